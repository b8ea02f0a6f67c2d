import gzip
import hashlib
import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from redwhale.filtering import CorpusError, find_inputs, read_documents
from redwhale.filtering.documents import read_batches

TEXTS = ["붉은 고래가 바다를 건넌다.", "둘째 글\n두 줄이다.", '셋째 글은 따옴표 "와" 역슬래시 \\ 를 담는다.']
COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


def jsonl(records: list[dict]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def read(path):
    broken = []
    return list(read_documents(path, on_broken=broken.append)), broken


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_jsonl_gives_text_id_and_source(tmp_path, suffix):
    path = tmp_path / f"wiki.jsonl{suffix}"
    records = [
        {"text": TEXTS[0], "id": "a"},
        {"text": TEXTS[1], "source": "책", "extra": [1]},
        {"id": 7, "text": TEXTS[2]},
    ]
    path.write_bytes(COMPRESS[suffix](jsonl(records)))
    documents, broken = read(path)
    assert [(d.id, d.text, d.source) for d in documents] == [
        ("a", TEXTS[0], "wiki"),
        (f"wiki.jsonl{suffix}:2", TEXTS[1], "책"),
        ("7", TEXTS[2], "wiki"),
    ]
    assert not broken


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_text_file_is_one_document(tmp_path, suffix):
    path = tmp_path / f"novel.txt{suffix}"
    path.write_bytes(COMPRESS[suffix]("\n\n".join(TEXTS).encode()))
    documents, broken = read(path)
    assert [(d.id, d.text, d.source) for d in documents] == [(f"novel.txt{suffix}:1", "\n\n".join(TEXTS), "novel")]
    assert not broken


def test_parquet_streams_row_groups_with_optional_columns(tmp_path):
    path = tmp_path / "corpus.parquet"
    texts = [f"{n}번째 글이다." for n in range(1500)]
    pq.write_table(pa.table({"n": list(range(1500)), "text": texts}), path, row_group_size=400)
    documents, broken = read(path)
    assert [d.text for d in documents] == texts
    assert [documents[0].id, documents[-1].id] == ["corpus.parquet:1", "corpus.parquet:1500"]
    assert {d.source for d in documents} == {"corpus"}
    assert not broken
    assert max(len(batch.records) for batch in read_batches(path)) < 1500

    pq.write_table(pa.table({"source": ["책", None], "id": [3, 4], "text": TEXTS[:2]}), path)
    assert [(d.id, d.source) for d in read_documents(path)] == [("3", "책"), ("4", "corpus")]


def test_cp949_is_read_where_utf_8_fails(tmp_path):
    (tmp_path / "old.txt").write_bytes(TEXTS[0].encode("cp949"))
    (tmp_path / "old.jsonl").write_bytes(
        json.dumps({"text": TEXTS[2]}, ensure_ascii=False).encode("cp949") + b"\n" + jsonl([{"text": TEXTS[1]}])
    )
    (tmp_path / "mark.txt").write_bytes(TEXTS[0].encode("utf-8-sig"))
    assert [d.text for d in read_documents(tmp_path / "old.txt")] == [TEXTS[0]]
    assert [d.text for d in read_documents(tmp_path / "old.jsonl")] == [TEXTS[2], TEXTS[1]]
    assert [d.text for d in read_documents(tmp_path / "mark.txt")] == [TEXTS[0]]


def test_broken_records_are_reported_with_their_line_and_reason_and_the_rest_is_read(tmp_path):
    path = tmp_path / "mixed.jsonl"
    deep = '{"text": "깊다", "x": ' + "[" * 100_000 + "]" * 100_000 + "}"
    lines = [
        jsonl([{"text": TEXTS[0]}]).strip(),
        b'{"text": "',
        b'{"title": "no text"}',
        b'{"text": null}',
        b'{"text": " \\n "}',
        b"",
        b"\xff\xfe\xff",
        b'["text"]',
        deep.encode(),
        jsonl([{"text": TEXTS[1]}]).strip(),
    ]
    path.write_bytes(b"\r\n".join(lines))
    documents, broken = read(path)
    assert [(d.id, d.text) for d in documents] == [("mixed.jsonl:1", TEXTS[0]), ("mixed.jsonl:10", TEXTS[1])]
    assert [record.record for record in broken] == [2, 3, 4, 5, 7, 8, 9]
    reasons = [record.reason for record in broken]
    assert reasons[0].startswith("bad JSON")
    assert "`text`" in reasons[1]
    assert "null" in reasons[2]
    assert reasons[3] == "the text is empty"
    assert reasons[4] == "the bytes are neither UTF-8 nor CP949"
    assert str(broken[0]).startswith(f"{path}:2: bad JSON")
    assert [d.text for d in read_documents(path)] == TEXTS[:2]


def test_broken_rows_of_parquet_are_reported(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": pa.array([b"\xff\xff", TEXTS[0].encode("cp949"), None], pa.binary())}), path)
    documents, broken = read(path)
    assert [d.text for d in documents] == [TEXTS[0]]
    assert [record.record for record in broken] == [1, 3]


def test_unpaired_surrogates_do_not_cost_the_document(tmp_path):
    path = tmp_path / "half.jsonl"
    path.write_text('{"text": "반쪽 \\ud83d 이모지", "id": 1}\n')
    documents, broken = read(path)
    assert [d.text for d in documents] == ["반쪽 \ud83d 이모지"]
    assert not broken


def test_concatenated_compressed_files_are_read_to_the_end(tmp_path):
    halves = [jsonl([{"text": TEXTS[0]}]), jsonl([{"text": TEXTS[1]}])]
    for suffix in (".gz", ".zst"):
        path = tmp_path / f"parts.jsonl{suffix}"
        path.write_bytes(b"".join(COMPRESS[suffix](half) for half in halves))
        assert [d.text for d in read_documents(path)] == TEXTS[:2]


@pytest.mark.parametrize("name", ["cut.jsonl.gz", "cut.jsonl.zst", "cut.parquet", "cut.txt.zst"])
def test_a_truncated_file_is_an_error_that_names_it(tmp_path, name):
    path = tmp_path / name
    records = [{"text": hashlib.sha256(bytes([n % 256, n // 256])).hexdigest()} for n in range(5000)]
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        path.write_bytes(COMPRESS["." + name.rsplit(".", 1)[1]](jsonl(records)))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CorpusError, match=rf"{name}' is damaged .*: fetch it again"):
        list(read_documents(path))


def test_parquet_without_text_names_its_columns(tmp_path):
    path = tmp_path / "no_text.parquet"
    pq.write_table(pa.table({"body": ["가"], "n": [1]}), path)
    with pytest.raises(CorpusError, match="no column 'text': its columns are body, n"):
        list(read_documents(path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt", "a.parquet"])
def test_consumed_bytes_sum_to_the_file_size(tmp_path, name):
    path = tmp_path / name
    records = [{"text": f"{n}번째 글은 {n * n}자이다."} for n in range(3000)]
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        path.write_bytes(COMPRESS[name.removeprefix("a.jsonl").removeprefix("a.txt")](jsonl(records)))
    batches = list(read_batches(path, batch_bytes=20_000))
    assert sum(batch.file_bytes for batch in batches) == path.stat().st_size
    assert min(batch.file_bytes for batch in batches) >= 0
    numbers = [batch.first_record + n for batch in batches for n in range(len(batch.records))]
    assert numbers == list(range(1, 1 + (1 if name.endswith(".txt") else 3000)))


@pytest.mark.parametrize(("module", "name"), [("pyarrow", "a.parquet"), ("zstandard", "a.jsonl.zst")])
def test_a_missing_package_is_one_sentence_with_the_extra(tmp_path, monkeypatch, module, name):
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(CorpusError, match=rf'needs {module}: pip install "redwhale\[filtering\]"'):
        list(read_documents(tmp_path / name))


def test_inputs_are_files_folders_and_globs_in_a_stable_order(tmp_path):
    for name in [
        "b/two.jsonl",
        "b/one.txt.gz",
        "b/notes.md",
        "b/.hidden/x.txt",
        "b/deep/three.parquet",
        "c[1].jsonl",
        "d.jsonl",
    ]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    names = lambda patterns: [str(path.relative_to(tmp_path)) for path in find_inputs(patterns)]  # noqa: E731
    assert names([tmp_path / "b"]) == ["b/deep/three.parquet", "b/one.txt.gz", "b/two.jsonl"]
    assert names([tmp_path / "d.jsonl", str(tmp_path / "*.jsonl")]) == ["d.jsonl", "c[1].jsonl"]
    assert names([tmp_path / "c[1].jsonl"]) == ["c[1].jsonl"]
    assert names([str(tmp_path / "**" / "t*")]) == ["b/deep/three.parquet", "b/two.jsonl"]
    assert names([str(tmp_path / "b*")]) == names([tmp_path / "b"])


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("missing.jsonl", "missing.jsonl' does not exist: give a file"),
        ("*.parquet", r"\*.parquet' does not exist"),
        ("*.md", r"\*.md' matches no file that ends in one of .jsonl"),
        ("readme.md", "readme.md': its name must end in one of .jsonl"),
        ("empty", "folder .*empty' holds no file that ends in"),
    ],
)
def test_a_pattern_that_gives_nothing_is_named(tmp_path, pattern, message):
    (tmp_path / "readme.md").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "fine.txt").write_text("x")
    with pytest.raises(CorpusError, match=message) as caught:
        find_inputs([tmp_path / "fine.txt", str(tmp_path / pattern)])
    assert "\n" not in str(caught.value)


def test_no_inputs_and_unreadable_paths_are_clear(tmp_path):
    with pytest.raises(CorpusError, match="no inputs are given"):
        find_inputs([])
    for name in ("gone.jsonl", "gone.jsonl.zst", "gone.parquet"):
        with pytest.raises(CorpusError, match=rf"cannot read .*{name}'"):
            list(read_documents(tmp_path / name))
    with pytest.raises(CorpusError, match="must end in one of"):
        list(read_documents(tmp_path / "gone.pdf"))


def test_utf_16_is_read_by_its_byte_order_mark(tmp_path):
    for encoding, mark in (("utf-16-le", b"\xff\xfe"), ("utf-16-be", b"\xfe\xff")):
        (tmp_path / "notepad.txt").write_bytes(mark + TEXTS[0].encode(encoding))
        assert [d.text for d in read_documents(tmp_path / "notepad.txt")] == [TEXTS[0]]
    (tmp_path / "notepad.txt").write_bytes(b"\xff\xfe" + TEXTS[0].encode("utf-16-le") + b"\x00")
    documents, broken = read(tmp_path / "notepad.txt")
    assert not documents
    assert [one.reason for one in broken] == ["the bytes are neither UTF-8 nor CP949"]
