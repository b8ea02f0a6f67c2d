"""RMS normalisation equals the formula in float64 and Llama's own, and keeps only what its backward pass needs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_testing import BACKENDS, DEVICE, EPSILON, far_rows, normal, relative_error, strided
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from redwhale.kernels import RMSNorm, add_rms_norm, rms_norm

EPS = 1e-5


def formula(x, weight):
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS)


def add_formula(x, residual, weight):
    return formula(x + residual, weight), x + residual


def gradients(function, inputs, upstream):
    """Outputs and input gradients of a function of several tensors, one upstream gradient an output."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [output.detach() for output in outputs] + list(torch.autograd.grad(outputs, inputs, upstream))


def case(*shape, seed=0, dtype=torch.float32):
    """x, residual, weight, and an upstream gradient for each of the two outputs."""
    like = {"dtype": dtype}
    return (
        [normal(*shape, seed=seed, scale=3, **like), normal(*shape, seed=seed + 1, **like)],
        normal(shape[-1], seed=seed + 2, **like),
        [normal(*shape, seed=seed + 3, **like), normal(*shape, seed=seed + 4, **like)],
    )


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=30, deadline=None)
@given(shape=st.lists(st.integers(1, 6), max_size=3), hidden=st.integers(1, 40), seed=st.integers(0, 2**16))
def test_fp32_output_and_gradients_equal_float64(backend, shape, hidden, seed):
    (x, residual), weight, upstream = case(*shape, hidden, seed=seed)
    for function, exact, inputs in (
        (rms_norm, formula, [x, weight]),
        (add_rms_norm, add_formula, [x, residual, weight]),
    ):
        given_upstream = upstream[: len(inputs) - 1]
        actual = gradients(lambda *args, f=function: f(*args, EPS, backend=backend), inputs, given_upstream)
        expected = gradients(exact, [t.double() for t in inputs], [t.double() for t in given_upstream])
        for a, e in zip(actual, expected, strict=True):
            # A width of 1 leaves a gradient that cancels almost wholly: the bound is absolute there.
            torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_within_its_roundings_of_float64(backend, dtype):
    (x, residual), weight, upstream = case(50, 64, dtype=dtype)
    actual = gradients(lambda *args: add_rms_norm(*args, EPS, backend=backend), [x, residual, weight], upstream)
    exact = [tensor.double() for tensor in (x, residual, weight)]
    expected = gradients(add_formula, exact, [tensor.double() for tensor in upstream])
    assert all(tensor.dtype == dtype for tensor in actual)
    # y: the sum, the normalised row and the product; the others: the sum, and themselves.
    for a, e, roundings in zip(actual, expected, (3, 1, 2, 2, 2), strict=True):
        assert relative_error(a, e) < roundings * EPSILON[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_output_of_the_torch_backend_is_bit_equal_to_that_of_llama(dtype, eps):
    (x, _), weight, _ = case(64, 96, dtype=dtype)
    theirs = LlamaRMSNorm(96, eps).to(DEVICE, dtype)
    theirs.weight.data = weight
    assert torch.equal(rms_norm(x, weight, eps, backend="torch"), theirs(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_eps_bounds_the_scale_of_a_zero_row(backend):
    x = torch.zeros(2, 8, device=DEVICE, requires_grad=True)
    output = rms_norm(x, torch.ones(8, device=DEVICE), EPS, backend=backend)
    output.sum().backward()
    assert not output.any()
    torch.testing.assert_close(x.grad, torch.full((2, 8), EPS**-0.5, device=DEVICE))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_and_upstream_gradients_give_the_same(backend):
    (x, residual), weight, upstream = case(6, 5, 16)
    contiguous = gradients(lambda *a: add_rms_norm(*a, backend=backend), [x, residual, weight], upstream)

    def of_strided(x, residual, weight):
        return add_rms_norm(strided(x), strided(residual), weight, backend=backend)

    others = gradients(of_strided, [x, residual, weight], [strided(tensor) for tensor in upstream])
    for a, e in zip(others, contiguous, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_give_no_rows_and_a_zero_weight_gradient(backend):
    (x, residual), weight, upstream = case(0, 16)
    y, total, grad_x, _, grad_weight = gradients(
        lambda *args: add_rms_norm(*args, backend=backend), [x, residual, weight], upstream
    )
    assert y.shape == total.shape == grad_x.shape == (0, 16)
    assert not grad_weight.any()


def test_rows_behind_2_to_the_31_entries_are_read_where_they_are():
    x = far_rows(3, 16, torch.float16)
    values = normal(3, 16, dtype=torch.float16)
    x.copy_(values)
    weight, upstream = normal(16, seed=1, dtype=torch.float16), far_rows(3, 16, torch.float16)
    upstream.copy_(values)
    near = gradients(lambda x: rms_norm(x, weight, backend="triton"), [values], [values])
    far = gradients(lambda x: rms_norm(x, weight, backend="triton"), [x], [upstream])
    for a, e in zip(far, near, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_keeps_the_sum_and_one_number_a_row(backend):
    (x, residual), weight, _ = case(10, 64, dtype=torch.bfloat16)
    for function, inputs in ((rms_norm, [x]), (add_rms_norm, [x, residual])):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            function(*(tensor.requires_grad_() for tensor in inputs), weight.requires_grad_(), backend=backend)
        assert sorted(kept) == [10, 64, 640]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_frozen_weight_gets_no_gradient(backend):
    (x, _), weight, (upstream, _) = case(9, 32)
    x.requires_grad_()
    rms_norm(x, weight, EPS, backend=backend).backward(upstream)
    assert weight.grad is None
    _, exact, _ = gradients(formula, [x.double(), weight.double()], [upstream.double()])
    assert relative_error(x.grad, exact) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_checkpointing_changes_nothing(backend):
    (x, residual), weight, upstream = case(9, 32)

    def function(x, residual, weight):
        return add_rms_norm(x, residual, weight, backend=backend)

    plain = gradients(function, [x, residual, weight], upstream)
    again = gradients(lambda *args: checkpoint(function, *args, use_reentrant=False), [x, residual, weight], upstream)
    assert all(torch.equal(a, e) for a, e in zip(again, plain, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_without_graph_breaks_it_gives_the_same(backend):
    (x, residual), weight, upstream = case(9, 32)

    def function(x, residual, weight):
        y, total = add_rms_norm(x, residual, weight, backend=backend)
        return rms_norm(y, weight, backend=backend), total

    plain = gradients(function, [x, residual, weight], upstream)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for a, e in zip(gradients(compiled, [x, residual, weight], upstream), plain, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_the_module_starts_as_plain_normalisation_and_trains_its_weight():
    module = RMSNorm(16, EPS).to(DEVICE)
    x = normal(4, 16)
    assert relative_error(module(x), formula(x.double(), 1.0)) < 1e-6
    module(x).sum().backward()
    assert module.weight.grad is not None


def test_rows_too_long_for_the_kernel_are_refused_or_left_to_torch():
    x, weight = torch.ones(1, 40_000, device=DEVICE), torch.ones(40_000, device=DEVICE)
    with pytest.raises(ValueError, match="40000 values are too long for the Triton kernel"):
        rms_norm(x, weight, backend="triton")
    torch.testing.assert_close(rms_norm(x, weight), x)


def test_second_derivatives_are_refused_rather_than_wrong():
    (x, _), weight, _ = case(3, 8)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(rms_norm(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
