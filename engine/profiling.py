"""A trace of some training steps, by torch.profiler, at no cost where it is not asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch.profiler import ProfilerActivity, profile, schedule

_WAIT, _WARMUP = 2, 2


class StepProfiler(Protocol):
    """What `profiled` gives."""

    def step(self) -> None:
        """Call it at the end of every training step."""


class _Off:
    def step(self) -> None:
        pass


@contextlib.contextmanager
def profiled(folder: Path, steps: int) -> Iterator[StepProfiler]:
    """Trace `steps` training steps, after 2 that may compile and 2 in which the profiler warms up.

    Writes `folder/profile/trace.json.gz`, for https://ui.perfetto.dev or chrome://tracing, and `operations.txt`, the
    time and memory of every operation, the longest first. Training that ends earlier leaves the steps it did.

    Args:
        folder: of the stage.
        steps: to trace; 0 turns the profiler off.
    """
    if steps == 0:
        yield _Off()
        return

    def write(profiler: profile) -> None:
        target = folder / "profile"
        target.mkdir(parents=True, exist_ok=True)
        # Suffixes as they are: the profiler compresses what ends in .gz.
        profiler.export_chrome_trace(str(target / "writing.json.gz"))
        (target / "writing.json.gz").replace(target / "trace.json.gz")
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=100, max_name_column_width=80)
        (target / "writing.txt").write_text(table + "\n", encoding="utf-8")
        (target / "writing.txt").replace(target / "operations.txt")

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    phases = schedule(wait=_WAIT, warmup=_WARMUP, active=steps, repeat=1)
    with profile(activities=activities, schedule=phases, on_trace_ready=write, profile_memory=True) as profiler:
        yield profiler
