import json

import msgspec
import pytest
from object_stores import _gcs_server, _s3_server, gcs, s3

from redwhale.engine import load_recipe, run_recipe
from redwhale.engine.cli import main
from redwhale.engine.copies import fetch, publish
from redwhale.engine.errors import RecipeError, RunError
from redwhale.engine.run_folder import RunFolder, StepResult
from redwhale.engine.shards import TokenShards
from redwhale.engine.steps import pack
from redwhale.engine.steps.context import Context
from redwhale.filtering import read_documents
from redwhale.filtering.storage import file_system

__all__ = ["_gcs_server", "_s3_server", "gcs", "s3"]


def step_of(root, files: dict[str, bytes], digest: str = "a"):
    """A finished step `pack` with these outputs, and one file that is none."""
    step = RunFolder(root).step("pack")
    folder = step.begin(digest)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "scratch.txt").write_bytes(b"not an output")
    step.finish(digest, {}, {}, StepResult(summary={}, outputs=list(files), went_in="", came_out=""), 0.0)
    return step.path


FILES = {"train-00000.bin": bytes(range(256)) * 99, "train-00000.idx": b"offsets", "model/config.json": b"{}"}


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(params=["s3", "gcs"])
def url(request) -> str:
    return request.getfixturevalue(request.param) + "/runs/pack"


def test_what_is_fetched_is_what_was_published(url, tmp_path):
    step = step_of(tmp_path / "run", FILES)
    (tmp_path / "scratch").mkdir()
    sent, got = [], []
    size = publish(step, url, tmp_path / "scratch", sent.append)
    fetch(url, tmp_path / "there", got.append)
    manifest = (step / "manifest.json").read_bytes()
    assert contents(tmp_path / "there") == {**FILES, "manifest.json": manifest, ".lock": b""}
    assert size == sum(sent) == sum(got) == sum(map(len, FILES.values()))
    assert RunFolder(tmp_path).step("there").is_current("a")


def test_a_copy_without_a_manifest_is_not_whole_and_an_interrupted_one_goes_on(s3, tmp_path, monkeypatch):
    step = step_of(tmp_path / "run", FILES)
    (tmp_path / "scratch").mkdir()
    publish(step_of(tmp_path / "old", {"old.bin": b"old", **FILES}), f"{s3}/p", tmp_path / "old")
    system, root = file_system(f"{s3}/p")
    put, names = system.put_file, []

    def put_or_fail(local, remote, **options):
        if remote.endswith(".idx") and "failed" not in names:
            names.append("failed")
            raise OSError("the connection is gone")
        names.append(remote.rpartition("/p/")[2])
        return put(local, remote, **options)

    monkeypatch.setattr("redwhale.engine.copies._THREADS", 1)
    monkeypatch.setattr(system, "put_file", put_or_fail)
    with pytest.raises(RunError, match=r"cannot write 's3://.*/p': the connection is gone"):
        publish(step, f"{s3}/p", tmp_path / "scratch")
    with pytest.raises(RunError, match=r"has no manifest.json: nothing was published there, or not to its end"):
        fetch(f"{s3}/p", tmp_path / "there")
    before = list(names)
    publish(step, f"{s3}/p", tmp_path / "scratch")
    sent = names[len(before) :]
    assert set(before) - {"failed"} | set(sent) == set(FILES)
    assert not set(before) & set(sent)
    assert {name.removeprefix(f"{root}/") for name in system.find(root)} == {*FILES, "manifest.json"}
    fetch(f"{s3}/p", tmp_path / "there")
    assert contents(tmp_path / "there").items() >= FILES.items()


def test_an_interrupted_fetch_goes_on_inside_of_a_file(s3, tmp_path, monkeypatch):
    (tmp_path / "scratch").mkdir()
    publish(step_of(tmp_path / "run", FILES), f"{s3}/p", tmp_path / "scratch")
    there = tmp_path / "there"
    there.mkdir()
    (there / "train-00000.bin.fetching").write_bytes(FILES["train-00000.bin"][:10_000])
    system, _ = file_system(f"{s3}/p")
    begins, cat = [], system.cat_file

    def watched(path, start=None, end=None, **options):
        if path.endswith(".bin"):
            begins.append(start)
        return cat(path, start=start, end=end, **options)

    monkeypatch.setattr(system, "cat_file", watched)
    fetch(f"{s3}/p", there)
    assert begins == [10_000]
    assert contents(there).items() >= FILES.items()
    fetch(f"{s3}/p", there)
    assert begins == [10_000]


def test_what_an_older_fetch_left_is_not_taken_for_the_new(s3, tmp_path):
    (tmp_path / "scratch").mkdir()
    publish(step_of(tmp_path / "run", FILES), f"{s3}/p", tmp_path / "scratch")
    there = tmp_path / "there"
    there.mkdir()
    (there / "train-00000.idx").write_bytes(b"OFFSETS")  # as long as the new one
    (there / "train-00000.bin.fetching").write_bytes(b"older" * 100)
    got: list[int] = []
    fetch(f"{s3}/p", there, got.append)
    assert contents(there).items() >= FILES.items()
    assert sum(got) == sum(map(len, FILES.values()))


