import importlib.util
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(BENCH))
    try:
        spec = importlib.util.spec_from_file_location("filter_worst_case", BENCH / "filter_worst_case.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCH))
    return module


@pytest.mark.slow
def test_no_step_takes_more_than_50_ms_on_a_hostile_line_of_100_kb(bench):
    lines = bench.hostile_lines()
    assert len(lines) > 150
    assert all(90_000 < len(line.encode()) <= 100_000 for line in lines.values())
    bench.steps("가")["prepare"]()  # builds its tables
    slow = [
        (name, step, taken)
        for name, line in lines.items()
        for step, call in bench.steps(line).items()
        if (taken := bench.milliseconds(call)) > 50
    ]
    assert not slow
