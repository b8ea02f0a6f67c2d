import json
import multiprocessing
import os
import random
import subprocess
import sys
from collections import Counter

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filtering_corpus import ENGLISH, korean, mixed_corpus, outputs

from redwhale.filtering import (
    RULES,
    CorpusError,
    FilterConfig,
    FilterSummary,
    Threshold,
    content_id,
    filter_corpus,
    normalize_text,
    pipeline,
    prepare,
)
from redwhale.filtering.work import WorkFolder, quality
from redwhale.filtering.workers import Workers
from redwhale.filtering.writer import SplitWriter


def rows(folder, split: str) -> list[dict]:
    return [row for path in sorted(folder.glob(f"{split}-*.parquet")) for row in pq.read_table(path).to_pylist()]


def failing_rules(text: str, *, skip: frozenset[str] = frozenset()) -> list[str]:
    document = prepare(normalize_text(text))
    failing = []
    for rule in RULES.values():
        low = rule.minimum if rule.minimum is not None else float("-inf")
        high = rule.maximum if rule.maximum is not None else float("inf")
        if rule.enabled and rule.name not in skip and not low <= rule.score(document) <= high:
            failing.append(rule.name)
    return failing


def grams(text: str) -> set[str]:
    """The 8-grams of a text's characters, white space left out."""
    squeezed = "".join(text.split())
    return {squeezed[start : start + 8] for start in range(max(len(squeezed) - 7, 1))}


def reference(records: list[dict], *, skip: frozenset[str] = frozenset(), jaccard: float = 0.8):
    """Brute force: every document against all texts before it, and what passes against everything better."""
    failed: list[list[str]] = []
    first: dict[str, int] = {}
    for place, record in enumerate(records):
        text = normalize_text(record["text"])
        failed.append(failing_rules(record["text"], skip=skip) + (["exact_duplicate"] if text in first else []))
        first.setdefault(text, place)

    def rank(place: int):
        text = normalize_text(records[place]["text"])
        document = prepare(text)
        scores = {rule.name: rule.score(document) for rule in RULES.values()}
        return -quality(scores), -len(text.encode()), content_id(text)

    stay: list[set[str]] = []
    for place in sorted((place for place, names in enumerate(failed) if not names), key=rank):
        mine = grams(normalize_text(records[place]["text"]))
        if any(len(mine & other) >= jaccard * len(mine | other) for other in stay):
            failed[place].append("near_duplicate")
        else:
            stay.append(mine)
    dropped, failing, unique = Counter(), Counter(), Counter()
    for names in failed:
        failing.update(names)
        if names:
            dropped[names[0]] += 1
            unique[names[0]] += len(names) == 1
    return [record for record, names in zip(records, failed, strict=True) if not names], dropped, failing, unique


def test_kept_documents_and_rule_counts_equal_brute_force(tmp_path):
    records = mixed_corpus(tmp_path / "in")
    summary = filter_corpus(FilterConfig(inputs=[str(tmp_path / "in")], validation_fraction=0.2), tmp_path / "out")
    kept, dropped, failing, unique = reference(records)

    train, validation = rows(tmp_path / "out", "train"), rows(tmp_path / "out", "validation")
    assert sorted(int(row["id"]) for row in train + validation) == [int(record["id"]) for record in kept]
    assert [int(row["id"]) for row in train] == sorted(int(row["id"]) for row in train)
    by_id = {record["id"]: record for record in records}
    for row in train + validation:
        assert row["text"] == normalize_text(by_id[row["id"]]["text"])
        assert row["source"] == by_id[row["id"]]["source"]
        assert row["bytes"] == len(row["text"].encode())
        document = prepare(row["text"])
        for rule in RULES.values():
            assert row[rule.name] == pytest.approx(rule.score(document), rel=1e-6)

    assert len([name for name, count in dropped.items() if count]) >= 5
    for rule in summary.rules:
        assert rule.dropped_documents == dropped[rule.name], rule.name
        assert rule.failing_documents == failing[rule.name], rule.name
        assert rule.unique_documents == unique[rule.name], rule.name
        assert 0 < len(rule.examples) <= 3 if dropped[rule.name] else not rule.examples
    assert dropped["near_duplicate"] > 0
    assert [rule.name for rule in summary.rules[-3:]] == ["exact_duplicate", "near_duplicate", "frequent_lines"]
    assert summary.documents_out == len(kept)
    assert summary.broken_records == 1
    assert "a.jsonl:134: bad JSON" in summary.broken_examples[0]


