import json
import random

import pyarrow.parquet as pq
import pytest
from filtering_corpus import korean

from redwhale.filtering import CorpusError, FilterConfig, filter_corpus
from redwhale.filtering.decontaminate import Benchmarks, Probe, load_benchmarks

PASSAGE = "콜라독립 815는 범양식품이 만들어 오던 탄산음료로 천구백구십팔년 사월에 처음 나왔다."
QUESTION = "콜라독립 815는 코카콜라를 만들던 회사의 탄산음료인가요?"
KOBEST = f"ID\tText\tQuestion\tAnswer\r\n1\t{PASSAGE}\t{QUESTION}\tTrue\r\n"


def benchmarks(tmp_path, name: str, content: str) -> Benchmarks:
    (tmp_path / name).write_text(content, encoding="utf-8")
    return load_benchmarks((str(tmp_path / name),))


def test_a_question_is_found_whatever_its_spacing_and_a_passage_is_not(tmp_path):
    loaded = benchmarks(tmp_path, "test.tsv", KOBEST)
    assert [probe.text for probe in loaded.probes] == [QUESTION]
    around = korean(random.Random(0))
    quoted = f"{around} {QUESTION.replace(' ', '')} {around}"
    assert loaded.find([around, quoted, f"{around} {PASSAGE}"]) == [[], [(0, 1.0)], []]


def test_a_part_of_a_question_is_not_enough_and_a_changed_word_is():
    text = (
        "대한민국의 수도인 서울에서 가장 오래된 궁궐로 알려진 경복궁은 조선을 세운 태조가 처음으로 지은 궁궐이 맞습니까"
    )
    loaded = Benchmarks([Probe("a", 1, text)])
    assert loaded.find([text[:30]]) == [[]]
    ((probe, share),) = loaded.find([text.replace("맞습니까", "맞나요")])[0]
    assert probe == 0
    assert 0.8 <= share < 1


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "ynat.json",
            [{"guid": "a", "title": "유튜브 내달 이일까지 크리에이터 지원 공간 운영", "label": 3}],
            ["유튜브 내달"],
        ),
        (
            "mrc.json",
            {
                "data": [
                    {"paragraphs": [{"context": PASSAGE, "qas": [{"question": QUESTION, "answers": [{"text": "예"}]}]}]}
                ]
            },
            [QUESTION],
        ),
        (
            "sts.jsonl",
            [{"sentence1": "숙소 위치는 찾기 쉽고 일반적인 곳이에요", "url": "https://a.example/" + "b" * 30}],
            ["숙소"],
        ),
        ("plain.txt", ["이 줄은 시험 문제라서 말뭉치에 있으면 안 됩니다"], ["이 줄은"]),
        (
            "hella.csv",
            [["context", "choice1"], ["여자는 새벽까지 잔업을 마치고 기지개를 켠다", "문을 닫는다"]],
            ["여자는"],
        ),
    ],
)
def test_files_of_every_kind_give_their_questions(tmp_path, name, content, expected):
    text = {
        "json": lambda: json.dumps(content, ensure_ascii=False),
        "jsonl": lambda: "\n".join(json.dumps(one, ensure_ascii=False) for one in content),
        "txt": lambda: "\n".join(content),
        "csv": lambda: "\n".join(",".join(row) for row in content),
    }[name.rpartition(".")[2]]()
    probes = benchmarks(tmp_path, name, text).probes
    assert len(probes) == len(expected)
    assert all(probe.text.startswith(start) for probe, start in zip(probes, expected, strict=True))


def test_contaminated_documents_are_dropped_and_listed(tmp_path):
    rng = random.Random(1)
    (tmp_path / "BoolQ").mkdir()
    (tmp_path / "BoolQ" / "test.tsv").write_text(KOBEST, encoding="utf-8")
    rows = [korean(rng) for _ in range(5)] + [f"{korean(rng)} {QUESTION} 그렇다고 한다."] * 2
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"id": str(n), "text": one}) + "\n" for n, one in enumerate(rows))
    )
    config = FilterConfig(
        inputs=[str(tmp_path / "a.jsonl")], validation_fraction=0, decontaminate=(str(tmp_path / "BoolQ"),)
    )
    summary = filter_corpus(config, tmp_path / "out")
    by_name = {rule.name: rule for rule in summary.rules}
    assert by_name["contaminated"].dropped_documents == by_name["contaminated"].failing_documents == 2
    assert by_name["exact_duplicate"].failing_documents == 1
    assert [(match.document, match.benchmark, match.record, match.share) for match in summary.matches] == [
        ("5", "BoolQ/test.tsv", 1, 1.0),
        ("6", "BoolQ/test.tsv", 1, 1.0),
    ]
    assert QUESTION in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    (kept,) = (tmp_path / "out").glob("*.parquet")
    assert [row["id"] for row in pq.read_table(kept).to_pylist()] == list("01234")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "is damaged"),
        ("a.tsv", "ID\tText\n1\t짧다\n", "hold no text of 16 or more letters"),
        ("a.xml", "<a>", "must be a file, or hold one, that ends in one of .tsv"),
        (None, "", "cannot read .*: no such file"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_clear_sentence(tmp_path, name, content, message):
    if name is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "고래"}))
    config = FilterConfig(inputs=[str(tmp_path / "in.jsonl")], decontaminate=(str(tmp_path / (name or "none.tsv")),))
    with pytest.raises(CorpusError, match=f"decontaminate: .*{message}") as caught:
        filter_corpus(config, tmp_path / "out")
    assert "\n" not in str(caught.value)
