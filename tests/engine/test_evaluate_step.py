"""The step `eval` on checkpoints of a run and from outside: comparisons, questions, sheets to grade, and its tables."""

import csv
import json

import pytest
from tiny import KOBEST, write_jsonl

from redwhale.engine import load_recipe, run_recipe
from redwhale.engine.chat import ChatModel, Sampling
from redwhale.engine.cli import main
from redwhale.engine.conversations import Message
from redwhale.engine.errors import RecipeError
from redwhale.engine.evaluation_tables import evaluation_tables, markdown
from redwhale.engine.kobest import KOBEST_TASKS, read_documents, read_task
from redwhale.engine.report import write_report
from redwhale.engine.statistics import compare_paired

OPEN = [
    {"question": f"첫 낱말은? {text}", "answer": text.split()[0]}
    for text in ("국회는 법을", "국민은 모두", "산과 강은")
]
CHOICES = [{"question": text, "choices": ["서울", "부산", "대구"], "answer": 0} for text in ("수도?", "한강은?")]


@pytest.fixture(scope="module")
def recipe(finished, tiny_root, tmp_path_factory):
    root = tmp_path_factory.mktemp("measure")
    for task in KOBEST_TASKS:
        rows = read_documents(KOBEST, task)
        write_jsonl(root / "kobest" / task / "test.jsonl", rows[:6])
        write_jsonl(root / "kobest" / task / "train.jsonl", rows[6:])
    write_jsonl(root / "open.jsonl", OPEN)
    write_jsonl(root / "choices.jsonl", CHOICES)
    (root / "measure.toml").write_text(
        f'name = "measure"\nruns = "{root}"\ndevice = "cpu"\nprecision = "fp32"\n'
        f'[heldout]\nenglish = ["{tiny_root}/data/english_heldout.jsonl"]\n'
        f'[base]\ncheckpoint = "{finished.run_dir}/init/model"\n'
        f'[eval]\nothers = {{ tuned = "{finished.run_dir}/sft/model" }}\n'
        f'kobest = "{root}/kobest"\nkobest_shots = [0, 2]\n'
        f'[eval.qa.open]\ndata = ["{root}/open.jsonl"]\nmax_new_tokens = 8\n'
        f'[eval.qa.choices]\ndata = ["{root}/choices.jsonl"]\n',
        encoding="utf-8",
    )
    return root / "measure.toml"


@pytest.fixture(scope="module")
def measured(recipe):
    (manifest,) = run_recipe(load_recipe(recipe), say=lambda line: None)
    return manifest


@pytest.fixture(scope="module")
def folder(recipe, measured):
    return recipe.parent / "measure" / "eval"


def test_two_checkpoints_are_compared_item_by_item(measured, folder):
    right = {}
    for line in (folder / "items.jsonl").read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        assert item["choice"] == item["log_likelihoods"].index(max(item["log_likelihoods"]))
        right.setdefault((item["checkpoint"], item["task"]), []).append(item["choice"] == item["gold"])
    compared = {found["task"]: found for found in measured["summary"]["comparisons"]}
    assert set(compared) == {*KOBEST_TASKS, *(f"{task} 2-shot" for task in KOBEST_TASKS), "choices", "open"}
    for task, found in compared.items():
        assert (found["first"], found["second"]) == ("tuned", "base")  # a positive difference favours the run's own
        if task != "open":
            expected = compare_paired(right["tuned", task], right["base", task])
            assert found["difference"] == pytest.approx(expected.difference)
            assert (found["only_first"], found["only_second"]) == (expected.only_first, expected.only_second)


def test_accuracies_are_those_of_the_logged_items(measured, folder):
    lines = [json.loads(line) for line in (folder / "items.jsonl").read_text(encoding="utf-8").splitlines()]
    for name, found in measured["summary"]["checkpoints"].items():
        for task, result in found["kobest"].items():
            hits = [row["gold"] == row["choice"] for row in lines if (row["checkpoint"], row["task"]) == (name, task)]
            assert (result["n"], result["acc"]) == (6, pytest.approx(sum(hits) / 6))


