"""Built-in plans of stages. A plan is data: copy its stages into a recipe to change them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from .errors import RecipeError
from .stages import Stage

# The learning rates are ours: neither paper gives them. Rows that begin as averages of others have furthest to go.
_ROWS, _LAYERS, _ADAPTERS = 2e-4, 2e-5, 1e-4

PLANS: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    # RedWhale (arXiv 2408.11294).
    "redwhale": (
        {"name": "embed+head", "train": ("embed", "head"), "lr": _ROWS},
        {"name": "odd-layers", "train": ("layers.odd",), "lr": _LAYERS},
        {"name": "even-layers", "train": ("layers.even",), "lr": _LAYERS},
        {"name": "lora", "train": ("lora",), "lr": _ADAPTERS},
    ),
    # EEVE (arXiv 2402.14714): new rows first, then all rows of the head, then the whole model, then its layers.
    "eeve": (
        {"name": "embed-new", "train": ("embed.new",), "lr": _ROWS},
        {"name": "head-new", "train": ("head.new",), "lr": _ROWS},
        {"name": "embed-new+head-new", "train": ("embed.new", "head.new"), "lr": _ROWS},
        {"name": "head", "train": ("head",), "lr": _ROWS},
        {"name": "embed-new+head", "train": ("embed.new", "head"), "lr": _ROWS},
        {"name": "all", "train": ("all",), "lr": _LAYERS},
        {"name": "layers", "train": ("layers",), "lr": _LAYERS},
    ),
    # All parameters at once, as the plain alternative.
    "full": ({"name": "all", "train": ("all",), "lr": _LAYERS, "embed_lr": _ROWS, "head_lr": _ROWS},),
    # RedWhale with the lower and the upper half of the layers in place of odd and even ones.
    "sequential": (
        {"name": "embed+head", "train": ("embed", "head"), "lr": _ROWS},
        {"name": "lower-layers", "train": ("layers.lower",), "lr": _LAYERS},
        {"name": "upper-layers", "train": ("layers.upper",), "lr": _LAYERS},
        {"name": "lora", "train": ("lora",), "lr": _ADAPTERS},
    ),
    # LISA (arXiv 2403.17919): embedding and head throughout, and two layers drawn anew every twenty steps.
    "lisa": (
        {
            **{"name": "lisa", "train": ("embed", "head", "layers"), "blocks": {"layers": 2, "steps": 20}},
            **{"lr": _LAYERS, "embed_lr": _ROWS, "head_lr": _ROWS},
        },
    ),
    # BAdam (arXiv 2404.02827): one layer for a hundred steps, then the next, again and again.
    "badam": (
        {"name": "embed+head", "train": ("embed", "head"), "lr": _ROWS, "share": 0.25},
        {
            **{"name": "badam", "train": ("layers",), "blocks": {"layers": 1, "steps": 100, "order": "cyclic"}},
            **{"lr": _LAYERS, "share": 0.75},
        },
    ),
}
"""Stages by plan: the keys of `Stage`, and "share" of the tokens, by default the same for every stage."""


def plan_stages(plan: str, tokens: int, *, lr_scale: float = 1.0) -> tuple[Stage, ...]:
    """The stages of a built-in plan.

    Args:
        plan: one of `PLANS`.
        tokens: budget of all stages together.
        lr_scale: multiplies every learning rate of the plan, which are meant for models of some billion parameters.

    Raises:
        RecipeError: for a plan that does not exist.
    """
    if plan not in PLANS:
        raise RecipeError(f"there is no plan {plan!r}; known: {', '.join(PLANS)}")
    stages = []
    for described in PLANS[plan]:
        share = described.get("share", 1 / len(PLANS[plan]))
        rates = {key: described[key] * lr_scale for key in ("lr", "embed_lr", "head_lr") if key in described}
        fields = {**described, **rates, "tokens": math.ceil(share * tokens)}
        fields.pop("share", None)
        stages.append(msgspec.convert(fields, Stage))
    return tuple(stages)
