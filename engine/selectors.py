"""Which parameters of a model a stage's selectors mean."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from .errors import RecipeError

KNOWN = (
    *("embed", "embed.new", "head", "head.new", "norms", "all", "lora"),
    *("layers", "layers.odd", "layers.even", "layers.lower", "layers.upper", "layers[8:16]"),
)
"""Every selector; the last stands for all Python indices and slices."""

_INDEXED = re.compile(r"layers\[(?:(?P<index>-?\d+)|(?P<start>-?\d+)?:(?P<stop>-?\d+)?)\]")
_NAMED_LAYERS: dict[str, Callable[[int], slice]] = {
    "layers": lambda count: slice(None),
    # Layers count from 0, as in checkpoints: layers.odd is layers 1, 3, 5, …
    "layers.odd": lambda count: slice(1, None, 2),
    "layers.even": lambda count: slice(0, None, 2),
    "layers.lower": lambda count: slice(None, count // 2),
    "layers.upper": lambda count: slice(count // 2, None),
}
_NAMED: dict[str, Callable[[str], bool]] = {
    "embed": lambda name: name == "model.embed_tokens.weight",
    "head": lambda name: name.startswith("lm_head."),
    "norms": lambda name: name.split(".")[-2].endswith("norm") if "." in name else False,
    "all": lambda name: True,
    "lora": lambda name: name.endswith((".lora_A", ".lora_B")),
}


def check_selectors(train: Sequence[str]) -> None:
    """Raise ValueError for a selector that does not exist, or for two that cannot train together."""
    for selector in train:
        if selector not in KNOWN and not _INDEXED.fullmatch(selector):
            raise ValueError(f"cannot train {selector!r}; known: {', '.join(KNOWN)}")
    for matrix in ("embed", "head"):
        if f"{matrix}.new" in train and {matrix, "all"} & set(train):
            raise ValueError(f"'{matrix}.new' is part of what else this stage trains; choose one")
    if "lora" in train and any(re.match(r"layers\b|all", selector) for selector in train):
        raise ValueError("'lora' cannot be trained together with the layers it adapts; choose one")


def layer_index(name: str) -> int | None:
    """Index of the decoder layer a parameter belongs to, from its whole path component (never a prefix)."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] else None


def selected_layers(selector: str, count: int) -> list[int]:
    """Layers that a selector means, of `count`, ascending; none for a selector of other parameters."""
    layers = list(range(count))
    if selector in _NAMED_LAYERS:
        return layers[_NAMED_LAYERS[selector](count)]
    indexed = _INDEXED.fullmatch(selector)
    if indexed is None:
        return []
    if indexed["index"] is not None:
        index = int(indexed["index"])
        return [layers[index]] if -count <= index < count else []
    start, stop = (None if indexed[name] is None else int(indexed[name]) for name in ("start", "stop"))
    return layers[start:stop]


def select_parameters(
    model: nn.Module, train: Sequence[str], *, first_new_row: int | None = None
) -> dict[str, nn.Parameter]:
    """The parameters that `train` names, by name, in model order; the rest of the model is left as it is.

    A tied head is the embedding: "head" and "head.new" then mean the shared matrix. Adapters belong to "lora" alone.
    For "embed.new" and "head.new" the model is told to train those rows (`Llama.train_rows`), which ends what was told
    it before.

    Args:
        model: a Llama; of any other module, "all", "norms", "lora", and what happens to be named as in a Llama.
        train: selectors.
        first_new_row: where the rows of "embed.new" and "head.new" begin: the size of the base's vocabulary.

    Raises:
        RecipeError: for a selector that does not exist or that selects nothing in this model.
    """
    try:
        check_selectors(train)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    parameters = dict(model.named_parameters())
    count = 1 + max((layer for name in parameters if (layer := layer_index(name)) is not None), default=-1)
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    selected: set[str] = set()
    for selector in train:
        if selector.endswith(".new"):
            continue
        layers = set(selected_layers(selector, count))
        matches = _NAMED.get("embed" if tied and selector == "head" else selector)
        found = {
            name
            for name in parameters
            if (matches(name) if matches is not None else layer_index(name) in layers)
            and _NAMED["lora"](name) == (selector == "lora")
        }
        if not found:
            of_layers = f" of {count} layers" if count else ""
            raise RecipeError(f"{selector!r} selects no parameter of this model{of_layers}")
        selected |= found
    rows = _new_rows(model, train, first_new_row)
    if tied and rows and selected & {"model.embed_tokens.weight"}:
        raise RecipeError("embedding and LM head are one matrix in this model: train it whole, or its new rows")
    return {**rows, **{name: parameter for name, parameter in parameters.items() if name in selected}}


def _new_rows(model: nn.Module, train: Sequence[str], first_new_row: int | None) -> Mapping[str, nn.Parameter]:
    train_rows = getattr(model, "train_rows", None)
    wanted = {matrix: f"{matrix}.new" in train for matrix in ("embed", "head")}
    if train_rows is None or (any(wanted.values()) and first_new_row is None):
        if any(wanted.values()):
            raise RecipeError(
                "'embed.new' and 'head.new' need a Llama, and first_new_row, where its new rows begin: in a recipe, a "
                "[tokenizer] section"
            )
        return {}
    return train_rows(*(first_new_row if wanted[matrix] else None for matrix in ("embed", "head")))


def freeze_all_but(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> None:
    """Let exactly these parameters of the model require gradients."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
