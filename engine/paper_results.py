"""KoBEST's mean as published and as computed here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple


class PublishedMean(NamedTuple):
    """The mean over KoBEST's five tasks that a paper reports."""

    model: str
    mean: float
    """In percent."""
    source: str


PUBLISHED_KOBEST = (
    PublishedMean("SOLAR-10.7B, the base of both", 50.23, "arXiv 2408.11294"),
    PublishedMean("RedWhale, pretrained", 66.72, "arXiv 2408.11294"),
    PublishedMean("RedWhale, fine-tuned", 80.83, "arXiv 2408.11294"),
    PublishedMean("EEVE-Korean-10.8B", 79.42, "arXiv 2408.11294"),
)
"""Published means. Neither the metric nor the number of examples is known to us for certain, so that a difference of a
few points from a run's own accuracy says nothing."""


def kobest_means(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Unweighted mean over tasks of accuracy and macro F1, with the standard error of the former.

    Args:
        tasks: by name, each with `acc`, `acc_stderr` and `macro_f1`.
    """
    count = len(tasks)
    return {
        "acc": sum(task["acc"] for task in tasks.values()) / count,
        "acc_stderr": math.sqrt(sum(task["acc_stderr"] ** 2 for task in tasks.values())) / count,
        "macro_f1": sum(task["macro_f1"] for task in tasks.values()) / count,
    }
