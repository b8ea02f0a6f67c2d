"""KoBEST files become the harness's prompts, and log-likelihoods become its scores."""

import json
import math
import random
import statistics
from pathlib import Path

import pytest

from redwhale.engine.kobest import (
    KOBEST_TASKS,
    EvaluationDataError,
    MultipleChoiceItem,
    read_task,
    score,
)
from redwhale.engine.statistics import macro_f1

FULL_KOBEST = Path(__file__).parents[2].parent / "shared/data/kobest_v1"
QUICKSTART_KOBEST = Path(__file__).parents[2] / "recipes/quickstart/kobest"
TEST_SIZES = {"boolq": 1404, "copa": 1000, "hellaswag": 500, "sentineg": 397, "wic": 1260}

BOOLQ = (
    "ID\tText\tQuestion\tAnswer\r\n"
    "1\t달은 지구를 돈다.\t달은 지구를 도는가?\tTRUE\r\n"
    "2\t해는 별이다.\t해는 행성인가?\tFalse\r\n"
)
COPA = (
    "ID\tsentence\tquestion\t1\t2\tAnswer\r\n"
    "1\t비가 왔다.\t결과\t우산을 썼다.\t모자를 벗었다.\t1\r\n"
    "2\t배가 고팠다.\t원인 \t밥을 먹었다.\t아침을 굶었다.\t2\r\n"
)
HELLASWAG = (
    "context\tchoice1\tchoice2\tchoice3\tchoice4\tlabel\n"
    '남자가 문을 연다.\t남자가 들어간다.\t"남자가 ""안녕""이라 말한다."\t"가" 또는 "나"\t문이 닫힌다.\t1\n'
)
SENTINEG_TEST = "ID\tLabel_origin\tText_origin\tLabel\tText\tCategory_neg\r\n7\t0\t별로예요\t1\t별로가 아니에요\t3\r\n"
SENTINEG_DEV = "ID\tLabel\tText\r\n1\t0\t실망했어요\r\n"
WIC = (
    "ID\tTarget\tSENTENCE1\tDictionary 1\tLink 1\tSENTENCE2\tDictionary 2\tLink2\tANSWER\r\n"
    "1\t배\t[배]를 타고 갔다.\t1\t\t[배]가 달다.\t2\t\tFALSE\r\n"
)


def write(folder: Path, name: str, text: str | bytes, split: str = "test") -> Path:
    (folder / name).mkdir(exist_ok=True)
    data = text if isinstance(text, bytes) else text.encode()
    (folder / name / f"{split}.tsv").write_bytes(data)
    return folder


def test_boolq_moves_the_prompts_trailing_space_into_the_choices(tmp_path: Path) -> None:
    items = read_task(write(tmp_path, "BoolQ", BOOLQ), "boolq")
    assert items == [
        MultipleChoiceItem("달은 지구를 돈다. 질문: 달은 지구를 도는가? 답변:", ("  아니오", "  예"), 1),
        MultipleChoiceItem("해는 별이다. 질문: 해는 행성인가? 답변:", ("  아니오", "  예"), 0),
    ]


def test_copa_puts_two_spaces_before_the_connector(tmp_path: Path) -> None:
    items = read_task(write(tmp_path, "COPA", COPA), "copa")
    assert items == [
        MultipleChoiceItem("비가 왔다.  그래서", (" 우산을 썼다.", " 모자를 벗었다."), 0),
        MultipleChoiceItem("배가 고팠다.  왜냐하면", (" 밥을 먹었다.", " 아침을 굶었다."), 1),
    ]


def test_hellaswag_undoes_csv_quoting_only_where_a_csv_writer_quoted(tmp_path: Path) -> None:
    items = read_task(write(tmp_path, "HellaSwag", HELLASWAG), "hellaswag")
    choices = (" 남자가 들어간다.", ' 남자가 "안녕"이라 말한다.', ' "가" 또는 "나"', " 문이 닫힌다.")
    assert items == [MultipleChoiceItem("문장: 남자가 문을 연다.", choices, 1)]


