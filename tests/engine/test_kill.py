"""SIGKILL at twenty points of two runs, within writes too: what they end with is what unkilled runs end with."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "seed"), [("adamw", 0), ("adamw_8bit", 1)])
def test_killed_and_resumed_runs_end_bit_for_bit_as_unkilled_ones(tmp_path, optimizer, seed):
    command = [sys.executable, str(TESTS / "engine" / "kill_worker.py"), str(tmp_path), optimizer, str(seed)]
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result["killed"] == {
        "step of stage 0": 3,
        "write of stage 0": 1,
        "end of stage 0": 1,
        "step of stage 1": 3,
        "write of stage 1": 1,
        "end of stage 1": 1,
    }
    assert result["differences"] == []