def test_counts_sum_to_in_minus_out(tmp_path):
    records = mixed_corpus(tmp_path / "in")
    summary = filter_corpus(FilterConfig(inputs=[str(tmp_path / "in")], validation_fraction=0.2), tmp_path / "out")
    read_bytes = sum(len(record["text"].encode()) for record in records)
    train, validation = rows(tmp_path / "out", "train"), rows(tmp_path / "out", "validation")

    assert (summary.documents_in, summary.bytes_in) == (len(records), read_bytes)
    assert (summary.train_documents, summary.validation_documents) == (len(train), len(validation))
    assert summary.train_bytes == sum(len(row["text"].encode()) for row in train)
    assert summary.validation_bytes == sum(len(row["text"].encode()) for row in validation)
    assert summary.documents_out == summary.train_documents + summary.validation_documents
    assert summary.bytes_out == summary.train_bytes + summary.validation_bytes
    dropped_documents = sum(rule.dropped_documents for rule in summary.rules)
    dropped_bytes = sum(rule.dropped_bytes for rule in summary.rules)
    assert dropped_documents == summary.documents_in - summary.documents_out > 0
    taken = summary.bytes_normalized + summary.bytes_of_lines
    assert dropped_bytes + taken == summary.bytes_in - summary.bytes_out
    for field in ("documents_in", "bytes_in", "documents_out", "bytes_out"):
        assert sum(getattr(source, field) for source in summary.sources.values()) == getattr(summary, field)
    assert set(summary.sources) == {"source0", "source1", "source2"}
    saved = msgspec.json.decode((tmp_path / "out" / "summary.json").read_bytes(), type=FilterSummary)
    assert saved == summary


def small_shards(monkeypatch, shard_bytes: int = 4096) -> None:
    """Shards of a few documents, and processes even for a small input."""
    monkeypatch.setattr(pipeline, "_WORKERS_PAY_FROM_BYTES", 0)
    monkeypatch.setattr(pipeline, "MEGABYTE", shard_bytes)
    monkeypatch.setattr("redwhale.filtering.work._BATCH_BYTES", 2048)


@pytest.mark.slow
def test_files_are_byte_identical_for_any_workers_and_shard_sizes(tmp_path, monkeypatch):
    mixed_corpus(tmp_path / "in")
    used, seen = [], set()
    original = pipeline.Workers

    def spy(count):
        used.append(count)
        return original(count)

    monkeypatch.setattr(pipeline, "Workers", spy)
    for workers, shard_bytes in ((1, 1 << 20), (2, 4096), (7, 30_000)):
        small_shards(monkeypatch, shard_bytes)
        config = FilterConfig(
            inputs=[str(tmp_path / "in")], workers=workers, shard_mb=1, validation_fraction=0.2, documents_per_file=50
        )
        filter_corpus(config, tmp_path / f"out{workers}")
        seen.add(tuple(outputs(tmp_path / f"out{workers}").items()))
    assert used == [1, 2, 7]
    assert len(seen) == 1
    names = {name for name, _ in seen.pop()}
    assert {
        "summary.json",
        "report.html",
        "train-00000.parquet",
        "train-00001.parquet",
        "validation-00000.parquet",
    } <= names
    for path in (tmp_path / "out1").glob("*.parquet"):
        metadata = pq.read_metadata(path)
        assert metadata.num_rows <= 50
        assert metadata.row_group(0).column(1).compression == "ZSTD"


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_shards_that_it_lacks(tmp_path, monkeypatch):
    mixed_corpus(tmp_path / "in")
    small_shards(monkeypatch)
    config = FilterConfig(inputs=[str(tmp_path / "in")], workers=2, shard_mb=1, validation_fraction=0.2)
    filter_corpus(config, tmp_path / "whole")
    script = f"""
import os, signal
from redwhale.filtering import FilterConfig, filter_corpus, pipeline
import redwhale.filtering.work as work
pipeline._WORKERS_PAY_FROM_BYTES, pipeline.MEGABYTE, work._BATCH_BYTES = 0, 4096, 2048
if __name__ == "__main__":
    calls = []
    def stop(size):
        calls.append(size)
        if len(calls) == 9:
            os.kill(os.getpid(), signal.SIGKILL)
    config = FilterConfig(inputs=[{str(tmp_path / "in")!r}], workers=2, shard_mb=1, validation_fraction=0.2)
    filter_corpus(config, {str(tmp_path / "out")!r}, progress=stop)
"""
    (tmp_path / "killed.py").write_text(script)
    killed = subprocess.run([sys.executable, str(tmp_path / "killed.py")], capture_output=True, check=False)
    assert killed.returncode == -9
    measured = tmp_path / "out" / "work" / "measured"
    before = {path.name: path.stat().st_mtime_ns for path in measured.glob("*.parquet")}
    assert len(before) >= 9
    after: dict[str, int] = {}
    remove = WorkFolder.remove

    def look(folder) -> None:
        after.update({path.name: path.stat().st_mtime_ns for path in folder.measured.glob("*.parquet")})
        remove(folder)

    monkeypatch.setattr(WorkFolder, "remove", look)
    reported: list[int] = []
    filter_corpus(config, tmp_path / "out", progress=reported.append)
    assert before.items() <= after.items()
    assert len(after) > len(before)
    assert sum(reported) == sum(path.stat().st_size for path in (tmp_path / "in").iterdir())
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")


