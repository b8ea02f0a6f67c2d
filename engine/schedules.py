"""Learning rates over the steps of a stage."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine", "wsd"]


def learning_rate_factor(
    schedule: Schedule, step: int, steps: int, *, warmup: float, min_lr_ratio: float, decay: float
) -> float:
    """Share of the peak learning rate in step `step` (0-based) of `steps`.

    Every schedule begins with a linear warm-up. "wsd" (warm-up, stable, decay: Hu et al. 2024, arXiv 2404.06395) keeps
    the peak and falls in its last steps by 1 − √x, the shape that Hägele et al. (2024, arXiv 2405.18392) found best.
    The last step still trains: it gets `min_lr_ratio` of the peak, not less.

    Args:
        schedule: what follows the warm-up.
        step, steps: where in the stage.
        warmup: share of the steps over which the learning rate rises.
        min_lr_ratio: what it falls to, over the peak; "constant" does not fall.
        decay: share of the steps over which "wsd" falls.
    """
    warmup_steps = math.ceil(warmup * steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    begin = warmup_steps
    if schedule == "wsd":
        begin = max(warmup_steps, steps - 1 - math.ceil(decay * steps))
    progress = max(0.0, (step - begin) / max(1, steps - 1 - begin))
    shape = {
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        "wsd": 1.0 - math.sqrt(progress),
    }[schedule]
    return min_lr_ratio + (1.0 - min_lr_ratio) * shape
