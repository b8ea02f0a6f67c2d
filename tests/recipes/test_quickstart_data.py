"""The quickstart's inputs are derived deterministically, held-out text stays apart, and failures are one sentence."""

import hashlib
import importlib
import json
import re
import sys
import unicodedata
import zipfile
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def data() -> ModuleType:
    sys.path.insert(0, str(RECIPES))
    try:
        return importlib.import_module("quickstart_data")
    finally:
        sys.path.remove(str(RECIPES))


@pytest.fixture(scope="module")
def derive(data: ModuleType) -> ModuleType:
    return sys.modules["quickstart.derive"]


@pytest.fixture(scope="module")
def material() -> tuple[list[str], list[tuple[str, str]]]:
    good, bad = (
        [json.loads(line) for line in (RECIPES / "quickstart" / name).read_text(encoding="utf-8").splitlines()]
        for name in ("crawl_good.jsonl", "crawl_bad.jsonl")
    )
    return [row["text"] for row in good if row["kind"] == "good"], [(row["kind"], row["text"]) for row in bad]


def longest_common_run(first: str, second: str) -> int:
    first, second = ("".join(text.split()) for text in (first, second))
    previous, best = [0] * (len(second) + 1), 0
    for a in first:
        current = [0]
        for j, b in enumerate(second):
            current.append(previous[j] + 1 if a == b else 0)
        best = max(best, *current)
        previous = current
    return best


BILLS = {
    f"PRC_{i}": (
        f"현행법은 제{i}호 시설의 관리를 {place}의 장에게 맡기고 있음. 그런데 {place}에서는 {what} 문제가 해마다 "
        f"늘고 있어 주민의 불편이 크다는 지적이 {i}차례 있었음.\n"
        f"이에 {what} 문제를 {place} 차원에서 살필 {i}인의 조사관을 두려는 것임."
    )
    for i, (place, what) in enumerate(
        (place, what)
        for place in ("광역시와 도", "섬 지역의 군", "바닷가 마을 협의회", "국립 공원 구역", "산업 단지 관리소")
        for what in ("쓰레기 처리", "상수도 누수", "야간 소음", "노후 전선", "주차 공간")
    )
}
TOPICS = {
    "loops": 'The "for" statement\n*******************\n\nThe loop runs once for each item of an *iterable object*,\n'
    "in the order in which the items come.\n\n   for item in items:\n       use(item)\n\n"
    "+------+------+\n| a    | b    |\n+------+------+\n\n"
    "* An item of a list that is long enough to be\n  broken over two lines.\n",
}


def test_topic_markup_is_removed_and_prose_is_unwrapped(derive: ModuleType) -> None:
    assert derive.topic_paragraphs(TOPICS["loops"]) == [
        'The "for" statement',
        "The loop runs once for each item of an iterable object, in the order in which the items come.",
        "   for item in items:\n       use(item)",
        "* An item of a list that is long enough to be broken over two lines.",
    ]


def test_sections_keep_every_paragraph_in_order_within_the_limit(derive: ModuleType) -> None:
    paragraphs = [str(i) * (1 + 37 * i % 90) for i in range(40)] + ["x" * 250]
    documents = list(derive.sections(paragraphs, limit=200))
    assert "\n\n".join(documents).split("\n\n") == paragraphs
    assert all(len(text) <= 200 for text in documents[:-1])
    assert documents[-1] == "x" * 250
    # Greedy: no two neighbours would have fitted into one document.
    assert all(len(a) + 2 + len(b.split("\n\n")[0]) > 200 for a, b in pairwise(documents))


def test_a_paragraph_that_many_topics_share_is_kept_once(derive: ModuleType) -> None:
    topics = {f"topic{i}": f"Heading {i}\n\nThis whole paragraph is the same\nin every topic." for i in range(30)}
    train, heldout = derive.topic_rows(topics, heldout_share=0.1)
    assert [len(heldout), len(train)] == [3, 27]
    everything = "\n\n".join(row["text"] for row in train + heldout)
    assert everything.count("This whole paragraph is the same in every topic.") == 1


