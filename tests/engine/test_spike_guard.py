"""The guard's decisions against numpy, and its state after a resume."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from redwhale.engine.spike_guard import SpikeGuard

SETTINGS = {"sigma": 3.0, "window": 8, "warmup": 4}


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32)


def take(guard: SpikeGuard, step: int, loss: float, norm: float = 1.0) -> bool:
    """One step of a trainer; returns whether it is skipped."""
    skip = guard.check_loss(scalar(loss)) | guard.check_norm(scalar(norm))
    guard.record(step, scalar(loss), scalar(norm), skip)
    return bool(skip)


def test_decisions_equal_those_of_the_formula_on_the_accepted_values():
    rng = np.random.default_rng(0)
    guard = SpikeGuard(**SETTINGS)
    accepted: list[list[float]] = [[], []]
    skipped = 0
    for step in range(300):
        # Heavy tails, so that both kinds of spike come, some of them not finite.
        loss, norm = (float(np.float32(5.0 + value)) for value in rng.standard_t(2, 2) * (0.3, 0.6))
        if step % 50 == 49:
            loss, norm = ((math.nan, norm), (loss, math.inf))[step % 100 == 49]
        limits = [math.inf, math.inf]
        if len(accepted[0]) >= 4:
            for row, values in enumerate(accepted):
                last = np.array(values[-8:], dtype=np.float64)
                limits[row] = last.mean() + 3.0 * max(last.std(ddof=1), 0.01 * abs(last.mean()))
        expected = not all(math.isfinite(v) and v <= limit for v, limit in zip((loss, norm), limits, strict=True))
        np.testing.assert_allclose(guard.limits.numpy(), limits, rtol=1e-9)
        assert take(guard, step, loss, norm) == expected, step
        skipped += expected
        if not expected:
            accepted[0].append(loss)
            accepted[1].append(norm)
    assert 10 < skipped < 100
    assert guard.report().skipped == skipped


def test_a_loss_that_falls_or_stays_is_no_spike():
    for losses in (np.geomspace(10.9, 2.0, 200), np.full(200, 2.0), 2.0 + 0.015 * (np.arange(200) % 2)):
        guard = SpikeGuard()
        assert not any(take(guard, step, loss, norm=loss) for step, loss in enumerate(losses))


def test_no_limit_before_the_warmup_and_none_with_sigma_0():
    guard = SpikeGuard(**SETTINGS)
    assert not any(take(guard, step, loss) for step, loss in enumerate((1.0, 1000.0, 1.0, 1.0)))
    still = SpikeGuard(**{**SETTINGS, "sigma": 0.0})
    for step in range(20):
        assert not take(still, step, 1.0)
    assert not take(still, 20, 1e30)
    assert take(still, 21, math.nan)
    assert take(still, 22, 1.0, norm=math.inf)
    assert take(still, 23, -math.inf)


def test_the_report_counts_the_present_run_of_skips_and_remembers_where_it_began():
    guard = SpikeGuard(**SETTINGS)
    for step in range(6):
        take(guard, step, 2.0 + 0.01 * step)
    assert guard.report().first_step is None
    assert take(guard, 6, 99.0)
    assert not take(guard, 7, 2.0)
    for step in (8, 9, 10):
        assert take(guard, step, 50.0 + step, norm=3.0)
    report = guard.report()
    assert (report.skipped, report.consecutive, report.first_step) == (4, 3, 8)
    assert (report.loss, report.norm) == (60.0, 3.0)
    sentence = report.sentence("odd", lr=1e-3, begin={"ko": 32, "en": 7}, end={"ko": 1044, "en": 7})
    assert sentence == (
        "stage 'odd' skipped its last 3 steps, 9 to 11: at step 11 the loss is 60 (limit 2.082) and the gradient norm "
        "3 (limit 1.03); lower the learning rate (lr = 0.001) or look at these sequences, in training order: "
        "ko 32 to 1,043"
    )
    take(guard, 11, 2.0)
    assert guard.report().consecutive == 0
    assert guard.report().skipped == 4


def test_a_resumed_guard_decides_bit_for_bit_as_the_unbroken_one():
    rng = np.random.default_rng(1)
    steps = [(5.0 + a, 1.0 + b) for a, b in rng.standard_t(2, (60, 2)) * 0.3]
    whole = SpikeGuard(**SETTINGS)
    for step, values in enumerate(steps[:37]):
        take(whole, step, *values)
    saved = {name: tensor.clone() for name, tensor in whole.state_tensors().items()}
    for step, values in enumerate(steps[37:], 37):
        take(whole, step, *values)
    resumed = SpikeGuard(**SETTINGS)
    resumed.load_state_tensors(saved)
    for step, values in enumerate(steps[37:], 37):
        take(resumed, step, *values)
    assert resumed.report() == whole.report()
    for name, tensor in whole.state_tensors().items():
        assert torch.equal(tensor, resumed.state_tensors()[name]), name
    with pytest.raises(ValueError, match="the saved window has 8 steps, not 16"):
        SpikeGuard(window=16, warmup=4).load_state_tensors(saved)


def test_a_step_never_waits_for_the_device():
    """Every way to the host (`.item()`, `bool()`, masks as indices) passes through one of these operators."""

    class NoSynchronisation(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func.overloadpacket not in (
                torch.ops.aten._local_scalar_dense,
                torch.ops.aten.nonzero,
                torch.ops.aten.is_nonzero,
            ), func
            return func(*args, **(kwargs or {}))

    guard = SpikeGuard(**SETTINGS)
    loss, norm = scalar(2.0), scalar(1.0)
    with NoSynchronisation():
        for step in range(10):
            guard.record(step, loss, norm, guard.check_loss(loss) | guard.check_norm(norm))
    assert guard.report().skipped == 0


@pytest.mark.parametrize("wrong", [{"sigma": -1.0}, {"warmup": 1}, {"window": 4, "warmup": 5}])
def test_settings_that_cannot_work_are_refused(wrong):
    with pytest.raises(ValueError, match="2 <= warmup <= window"):
        SpikeGuard(**{**SETTINGS, **wrong})
