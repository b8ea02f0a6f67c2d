"""What each schedule costs at the proxy's size on this machine: CPU time of its steps, and memory."""

from __future__ import annotations

import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import torch
from reproduction.conclusions import compared
from reproduction.preparation import Prepared
from reproduction.schedules import SCHEDULES, small_stages

from redwhale.engine import LoopConfig, Stage, Trainer
from redwhale.engine.memory_plan import stage_memory
from redwhale.model import load_model

ROUNDS, STEPS = 2, 3


def small_cost(prepared: Prepared) -> dict[str, Any]:
    """Tokens a CPU second of one core, and the most bytes, of every schedule.

    All stages are timed in turn, `ROUNDS` times, and the fastest step of each counts: it is the least disturbed.
    """
    sizes = prepared.sizes
    checkpoint = prepared.initial(sizes.usual_added, "decomposition", 0)
    config = load_model(checkpoint, dtype=torch.bfloat16).config
    step_tokens = sizes.batch_size * sizes.sequence_length
    stages = {
        schedule: small_stages(
            schedule,
            sizes.tokens,
            lr_scale=1.0,
            rows_scale=1.0,
            layers=config.num_hidden_layers,
            step_tokens=step_tokens,
        )
        for schedule in SCHEDULES
    }
    loop = LoopConfig(
        batch_size=sizes.batch_size, micro_batch_size=sizes.batch_size, activations="none", checkpoint_every=10**6
    )
    first_new_row = config.vocab_size - prepared.pieces(sizes.usual_added)
    distinct = {(stage.train, stage.blocks): stage for parts in stages.values() for stage in parts}
    seconds: dict[Any, float] = {}
    for _ in range(ROUNDS):
        for kind, stage in distinct.items():
            took = _step_seconds(prepared, checkpoint, stage, loop, first_new_row)
            seconds[kind] = min(took, seconds.get(kind, took))
    found = {}
    for schedule, parts in stages.items():
        rows = []
        for stage in parts:
            memory = stage_memory(
                config,
                stage,
                loop,
                sequence_length=sizes.sequence_length,
                dtype=torch.bfloat16,
                device="cpu",
                first_new_row=first_new_row,
            )
            rows.append(
                {
                    "stage": stage.name,
                    "tokens": stage.tokens,
                    "bytes": memory.peak_bytes,
                    "tokens_per_cpu_second": step_tokens / seconds[stage.train, stage.blocks],
                }
            )
        tokens = sum(row["tokens"] for row in rows)
        found[schedule] = {
            "stages": rows,
            "bytes": max(row["bytes"] for row in rows),
            "tokens_per_cpu_second": tokens / sum(row["tokens"] / row["tokens_per_cpu_second"] for row in rows),
        }
    comparisons = [
        msgspec.to_builtins(
            compared(f"cost of the proxy, bytes: {name} against full", *_pair(name, found, "bytes"), "bytes")
        )
        for name in found
        if name != "full"
    ]
    return {"schedules": found, "comparisons": comparisons}


def _pair(name: str, found: dict[str, Any], key: str) -> tuple[tuple[str, list[float]], tuple[str, list[float]]]:
    return (name, [found[name][key]]), ("full", [found["full"][key]])


def _step_seconds(prepared: Prepared, checkpoint: Path, stage: Stage, loop: LoopConfig, first_new_row: int) -> float:
    """CPU seconds of the fastest of a few steps, the first left out."""
    sizes = prepared.sizes
    model = load_model(checkpoint, dtype=torch.bfloat16)
    brief = msgspec.structs.replace(stage, tokens=(STEPS + 1) * sizes.batch_size * sizes.sequence_length)
    times: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            model,
            brief,
            prepared.mixture(sizes.usual_added, "filtered", 0.1, 0),
            sequence_length=sizes.sequence_length,
            folder=Path(folder),
            loop=loop,
            first_new_row=first_new_row,
            on_step=lambda trainer, step: times.append(time.process_time()),
        ).run()
    return min(after - before for before, after in itertools.pairwise(times))