def test_heldout_topics_share_no_run_of_39_characters_with_training(derive: ModuleType) -> None:
    shared = "This sentence about binding names stands in the middle of two otherwise different paragraphs."
    topics = {
        f"topic{i}": f"Heading {i}\n\nOnly topic {i} says {'abcdefgh'[i % 8] * 30}. {shared}\n\nOwn text {i * 7919}."
        for i in range(30)
    }
    train, heldout = derive.topic_rows(topics, heldout_share=0.1)
    assert len(heldout) == 3
    assert train
    for row in train:
        assert all(longest_common_run(row["text"], other["text"]) < 39 for other in heldout)
    assert {row["id"] for row in train}.isdisjoint(row["id"] for row in heldout)


def test_shares_run_finds_every_common_run_of_39_characters(derive: ModuleType) -> None:
    letters = [chr(0xAC00 + 7 * i) for i in range(400)]
    for start in range(0, 60):
        text = "".join(letters[start : start + 39])
        assert derive.shares_run("다른 글 " + text + " 뒤", derive.blocks("".join(letters[:120])))
    assert not derive.shares_run("".join(letters[200:]), derive.blocks("".join(letters[:200])))
    assert not derive.shares_run("".join(letters[:19]), derive.blocks("".join(letters)))


def test_bill_sample_stops_at_the_first_bill_past_the_limit(derive: ModuleType) -> None:
    rows = derive.sample_bills(BILLS, 2000)
    sizes = [len(row["text"].encode()) for row in rows]
    assert sum(sizes) >= 2000 > sum(sizes[:-1])
    assert all(BILLS[row["id"]] == row["text"] and row["source"] == "bills" for row in rows)
    reordered = dict(reversed(BILLS.items()))
    assert derive.sample_bills(reordered, 2000) == rows
    assert len(derive.sample_bills(BILLS, 10**9)) == len(BILLS)


def test_excerpt_ends_at_a_sentence_and_drops_headings(derive: ModuleType) -> None:
    text = "■ 제안이유 및 주요내용\n현행법은 이러함. 그러나 저러함.\n이에 고치려는 것임."
    assert derive.excerpt(text) == "현행법은 이러함. 그러나 저러함. 이에 고치려는 것임."
    assert derive.excerpt(text, limit=20) == "현행법은 이러함. 그러나 저러함."
    assert derive.excerpt("제안이유\n" + "가" * 400) == ""


def test_instruction_rows_use_no_text_of_the_corpus_nor_of_one_another(derive: ModuleType) -> None:
    corpus = [BILLS["PRC_0"], BILLS["PRC_7"]]
    names = {bill_id: f"{bill_id} 법률안" for bill_id in BILLS}
    rows = derive.instruction_rows(BILLS, names, corpus, 100)
    prompts = [row["messages"][0]["content"] for row in rows]
    bodies = [max(prompt.split("\n\n"), key=len) for prompt in prompts]
    assert 2 <= len(rows) < len(BILLS)
    for i, body in enumerate(bodies):
        assert all(longest_common_run(body, text) < 39 for text in corpus + bodies[:i])
    for row in rows:
        answer = row["messages"][1]["content"]
        bill = BILLS[answer.removesuffix(" 법률안")]
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert derive.excerpt(bill) in row["messages"][0]["content"]
    assert derive.instruction_rows(BILLS, names, corpus, 2) == rows[:2]
    assert derive.instruction_rows(BILLS, {}, corpus, 2) == []


