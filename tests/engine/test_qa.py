"""The user's own questions: files, grades, and the sheet for people to grade."""

import csv
import json

import pytest

from redwhale.engine.grading_sheet import read_grades, write_grading_file
from redwhale.engine.multiple_choice import EvaluationDataError
from redwhale.engine.qa import GradedAnswer, Question, choice_items, grade, read_questions


def write(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("answer", "reference", "grading", "score"),
    [
        ("서울 특별시.", "서울특별시", "exact", 1.0),
        ("1,000원", "1000원", "exact", 1.0),
        ("5", "-5", "exact", 0.0),
        ("15%", "1.5%", "exact", 0.0),
        ("정답은 서울입니다.", "서울", "contains", 1.0),
        ("정답은 15입니다.", "5", "contains", 0.0),
        ("정답은 5.", "5", "contains", 1.0),
        ("가나다", "가나라마", "f1", 4 / 7),
        ("", "가", "f1", 0.0),
    ],
)
def test_grades(answer, reference, grading, score):
    assert grade(answer, [reference], grading) == pytest.approx(score)


def test_the_best_reference_counts():
    assert grade("부산", ["서울", "부산"], "exact") == 1.0


def test_rows_with_choices_take_a_number_or_a_text(tmp_path):
    rows = [{"question": "수도?", "choices": ["서울", "부산"], "answer": answer} for answer in (1, "부산")]
    items = choice_items(read_questions([write(tmp_path / "q.jsonl", *rows)]), "질문: {question}\n답변:")
    assert [(item.context, item.choices, item.gold) for item in items] == [
        ("질문: 수도?\n답변:", (" 서울", " 부산"), 1)
    ] * 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "가"}, "q.jsonl:1 has no question"),
        ({"question": "가?", "answer": ["나", 3]}, "q.jsonl:1 has answer"),
        ({"question": "가?", "choices": ["나"], "answer": 1}, "choices 0 to 0"),
        ({"question": "가?", "choices": ["나"], "answer": "다"}, "none of its choices"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path, row, message):
    with pytest.raises(EvaluationDataError, match=message):
        read_questions([write(tmp_path / "q.jsonl", row)])


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-8", "cp949"])
def test_people_grade_in_a_sheet_and_the_grades_are_counted(tmp_path, encoding):
    question = Question(id="1", question="수도?", answers=("서울",))
    answers = [GradedAnswer(question=question, answer="서울, 그리고\n부산", score=1.0)]
    sheet = tmp_path / "qa.csv"
    write_grading_file(sheet, {"base": answers, "sft": answers})
    with sheet.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["checkpoint"], row["answer"]) for row in rows] == [(n, "서울, 그리고\n부산") for n in ("base", "sft")]
    rows[1]["grade"] = "Partially correct"
    with sheet.open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    counts = read_grades(sheet)
    assert (counts["base"]["ungraded"], counts["sft"]["partially correct"]) == (1, 1)


def test_a_sheet_that_is_no_text_is_one_sentence(tmp_path):
    (tmp_path / "qa.xlsx").write_bytes(b"PK\x03\x04\xff\xff\x00")
    with pytest.raises(EvaluationDataError, match="neither UTF-8 nor CP949"):
        read_grades(tmp_path / "qa.xlsx")
