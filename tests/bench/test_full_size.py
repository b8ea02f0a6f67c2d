"""bench/full_size.py run as its user would, on a CPU: what it writes, that it goes on, and what it says of peers."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A copy of the scripts, so that results of the project stay as they are."""
    copied = tmp_path_factory.mktemp("project") / "bench"
    return Path(shutil.copytree(BENCH, copied, ignore=shutil.ignore_patterns("results", "work", "__pycache__")))


def run(folder: Path, *arguments: str) -> tuple[str, dict]:
    command = [sys.executable, folder / "full_size.py", "--device", "cpu", "--scale", "tiny", "--steps", "1"]
    fixed = ["--micro-batch", "1", "--activations", "recompute-cheap"]
    done = subprocess.run([*command, *fixed, *arguments], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "results" / "full_size-cpu-tiny.json").read_text())


def test_the_whole_path_runs_goes_on_where_it_stopped_and_names_what_peers_cannot(folder):
    out, first = run(folder, "--stages", "lora", "--frozen", "stored")
    assert list(first["cases"]) == ["lora/redwhale"]
    ours = first["cases"]["lora/redwhale"]
    assert ours["plan"]["fits"]
    assert ours["plan"]["frozen"] == "stored"
    assert ours["planned_bytes"] == sum(ours["plan"]["peak"].values())
    assert ours["tokens_per_second"] > 0
    assert ours["finite"]
    assert len(ours["losses"]) == 4  # two to warm up, one that is timed, one that is profiled
    assert 0 < sum(ours["kernels"].values()) <= 1.001
    assert ours["peak_bytes"] is ours["mfu"] is None  # a GPU's
    assert first["command"].startswith("python bench/full_size.py --device cpu --scale tiny")

    # As if the next case had been cut off: what there is is kept, what failed is tried again, the rest is added.
    file = folder / "results" / "full_size-cpu-tiny.json"
    cut = {**first["cases"], "lora/redwhale-fp8": {"failed": "Killed"}}
    file.write_text(json.dumps({**first, "cases": cut}))
    out, second = run(folder, "--stages", "lora", "--peers", "transformers-liger")
    assert second["cases"]["lora/redwhale"] == ours
    assert "lora/redwhale {" not in out
    fp8 = second["cases"]["lora/redwhale-fp8"]
    assert fp8["plan"]["frozen"] == "fp8"
    assert fp8["finite"]
    assert fp8["losses"][0] == pytest.approx(ours["losses"][0], rel=0.01)
    assert second["times_faster"]["lora"]["fp8_than_stored"] == pytest.approx(
        fp8["tokens_per_second"] / ours["tokens_per_second"], abs=1e-3
    )
    peer = second["cases"]["lora/transformers-liger"]
    if "skipped" in peer:
        assert peer == {"skipped": "liger-kernel is not installed"}
        assert "lora/transformers-liger {'skipped': 'liger-kernel is not installed'}" in out
        assert second["times_faster"]["lora"]["stored_than_fastest_peer"] is None


def test_without_a_gpu_it_says_what_runs_here(folder):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, folder / "full_size.py"], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "no GPU is at hand: --device cpu --scale tiny runs the same path" in done.stderr
