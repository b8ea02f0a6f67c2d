"""Answers as a sheet for people to grade, and the grades counted: the shape of RedWhale's Financial QA."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from .evaluation_tables import Table
from .multiple_choice import EvaluationDataError
from .qa import GradedAnswer

GRADES = ("correct", "partially correct", "incorrect")
"""What a person may write into the `grade` column."""
_COLUMNS = ("checkpoint", "id", "question", "reference", "answer", "score", "grade")


def write_grading_file(path: Path, answers: Mapping[str, Sequence[GradedAnswer]]) -> None:
    """Write answers as CSV for people to grade: a row for every question and checkpoint, the last column empty.

    Rows of one question stand together. UTF-8 with a byte order mark, as spreadsheets expect it.

    Args:
        path: file to write.
        answers: by checkpoint.
    """
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for together in zip(*answers.values(), strict=True):
            for checkpoint, graded in zip(answers, together, strict=True):
                question = graded.question
                reference = " | ".join(question.answers)
                answer = [checkpoint, question.id, question.text, reference, graded.answer, f"{graded.score:.3f}", ""]
                writer.writerow(answer)


def read_grades(path: Path) -> dict[str, dict[str, int]]:
    """Count the grades that people gave, by checkpoint: one of `GRADES`, or "ungraded".

    The file is UTF-8, or CP949, in which a Korean Excel stores CSV.

    Raises EvaluationDataError if it is neither, lacks a column, or a row has another grade.
    """
    counts: dict[str, dict[str, int]] = {}
    reader = csv.DictReader(io.StringIO(_decoded(path), newline=""))
    if missing := {"checkpoint", "grade"} - set(reader.fieldnames or ()):
        raise EvaluationDataError(f"{path} lacks the column {', '.join(sorted(missing))}")
    for row in reader:
        given = (row["grade"] or "").strip().lower()
        if given and given not in GRADES:
            raise EvaluationDataError(
                f"{path} line {reader.line_num} has the grade {given!r}; it must be one of {', '.join(GRADES)}"
            )
        of_checkpoint = counts.setdefault(row["checkpoint"], dict.fromkeys((*GRADES, "ungraded"), 0))
        of_checkpoint[given or "ungraded"] += 1
    return counts


def _decoded(path: Path) -> str:
    data = path.read_bytes()
    for encoding in ("utf-8-sig", "cp949"):
        with contextlib.suppress(UnicodeDecodeError):
            return data.decode(encoding)
    raise EvaluationDataError(f"{path} is neither UTF-8 nor CP949 text; save it as CSV")


def grades_table(counts: Mapping[str, Mapping[str, int]]) -> Table:
    """What `read_grades` counted, each grade with its share of the graded answers."""
    rows = []
    for checkpoint, given in counts.items():
        graded = sum(given[grade] for grade in GRADES)
        cells = [f"{given[grade]} ({given[grade] / graded:.1%})" if graded else "" for grade in GRADES]
        rows.append([checkpoint, *cells, str(given["ungraded"])])
    return Table("Grades", ["checkpoint", *GRADES, "ungraded"], rows)