def test_a_damaged_copy_is_refused_and_not_kept(s3, tmp_path):
    (tmp_path / "scratch").mkdir()
    publish(step_of(tmp_path / "run", FILES), f"{s3}/p", tmp_path / "scratch")
    system, root = file_system(f"{s3}/p")
    system.pipe_file(f"{root}/train-00000.idx", b"offsetz")
    with pytest.raises(RunError, match=r"train-00000.idx does not match its checksum: it is damaged, publish"):
        fetch(f"{s3}/p", tmp_path / "there")
    assert not [path for path in (tmp_path / "there").iterdir() if "idx" in path.name or "manifest" in path.name]
    manifest = json.loads(system.cat_file(f"{root}/manifest.json"))
    manifest["outputs"]["../out"] = {"bytes": 1, "sha256": ""}
    system.pipe_file(f"{root}/manifest.json", json.dumps(manifest).encode())
    with pytest.raises(RunError, match="leads out of the folder"):
        fetch(f"{s3}/p", tmp_path / "other")


def test_a_folder_of_another_step_is_left_alone(s3, tmp_path):
    (tmp_path / "scratch").mkdir()
    publish(step_of(tmp_path / "run", FILES), f"{s3}/p", tmp_path / "scratch")
    other = step_of(tmp_path / "other", {"train-00000.bin": b"other"})
    with pytest.raises(RunError, match="holds another pack than s3://"):
        fetch(f"{s3}/p", other)
    assert (other / "train-00000.bin").read_bytes() == b"other"
    busy = tmp_path / "busy"
    with RunFolder(busy).locked(), pytest.raises(RunError, match="busy is in use by another redwhale process"):
        fetch(f"{s3}/p", busy)


def test_a_recipe_reads_from_s3_and_publishes_there_what_other_machines_fetch(s3, tiny_root, tmp_path, capsys):
    system, root = file_system(s3)
    system.put(str(tiny_root / "data" / "korean") + "/", f"{root}/korean/", recursive=True)
    overrides = [
        f'runs="{tmp_path}/runs"',
        f'filter.inputs=["{s3}/korean/*.jsonl"]',
        f'filter.output="{s3}/filter"',
        f'pack.output="{s3}/pack"',
    ]
    recipe = load_recipe(tiny_root / "tiny.toml", overrides)
    said: list[str] = []
    for step in ("filter", "tokenizer", "pack"):
        run_recipe(recipe, only=step, say=said.append)
    assert [line.partition(":")[0] for line in said] == [
        *("filter", "published/filter", "tokenizer", "pack", "published/pack")
    ]
    assert main(["fetch", f"{s3}/pack", str(tmp_path / "cache" / "pack")]) == 0
    assert "all checked" in capsys.readouterr().out
    packed = TokenShards.open(recipe.run_dir / "pack", "train")
    assert TokenShards.open(tmp_path / "cache" / "pack", "train", verify=True).manifests == packed.manifests
    again: list[str] = []
    run_recipe(recipe, only="pack", say=again.append)
    assert again == ["pack: up to date", "published/pack: up to date"]
    # Another address copies the shards there, and packs nothing again; a changed input of the store filters again.
    moved = msgspec.structs.replace(recipe, pack=msgspec.structs.replace(recipe.pack, output=f"{s3}/second"))
    again.clear()
    run_recipe(moved, only="pack", say=again.append)
    assert again[0] == "pack: up to date"
    assert "up to date" not in again[1]
    # On a cluster packing reads the copy, as long as it is one.
    on_ray = msgspec.structs.replace(recipe, pack=msgspec.structs.replace(recipe.pack, engine="ray"))
    local, remote = (pack._corpora(Context.create(one))["train"] for one in (recipe, on_ray))
    assert [str(file) for (file,) in remote] == [f"{s3}/filter/{file.name}" for (file,) in local]
    for (mine,), (theirs,) in zip(local, remote, strict=True):
        assert list(read_documents(theirs)) == list(read_documents(mine))
    manifest = system.cat_file(f"{root}/filter/manifest.json")
    system.rm_file(f"{root}/filter/manifest.json")
    with pytest.raises(RunError, match="filter is no copy of .* as it is now: run `redwhale filter` to publish it"):
        pack._corpora(Context.create(on_ray))
    system.pipe_file(f"{root}/filter/manifest.json", manifest)
    system.pipe_file(f"{root}/korean/bad.jsonl", b'{"text": "x"}')
    again.clear()
    run_recipe(recipe, only="filter", say=again.append)
    assert "up to date" not in again[0]
    assert main(["fetch", f"{s3}/nothing", str(tmp_path / "none")]) == 2
    assert "nothing was published there" in capsys.readouterr().err


def test_an_output_that_is_no_address_is_refused_before_any_work(tiny_root, tmp_path):
    recipe = load_recipe(tiny_root / "tiny.toml", [f'runs="{tmp_path}"', 'filter.output="/data/filter"'])
    with pytest.raises(RecipeError, match=r"filter.output = '/data/filter' is no address with a scheme"):
        run_recipe(recipe, only="filter")