def test_sentineg_reads_both_column_layouts(tmp_path: Path) -> None:
    write(tmp_path, "SentiNeg", SENTINEG_TEST)
    write(tmp_path, "SentiNeg", SENTINEG_DEV, split="dev")
    negated = MultipleChoiceItem("문장: 별로가 아니에요 긍부정:", (" 부정", " 긍정"), 1)
    assert read_task(tmp_path, "sentineg") == [negated]
    assert read_task(tmp_path, "sentineg", "dev") == [
        MultipleChoiceItem("문장: 실망했어요 긍부정:", (" 부정", " 긍정"), 0)
    ]


def test_wic_keeps_the_brackets_and_appends_the_fixed_particle(tmp_path: Path) -> None:
    context = "문장1: [배]를 타고 갔다. 문장2: [배]가 달다. 두 문장에서 배가 같은 뜻으로 쓰였나?"
    assert read_task(write(tmp_path, "WiC", WIC), "wic") == [MultipleChoiceItem(context, (" 아니오", " 예"), 0)]


@pytest.mark.parametrize("folder", ["boolq", "BOOLQ", "BoolQ"])
def test_byte_order_mark_line_feeds_and_folder_case_do_not_matter(tmp_path: Path, folder: str) -> None:
    plain = read_task(write(tmp_path, "BoolQ", BOOLQ), "BoolQ")
    other = tmp_path / "other"
    other.mkdir()
    write(other, folder, b"\xef\xbb\xbf" + BOOLQ.replace("\r\n", "\n").rstrip("\n").encode())
    assert read_task(other, "boolq") == plain


@pytest.mark.parametrize("label", ["True", "TRUE", "true", " True "])
def test_truth_labels_are_read_in_any_case(tmp_path: Path, label: str) -> None:
    folder = write(tmp_path, "BoolQ", f"Text\tQuestion\tAnswer\n글.\t물음?\t{label}\n")
    assert [item.gold for item in read_task(folder, "boolq")] == [1]


def test_unicode_line_separators_and_quotes_stay_inside_a_field(tmp_path: Path) -> None:
    folder = write(tmp_path, "BoolQ", 'Text\tQuestion\tAnswer\n"가"\u2028나\x85다.\t"물음"?\tFalse\n')
    assert [item.context for item in read_task(folder, "boolq")] == ['"가"\u2028나\x85다. 질문: "물음"? 답변:']


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("boolq", BOOLQ.replace("TRUE", "yes"), r"test\.tsv line 2 has Answer 'yes'; it must be one of false, true"),
        ("boolq", BOOLQ.replace("False", "0"), r"line 3 has Answer '0'"),
        ("copa", COPA.replace("\t2\r\n", "\t3\r\n"), r"line 3 has Answer '3'; it must be one of 1, 2"),
        ("copa", COPA.replace("결과", "이유"), r"line 2 has question '이유'; it must be one of 원인, 결과"),
        ("hellaswag", HELLASWAG.replace("\t1\n", "\t4\n"), r"line 2 has label '4'"),
        ("hellaswag", HELLASWAG.replace("choice4", "ending4"), r"line 1 lacks the column choice4; it has context, "),
        ("sentineg", SENTINEG_TEST.replace("\t1\t", "\t\t"), r"line 2 has Label ''; it must be one of 0, 1"),
        ("wic", WIC.replace("\t배\t", "\t \t"), r"line 2 has an empty Target field"),
        ("wic", WIC.replace("\t2\t\tFALSE", ""), r"line 2 has 6 fields; the header has 9"),
        ("boolq", "", r"line 1 lacks the column Text, Question, Answer"),
        ("boolq", BOOLQ.encode("cp949"), r"test\.tsv is not UTF-8 \(byte 27\)"),
    ],
)
def test_malformed_files_are_named_with_their_line(tmp_path: Path, name: str, text: str | bytes, message: str) -> None:
    with pytest.raises(EvaluationDataError, match=message):
        read_task(write(tmp_path, name, text), name)


