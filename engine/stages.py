"""Stages as data: what trains, for how long, and at which learning rate."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
from torch import nn

from ..model import ADAPTABLE_LAYERS, LINEAR_LAYERS, Llama
from .errors import RecipeError

Positive = Annotated[int, msgspec.Meta(ge=1)]
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]
Schedule = Literal["constant", "linear", "cosine"]


class LoRAConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Adapters of a stage that trains "lora"; they are merged into the weights when the stage ends."""

    r: Positive = 128
    """Rank. 128 on all seven projections is 4.4-4.6% of SOLAR-10.7B, the share RedWhale reports."""
    alpha: Annotated[float, msgspec.Meta(gt=0)] = 128.0
    """The update is scaled by alpha / r."""
    rslora: bool = False
    """Scale by alpha / √r instead (arXiv 2312.03732)."""
    dropout: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    """Share of the adapters' inputs that a training step sets to zero."""
    targets: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)] | str = LINEAR_LAYERS
    """Last or whole names of the linear layers to adapt, or one regular expression of whole names, or "all-linear"."""

    def __post_init__(self) -> None:
        if isinstance(self.targets, str):
            try:
                re.compile(self.targets)
            except re.error as error:
                raise ValueError(f"targets {self.targets!r} is not a regular expression: {error}") from None
            return
        for target in self.targets:
            if target.rpartition(".")[2] not in ADAPTABLE_LAYERS:
                raise ValueError(f"cannot adapt {target!r}; known: {', '.join(ADAPTABLE_LAYERS)}")


class Stage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One stage of training: exactly the parameters that `train` names move, every other stays bit-identical."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9_+-]*$")]
    """Names the stage's folder."""
    train: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    """Any of "embed", "head", "norms", "layers.odd", "layers.even", "layers", "all", "lora"."""
    tokens: Positive
    """Token budget, rounded up to whole steps."""
    lr: Annotated[float, msgspec.Meta(gt=0)]
    """Peak learning rate."""
    schedule: Schedule = "cosine"
    warmup: Fraction = 0.05
    """Share of the steps over which the learning rate rises linearly."""
    min_lr_ratio: Fraction = 0.1
    """Learning rate at the end over its peak (linear and cosine)."""
    weight_decay: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """Decoupled weight decay of matrices; norm weights never decay."""
    beta1: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.95
    grad_clip: Annotated[float, msgspec.Meta(ge=0)] = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    lora: LoRAConfig = LoRAConfig()

    def __post_init__(self) -> None:
        check_selectors(self.train)

    def steps(self, batch_size: int, sequence_length: int) -> int:
        """Steps that the token budget takes with batches of `batch_size` sequences."""
        return math.ceil(self.tokens / (batch_size * sequence_length))

    @property
    def uses_lora(self) -> bool:
        return "lora" in self.train

    @property
    def trains_adapters_alone(self) -> bool:
        return set(self.train) == {"lora"}


def _layer_index(name: str) -> int | None:
    """Index of the decoder layer a parameter belongs to, from its whole path component (never a prefix)."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] else None


def _is_adapter(name: str) -> bool:
    return name.endswith((".lora_A", ".lora_B"))


SELECTORS = {
    "embed": lambda name: name == "model.embed_tokens.weight",
    "head": lambda name: name.startswith("lm_head."),
    "norms": lambda name: name.split(".")[-2].endswith("norm"),
    # Layers count from 0, as in checkpoints: layers.odd is layers 1, 3, 5, …
    "layers.odd": lambda name: (layer := _layer_index(name)) is not None and layer % 2 == 1,
    "layers.even": lambda name: (layer := _layer_index(name)) is not None and layer % 2 == 0,
    "layers": lambda name: _layer_index(name) is not None,
    "all": lambda name: True,
    "lora": _is_adapter,
}
"""What a stage may name, and which parameters that is. Adapters belong to "lora" alone."""


def check_selectors(train: Sequence[str]) -> None:
    """Raise ValueError for an unknown selector, or for adapters trained together with what they adapt."""
    for selector in train:
        if selector not in SELECTORS:
            raise ValueError(f"cannot train {selector!r}; known: {', '.join(SELECTORS)}")
    if "lora" in train and any(selector.split(".")[0] in ("layers", "all") for selector in train):
        raise ValueError("'lora' cannot be trained together with the layers it adapts; choose one")


def select_parameters(model: Llama, train: Sequence[str]) -> dict[str, nn.Parameter]:
    """The parameters that `train` names, by name, in model order.

    A tied head is the embedding: "head" then selects the shared matrix.

    Raises:
        RecipeError: for an unknown selector, or one that selects nothing in this model.
    """
    tied = model.config.tie_word_embeddings
    selected: dict[str, nn.Parameter] = {}
    parameters = dict(model.named_parameters())
    for selector in train:
        if selector not in SELECTORS:
            raise RecipeError(f"unknown selector {selector!r}; known: {', '.join(SELECTORS)}")
        matches = SELECTORS["embed" if tied and selector == "head" else selector]
        found = {n: p for n, p in parameters.items() if matches(n) and (_is_adapter(n) == (selector == "lora"))}
        if not found:
            raise RecipeError(f"{selector!r} selects no parameter of this model")
        selected.update(found)
    return {name: parameter for name, parameter in parameters.items() if name in selected}


def learning_rate(stage: Stage, step: int, steps: int) -> float:
    """Learning rate of step `step` (0-based) of `steps`: linear warm-up, then the stage's schedule.

    The last step still trains: it gets lr · min_lr_ratio (linear, cosine), not less.
    """
    warmup_steps = math.ceil(stage.warmup * steps)
    if step < warmup_steps:
        return stage.lr * (step + 1) / warmup_steps
    if stage.schedule == "constant":
        return stage.lr
    progress = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    shape = 1.0 - progress if stage.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return stage.lr * (stage.min_lr_ratio + (1.0 - stage.min_lr_ratio) * shape)
