"""Metrics that survive kills and resumes, what trackers get, and the numbers of a log line."""

import gzip
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from redwhale.engine.errors import TrainingError
from redwhale.engine.profiling import profiled
from redwhale.engine.telemetry import Telemetry, Throughput, memory


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_every_line_is_there_at_once_and_is_json(tmp_path):
    with Telemetry(tmp_path / "new" / "folder", run_name="r") as telemetry:
        fields = {"stage": "한국어", "loss": math.nan, "best": None, "validation": {"ko": [1.5, math.inf]}}
        telemetry.log(3, fields)
        expected = {"step": 3, "stage": "한국어", "loss": None, "best": None, "validation": {"ko": [1.5, None]}}
        assert lines(tmp_path / "new" / "folder") == [expected]  # before it is closed


def test_a_resumed_run_forgets_the_lines_behind_its_state(tmp_path):
    with Telemetry(tmp_path, run_name="r") as telemetry:
        for step in range(4):
            telemetry.log(step, {"loss": float(step)})
            if step == 1:
                position = telemetry.position()
    assert position == len('{"step": 0, "loss": 0.0}\n' * 2)
    with Telemetry(tmp_path, run_name="r") as telemetry:
        telemetry.resume(position, 1)
        assert [line["step"] for line in lines(tmp_path)] == [0, 1]
        telemetry.log(2, {"loss": 9.0})
    assert lines(tmp_path)[1:] == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 9.0}]
    with Telemetry(tmp_path, run_name="r") as telemetry:
        telemetry.resume(0, 0)
        telemetry.log(0, {})
    assert lines(tmp_path) == [{"step": 0}]


@pytest.mark.parametrize("torn", [b'{"step": 2, "lo', b"\0" * 100_000])
def test_a_line_that_a_kill_tore_is_cut_off(tmp_path, torn):
    with Telemetry(tmp_path, run_name="r") as telemetry:
        telemetry.log(1, {"text": "x" * 200_000})
        position = telemetry.position()
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(torn)
    with Telemetry(tmp_path, run_name="r") as telemetry:
        assert telemetry.position() == position
        telemetry.log(2, {})
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_a_file_shorter_than_the_state_says_is_not_filled_up(tmp_path):
    with Telemetry(tmp_path, run_name="r") as telemetry:
        telemetry.resume(1000, 6)
        telemetry.log(7, {})
    assert lines(tmp_path) == [{"step": 7}]


def tensorboard_points(folder):
    """What TensorBoard shows: (step, value) of every scalar."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, round(e.value, 5)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_every_number_once_even_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard")
    with Telemetry(tmp_path, trackers=["tensorboard"], run_name="r") as telemetry:
        telemetry.resume(0, 0)
        for step in (2, 4, 6):
            telemetry.log(step, {"stage": "odd", "loss": step / 4, "validation": {"ko": {"bits": step}}, "up": True})
            if step == 4:
                position = telemetry.position()
    with Telemetry(tmp_path, trackers=["tensorboard"], run_name="r") as telemetry:
        telemetry.resume(position, 4)
        telemetry.log(6, {"loss": 8.0})
    assert tensorboard_points(tmp_path) == {
        "loss": [(2, 0.5), (4, 1.0), (6, 8.0)],
        "validation/ko/bits": [(2, 2.0), (4, 4.0)],
    }
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 6]


def test_weights_and_biases_gets_the_numbers_under_one_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = []
    for step in (2, 4):
        with Telemetry(tmp_path, trackers=["wandb"], run_name="solar/odd") as telemetry:
            telemetry.log(step, {"loss": 0.5})
        ids.append((tmp_path / "wandb_run_id").read_text())
    assert ids[0] == ids[1]
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{ids[0]}"))) == 2


@pytest.mark.parametrize(("tracker", "extra"), [("tensorboard", ""), ("wandb", " wandb")])
def test_a_missing_package_is_told_before_training(tmp_path, monkeypatch, tracker, extra):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == tracker else find(name))
    with pytest.raises(TrainingError, match=rf'{tracker}.*: pip install "redwhale\[track\]"{extra}$'):
        Telemetry(tmp_path, trackers=[tracker], run_name="r")


def test_trackers_that_nobody_asked_for_are_not_imported():
    code = (
        "import sys, pathlib, tempfile\n"
        "from redwhale.engine.telemetry import Telemetry\n"
        "Telemetry(pathlib.Path(tempfile.mkdtemp()), run_name='r').log(1, {'loss': 1.0})\n"
        "assert not {'tensorboard', 'wandb'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_rates_and_the_time_left_follow_the_clock(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    throughput = Throughput(2100, done_tokens=1000, peak_flops=1e6, smoothing=0.75)
    now += 10.0  # the first interval, with its warm-up, is shown
    fields = throughput.update(tokens=100, flops=5e5)
    assert fields == pytest.approx(
        {"tokens_per_second": 10.0, "model_flops_per_second": 5e4, "mfu": 0.05, "eta_seconds": 100.0}
    )
    now += 1.0  # but forgotten as soon as there is another
    assert throughput.update(100, 5e5)["eta_seconds"] == pytest.approx(9.0)
    now += 50.0
    throughput.restart()  # a validation does not count
    now += 2.0
    fields = throughput.update(100, 5e5)
    assert fields["tokens_per_second"] == pytest.approx(50.0)
    assert fields["mfu"] == pytest.approx(0.25)
    assert fields["eta_seconds"] == pytest.approx(800 * (0.75 * 0.01 + 0.25 * 0.02))
    assert "mfu" not in Throughput(1).update(1, 1.0)


def test_memory_now_and_at_most():
    before = memory(torch.device("cpu"))
    block = torch.ones(40_000_000)
    during = memory(torch.device("cpu"))
    assert 150e6 < during["memory_bytes"] - before["memory_bytes"] < 200e6
    assert during["peak_memory_bytes"] >= during["memory_bytes"]
    assert block.nbytes == 160_000_000
    del block
    after = memory(torch.device("cpu"))
    assert after["memory_bytes"] < during["memory_bytes"] - 150e6
    assert after["peak_memory_bytes"] > 0.99 * during["memory_bytes"]  # the kernel counts in batches
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    assert after["memory_bytes"] == pytest.approx(resident, rel=0.02)


def test_a_profile_holds_the_steps_it_was_asked_for(tmp_path):
    weight = torch.ones(64, 64)
    with profiled(tmp_path, steps=3) as profiler:
        for _ in range(12):
            _ = weight @ weight
            profiler.step()
    with gzip.open(tmp_path / "profile" / "trace.json.gz") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    assert names.count("aten::mm") == 3
    assert sorted(name for name in names if name.startswith("ProfilerStep")) == [
        f"ProfilerStep#{step}" for step in (4, 5, 6)
    ]
    assert "aten::mm" in (tmp_path / "profile" / "operations.txt").read_text()
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == ["operations.txt", "trace.json.gz"]


def test_training_that_ends_early_leaves_the_steps_it_did(tmp_path):
    weight = torch.ones(64, 64)
    with profiled(tmp_path, steps=100) as profiler:
        for _ in range(6):
            _ = weight @ weight
            profiler.step()
    with gzip.open(tmp_path / "profile" / "trace.json.gz") as file:
        assert [event.get("name") for event in json.load(file)["traceEvents"]].count("aten::mm") == 2


def test_no_profile_where_none_is_asked_for(tmp_path):
    with profiled(tmp_path, steps=0) as profiler:
        profiler.step()
    assert list(tmp_path.iterdir()) == []
