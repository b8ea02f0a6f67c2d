"""The text fields of the four KoBEST tasks whose token ratio RedWhale reports (arXiv 2408.11294), one by one."""

from __future__ import annotations

from pathlib import Path

from .kobest import _find_file, _read_rows, _unquote

_FIELDS = {
    "boolq": ("Text", "Question"),
    "copa": ("sentence", "1", "2"),
    "hellaswag": ("context", "choice1", "choice2", "choice3", "choice4"),
    "sentineg": ("Text",),
}


def kobest_texts(folder: Path, split: str = "test") -> dict[str, list[str]]:
    """Return every text field of the tasks' files, as they are, without the prompts around them.

    Raises EvaluationDataError if a file is missing or lacks a field.
    """
    texts: dict[str, list[str]] = {}
    for task, fields in _FIELDS.items():
        rows = _read_rows(_find_file(Path(folder), task, split), fields)
        clean = _unquote if task == "hellaswag" else str
        texts[f"kobest/{task}"] = [clean(row.text(field)) for row in rows for field in fields]
    return texts