def test_other_settings_start_from_the_beginning(tmp_path):
    mixed_corpus(tmp_path / "in", documents=60)
    inputs = [str(tmp_path / "in")]

    def stop(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        filter_corpus(FilterConfig(inputs=inputs), tmp_path / "out", say=stop)
    assert list((tmp_path / "out" / "work" / "measured").glob("*.parquet"))
    config = FilterConfig(inputs=inputs, thresholds={"length": Threshold(minimum=200)})
    assert filter_corpus(config, tmp_path / "out") == filter_corpus(config, tmp_path / "fresh")
    assert outputs(tmp_path / "out") == outputs(tmp_path / "fresh")


def test_small_inputs_start_no_workers(tmp_path, monkeypatch):
    mixed_corpus(tmp_path / "in", documents=60)
    monkeypatch.setattr("redwhale.filtering.workers.ProcessPoolExecutor", None)
    filter_corpus(FilterConfig(inputs=[str(tmp_path / "in")], workers=4), tmp_path / "out")


def test_validation_is_chosen_by_content_and_not_by_order(tmp_path):
    rng = random.Random(1)
    texts = [text for text in (korean(rng) for _ in range(1500)) if not failing_rules(text)][:1000]
    chosen = []
    for name in ("forward", "backward"):
        texts.reverse()
        (tmp_path / f"{name}.jsonl").write_text(
            "\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8"
        )
        config = FilterConfig(inputs=[str(tmp_path / f"{name}.jsonl")], validation_fraction=0.1)
        filter_corpus(config, tmp_path / name)
        chosen.append({row["text"] for row in rows(tmp_path / name, "validation")})
    assert chosen[0] == chosen[1] == {text for text in texts if content_id(text) / 2**64 < 0.1}
    # Binomial(1000, 0.1): five standard deviations are 47.
    assert 53 <= len(chosen[0]) <= 147


def test_thresholds_change_and_disable_rules(tmp_path):
    records = mixed_corpus(tmp_path / "in")
    open_rules = frozenset({"length", "grammar_ratio", "sentence_lines", "boilerplate_lines"})
    config = FilterConfig(
        inputs=[str(tmp_path / "in")],
        thresholds={
            "length": Threshold(minimum=float("-inf")),
            "sentence_lines": Threshold(minimum=0),
            "boilerplate_lines": Threshold(maximum=float("inf")),
            "grammar_ratio": Threshold(enabled=False),
        },
    )
    summary = filter_corpus(config, tmp_path / "out")
    kept, dropped, _, _ = reference(records, skip=open_rules)
    assert summary.documents_out == len(kept) > len(reference(records)[0])
    by_name = {rule.name: rule for rule in summary.rules}
    assert by_name["length"].dropped_documents == by_name["grammar_ratio"].failing_documents == 0
    assert by_name["length"].threshold.maximum == RULES["length"].maximum
    assert {name: rule.dropped_documents for name, rule in by_name.items() if rule.dropped_documents} == dropped


def test_korean_read_in_the_wrong_encoding_is_kept_as_korean(tmp_path):
    text = korean(random.Random(2))
    wrong = text.encode("cp949").decode("latin-1")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": wrong}), encoding="utf-8")
    config = FilterConfig(inputs=[str(tmp_path / "a.jsonl")], validation_fraction=0)
    summary = filter_corpus(config, tmp_path / "out")
    assert summary.repaired_encodings == 1
    assert [row["text"] for row in rows(tmp_path / "out", "train")] == [text]


def test_progress_sums_to_the_size_of_the_inputs(tmp_path):
    mixed_corpus(tmp_path / "in")
    reported: list[int] = []
    filter_corpus(FilterConfig(inputs=[str(tmp_path / "in")]), tmp_path / "out", progress=reported.append)
    assert sum(reported) == sum(path.stat().st_size for path in (tmp_path / "in").iterdir())


def test_a_rerun_replaces_the_files_of_the_run_before(tmp_path):
    mixed_corpus(tmp_path / "in")
    out = tmp_path / "out"
    filter_corpus(FilterConfig(inputs=[str(tmp_path / "in")], documents_per_file=20), out)
    (out / "mine.txt").write_text("not ours")
    assert len(list(out.glob("train-*"))) > 1
    filter_corpus(FilterConfig(inputs=[str(tmp_path / "in")]), out)
    assert sorted(path.name for path in out.glob("train-*")) == ["train-00000.parquet"]
    assert (out / "mine.txt").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_leaves_no_process_and_no_output_but_what_resuming_needs(tmp_path, monkeypatch, workers):
    mixed_corpus(tmp_path / "in")
    small_shards(monkeypatch)
    monkeypatch.setattr("redwhale.filtering.writer._ROW_GROUP_DOCUMENTS", 2)
    config = FilterConfig(inputs=[str(tmp_path / "in")], workers=workers, shard_mb=1)
    calls = 0

    def interrupt(_: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        filter_corpus(config, tmp_path / "out", progress=interrupt)
    assert multiprocessing.active_children() == []
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["work"]

    written = SplitWriter.write

    def interrupt_writing(writer, document) -> None:
        written(writer, document)
        if list((tmp_path / "out").glob("*.tmp")):
            raise KeyboardInterrupt

    monkeypatch.setattr(SplitWriter, "write", interrupt_writing)
    with pytest.raises(KeyboardInterrupt):
        filter_corpus(config, tmp_path / "out")
    assert multiprocessing.active_children() == []
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["work"]


def test_a_dead_worker_is_one_clear_sentence(tmp_path):
    with pytest.raises(CorpusError, match=r"a filter worker process died.*set workers = 1"):
        list(Workers(2).map(os._exit, [3, 3]))


def test_nothing_left_names_the_rule_that_dropped_most(tmp_path):
    lines = [json.dumps({"text": f"{ENGLISH} {n}"}) for n in range(3)] + [json.dumps({"text": "짧다"})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(CorpusError, match=r"no document is left of 4: rule 'korean_ratio' .* dropped most, 3"):
        filter_corpus(FilterConfig(inputs=[str(tmp_path / "a.jsonl")]), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    (tmp_path / "a.jsonl").write_text("{oops\n")
    with pytest.raises(CorpusError, match=r"no documents; the first of 1 broken records is .*a.jsonl:1: bad JSON"):
        filter_corpus(FilterConfig(inputs=[str(tmp_path / "a.jsonl")]), tmp_path / "out")


def test_a_missing_input_is_one_clear_sentence(tmp_path):
    with pytest.raises(CorpusError, match=r"^input '.*nowhere.jsonl' does not exist: give a file") as caught:
        filter_corpus(FilterConfig(inputs=[str(tmp_path / "nowhere.jsonl")]), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_inputs_inside_the_output_folder_are_refused_and_not_deleted(tmp_path):
    pq.write_table(pa.table({"text": [korean(random.Random(3))]}), tmp_path / "train-00000.parquet")
    with pytest.raises(CorpusError, match="lies in the output folder"):
        filter_corpus(FilterConfig(inputs=[str(tmp_path)]), tmp_path)
    assert (tmp_path / "train-00000.parquet").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": -1}, "workers must be 0"),
        ({"validation_fraction": 1.0}, "validation_fraction must be at least 0 and below 1, not 1.0"),
        ({"documents_per_file": 0}, "documents_per_file must be at least 1"),
        ({"engine": "spark"}, "engine must be one of local, ray, not 'spark'"),
        ({"memory_gb": 0.1}, "memory_gb must be at least 0.25, not 0.1"),
        ({"shard_mb": 0}, "shard_mb must be from 1 to 128, not 0"),
        ({"duplicates": {"jaccard": 0.2}}, r"duplicates.jaccard must be from 0.5 to 1 \(off\), not 0.2"),
        ({"duplicates": {"block_documents": 60}}, "block_documents must be from 2 to line_documents = 50, not 60"),
        ({"examples_per_rule": -1}, "examples_per_rule must be at least 0"),
        ({"thresholds": {"korean": {}}}, "unknown rule 'korean': the rules are length, korean_ratio"),
        (
            {"thresholds": {"symbol_ratio": {"minimum": 0.5}}},
            "symbol_ratio lets nothing pass: minimum 0.5, maximum 0.1",
        ),
        ({"thresholds": {"length": {"minimum": float("nan")}}}, "length lets nothing pass: minimum nan"),
        ({"thresholds": {"length": {"min": 3}}}, "unknown field `min`"),
        ({"input": []}, "unknown field `input`"),
    ],
)
def test_bad_settings_are_refused_with_the_value(settings, message):
    with pytest.raises(ValueError, match=message):
        msgspec.convert({"inputs": ["x"], **settings}, FilterConfig)


def test_the_package_imports_with_core_dependencies_only():
    script = """
import sys
for name in ("torch", "pyarrow", "duckdb", "zstandard", "ahocorasick_rs", "fastwarc", "resiliparse", "ray"):
    sys.modules[name] = None
import redwhale.filtering as filtering
print(len(filtering.RULES))
loaded = {name.partition(".")[0] for name in sys.modules}
print(sorted(loaded & {"torch", "pyarrow", "zstandard", "tokenizers", "transformers"}, key=str))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    count, loaded = result.stdout.splitlines()
    assert int(count) == len(RULES)
    # Blocked names stay in sys.modules as None; nothing else may have come in.
    assert loaded == "['pyarrow', 'torch', 'zstandard']"


def test_personal_data_is_masked_in_what_is_kept_and_counted(tmp_path):
    text = korean(random.Random(5)) + " 문의는 010-1234-5678이나 whale@naver.com으로 하면 된다."
    spam = "카지노사이트 추천 꽁머니 먹튀검증 가입코드 안전놀이터 010-9876-5432로 문의하면 바로 지급해 드립니다."
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in (text, spam)))
    config = FilterConfig(inputs=[str(tmp_path / "a.jsonl")], validation_fraction=0)
    summary = filter_corpus(config, tmp_path / "out")
    (row,) = rows(tmp_path / "out", "train")
    assert row["text"].endswith("문의는 <|phone|>이나 <|email|>으로 하면 된다.")
    assert summary.masked == {"phone": 1, "email": 1}
    unmasked = FilterConfig(inputs=config.inputs, validation_fraction=0, mask=())
    assert filter_corpus(unmasked, tmp_path / "plain").masked == {}
    assert rows(tmp_path / "plain", "train")[0]["text"] == normalize_text(text)


def test_html_texts_are_extracted_on_request(tmp_path):
    text = korean(random.Random(6))
    page = f"<html><body><nav><a href='/'>로그인</a></nav><article><h1>고래</h1><p>{text}</p></article></body></html>"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": page}))
    config = FilterConfig(inputs=[str(tmp_path / "a.jsonl")], validation_fraction=0, html=True)
    filter_corpus(config, tmp_path / "out")
    (row,) = rows(tmp_path / "out", "train")
    assert text in row["text"]
    assert "로그인" not in row["text"]
    assert "<" not in row["text"]


def test_writing_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": korean(random.Random(4))}), encoding="utf-8")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(CorpusError, match=r'filtering needs pyarrow: pip install "redwhale\[filtering\]"'):
        filter_corpus(FilterConfig(inputs=[str(tmp_path / "a.jsonl")]), tmp_path / "out")
