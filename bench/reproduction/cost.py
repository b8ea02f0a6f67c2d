"""What each schedule costs at SOLAR's size on one GPU: FLOPs, memory and speed, from the engine's plans."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec
from reproduction.conclusions import compared
from reproduction.schedules import SCHEDULES, large_stages

from redwhale.engine import LoopConfig, Stage
from redwhale.engine.gpus import find_gpu
from redwhale.engine.run_folder import write_json
from redwhale.engine.run_plan import StagePlan, plan_stage
from redwhale.model import preset

BASE, PIECES, SEQUENCE, GPU = "solar-10.7b", 52_000, 4096, "h100-80gb"
SETTINGS: dict[str, dict[str, Any]] = {
    "AdamW": {"optimizer": "adamw"},
    "8-bit": {"optimizer": "adamw_8bit"},
    "no gradients": {
        **{"optimizer": "adamw_8bit", "masters": "stochastic"},
        **{"in_backward": True, "grad_clip": 0.0, "batch_size": 1},
    },
}
"""Optimizers from what changes nothing to what takes least memory: 8-bit moments, then stochastic rounding in place of
masters and gradients that are never kept, so that nothing can be accumulated or clipped."""


def cost(work: Path) -> dict[str, Any]:
    """Every stage of every schedule, and each schedule as a whole, with what they say, which has no noise.

    Args:
        work: folder that the plans are kept in, stage by stage.
    """
    schedules = {schedule: _cost_of(schedule, work) for schedule in SCHEDULES}
    full = schedules["full"]
    comparisons = [
        compared(f"cost, {key}: {name} against full", (name, [one[key]]), ("full", [full[key]]), key)
        for name, one in schedules.items()
        for key in ("adamw_bytes", "flops_per_token", "tokens_per_second")
        if name != "full" and key in one and key in full
    ]
    described = {"base": BASE, "pieces": PIECES, "sequence_length": SEQUENCE, "gpu": GPU}
    return {**described, "schedules": schedules, "comparisons": [msgspec.to_builtins(one) for one in comparisons]}


def _cost_of(schedule: str, work: Path) -> dict[str, Any]:
    rows = []
    for stage, share in large_stages(schedule):
        unnamed = msgspec.structs.replace(stage, name="stage")  # schedules share stages
        digest = hashlib.sha256(msgspec.json.encode((unnamed, SETTINGS))).hexdigest()[:12]
        path = work / "plans" / f"{digest}.json"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            write_json(path, _planned(unnamed))
        rows.append({"stage": stage.name, "share": share, **json.loads(path.read_text(encoding="utf-8"))})
    whole = {
        "adamw_bytes": max(row["adamw_bytes"] for row in rows),
        "flops_per_token": sum(row["share"] * row["flops_per_token"] for row in rows),
    }
    if all("tokens_per_second" in row for row in rows):
        whole["bytes"] = max(row["bytes"] for row in rows)
        whole["tokens_per_second"] = 1 / sum(row["share"] / row["tokens_per_second"] for row in rows)
    return {"stages": rows, **whole}


def _planned(stage: Stage) -> dict[str, Any]:
    """A stage with plain AdamW, and with the first of `SETTINGS` that fits the GPU."""
    row: dict[str, Any] = {}
    for name, setting in SETTINGS.items():
        plan = _plan(msgspec.structs.replace(stage, **setting))
        row.setdefault("adamw_bytes", plan.bytes)
        row.setdefault("flops_per_token", plan.model_flops_per_token)
        if plan.fits:
            return {**row, "setting": name, "bytes": plan.bytes, "tokens_per_second": plan.tokens_per_second}
    return row


def _plan(stage: Stage) -> StagePlan:
    """One sequence at a time, everything recomputed."""
    loop = LoopConfig(batch_size=64, micro_batch_size=1, activations="full")
    first = preset(BASE).vocab_size
    config = preset(BASE, vocab_size=PIECES)
    return plan_stage(config, stage, loop, find_gpu(GPU), sequence_length=SEQUENCE, first_new_row=first)


def equal_flops(work: Path) -> dict[str, float]:
    """Tokens that a schedule sees for one of full fine-tuning, at the same FLOPs."""
    schedules = cost(work)["schedules"]
    return {name: schedules["full"]["flops_per_token"] / one["flops_per_token"] for name, one in schedules.items()}
