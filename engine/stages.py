"""Stages as data: what trains, for how long, at which learning rate, and how."""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal

import msgspec
import numpy as np

from ..model import ADAPTABLE_LAYERS, LINEAR_LAYERS
from ..model.activations import Activations
from .optimizer_config import AboveZero, BelowOne, OptimizerConfig
from .schedules import Schedule, learning_rate_factor
from .selectors import check_selectors, layer_index

Positive = Annotated[int, msgspec.Meta(ge=1)]
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]
Precision = Literal["auto", "bf16", "fp32"]
Auto = Literal["auto"]
Frozen = Literal["stored", "fp8"]


class LoRAConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Adapters of a stage that trains "lora"; they are merged into the weights when the stage ends."""

    r: Positive = 128
    """Rank. 128 on all seven projections is 4.4-4.6% of SOLAR-10.7B, the share RedWhale reports."""
    alpha: AboveZero = 128.0
    """The update is scaled by alpha / r."""
    rslora: bool = False
    """Scale by alpha / √r instead (arXiv 2312.03732)."""
    dropout: BelowOne = 0.0
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


class BlockSchedule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of the layers that a stage names, a few train at a time; what else it names trains throughout.

    "random" is LISA (Pan et al. 2024, arXiv 2403.17919), "cyclic" BAdam (Luo et al. 2024, arXiv 2404.02827). A layer
    that freezes loses its optimizer state; one that thaws begins with none.
    """

    layers: Positive
    """Layers that train at the same time."""
    steps: Positive
    """Steps until others take their place."""
    order: Literal["random", "cyclic"] = "random"
    """"random" draws the layers anew each time, "cyclic" takes them in turn, from the bottom up, again and again."""

    def active(self, layers: list[int], step: int, seed: int) -> list[int]:
        """The layers that train in step `step`, of those that the stage names; a pure function of its arguments."""
        size, period = min(self.layers, len(layers)), step // self.steps
        if self.order == "random":
            drawn = np.random.default_rng((seed, period)).permutation(len(layers))[:size]
            return sorted(layers[i] for i in drawn)
        blocks = [layers[begin : begin + size] for begin in range(0, len(layers), size)]
        return blocks[period % len(blocks)]


class Stage(OptimizerConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One stage of training: exactly the parameters that `train` names move, every other stays bit-identical."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9_+-]*$")]
    """Names the stage's folder."""
    train: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    """Selectors, see `redwhale.engine.selectors.KNOWN`."""
    tokens: Positive
    """Token budget, rounded up to whole steps."""
    lr: AboveZero
    """Peak learning rate."""
    schedule: Schedule = "cosine"
    warmup: Fraction = 0.05
    """Share of the steps over which the learning rate rises linearly."""
    min_lr_ratio: Fraction = 0.1
    """Learning rate at the end over its peak (all but "constant")."""
    decay: Fraction = 0.2
    """Share of the steps over which "wsd" falls, at the end."""
    lora: LoRAConfig = LoRAConfig()
    blocks: BlockSchedule | None = None
    """Train a few of the named layers at a time."""
    inherit: bool = False
    """Go on with the optimizer state of the parameters that the stage before trained too; else all begins anew."""
    batch_size: Positive | None = None
    """Sequences in a global batch; None, here and in the next four, for what the loop says."""
    micro_batch_size: Positive | Auto | None = None
    activations: Activations | Auto | None = None
    frozen: Frozen | None = None
    precision: Precision | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_selectors(self.train)
        if self.blocks is not None and not any(selector.startswith("layers") for selector in self.train):
            raise ValueError(f"blocks need layers to choose from, but {' + '.join(self.train)} names none as such")

    def steps(self, batch_size: int, sequence_length: int) -> int:
        """Steps that the token budget takes with batches of `batch_size` sequences."""
        return math.ceil(self.tokens / (batch_size * sequence_length))

    def lr_factor(self, step: int, steps: int) -> float:
        """Share of every peak learning rate in step `step` (0-based) of `steps`."""
        shape = {"warmup": self.warmup, "min_lr_ratio": self.min_lr_ratio, "decay": self.decay}
        return learning_rate_factor(self.schedule, step, steps, **shape)

    def active(self, names: list[str], step: int, seed: int) -> list[str]:
        """Those of the trained parameters `names` that train in step `step`."""
        if self.blocks is None:
            return names
        layers = sorted({layer for name in names if (layer := layer_index(name)) is not None})
        active = set(self.blocks.active(layers, step, seed))
        return [name for name in names if (layer := layer_index(name)) is None or layer in active]

    @property
    def uses_lora(self) -> bool:
        return "lora" in self.train

    @property
    def trains_adapters_alone(self) -> bool:
        return set(self.train) == {"lora"}
