"""The text fields of the four KoBEST tasks whose token ratio RedWhale reports (arXiv 2408.11294), one by one."""

from __future__ import annotations

from pathlib import Path

from .kobest import read_documents

_FIELDS = {
    "boolq": ("paragraph", "question"),
    "copa": ("premise", "alternative_1", "alternative_2"),
    "hellaswag": ("context", "ending_1", "ending_2", "ending_3", "ending_4"),
    "sentineg": ("sentence",),
}


def kobest_texts(folder: Path, split: str = "test") -> dict[str, list[str]]:
    """Return every text field of the tasks' files, as they are, without the prompts around them.

    Raises EvaluationDataError if a file is missing or lacks a field.
    """
    return {
        f"kobest/{task}": [document[field] for document in read_documents(folder, task, split) for field in fields]
        for task, fields in _FIELDS.items()
    }
