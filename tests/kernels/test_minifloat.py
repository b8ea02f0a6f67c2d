"""Codes mean what their formula says, rounding keeps the mean, and both backends agree in every bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_testing import BACKENDS, DEVICE, normal

from redwhale.kernels.launch import launch, tl, triton
from redwhale.kernels.minifloat import (
    BLOCK,
    dither_of,
    minifloat_decode,
    minifloat_encode,
    random_words,
    torch_decode,
    torch_dither,
    torch_encode,
    torch_random_words,
)

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

LAYOUTS = [(3, 4), (3, 5), (4, 4), (4, 3), (2, 6), (2, 5)]


@triton.jit
def _encode(values, dither, codes, exponents, E: tl.constexpr, M: tl.constexpr):
    block = tl.program_id(0) + tl.arange(0, 1)[:, None]
    entry = block * 256 + tl.arange(0, 256)[None, :]
    new, shared = minifloat_encode(tl.load(values + entry), tl.load(dither + entry).to(tl.uint32), E, M)
    tl.store(codes + entry, new)
    tl.store(exponents + block, shared)


@triton.jit
def _decode(codes, exponents, values, E: tl.constexpr, M: tl.constexpr):
    block = tl.program_id(0) + tl.arange(0, 1)[:, None]
    entry = block * 256 + tl.arange(0, 256)[None, :]
    tl.store(values + entry, minifloat_decode(tl.load(codes + entry), tl.load(exponents + block), E, M))


@triton.jit
def _dither(words, dither, seed, number, first, stream, step):
    entry = tl.arange(0, 2)[:, None] * 256 + tl.arange(0, 256)[None, :]
    drawn = random_words(tl.load(seed), tl.load(number), tl.load(first), stream, 2)
    tl.store(words + entry, drawn.to(tl.int64))
    tl.store(dither + entry, dither_of(drawn, tl.load(step)).to(tl.int64))


def encode(values, dither, layout, backend):
    if backend == "torch":
        return torch_encode(values, dither, *layout)
    codes = torch.empty_like(values, dtype=torch.uint8)
    exponents = codes.new_empty(len(values), 1)
    launch(_encode, (len(values),), values, dither, codes, exponents, E=layout[0], M=layout[1])
    return codes, exponents


def decode(codes, exponents, layout, backend):
    if backend == "torch":
        return torch_decode(codes, exponents, *layout)
    values = torch.empty_like(codes, dtype=torch.float32)
    launch(_decode, (len(codes),), codes, exponents, values, E=layout[0], M=layout[1])
    return values


def meaning(codes, exponents, exponent_bits, mantissa_bits):
    """The formula of the module, in float64."""
    codes, exponents = codes.long(), exponents.double()
    x, f = (codes >> mantissa_bits) % 2**exponent_bits, (codes % 2**mantissa_bits).double() / 2**mantissa_bits
    top = torch.exp2(exponents - 127)
    values = torch.where(
        x > 0, top * torch.exp2((x - 2**exponent_bits + 1).double()) * (1 + f), top * 2.0 ** (2 - 2**exponent_bits) * f
    )
    return torch.where(codes >= 128, -values, values) if exponent_bits + mantissa_bits < 8 else values


def dithers(blocks, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**32, (blocks, BLOCK), generator=generator).to(DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_code_has_the_value_of_its_formula_and_is_its_own_code(layout, backend):
    exponents = torch.tensor([[1], [2], [12], [100], [127], [200], [253]], dtype=torch.uint8, device=DEVICE)
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE).repeat(len(exponents), 1)
    values = decode(codes, exponents, layout, backend)
    assert torch.equal(values.double(), meaning(codes, exponents, *layout))
    for dither in (0, 2**31, 2**32 - 1):
        again, same = encode(values, torch.full(values.shape, dither, device=DEVICE), layout, backend)
        assert torch.equal(again, codes)
        assert torch.equal(same, exponents)


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=20, deadline=None)
@given(log_scale=st.floats(-120, 40), spread=st.floats(0, 15), seed=st.integers(0, 2**16))
def test_numbers_are_rounded_to_a_neighbour_and_backends_agree(layout, log_scale, spread, seed):
    values = normal(2, BLOCK, seed=seed) * torch.exp2(log_scale + spread * normal(2, BLOCK, seed=seed + 1))
    signed = sum(layout) < 8
    values = values if signed else values.abs()
    dither = dithers(2, seed)
    codes, exponents = encode(values, dither, layout, "torch")
    for other, one in zip(encode(values, dither, layout, "triton"), (codes, exponents), strict=True):
        assert torch.equal(other, one)
    decoded = decode(codes, exponents, layout, "triton")
    assert torch.equal(decoded, decode(codes, exponents, layout, "torch"))
    # The distance between codes: that of subnormal ones below, growing with the power of two above.
    power = torch.maximum(values.double().abs(), torch.exp2(exponents.double() - 127 - 2 ** layout[0] + 2))
    width = torch.exp2(power.log2().floor() - layout[1])
    assert bool(((decoded.double() - values.double()).abs() < width * (1 + 1e-6)).all())
    if not signed:
        assert torch.equal(codes > 0, values > 0)


@pytest.mark.parametrize("layout", [(3, 4), (3, 5)])
def test_the_mean_over_random_dithers_is_the_number(layout):
    blocks = 4096
    values = normal(1, BLOCK).abs() * torch.exp2(3 * normal(1, BLOCK, seed=1).clamp(-2, 2))
    codes, exponents = encode(values.expand(blocks, BLOCK).contiguous(), dithers(blocks), layout, "torch")
    decoded = decode(codes, exponents, layout, "torch").double()
    standard_error = decoded.std(0) / blocks**0.5
    clamped = values[0] < decode(torch.ones_like(codes[:1]), exponents[:1], layout, "torch")[0]
    free = ~clamped if sum(layout) == 8 else torch.ones_like(clamped)  # what would become code 0 is no longer unbiased
    assert free.sum() > 200
    assert bool(((decoded.mean(0) - values[0]).abs() <= 5 * standard_error + 1e-6 * values[0])[free].all())


def test_dithers_of_successive_steps_fill_the_interval_evenly():
    words = torch_random_words(5, 3, 0, BLOCK, 0, DEVICE)
    steps = 1000
    for threshold in (0.01, 0.3, 0.77):
        below = sum((torch_dither(words, step) < threshold * 2**32).int() for step in range(1, steps + 1))
        assert int((below - threshold * steps).abs().max()) <= 4  # independent numbers: up to 50


def test_a_slow_average_follows_only_if_dithered():
    # r loses 0.05% a step, a thirtieth of a code's width or less.
    steps, factor = 1000, 0.999**0.5
    for dithered in (False, True):
        r = 1 + normal(4, BLOCK).abs()
        start = r = torch_decode(*torch_encode(r, dithers(4), 3, 5), 3, 5)
        words = torch_random_words(0, 0, 0, r.numel(), 0, DEVICE).view(r.shape)
        for step in range(1, steps + 1):
            dither = torch_dither(words, step) if dithered else torch.full_like(words, 2**31)
            r = torch_decode(*torch_encode(r * factor, dither, 3, 5), 3, 5)
        if dithered:
            torch.testing.assert_close(r.mean(), start.mean() * factor**steps, rtol=0.03, atol=0)
        else:
            assert torch.equal(r, start)


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_of_zeros_subnormal_and_largest_numbers(backend):
    top = 2.0**126
    for value, expected in (
        (0.0, 0.0),
        (2.0**-149, 2.0**-149),
        (2.0**-127, 2.0**-127),
        (top, top),
        (1.9375 * top,) * 2,
    ):
        values = torch.full((1, BLOCK), value, device=DEVICE)
        codes, exponents = encode(values, dithers(1), (3, 4), backend)
        decoded = decode(codes, exponents, (3, 4), backend)
        if value == 2.0**-149:  # below the smallest code: one of its two neighbours
            assert set(decoded.unique().tolist()) <= {0.0, 2.0**-136}
        else:
            assert bool((decoded == expected).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", [(3, 4), (3, 5)])
@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 3e38])
def test_a_number_beyond_all_codes_makes_its_block_nan_and_no_other(bad, layout, backend):
    values = normal(2, BLOCK).abs()
    values[1, 77] = bad
    codes, exponents = encode(values, dithers(2), layout, backend)
    decoded = decode(codes, exponents, layout, backend)
    assert exponents[1].item() == 255
    assert bool(decoded[1].isnan().all())
    assert bool(decoded[0].isfinite().all())


@pytest.mark.parametrize("seed", [0, 7, 2**62 + 12345])
def test_both_backends_draw_the_same_words(seed):
    for number, first, stream, step in ((0, 0, 0, 1), (3, 2**33 + 1024, 1, 10**6), (2**32 - 1, 256, 0, 2**31 + 5)):
        words, dither = (torch.empty(2 * BLOCK, dtype=torch.int64, device=DEVICE) for _ in range(2))
        scalars = [torch.tensor([value], device=DEVICE) for value in (seed, number, first)]
        launch(_dither, (1,), words, dither, *scalars, stream, torch.tensor([step], device=DEVICE))
        expected = torch_random_words(seed, number, first, 2 * BLOCK, stream, DEVICE)
        assert torch.equal(words, expected)
        assert torch.equal(dither, torch_dither(expected, step))


def test_words_are_uniform_and_differ_between_tensors_streams_and_seeds():
    streams = [(0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0)]
    words = torch.stack(
        [torch_random_words(seed, number, 0, 2**16, stream, DEVICE) for seed, number, stream in streams]
    )
    uniform = words.double() / 2**32
    assert float((uniform.mean(1) - 0.5).abs().max()) < 5 * (1 / 12 / 2**16) ** 0.5
    correlations = torch.corrcoef(torch.cat([uniform, uniform[:1].roll(1, 1)])) - torch.eye(5, device=DEVICE)
    assert float(correlations.abs().max()) < 5 / 2**8
