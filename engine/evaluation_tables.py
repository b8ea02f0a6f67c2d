"""What the evaluation step measured, as tables: for its own Markdown, the model card and the report alike."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from .kobest import KOBEST_TASKS
from .paper_results import PUBLISHED_KOBEST, kobest_means


class Table(NamedTuple):
    """A table of finished cells."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1
    """Columns from the left that hold words; the others hold numbers."""
    note: str = ""
    """A sentence below it."""


def evaluation_tables(summary: Mapping[str, Any]) -> list[Table]:
    """Tables of all that a summary of the step `eval` holds; what it lacks, such as one of an older run, is left out.

    Args:
        summary: with `checkpoints` (by name: `text`, and perhaps `kobest`, `qa`, `lm_eval`), and perhaps
            `comparisons` and `change_from_base`.
    """
    checkpoints = summary.get("checkpoints", {})
    tables = [
        _text(checkpoints, summary.get("change_from_base", {})),
        *_kobest(checkpoints),
        _comparisons(summary.get("comparisons", [])),
        _questions(checkpoints),
        _lm_eval(checkpoints),
    ]
    return [table for table in tables if table.rows]


def markdown(tables: Sequence[Table], *, level: int = 2) -> str:
    """Tables as Markdown under headings of a level."""
    parts = []
    for table in tables:
        parts.append(f"{'#' * level} {table.title}\n\n{markdown_table(table.header, table.rows)}")
        parts += [table.note] if table.note else []
    return "\n\n".join(parts) + "\n"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def task_shots(task: str) -> str:
    """ "5-shot" of "boolq 5-shot", "0-shot" of "boolq"."""
    return task.partition(" ")[2] or "0-shot"


def means_by_shots(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """`kobest_means` over the tasks of one number of examples, by that number."""
    shots = dict.fromkeys(map(task_shots, tasks))
    return {shot: kobest_means({t: found for t, found in tasks.items() if task_shots(t) == shot}) for shot in shots}


def _text(checkpoints: Mapping[str, Any], changes: Mapping[str, Any]) -> Table:
    rows = []
    for name, measured in checkpoints.items():
        for domain, found in measured.get("text", {}).items():
            change = changes.get(name, {}).get(domain)
            cells = [_number(found["bits_per_byte"], 3), "" if change is None else f"{change:+.3f}"]
            rows.append([name, domain, *cells, _number(found["accuracy"], 3), f"{found['tokens']:,}"])
    header = ["checkpoint", "text", "bits per byte", "change from the base", "next-token accuracy", "tokens"]
    note = "Bits per byte above the base's are what was forgotten." if any(changes.values()) else ""
    return Table("Held-out text", header, rows, text_columns=2, note=note)


def _kobest(checkpoints: Mapping[str, Any]) -> Iterator[Table]:
    """A table for every number of examples: accuracy by task in percent, its mean, and the published means."""
    measured = {name: found["kobest"] for name, found in checkpoints.items() if found.get("kobest")}
    first = next(iter(measured.values()), {})
    for shots in dict.fromkeys(map(task_shots, first)):
        columns = [task for task in first if task_shots(task) == shots]
        names = [task.partition(" ")[0] for task in columns]
        normalised = [task for task in columns if first[task].get("acc_norm") is not None]
        rows = []
        for name, found in measured.items():
            mean = means_by_shots(found)[shots]
            cells = [_percent(found[task]["acc"], found[task]["acc_stderr"]) for task in columns]
            cells += [_percent(mean["acc"], mean["acc_stderr"]), _percent(mean["macro_f1"])]
            cells += [_percent(found[task]["acc_norm"], found[task]["acc_norm_stderr"]) for task in normalised]
            rows.append([name, *cells])
        items = ", ".join(f"{first[task]['n']:,}" for task in columns)
        note = f"Accuracy in percent and its standard error; {items} items."
        if set(names) == set(KOBEST_TASKS):  # the mean of fewer tasks is another number
            for row in PUBLISHED_KOBEST:
                before, behind = [""] * len(columns), [""] * (1 + len(normalised))
                rows.append([f"{row.model} ({row.source})", *before, f"{row.mean:.2f}", *behind])
            note += " The published means may be of another metric or number of examples."
        header = ["checkpoint", *names, "mean", "mean macro F1"]
        header += [f"{task.partition(' ')[0]} acc_norm" for task in normalised]
        yield Table(f"KoBEST, {shots}", header, rows, note=note)


def _comparisons(comparisons: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        [
            f"{found['first']} → {found['second']}",
            found["task"],
            f"{100 * found['difference']:+.2f}",
            f"{100 * found['low']:+.2f} to {100 * found['high']:+.2f}",
            f"{found['p_value']:.3g}",
            f"{found['only_first']:,}",
            f"{found['only_second']:,}",
        ]
        for found in comparisons
    ]
    header = ["checkpoints", "task", "difference", "95 % interval", "p", "only the first right", "only the second"]
    note = "Points of accuracy on the same items; interval of the paired bootstrap, p of McNemar's exact test."
    return Table("Comparisons item by item", header, rows, text_columns=2, note=note)


def _questions(checkpoints: Mapping[str, Any]) -> Table:
    rows = []
    for name, measured in checkpoints.items():
        for title, found in measured.get("qa", {}).items():
            # With choices accuracy, else the mean grade.
            key = "acc" if "acc" in found else "score"
            stderr = found["acc_stderr" if key == "acc" else "stderr"]
            kind = "accuracy" if key == "acc" else found.get("grading", "score")
            rows.append([name, title, kind, _percent(found[key], stderr), f"{found['n']:,}"])
    return Table("Own questions", ["checkpoint", "questions", "measured", "percent", "n"], rows, text_columns=3)


def _lm_eval(checkpoints: Mapping[str, Any]) -> Table:
    rows = []
    for name, measured in checkpoints.items():
        for task, metrics in measured.get("lm_eval", {}).items():
            for metric, value in metrics.items():
                if not metric.endswith("_stderr"):
                    rows.append([name, task, metric, f"{value:.4g}", _number(metrics.get(f"{metric}_stderr"), 4)])
    header = ["checkpoint", "task", "metric", "value", "standard error"]
    return Table("Tasks of lm_eval", header, rows, text_columns=3)


def _percent(share: float | None, stderr: float | None = None) -> str:
    if share is None:
        return ""
    # A single item has no standard error.
    return f"{100 * share:.2f}" + ("" if stderr is None or math.isnan(stderr) else f" ± {100 * stderr:.2f}")


def _number(value: float | None, digits: int) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.{digits}f}"
