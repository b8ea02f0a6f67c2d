"""Split masters are exact, and rounding them away is unbiased."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_testing import DEVICE

from redwhale.kernels.bf16_masters import fp32_masters, store_nearest_, store_stochastic_

AROUND_TIES = st.builds(
    lambda high, low: high << 16 | low, st.integers(0, 2**16 - 1), st.sampled_from([0, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
)
BITS = st.lists(st.integers(0, 2**32 - 1) | AROUND_TIES, min_size=1, max_size=20)
SPECIAL = (0x0000, 0x8000, 0x7F80, 0xFF80)  # 0, -0 and both infinities


def floats(bits):
    """fp32 tensor of these bits."""
    return torch.tensor([b - 2**32 if b >= 2**31 else b for b in bits], dtype=torch.int32, device=DEVICE).view(
        torch.float32
    )


def rounded(masters):
    weights = torch.empty(len(masters), dtype=torch.bfloat16, device=DEVICE)
    low = torch.empty(len(masters), dtype=torch.int16, device=DEVICE)
    store_nearest_(weights, masters, low)
    return weights, low


@settings(max_examples=200, deadline=None)
@given(BITS)
def test_weight_and_low_half_give_back_the_master(bits):
    masters = floats(bits)
    weights, low = rounded(masters)
    again = fp32_masters(weights, low)
    nan = masters.isnan()
    assert torch.equal(again.view(torch.int32)[~nan], masters.view(torch.int32)[~nan])
    assert bool(again[nan].isnan().all())
    assert bool(weights[nan].isnan().all())
    alone = torch.empty_like(weights)
    store_nearest_(alone, masters)
    assert torch.equal(alone.view(torch.int16), weights.view(torch.int16))


@settings(max_examples=200, deadline=None)
@given(BITS)
def test_weights_are_the_nearest_bf16_numbers_and_ties_go_away_from_zero(bits):
    masters = floats(bits)
    masters = masters[masters.abs() < 2.0**127]
    weights, _ = rounded(masters)
    even = masters.bfloat16()
    ours, theirs = (masters.double() - each.double() for each in (weights, even))
    assert torch.equal(ours.abs(), theirs.abs())
    tie = weights != even
    assert bool((weights[tie].abs() > masters[tie].abs()).all())


def test_stochastic_rounding_keeps_bf16_numbers_and_the_mean_of_others():
    exact = torch.tensor([b - 2**16 if b >= 2**15 else b for b in (*SPECIAL, *range(0x3F00, 0x3F40))])
    exact = exact.to(DEVICE, torch.int16).view(torch.bfloat16)
    weights = torch.empty_like(exact)
    for step in range(1, 20):
        store_stochastic_(weights, exact.float(), seed=1, number=2, step=step, first=0)
        assert torch.equal(weights.view(torch.int16), exact.view(torch.int16))

    share = 0.3
    masters = torch.full((2**16,), 1 + share * 2**-7, device=DEVICE)
    weights = torch.empty(2**16, dtype=torch.bfloat16, device=DEVICE)
    store_stochastic_(weights, masters, seed=1, number=2, step=1, first=0)
    up = weights == 1 + 2**-7
    assert bool((up | (weights == 1)).all())
    deviation = (share * (1 - share) / len(masters)) ** 0.5
    assert abs(up.double().mean().item() - share) < 5 * deviation


def test_stochastic_rounding_of_a_part_is_that_of_the_whole():
    masters = torch.linspace(1, 2, 1003, device=DEVICE)
    whole, parts = (torch.empty(1003, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    counter = {"seed": 5, "number": 7, "step": 3}
    store_stochastic_(whole, masters, first=0, **counter)
    for begin in range(0, 1003, 256):
        part = slice(begin, begin + 256)
        store_stochastic_(parts[part], masters[part], first=begin, **counter)
    assert torch.equal(whole, parts)