GOOD = {"paragraph": "글.", "question": "물음?", "label": 1}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("[1]", r"test\.jsonl line 2 is no JSON object"),
        ("{", "line 2 is no JSON object"),
        (json.dumps({"paragraph": "글.", "label": 1}), "line 2 lacks the key question; it has paragraph, label"),
        (json.dumps({**GOOD, "question": " "}), "line 2 has an empty question field"),
        (json.dumps({**GOOD, "paragraph": None}), "line 2 has an empty paragraph field"),
        (json.dumps({**GOOD, "label": 2}), "line 2 has label 2; it must be one of 0, 1"),
        (json.dumps({**GOOD, "label": True}), "line 2 has label True"),
        (json.dumps({**GOOD, "label": "1"}), "line 2 has label '1'"),
    ],
)
def test_malformed_jsonl_is_named_with_its_line(tmp_path: Path, row: str, message: str) -> None:
    (tmp_path / "boolq").mkdir()
    (tmp_path / "boolq" / "test.jsonl").write_text(f"{json.dumps(GOOD)}\n{row}\n", encoding="utf-8")
    with pytest.raises(EvaluationDataError, match=message):
        read_task(tmp_path, "boolq")


def test_missing_file_and_unknown_task_are_named(tmp_path: Path) -> None:
    write(tmp_path, "BoolQ", BOOLQ)
    with pytest.raises(EvaluationDataError, match=r"has no boolq/dev\.tsv"):
        read_task(tmp_path, "boolq", "dev")
    with pytest.raises(EvaluationDataError, match=r"has no copa/test\.tsv"):
        read_task(tmp_path / "nowhere", "copa")
    with pytest.raises(EvaluationDataError, match=r"unknown KoBEST task 'klue'; choose from boolq, copa, hellaswag"):
        read_task(tmp_path, "klue")


def slow_macro_f1(gold: list[int], predicted: list[int]) -> float:
    scores = []
    for label in set(gold) | set(predicted):
        pairs = list(zip(gold, predicted, strict=True))
        hits = sum(g == label and p == label for g, p in pairs)
        precision_base, recall_base = sum(p == label for p in predicted), sum(g == label for g in gold)
        precision = hits / precision_base if precision_base else 0.0
        recall = hits / recall_base if recall_base else 0.0
        scores.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
    return sum(scores) / len(scores)


@pytest.mark.parametrize("labels", [1, 2, 4])
def test_macro_f1_matches_precision_and_recall_computed_label_by_label(labels: int) -> None:
    generator = random.Random(labels)
    for size in (1, 2, 7, 200):
        gold = [generator.randrange(labels) for _ in range(size)]
        predicted = [generator.randrange(labels) for _ in range(size)]
        assert macro_f1(gold, predicted) == pytest.approx(slow_macro_f1(gold, predicted), abs=1e-12)


def test_macro_f1_of_a_label_never_right_is_zero() -> None:
    # Labels 0 and 1: F1 2/3 and 0.
    assert macro_f1([0, 1], [0, 0]) == pytest.approx(1 / 3)


def test_macro_f1_matches_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    generator = random.Random(5)
    gold, predicted = ([generator.randrange(4) for _ in range(300)] for _ in range(2))
    assert macro_f1(gold, predicted) == pytest.approx(metrics.f1_score(gold, predicted, average="macro"), abs=1e-12)