def test_crawl_is_the_same_every_time_and_has_every_kind(
    derive: ModuleType, material: tuple[list[str], list[tuple[str, str]]]
) -> None:
    good, bad = material
    rows = derive.crawl_rows(good, bad)
    assert rows == derive.crawl_rows(list(good), list(bad))
    kinds = Counter(row["kind"] for row in rows)
    assert set(kinds) == {kind for kind, _ in bad} | {"good", "duplicate", "near_duplicate", "nfd", "mojibake"}
    assert kinds["good"] + kinds["nfd"] + kinds["mojibake"] == len(good)
    assert 150 <= len(rows) <= 300
    assert len({row["id"] for row in rows}) == len(rows)
    # Rank order mixes the kinds: none may come in one block.
    order = [row["kind"] for row in rows]
    assert sum(a != b for a, b in pairwise(order)) > len(rows) / 2


def test_damaged_texts_can_be_repaired_to_the_original(
    derive: ModuleType, material: tuple[list[str], list[tuple[str, str]]]
) -> None:
    good, bad = material
    rows = derive.crawl_rows(good, bad)
    for row in rows:
        if row["kind"] == "nfd":
            assert row["text"] not in good
            assert unicodedata.normalize("NFC", row["text"]) in good
        elif row["kind"] == "mojibake":
            assert not re.search("[가-힣]", row["text"])
            assert row["text"].encode("latin-1").decode("cp949") in good
        elif row["kind"] in ("good", "duplicate"):
            assert row["text"] in good


def test_near_duplicates_are_edits_of_a_text_that_is_there(
    derive: ModuleType, material: tuple[list[str], list[tuple[str, str]]]
) -> None:
    good, bad = material
    rows = derive.crawl_rows(good, bad)
    present = ["".join(row["text"].split()) for row in rows if row["kind"] == "good"]
    for row in rows:
        if row["kind"] == "near_duplicate":
            assert row["text"] not in good
            text = "".join(row["text"].split())
            assert any(text == whole or whole.startswith(text) or whole in text for whole in present)


def test_edits_change_what_they_say_and_nothing_else(derive: ModuleType) -> None:
    text = "봄이 왔다. 꽃이 피었다. 새가 운다."
    assert derive.without_a_sentence(text) == "봄이 왔다. 꽃이 피었다."
    long = " ".join(f"낱말{i}" for i in range(240))
    closed = derive.without_some_gaps(long)
    assert closed.replace(" ", "") == long.replace(" ", "")
    assert 5 <= long.count(" ") - closed.count(" ") <= 45
    changed = derive.with_other_digits("가입 3만원 070-0000-1111 월 500 합 12345", "key")
    assert re.fullmatch(r"가입 \d만원 070-0000-1111 월 \d{3} 합 12345", changed)
    assert changed != "가입 3만원 070-0000-1111 월 500 합 12345"
    assert sorted(derive.rotated("가\n나\n다 라", "key").split("\n")) == ["가", "나", "다 라"]


def test_exactly_one_line_of_the_crawl_is_broken(derive: ModuleType) -> None:
    lines = [json.dumps({"id": i, "text": "글" * 30}, ensure_ascii=False) for i in range(5)]
    broken = derive.with_broken_line(lines)
    failures = []
    for number, line in enumerate(broken):
        try:
            json.loads(line)
        except ValueError:
            failures.append(number)
    assert failures == [3]
    assert [line for number, line in enumerate(broken) if number != 3] == lines


def test_hand_written_good_texts_fit_cp949_and_differ(material: tuple[list[str], list[tuple[str, str]]]) -> None:
    good, _ = material
    for text in good:
        assert text.encode("cp949").decode("cp949") == text
        assert unicodedata.is_normalized("NFC", text)
        assert 2 <= len(text.split("\n\n")) <= 4
    assert len(set(good)) == len(good) >= 36


def test_invented_personal_numbers_belong_to_nobody(material: tuple[list[str], list[tuple[str, str]]]) -> None:
    weights = (2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5)
    found = [number for _, text in material[1] for number in re.findall(r"\d{6}-\d{7}(?!\d)", text)]
    assert len(found) >= 2
    for number in found:
        digits = [int(digit) for digit in number.replace("-", "")]
        check = (11 - sum(w * d for w, d in zip(weights, digits, strict=False)) % 11) % 10
        assert digits[12] not in (check, (check + 2) % 10)
    mobiles = [m for _, text in material[1] for m in re.findall(r"01\d[-. ]?\d{4}[-. ]?\d{4}", text)]
    assert len(mobiles) >= 3
    assert all(re.sub(r"\D", "", mobile)[3:7] == "0000" for mobile in mobiles)


