"""The training schedules that are compared, at the size of the base at hand and at SOLAR's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from redwhale.engine import PLANS, BlockSchedule, LoRAConfig, Stage

_ADAPTERS = {"name": "lora", "train": ("lora",), "lr": 1e-4}
SCHEDULES: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "redwhale": PLANS["redwhale"],
    "full": PLANS["full"],
    "lora": (_ADAPTERS,),
    "lora+rows": ({**_ADAPTERS, "train": ("embed", "head", "lora"), "embed_lr": 2e-4, "head_lr": 2e-4},),
    "eeve": PLANS["eeve"],
    "sequential": PLANS["sequential"],
    "lisa": PLANS["lisa"],
    "badam": PLANS["badam"],
}
"""Built-in plans, and adapters alone or with all rows of embedding and head."""

ROWS = "rows"
"""The first stage of RedWhale's plan alone."""
_KNOWN = {**SCHEDULES, ROWS: SCHEDULES["redwhale"][:1]}

SMALL_RANK = 8
"""Of the proxy's adapters: 4.4% of its layers' weights, as rank 128 is of SOLAR's."""


def small_stages(
    schedule: str, tokens: int, *, lr_scale: float, rows_scale: float, layers: int, step_tokens: int
) -> list[Stage]:
    """A schedule for a model of few layers and for few steps.

    Adapters are smaller, of layers that train in turn there is one at a time, and turns are as long as it takes for
    every layer to have two.

    Args:
        schedule: one of `SCHEDULES`, or `ROWS`.
        tokens: of all stages together.
        lr_scale: multiplies the plan's rates of layers and adapters, which are meant for some billion parameters.
        rows_scale: multiplies those of embedding and head.
        layers: of the model.
        step_tokens: of a step.
    """
    stages = []
    for described in _KNOWN[schedule]:
        fields = {**described, "tokens": math.ceil(_share(schedule, described) * tokens)}
        rows_alone = all(selector.startswith(("embed", "head")) for selector in described["train"])
        factors = {"lr": rows_scale if rows_alone else lr_scale, "embed_lr": rows_scale, "head_lr": rows_scale}
        fields |= {key: described[key] * factor for key, factor in factors.items() if key in described}
        fields.pop("share", None)
        stage = msgspec.convert(fields, Stage)
        if stage.uses_lora:
            stage = msgspec.structs.replace(stage, lora=LoRAConfig(r=SMALL_RANK, alpha=float(SMALL_RANK)))
        if stage.blocks is not None:
            turn = max(1, math.ceil(stage.tokens / step_tokens) // (2 * layers))
            stage = msgspec.structs.replace(stage, blocks=BlockSchedule(layers=1, steps=turn, order=stage.blocks.order))
        stages.append(stage)
    return stages


def large_stages(schedule: str) -> list[tuple[Stage, float]]:
    """The stages of a schedule for a large model, each with its share of the tokens.

    A stage that takes the layers in turn, from the bottom up, becomes two, with the lowest and with the highest layer:
    what it costs falls evenly from one to the other.
    """
    stages = []
    for described in _KNOWN[schedule]:
        share = _share(schedule, described)
        fields = {key: value for key, value in described.items() if key != "share"}
        stage = msgspec.convert({**fields, "tokens": 1_000_000}, Stage)
        if stage.blocks is not None and stage.blocks.order == "cyclic":
            for place, selector in (("bottom", "layers[0]"), ("top", "layers[-1]")):
                name = f"{stage.name}-{place}"
                stages.append((msgspec.structs.replace(stage, name=name, train=(selector,), blocks=None), share / 2))
        else:
            stages.append((stage, share))
    return stages


def _share(schedule: str, described: Mapping[str, Any]) -> float:
    return described.get("share", 1 / len(_KNOWN[schedule]))
