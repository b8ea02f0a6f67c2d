"""`torchrun` on a recipe: the command line in two processes, killed and started again."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from redwhale.engine.cli import main
from redwhale.model import load_model

TESTS = Path(__file__).resolve().parents[1]
STAGES = ["1-embed-head", "2-odd", "3-even", "4-lora"]
DEATHS = [(1, "step", 9), (0, "write", 9), (0, "name", 3)]


def torchrun(*arguments: str, restarts: int = 0, deaths: list | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), str(TESTS / "distributed_launch.py"), *arguments]
    environment = {**os.environ, "DEATHS": json.dumps(deaths or []), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def same(folder: Path, other: Path, tolerance: float) -> bool:
    found, wanted = (load_file(path / "model.safetensors") for path in (folder, other))
    return all((found[name] - tensor).norm() <= tolerance * tensor.norm() for name, tensor in wanted.items())


@pytest.mark.slow
def test_a_run_whose_processes_are_killed_ends_with_the_losses_and_weights_of_one_process(
    finished, tiny_root, tmp_path
):
    """Killed in a step and within writes, restarted by torchrun, without a step that is lost or done twice."""
    shutil.copytree(finished.run_dir, tmp_path / "tiny", ignore=lambda _, names: {"train", "sft"} & set(names))
    command = ("run", str(tiny_root / "tiny.toml"), f"runs={tmp_path}")
    done = torchrun(*command, restarts=len(DEATHS), deaths=DEATHS)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr.count("failed (exitcode: -9)") == len(DEATHS), done.stderr[-4000:]
    for stage in STAGES:
        ours, expected = tmp_path / "tiny" / "train" / stage, finished.run_dir / "train" / stage
        steps = [step for step, _ in losses(expected)]
        assert [step for step, _ in losses(ours)] == steps == sorted(set(steps))
        for (_, loss), (_, other) in zip(losses(ours), losses(expected), strict=True):
            assert loss == pytest.approx(other, rel=1e-4)
        assert same(ours / "model", expected / "model", 1e-3), stage
        assert not (ours / "states").exists()
    assert same(tmp_path / "tiny" / "sft" / "model", finished.run_dir / "sft" / "model", 1e-3)
    assert done.stdout.count("pack: up to date") == len(DEATHS) + 1
    assert done.stdout.count("export: ") == done.stdout.count("report: ") == 1  # by the first process alone
    assert not list((tmp_path / "tiny").rglob("*.partial"))


@pytest.mark.slow
def test_one_process_exports_and_goes_on_with_what_two_left(finished, tiny_root, tmp_path, capfd):
    shutil.copytree(finished.run_dir, tmp_path / "tiny", ignore=lambda _, names: {"train", "sft"} & set(names))
    recipe = [str(tiny_root / "tiny.toml"), f"runs={tmp_path}"]
    assert torchrun("train", *recipe, deaths=[(1, "step", 33)]).returncode != 0
    capfd.readouterr()
    assert main(["snapshot", *recipe, "--to", str(tmp_path / "model")]) == 0
    assert re.search(r"stage 'embed-head' after (7|14|21|28) of 40 steps", capfd.readouterr().out)
    assert load_model(tmp_path / "model").config == load_model(finished.run_dir / "init" / "model").config
    assert not same(tmp_path / "model", finished.run_dir / "init" / "model", 0.01)

    assert main(["train", *recipe]) == 0
    for stage in STAGES:
        ours, expected = tmp_path / "tiny" / "train" / stage, finished.run_dir / "train" / stage
        assert [step for step, _ in losses(ours)] == [step for step, _ in losses(expected)]
        assert same(ours / "model", expected / "model", 1e-3)