def test_open_questions_are_asked_in_the_chat_template_that_a_checkpoint_carries(finished, folder):
    with (folder / "qa-open.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["checkpoint"] for row in rows] == ["base", "tuned"] * len(OPEN)
    assert {row["grade"] for row in rows} == {""}
    chat = ChatModel.load(finished.run_dir / "sft" / "model")
    for question, row in zip(OPEN, rows[1::2], strict=True):
        answer = chat.answer([Message("user", question["question"])], Sampling(max_new_tokens=8))
        assert row["answer"] == "".join(answer).strip()
        assert (row["question"], row["reference"]) == (question["question"], question["answer"])


def test_grades_that_people_gave_are_counted(folder, tmp_path, capsys):
    text = (folder / "qa-open.csv").read_text(encoding="utf-8-sig")
    with (folder / "qa-open.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    for row, grade in zip(rows, ["correct", "incorrect", "Correct", "partially correct", "", "correct"], strict=True):
        row["grade"] = grade
    with (tmp_path / "graded.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, text.splitlines()[0].split(","))
        writer.writeheader()
        writer.writerows(rows)
    assert main(["grades", str(tmp_path / "graded.csv")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| checkpoint | correct | partially correct | incorrect | ungraded |"
    assert lines[2:] == [
        "| base | 2 (100.0%) | 0 (0.0%) | 0 (0.0%) | 1 |",
        "| tuned | 1 (33.3%) | 1 (33.3%) | 1 (33.3%) | 0 |",
    ]
    rows[0]["grade"] = "good"
    with (tmp_path / "graded.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert main(["grades", str(tmp_path / "graded.csv")]) == 2
    assert "line 2 has the grade 'good'" in capsys.readouterr().err


def test_the_tables_stand_beside_the_papers_numbers_on_the_page_and_in_the_report(measured, folder):
    page = (folder / "results.md").read_text(encoding="utf-8")
    mean = measured["summary"]["checkpoints"]["tuned"]["kobest_mean"]["2-shot"]["acc"]
    assert f"{100 * mean:.2f} ± " in page.partition("## KoBEST, 2-shot")[2]
    report = write_report(folder.parent).read_text(encoding="utf-8")
    for table in evaluation_tables(measured["summary"]):
        for cell in (cell for row in table.rows for cell in row):
            assert cell in page
            assert cell.replace("&", "&amp;") in report
    for published in ("50.23", "66.72", "80.83", "79.42"):
        assert published in page


def test_a_summary_of_an_older_run_still_has_its_tables(measured):
    text = {"bits_per_byte": 1.5, "accuracy": 0.25, "tokens": 1000}
    task = {"n": 20, "acc": 0.5, "acc_stderr": float("nan"), "macro_f1": 0.4, "acc_norm": None}
    old = {"checkpoints": {"base": {"text": {"korean": text}, "kobest": {"boolq": task}}, "init": {"text": {}}}}
    tables = {table.title: table for table in evaluation_tables(old)}
    assert list(tables) == ["Held-out text", "KoBEST, 0-shot"]
    assert tables["Held-out text"].rows == [["base", "korean", "1.500", "", "0.250", "1,000"]]
    # The published means are of five tasks, and stand beside such a mean alone.
    assert tables["KoBEST, 0-shot"].rows == [["base", "50.00", "50.00", "40.00"]]
    assert evaluation_tables({}) == []
    assert markdown([]) == "\n"


def test_jsonl_files_of_kobest_hold_the_same_items_as_tsv(recipe):
    for task in KOBEST_TASKS:
        assert read_task(recipe.parent / "kobest", task) == read_task(KOBEST, task)[:6]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ('eval.kobest_split="train"', "kobest_split must be another one"),
        ('eval.others={base = "x"}', "checkpoint 'base' of others"),
        ('eval.others={them = "nowhere"}', "nowhere"),
        ('eval.qa={boolq = {data = ["x.jsonl"]}}', "not as a KoBEST task"),
        ('eval.qa={new = {data = ["x.jsonl"]}}', "there is no file x.jsonl"),
        ('eval.kobest_tasks=["boolq"]\neval.kobest="nowhere"', "nowhere"),
    ],
)
def test_what_cannot_be_measured_is_said_before_any_work(recipe, override, message):
    with pytest.raises(Exception, match=message) as caught:
        run_recipe(load_recipe(recipe, override.split("\n")), say=pytest.fail)
    assert isinstance(caught.value, (RecipeError, ValueError))
