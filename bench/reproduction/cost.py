"""What each schedule costs at SOLAR's size on one GPU: FLOPs, memory and speed, from the engine's plans."""

from __future__ import annotations

import functools
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
from redwhale.model.activations import Activations

BASE, PIECES, SEQUENCE, GPU = "solar-10.7b", 52_000, 4096, "h100-80gb"
MICRO_BATCH = 2
_LADDER: tuple[dict[str, Any], ...] = (
    {"optimizer": "adamw"},
    {"optimizer": "adamw_8bit"},
    {"optimizer": "adamw_8bit", "masters": "stochastic"},
    {
        "optimizer": "adamw_8bit", "masters": "stochastic", "in_backward": True, "grad_clip": 0.0,
        "batch_size": MICRO_BATCH,
    },
)  # fmt: skip
"""Settings of a stage, from what changes nothing to what takes least memory: in the last one gradients are never kept,
so that nothing can be accumulated or clipped."""


@functools.cache
def fitting_plan(stage: Stage) -> tuple[dict[str, Any], StagePlan] | None:
    """The first setting of the ladder with which a stage fits the GPU, recomputing as little as fits."""
    for setting in _LADDER:
        changed = msgspec.structs.replace(stage, **setting)
        plan = _plan(changed, MICRO_BATCH, "full")
        if plan.fits:
            faster = _plan(changed, MICRO_BATCH, "recompute-cheap")
            return setting, faster if faster.fits else plan
    return None


@functools.cache
def least_memory(stage: Stage) -> int:
    """Bytes with plain AdamW, one sequence at a time and everything recomputed."""
    return _plan(stage, 1, "full").bytes


def _plan(stage: Stage, micro_batch_size: int, activations: Activations) -> StagePlan:
    loop = LoopConfig(batch_size=64, micro_batch_size=micro_batch_size, activations=activations)
    first = preset(BASE).vocab_size
    config = preset(BASE, vocab_size=PIECES)
    return plan_stage(config, stage, loop, find_gpu(GPU), sequence_length=SEQUENCE, first_new_row=first)


def cost(work: Path) -> dict[str, Any]:
    """Every stage of every schedule, and each schedule as a whole, with what they say, which has no noise.

    Args:
        work: folder that the plans are kept in.
    """
    path = work / "plans.json"
    if not path.exists():
        write_json(path, {schedule: _cost_of(schedule) for schedule in SCHEDULES})
    schedules = json.loads(path.read_text(encoding="utf-8"))
    comparisons = []
    for name, one in schedules.items():
        for key in ("adamw_bytes", "flops_per_token", "tokens_per_second"):
            if name != "full" and key in one and key in schedules["full"]:
                pair = (name, [one[key]]), ("full", [schedules["full"][key]])
                comparisons.append(msgspec.to_builtins(compared(f"cost, {key}: {name} against full", *pair, key)))
    described = {"base": BASE, "pieces": PIECES, "sequence_length": SEQUENCE, "gpu": GPU, "micro_batch": MICRO_BATCH}
    return {**described, "schedules": schedules, "comparisons": comparisons}


def _cost_of(schedule: str) -> dict[str, Any]:
    rows = []
    for stage, share in large_stages(schedule):
        unnamed = msgspec.structs.replace(stage, name="stage")
        row: dict[str, Any] = {"stage": stage.name, "share": share, "adamw_bytes": least_memory(unnamed)}
        if (fitting := fitting_plan(unnamed)) is not None:
            setting, plan = fitting
            row |= {
                "setting": setting,
                "activations": plan.activations,
                "bytes": plan.bytes,
                "flops_per_token": plan.model_flops_per_token,
                "tokens_per_second": plan.tokens_per_second,
            }
        rows.append(row)
        print(f"{schedule}/{stage.name}: {row}", flush=True)
    whole: dict[str, Any] = {"adamw_bytes": max(row["adamw_bytes"] for row in rows)}
    if all("bytes" in row for row in rows):
        whole |= {
            "bytes": max(row["bytes"] for row in rows),
            "flops_per_token": sum(row["share"] * row["flops_per_token"] for row in rows),
            "tokens_per_second": 1 / sum(row["share"] / row["tokens_per_second"] for row in rows),
        }
    return {"stages": rows, **whole}


def equal_flops(work: Path) -> dict[str, float | None]:
    """Tokens that a schedule sees for one of full fine-tuning, at the same FLOPs."""
    return _relative(work, "flops_per_token", -1)


def equal_hours(work: Path) -> dict[str, float | None]:
    """The same at the same hours on the same GPU, every schedule with the settings that let it fit; None if none do."""
    return _relative(work, "tokens_per_second", 1)


def _relative(work: Path, key: str, power: int) -> dict[str, float | None]:
    schedules = cost(work)["schedules"]
    full = schedules["full"].get(key)
    return {
        name: (one[key] / full) ** power if full is not None and key in one else None for name, one in schedules.items()
    }
