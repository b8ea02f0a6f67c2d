"""Dropout masks are Philox of the seed and the place alone: equal between backends, independent, and never stored."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_testing import BACKENDS, DEVICE, EPSILON, far_rows, normal, relative_error, strided
from torch.utils.checkpoint import checkpoint

from redwhale.kernels.dropout import dropout_seed, keep_threshold, masked_scale, seeded_dropout, torch_keep_mask


def seed_of(value):
    return torch.tensor([value], device=DEVICE)


def philox_word(column, row, seed, rounds=7):
    """First word of Philox-4x32 as the paper defines it, in Python's integers."""
    c, k = [column, row, 0, 0], [seed % 2**32, seed >> 32]
    for _ in range(rounds):
        first, second = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [second >> 32 ^ c[1] ^ k[0], second % 2**32, first >> 32 ^ c[3] ^ k[1], first % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c[0]


def gradient(x, upstream, *args, **kwargs):
    x = x.detach().requires_grad_()
    y = seeded_dropout(x, *args, **kwargs)
    return y.detach(), *torch.autograd.grad(y, x, upstream)


def test_the_reference_of_this_test_is_the_published_generator():
    # Random123's known answers for philox4x32 of 10 rounds: counter and key zero.
    assert philox_word(0, 0, 0, rounds=10) == 0x6627E8D5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 70), seed=st.integers(0, 2**31 - 1))
def test_masks_are_those_of_philox_bit_for_bit(backend, p, rows, columns, seed):
    expected = [
        [philox_word(column, row, seed) >= round(p * 2**32) for column in range(columns)] for row in range(rows)
    ]
    y = seeded_dropout(torch.ones(rows, columns, device=DEVICE), seed_of(seed), p, backend=backend)
    assert torch.equal(y != 0, torch.tensor(expected, device=DEVICE))


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(1, 1), (3, 515), (2, 5, 33), (7,)])
def test_backends_draw_the_same_mask_across_blocks(shape, p):
    masks = [seeded_dropout(torch.ones(shape, device=DEVICE), seed_of(7), p, backend=name) != 0 for name in BACKENDS]
    assert torch.equal(*masks)
    rows, columns = math.prod(shape[:-1]), shape[-1]
    assert torch.equal(masks[0].view(rows, columns), torch_keep_mask(seed_of(7), rows, columns, p))


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5])
def test_the_share_of_zeros_is_p(p):
    kept = torch_keep_mask(seed_of(3), 512, 1024, p)
    error = abs(float((~kept).double().mean()) - p) / math.sqrt(p * (1 - p) / kept.numel())
    assert error < 4


def test_neighbours_rows_columns_and_seeds_are_independent():
    signs = torch_keep_mask(seed_of(11), 512, 512, 0.5).double() * 2 - 1
    other = torch_keep_mask(seed_of(12), 512, 512, 0.5).double() * 2 - 1
    above, below = torch.triu_indices(512, 512, 1, device=DEVICE)
    pairs = [
        *((signs[:, distance:], signs[:, :-distance]) for distance in (1, 2, 4, 32)),
        *((signs[distance:], signs[:-distance]) for distance in (1, 2, 4, 32)),
        (signs, other),
        (signs[above, below], signs[below, above]),  # rows and columns do not change places
    ]
    for one, another in pairs:
        assert abs(float((one * another).mean())) * math.sqrt(one.numel()) < 4


def test_a_threshold_never_leaves_32_bits():
    assert keep_threshold(0.0) == 0
    assert keep_threshold(0.25) == 2**30
    assert keep_threshold(1 - 2**-40) == 2**32 - 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kept_values_and_gradients_grow_by_the_share_kept(backend, dtype):
    x, upstream, p = normal(6, 40, dtype=dtype), normal(6, 40, seed=1, dtype=dtype), 0.3
    factor = torch_keep_mask(seed_of(5), 6, 40, p).double() / (1 - p)
    y, grad = gradient(x, upstream, seed_of(5), p, backend=backend)
    assert y.dtype == grad.dtype == dtype
    assert relative_error(y, x.double() * factor) <= 1.01 * EPSILON[dtype]
    assert relative_error(grad, upstream.double() * factor) <= 1.01 * EPSILON[dtype]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dropped_inf_or_nan_is_zero(backend):
    x = torch.full((4, 16), float("nan"), device=DEVICE)
    x[:, ::2] = float("inf")
    kept = torch_keep_mask(seed_of(1), 4, 16, 0.5)
    assert not seeded_dropout(x, seed_of(1), 0.5, backend=backend)[~kept].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_values_give_what_contiguous_ones_give(backend):
    x, upstream = normal(5, 3, 20), normal(5, 3, 20, seed=1)
    plain = gradient(x, upstream, seed_of(2), 0.4, backend=backend)
    others = gradient(strided(x), strided(upstream), seed_of(2), 0.4, backend=backend)
    assert all(torch.equal(a, e) for a, e in zip(others, plain, strict=True))


def test_rows_behind_2_to_the_31_entries_are_read_where_they_are():
    x, values = far_rows(3, 16, torch.float16), normal(3, 16, dtype=torch.float16)
    x.copy_(values)
    expected = seeded_dropout(values, seed_of(2), 0.4, backend="torch")
    assert torch.equal(seeded_dropout(x, seed_of(2), 0.4, backend="triton"), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_give_no_rows(backend):
    y, grad = gradient(normal(0, 16), normal(0, 16), seed_of(2), 0.4, backend=backend)
    assert y.shape == grad.shape == (0, 16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_keeps_the_seed_alone(backend):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        seeded_dropout(normal(6, 40).requires_grad_(), seed_of(5), 0.3, backend=backend)
    assert kept == [1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_recomputation_draws_the_mask_of_the_first_pass(backend):
    def function(x):
        return seeded_dropout(x * 2, dropout_seed(x.device), 0.4, backend=backend).square()

    gradients = []
    for run in (function, lambda x: checkpoint(function, x, use_reentrant=False)):
        torch.manual_seed(3)
        x = normal(6, 40).requires_grad_()
        run(x).sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_seeds_follow_the_generator_of_torch():
    torch.manual_seed(3)
    first = [int(dropout_seed(DEVICE)) for _ in range(50)]
    torch.manual_seed(3)
    assert [int(dropout_seed(DEVICE)) for _ in range(50)] == first
    assert len(set(first)) == 50
    assert all(0 <= seed < 2**31 for seed in first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_without_graph_breaks_it_gives_the_same(backend):
    x, upstream = normal(6, 40), normal(6, 40, seed=1)
    plain = gradient(x, upstream, seed_of(5), 0.3, backend=backend)
    compiled = torch.compile(seeded_dropout, backend="aot_eager", fullgraph=True)
    leaf = x.requires_grad_()
    y = compiled(leaf, seed_of(5), 0.3, backend=backend)
    assert torch.equal(y, plain[0])
    assert torch.equal(torch.autograd.grad(y, leaf, upstream)[0], plain[1])


def test_the_operator_is_registered_as_torch_asks():
    operator = torch.ops.redwhale.masked_scale.default
    torch.library.opcheck(operator, (normal(3, 20), seed_of(1), 0.5))
    assert torch.equal(operator(normal(3, 20), seed_of(1), 0.5), masked_scale(normal(3, 20), seed_of(1), 0.5))