def test_scores_of_a_hand_made_task() -> None:
    items = [MultipleChoiceItem("문장: 가", (" 부정", " 긍정"), gold) for gold in (1, 1, 0, 0, 1)]
    values = [[-2.0, -1.0], [-1.0, -2.0], [-1.0, -3.0], [-1.0, -1.0], [-math.inf, -9.0]]
    result = score(items, values, task="SentiNeg")
    # Predictions 1, 0, 0, 0 (a tie goes to the first), 1: four of five right.
    assert (result.task, result.n, result.acc) == ("sentineg", 5, 0.8)
    assert result.acc_stderr == pytest.approx(statistics.stdev([1, 0, 1, 1, 1]) / math.sqrt(5))
    # F1 of label 0: 2*2/(2*2+1+0) = 0.8; of label 1: 2*2/(2*2+0+1) = 0.8.
    assert result.macro_f1 == pytest.approx(0.8)
    assert result.acc_norm is None
    assert result.acc_norm_stderr is None


def test_hellaswag_is_also_scored_per_character_without_the_delimiter() -> None:
    choices = (" 가나다라", " 가", " 나나", " 다다다다다다다다")
    # The sums prefer choice 1 both times. Per character the first item is -1, -2, -1.5, -0.5 and prefers choice 3; the
    # second is -0.9 against -1 and prefers choice 0, which would flip if the delimiter counted (-0.72 against -0.5).
    items = [MultipleChoiceItem("문장: 글", choices, 3), MultipleChoiceItem("문장: 글", choices, 0)]
    values = [[-4.0, -2.0, -3.0, -4.0], [-3.6, -1.0, -30.0, -30.0]]
    result = score(items, values, task="hellaswag")
    assert result.acc == 0.0
    assert result.acc_norm == 1.0
    assert result.acc_norm_stderr == 0.0


def test_length_normalisation_counts_characters_not_bytes() -> None:
    # -1 per character against -0.9 per character; in bytes -0.33 against -0.9.
    item = MultipleChoiceItem("문장: 글", (" 가나다", " abc", " 라", " 마"), 1)
    result = score([item], [[-3.0, -2.7, -9.0, -9.0]], task="hellaswag")
    assert result.acc_norm == 1.0
    assert math.isnan(result.acc_stderr)


def test_scores_that_do_not_fit_the_items_are_refused() -> None:
    item = MultipleChoiceItem("문장: 가", (" 부정", " 긍정"), 1)
    with pytest.raises(EvaluationDataError, match="there are no wic items to score"):
        score([], [], task="wic")
    with pytest.raises(EvaluationDataError, match="wic has 1 items but 0 lists"):
        score([item], [], task="wic")
    with pytest.raises(EvaluationDataError, match="wic item 2 has 2 choices but 3 log-likelihoods"):
        score([item, item], [[0.0, -1.0], [0.0, -1.0, -2.0]], task="wic")
    with pytest.raises(EvaluationDataError, match="wic item 1 has a log-likelihood of nan"):
        score([item], [[math.nan, -1.0]], task="wic")


@pytest.mark.parametrize("task", KOBEST_TASKS)
def test_quickstart_items_have_twenty_balanced_questions(task: str) -> None:
    items = read_task(QUICKSTART_KOBEST, task)
    choices = len(items[0].choices)
    assert [sum(item.gold == label for item in items) for label in range(choices)] == [20 // choices] * choices
    assert len({(item.context, item.choices) for item in items}) == 20


@pytest.mark.parametrize("task", KOBEST_TASKS)
@pytest.mark.skipif(not FULL_KOBEST.is_dir(), reason="the KoBEST v1 files are not on this machine")
def test_full_test_split_has_its_published_size(task: str) -> None:
    items = read_task(FULL_KOBEST, task)
    assert len(items) == TEST_SIZES[task]
    assert all(item.context == item.context.rstrip() and 0 <= item.gold < len(item.choices) for item in items)
    assert all(choice.startswith(" ") and choice.strip() for item in items for choice in item.choices)
    if task == "hellaswag":
        assert not any('""' in text for item in items for text in (item.context, *item.choices))
