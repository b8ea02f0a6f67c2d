import json
import os

import pytest

from redwhale.engine.errors import RunError
from redwhale.engine.run_folder import RunFolder, StepResult, sha256_file


def finish(step, digest, content=b"data"):
    folder = step.begin(digest)
    (folder / "out.bin").write_bytes(content)
    step.finish(digest, {"key": 1}, {"in": "hash"}, StepResult({"n": 1}, ["out.bin"], "in", "out"), 1.5)


def test_a_finished_step_is_current_for_its_digest_only(tmp_path):
    step = RunFolder(tmp_path).step("train/1-embed")
    assert not step.is_current("a")
    finish(step, "a")
    assert step.is_current("a")
    assert not step.is_current("b")
    manifest = step.require()
    assert manifest["outputs"] == {"out.bin": {"bytes": 4, "sha256": sha256_file(step.path / "out.bin")}}
    assert (manifest["config"], manifest["inputs"], manifest["summary"]) == ({"key": 1}, {"in": "hash"}, {"n": 1})


def test_an_interrupted_step_goes_on_in_its_folder(tmp_path):
    step = RunFolder(tmp_path).step("pack")
    (step.begin("a") / "half").write_text("x")
    assert (step.begin("a") / "half").exists()
    assert step.manifest() is None


def test_work_begun_with_another_digest_is_set_aside_not_mixed(tmp_path):
    step = RunFolder(tmp_path).step("pack")
    (step.begin("a") / "half").write_text("x")
    assert list(step.begin("b").glob("half")) == []
    assert (tmp_path / "pack.partial.previous" / "half").exists()


def test_a_result_that_is_replaced_is_kept_as_previous(tmp_path):
    step = RunFolder(tmp_path).step("pack")
    finish(step, "a", b"old")
    finish(step, "b", b"new")
    assert (step.path / "out.bin").read_bytes() == b"new"
    assert (tmp_path / "pack.previous" / "out.bin").read_bytes() == b"old"


def test_a_truncated_or_missing_output_is_an_error_not_a_silent_redo(tmp_path):
    step = RunFolder(tmp_path).step("pack")
    finish(step, "a")
    (step.path / "out.bin").write_bytes(b"dat")
    with pytest.raises(RunError, match="has 3 bytes, its manifest says 4 bytes: it is truncated"):
        step.is_current("a")
    (step.path / "out.bin").unlink()
    with pytest.raises(RunError, match="is missing"):
        step.is_current("a")


def test_file_hashes_follow_the_content_and_not_the_time(tmp_path, monkeypatch):
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    file = tmp_path / "corpus.txt"
    file.write_text("one")
    first = run.file_hash(file)
    os.utime(file, (1, 1))
    assert run.file_hash(file) == first
    file.write_text("two")
    assert run.file_hash(file) == sha256_file(file) != first
    # Unchanged files are not read again, in a later process either.
    monkeypatch.setattr("redwhale.engine.run_folder.sha256_file", lambda path: pytest.fail("read again"))
    assert RunFolder(run.path).file_hash(file) != first


def test_a_second_process_is_turned_away(tmp_path):
    with RunFolder(tmp_path).locked(), pytest.raises(RunError, match="in use by another redwhale"):
        RunFolder(tmp_path).locked().__enter__()
    with RunFolder(tmp_path).locked():
        pass


def test_a_damaged_manifest_is_named(tmp_path):
    step = RunFolder(tmp_path).step("pack")
    finish(step, "a")
    (step.path / "manifest.json").write_text(json.dumps({"digest": "a"})[:-4])
    with pytest.raises(RunError, match=r"manifest\.json is damaged"):
        step.is_current("a")
