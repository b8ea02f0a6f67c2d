"""SwiGLU with low-rank updates of its inputs, and of its gradient, equals the formula in float64."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_testing import BACKENDS, DEVICE, EPSILON, far_rows, normal

from redwhale.kernels import swiglu_low_rank
from redwhale.kernels.dropout import torch_keep_mask
from redwhale.kernels.swiglu_low_rank import (
    MOST_RANKS,
    MOST_RANKS_FP32,
    Update,
    low_rank_swiglu,
    low_rank_swiglu_backward,
)

on_both = pytest.mark.parametrize("backend", BACKENDS)
SEED = torch.tensor([2**40 + 5], device=DEVICE)
NAMES = ("act", "dropped", "d_gate", "d_up", "again", "dB_gate", "dB_up", "dA_down")


def case(tokens, features, ranks, *, seed=0, dtype=torch.float32):
    """Bases, upstream gradient, and adapters of gate, up and down; rank 0 for none."""

    def update(rank, number, scale):
        if not rank:
            return Update()
        wide = normal(features, rank, seed=seed + number, dtype=dtype, scale=rank**-0.5)
        return Update(normal(tokens, rank, seed=seed + number + 1, dtype=dtype), wide, scale)

    gate_base, up_base, grad_base = (normal(tokens, features, seed=seed + n, dtype=dtype) for n in range(3))
    down = update(ranks[2], 20, 1.0)
    return SimpleNamespace(
        gate_base=gate_base,
        up_base=up_base,
        grad_base=grad_base,
        gate=update(ranks[0], 10, 0.5),
        up=update(ranks[1], 15, 2.0),
        u_down=down.narrow,
        a_down=None if down.wide is None else down.wide.T.contiguous(),
    )


def actual(given_case, p=0.0, backend="triton", grads=(True, True, True)):
    """All results of forward and backward, by name."""
    c = given_case
    seed, options = SEED if p else None, {"p": p, "triton_kernels": backend == "triton"}
    act, dropped = low_rank_swiglu(c.gate_base, c.up_base, c.gate, c.up, seed, **options)
    wanted = tuple(
        some and tensor is not None for some, tensor in zip(grads, (c.gate.wide, c.up.wide, c.a_down), strict=True)
    )
    d_gate, d_up, again, wides = low_rank_swiglu_backward(
        *(c.grad_base.clone(), c.gate_base, c.up_base, c.gate, c.up, c.u_down, c.a_down, seed),
        **options,
        wide_grads=wanted,
        output=True,
    )
    return dict(zip(NAMES, (act, dropped, d_gate, d_up, again, *wides), strict=True))


def expected(given_case, p=0.0):
    """The same by automatic differentiation of the formula in float64."""
    c = given_case

    def exact(tensor, grad=True):
        return None if tensor is None else tensor.detach().double().requires_grad_(grad)

    gate_base, up_base, b_gate, b_up, a_down = map(exact, (c.gate_base, c.up_base, c.gate.wide, c.up.wide, c.a_down))
    gate, up = gate_base, up_base
    if b_gate is not None:
        gate = gate + c.gate.scale * (c.gate.narrow.double() @ b_gate.T)
    if b_up is not None:
        up = up + c.up.scale * (c.up.narrow.double() @ b_up.T)
    act = gate / (1 + torch.exp(-gate)) * up
    dropped = act * torch_keep_mask(SEED, *act.shape, p) / (1 - p) if p else act
    loss = (act * c.grad_base.double()).sum()
    if a_down is not None:
        loss = loss + (dropped @ a_down.T * c.u_down.double()).sum()
    leaves = [tensor for tensor in (gate_base, up_base, b_gate, b_up, a_down) if tensor is not None]
    grads = iter(torch.autograd.grad(loss, leaves))
    d_gate, d_up, *wides = (next(grads) if t is not None else None for t in (gate_base, up_base, b_gate, b_up, a_down))
    return dict(zip(NAMES, (act, dropped, d_gate, d_up, act, *wides), strict=True))


def check(given_case, bound, p=0.0, backend="triton"):
    reference = expected(given_case, p)
    for name, tensor in actual(given_case, p, backend).items():
        assert (tensor is None) == (reference[name] is None), name
        if tensor is not None:
            assert tensor.dtype == given_case.gate_base.dtype
            error = (tensor.double() - reference[name]).norm()
            # Single entries may be next to nothing, as differences of what they are computed from.
            assert error < bound * reference[name].norm().clamp_min(0.1), name


@on_both
@settings(max_examples=15, deadline=None)
@given(
    tokens=st.integers(1, 50),
    features=st.integers(1, 80),
    ranks=st.tuples(*[st.sampled_from([0, 1, 8, 24])] * 3),
    p=st.sampled_from([0.0, 0.25]),
    seed=st.integers(0, 2**16),
)
def test_fp32_results_equal_float64(backend, tokens, features, ranks, p, seed):
    check(case(tokens, features, ranks, seed=seed), 2e-5, p, backend)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("ranks", [(64, 64, 64), (128, 16, 100), (8, 0, 128)])
def test_fp16_results_are_within_their_roundings_of_float64(ranks, p):
    # d_gate and d_up, act after dropout: rounded before they are multiplied, and their sums once more.
    check(case(70, 130, ranks, dtype=torch.float16), 3 * EPSILON[torch.float16], p)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_bf16_results_of_the_torch_backend_are_within_their_roundings_of_float64(p):
    # gate and up are rounded after the update, and so are silu(gate), the products, and d_act.
    check(case(70, 130, (64, 16, 8), dtype=torch.bfloat16), 6 * EPSILON[torch.bfloat16], p, "torch")


@on_both
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_adapters_beyond_the_kernel_are_left_to_library_products(backend, p, monkeypatch):
    for kernel in ("swiglu_low_rank_forward", "swiglu_low_rank_backward"):
        monkeypatch.delattr(swiglu_low_rank, kernel)
    check(case(20, 30, (MOST_RANKS_FP32 + 1, 0, 4)), 1e-5, p, backend)
    check(case(20, 30, (4, MOST_RANKS + 1, 4), dtype=torch.float16), 6 * EPSILON[torch.float16], p, backend)


@on_both
def test_no_tokens_give_zero_gradients_of_the_adapters(backend):
    results = actual(case(0, 30, (8, 4, 2)), 0.3, backend)
    assert results["act"].shape == results["d_gate"].shape == results["d_up"].shape == (0, 30)
    assert results["dB_gate"].shape == (30, 8)
    assert results["dA_down"].shape == (2, 30)
    assert not any(results[name].any() for name in ("dB_gate", "dB_up", "dA_down"))


def test_the_same_bits_come_out_each_time_though_tokens_are_shared_among_programs():
    inputs = case(300, 40, (8, 4, 16))
    first, second = actual(inputs, 0.3), actual(inputs, 0.3)
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


def test_what_nobody_wants_is_not_computed_and_changes_nothing_else():
    inputs = case(40, 50, (8, 4, 16))
    everything, less = actual(inputs, 0.3), actual(inputs, 0.3, grads=(False, False, False))
    assert less["dB_gate"] is less["dB_up"] is less["dA_down"] is None
    for name in NAMES[:5]:
        assert torch.equal(less[name], everything[name])


@on_both
def test_the_bases_stay_as_they_are(backend):
    inputs = case(40, 50, (8, 4, 16))
    before = inputs.gate_base.clone(), inputs.up_base.clone()
    actual(inputs, 0.3, backend)
    assert torch.equal(inputs.gate_base, before[0])
    assert torch.equal(inputs.up_base, before[1])


@on_both
def test_bases_and_narrow_sides_may_be_parts_of_wider_tensors(backend):
    inputs = case(20, 30, (8, 4, 0))
    plain = actual(inputs, backend=backend)
    inputs.gate_base, inputs.up_base = torch.cat([inputs.gate_base, inputs.up_base], 1).chunk(2, 1)
    t_gate, t_up = torch.cat([inputs.gate.narrow, inputs.up.narrow], 1).split([8, 4], 1)
    inputs.gate, inputs.up = inputs.gate._replace(narrow=t_gate), inputs.up._replace(narrow=t_up)
    for name, tensor in actual(inputs, backend=backend).items():
        if tensor is not None:
            torch.testing.assert_close(tensor, plain[name], rtol=1e-5, atol=1e-5)


def test_rows_behind_2_to_the_31_entries_are_read_where_they_are():
    inputs = case(3, 16, (8, 4, 2), dtype=torch.float16)
    near = actual(inputs)
    for name in ("gate_base", "up_base", "grad_base"):
        setattr(inputs, name, far_rows(3, 16, torch.float16).copy_(getattr(inputs, name)))
    t_gate = far_rows(3, 8, torch.float16).copy_(inputs.gate.narrow)
    inputs.gate = inputs.gate._replace(narrow=t_gate)
    inputs.u_down = far_rows(3, 2, torch.float16).copy_(inputs.u_down)
    c = inputs
    far = swiglu_low_rank.swiglu_low_rank_backward(
        *(c.grad_base, c.gate_base, c.up_base, *c.gate, *c.up, c.u_down, c.a_down, None, 0.0, True, True, True, True)
    )
    forward, _ = swiglu_low_rank.swiglu_low_rank_forward(c.gate_base, c.up_base, *c.gate, *c.up, None, 0.0)
    for name, tensor in zip(("act", "d_gate", "d_up", "again", *NAMES[5:]), (forward, *far), strict=True):
        assert torch.equal(tensor, near[name]), name


def test_the_operators_are_what_they_claim_to_be():
    c = case(20, 30, (8, 4, 2))
    for seed, p in ((SEED, 0.3), (None, 0.0)):
        updates = (*c.gate, *c.up)
        torch.library.opcheck(torch.ops.redwhale.swiglu_low_rank_forward, (c.gate_base, c.up_base, *updates, seed, p))
        torch.library.opcheck(
            torch.ops.redwhale.swiglu_low_rank_backward,
            (c.grad_base, c.gate_base, c.up_base, *updates, c.u_down, c.a_down, seed, p, True, not p, True, bool(p)),
        )
