import gzip
import importlib
import json
import pickle
import random
import sys
import tempfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from filtering_corpus import korean, mixed_corpus, outputs
from object_stores import _gcs_server, _s3_server, gcs, s3, upload

from redwhale.filtering import (
    CorpusError,
    FilterConfig,
    RemoteFile,
    filter_corpus,
    find_inputs,
    pipeline,
    read_documents,
    storage,
)
from redwhale.filtering.shared_work import SharedWorkFolder

__all__ = ["_gcs_server", "_s3_server", "gcs", "s3"]


@pytest.fixture(params=["s3", "gcs"])
def bucket(request) -> str:
    return request.getfixturevalue(request.param)


def test_files_of_every_kind_read_as_they_do_from_the_disk(bucket, tmp_path):
    rng = random.Random(0)
    records = [{"id": str(n), "text": korean(rng) * 30, "source": "원본"} for n in range(60)]
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records).encode()
    folder = tmp_path / "corpus"
    (folder / "b").mkdir(parents=True)
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "b" / "c.jsonl.zst").write_bytes(zstandard.compress(lines))
    (folder / "b" / "d.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "e.parquet").touch()
    pq.write_table(pa.Table.from_pylist(records), folder / "e.parquet")
    (folder / "f.txt").write_text(records[0]["text"], encoding="utf-8")
    for unread in (".hidden.jsonl", "b/notes.md", ".cache/x.jsonl"):
        path = folder / unread
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(lines)
    upload(folder, f"{bucket}/corpus")
    local, remote = find_inputs([folder]), find_inputs([f"{bucket}/corpus"])
    assert [file.name for file in remote] == [file.name for file in local]
    assert [file.stat().st_size for file in remote] == [file.stat().st_size for file in local]
    assert [list(read_documents(file)) for file in remote] == [list(read_documents(file)) for file in local]
    assert find_inputs([f"{bucket}/corpus/b/*.zst", f"{bucket}/corpus/**/*.jsonl.*"]) == remote[1:3]
    assert find_inputs([f"{bucket}/corpus/a.jsonl", f"{bucket}/corpus"]) == remote
    below = [[file.name for file in find_inputs([f"{place}/*"])] for place in (f"{bucket}/corpus", folder)]
    assert below[0] == below[1]


def test_a_changed_file_has_another_version(bucket):
    system, root = storage.file_system(bucket)
    versions = []
    for content in (b'{"text": "a"}', b'{"text": "b"}'):
        system.pipe_file(f"{root}/x.jsonl", content)
        (file,) = find_inputs([f"{bucket}/x.jsonl"])
        versions.append(storage.version_of(file))
    assert versions[0] != versions[1]
    assert all(versions)


@pytest.mark.slow
def test_the_filter_keeps_the_same_documents_of_files_in_s3(s3, tmp_path, monkeypatch):
    mixed_corpus(tmp_path / "in")
    upload(tmp_path / "in", f"{s3}/in")
    monkeypatch.setattr(pipeline, "_WORKERS_PAY_FROM_BYTES", 0)
    for name, inputs in (("local", str(tmp_path / "in")), ("remote", f"{s3}/in/*")):
        filter_corpus(FilterConfig(inputs=[inputs], workers=2, validation_fraction=0.2), tmp_path / name)
    kept = [
        {name: digest for name, digest in outputs(tmp_path / run).items() if name.endswith(".parquet")}
        for run in ("local", "remote")
    ]
    assert kept[0] == kept[1]
    assert kept[0]


def test_what_cannot_be_read_is_one_sentence(s3, monkeypatch):
    with pytest.raises(CorpusError, match="input 's3://.*/nothing' does not exist"):
        find_inputs([f"{s3}/nothing"])
    with pytest.raises(CorpusError, match="cannot read 's3://no-such-bucket-anywhere/x': .*bucket does not exist"):
        find_inputs(["s3://no-such-bucket-anywhere/x"])
    with pytest.raises(CorpusError, match="cannot read 'ftps9://host/x': Protocol not known"):
        find_inputs(["ftps9://host/x"])
    system, root = storage.file_system(s3)
    system.pipe_file(f"{root}/x.pdf", b"%PDF")
    with pytest.raises(CorpusError, match=r"holds no file that ends in one of \.jsonl"):
        find_inputs([s3])
    gone = RemoteFile(f"{s3}/gone.jsonl", 10, "")
    with pytest.raises(CorpusError, match="cannot read 's3://.*/gone.jsonl'"):
        list(read_documents(gone))
    system.pipe_file(f"{root}/short.jsonl.zst", zstandard.compress(b'{"text": "x"}' * 999)[:-9])
    with pytest.raises(CorpusError, match=r"short.jsonl.zst' is damaged"):
        list(read_documents(find_inputs([f"{s3}/short.jsonl.zst"])[0]))


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_package_names_the_extra(scheme, package, monkeypatch):
    registry = importlib.import_module("fsspec.registry")._registry
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(registry, scheme, raising=False)
    with pytest.raises(CorpusError, match=rf'^{scheme}:// needs {package}: pip install "redwhale\[cloud\]"$'):
        find_inputs([f"{scheme}://bucket/x"])


def test_an_exchange_never_deletes_what_it_did_not_write(s3, tmp_path):
    system, root = storage.file_system(s3)
    system.pipe_file(f"{root}/precious/corpus.jsonl", b"{}")
    folder = SharedWorkFolder(tmp_path / "work", f"{s3}/precious")
    with pytest.raises(CorpusError, match="precious' holds files of something else: name a folder that is empty"):
        folder.open({})
    assert system.find(root) == [f"{root}/precious/corpus.jsonl"]


def test_an_exchange_goes_on_with_its_own_run_and_forgets_another(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first = SharedWorkFolder(tmp_path / "first", f"{s3}/x")
    first.open({"run": 1})
    (first.path / "measured" / "0000000-000000.parquet").write_bytes(b"measured")
    first.keep(first.path / "measured" / "0000000-000000.parquet")
    worker = pickle.loads(pickle.dumps(first))
    assert worker.path != first.path
    assert worker.shards(0) == ["0000000-000000"]
    assert worker.need("measured/0000000-000000.parquet").read_bytes() == b"measured"
    assert worker.find("bounds.json") is None
    worker.forget()
    second = SharedWorkFolder(tmp_path / "second", f"{s3}/x")
    second.open({"run": 1})
    second.gather("measured")
    assert second.shards(0) == ["0000000-000000"]
    second.open({"run": 2})
    assert pickle.loads(pickle.dumps(second)).shards(0) == []
    second.remove()
    assert storage.file_system(s3)[0].find(f"{s3}/x") == []