@pytest.fixture
def pip_says(data: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    answers: list[SimpleNamespace] = []
    monkeypatch.setattr(data.subprocess, "run", lambda *_args, **_options: answers.pop(0))
    return answers


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        ("retrying\nERROR: No matching distribution found\n", r"\(pip says: ERROR: No matching distribution found\)"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM\n", r"offers a mistral-common==1\.13\.1 that is not"),
    ],
)
def test_failed_download_is_one_sentence_and_exit_code_2(
    data: ModuleType,
    tmp_path: Path,
    pip_says: list[SimpleNamespace],
    capsys: pytest.CaptureFixture[str],
    stderr: str,
    message: str,
) -> None:
    pip_says.append(SimpleNamespace(returncode=1, stderr=stderr))
    assert data.main(["--output", str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert re.search(message, printed)
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert not (tmp_path / "manifest.json").exists()


def test_archive_with_another_hash_is_refused(
    data: ModuleType, tmp_path: Path, pip_says: list[SimpleNamespace]
) -> None:
    (tmp_path / "thing-1.whl").write_bytes(b"changed")
    pip_says.append(SimpleNamespace(returncode=0, stderr=""))
    digest = hashlib.sha256(b"original").hexdigest()
    with pytest.raises(data.QuickstartDataError, match=rf"thing-1\.whl is not the expected file \(SHA-256 {digest}\)"):
        data.fetch(("thing==1", "thing-1.whl", digest), tmp_path)
    (tmp_path / "thing-1.whl").write_bytes(b"original")
    assert data.fetch(("thing==1", "thing-1.whl", digest), tmp_path) == b"original"


def test_whole_preparation_from_cached_archives_is_deterministic_and_done_once(
    data: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel = tmp_path / "tiny.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("mistral_common/data/tokenizer.model.v1", b"pieces")
    names = {bill_id: f"{bill_id} 법률안" for bill_id in BILLS}
    monkeypatch.setattr(data, "fetch", lambda archive, _cache: wheel.read_bytes())
    monkeypatch.setattr(data, "read_bills", lambda _archive: (dict(BILLS), names))
    monkeypatch.setattr(data, "BASE_KOREAN_BYTES", 1)
    monkeypatch.setattr(data, "BILLS_BYTES", 1500)
    monkeypatch.setattr(data, "SFT_HELDOUT", 1)
    first, second = tmp_path / "first", tmp_path / "second"
    assert data.main(["--output", str(first)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert data.main(["--output", str(second)]) == 0
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in files)
    manifest = json.loads((first / "manifest.json").read_text())
    assert sorted(manifest["files"]) == sorted(str(name) for name in files if name.name != "manifest.json")
    assert len(printed) == len(manifest["files"]) == 10
    ids = [
        {json.loads(line)["id"] for line in (first / name).read_text().splitlines()}
        for name in ("base/korean.jsonl", "korean/bills.jsonl")
    ]
    assert ids[0]
    assert not ids[0] & ids[1]
    legacy = (first / "korean/legacy_cp949.txt").read_bytes()
    assert "마을 소식지" in legacy.decode("cp949")
    with pytest.raises(UnicodeDecodeError):
        legacy.decode("utf-8")

    capsys.readouterr()
    monkeypatch.setattr(data, "prepare", lambda _output: pytest.fail("a finished output was prepared again"))
    assert data.main(["--output", str(first)]) == 0
    assert capsys.readouterr().out == f"{first} is complete\n"
    (first / "english/heldout.jsonl").write_bytes(b"cut short")
    assert not data.is_finished(first)
