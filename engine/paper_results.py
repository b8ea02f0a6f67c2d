"""KoBEST as published, and a run's own numbers beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
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


def results_table(checkpoints: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: a row a checkpoint with accuracy in percent by task, then the published means.

    Args:
        checkpoints: the evaluation step's results by checkpoint, with `kobest` and `kobest_mean`.
    """
    shots = list(next(iter(checkpoints.values()))["kobest_mean"])
    tasks = list(next(iter(checkpoints.values()))["kobest"])
    parts = []
    for shot in shots:
        columns = [task for task in tasks if task_shots(task) == shot]
        rows = []
        for name, measured in checkpoints.items():
            mean = measured["kobest_mean"][shot]
            cells = [_percent(measured["kobest"][task]) for task in columns]
            rows.append([name, *cells, _percent(mean), f"{100 * mean['macro_f1']:.2f}"])
        names = [task.partition(" ")[0] for task in columns]
        parts.append(f"## KoBEST, {shot}\n\n" + _table(["checkpoint", *names, "mean", "mean macro F1"], rows))
    published = [[row.model, f"{row.mean:.2f}", row.source] for row in PUBLISHED_KOBEST]
    parts.append("## Published means\n\n" + _table(["model", "mean", "source"], published))
    return "\n\n".join(parts) + "\n"


def task_shots(task: str) -> str:
    """ "5-shot" of "boolq 5-shot", "0-shot" of "boolq"."""
    return task.partition(" ")[2] or "0-shot"


def _percent(result: Mapping[str, Any]) -> str:
    return f"{100 * result['acc']:.2f} ± {100 * result['acc_stderr']:.2f}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])
