"""RMS normalisation equals its formula in float64, and Llama's own layer to the bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from redwhale.kernels import rms_norm

EPS = 1e-5


def formula(x, weight):
    return weight * x / torch.sqrt(x.square().mean(-1, keepdim=True) + EPS)


def gradients(function, x, weight, upstream):
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    output = function(x, weight)
    return output.detach(), *torch.autograd.grad(output, (x, weight), upstream)


def case(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator) * 3
    weight = torch.randn(shape[-1], generator=generator)
    upstream = torch.randn(*shape, generator=generator)
    return x.to(dtype), weight.to(dtype), upstream.to(dtype)


def relative_error(actual, expected) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 7), min_size=0, max_size=3),
    hidden=st.integers(1, 40),
    seed=st.integers(0, 2**16),
)
def test_fp32_output_and_gradients_equal_float64(shape, hidden, seed):
    inputs = case(*shape, hidden, seed=seed)
    expected = gradients(formula, *(tensor.double() for tensor in inputs))
    actual = gradients(lambda x, w: rms_norm(x, w, EPS), *inputs)
    for a, e in zip(actual, expected, strict=True):
        # A width of 1 leaves a gradient that cancels almost wholly: the bound is absolute there.
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=2e-5)


def test_bf16_gradients_are_within_one_rounding_of_float64():
    inputs = case(50, 64, dtype=torch.bfloat16)
    expected = gradients(formula, *(tensor.double() for tensor in inputs))
    actual = gradients(lambda x, w: rms_norm(x, w, EPS), *inputs)
    assert all(tensor.dtype == torch.bfloat16 for tensor in actual)
    # The output is rounded twice (before and after the scale), the gradients once: 2^-9 each.
    for a, e, roundings in zip(actual, expected, (2, 1, 1), strict=True):
        assert relative_error(a, e) < roundings * 2**-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_output_is_bit_equal_to_that_of_llama(dtype, eps):
    x, weight, _ = case(64, 96, dtype=dtype)
    theirs = LlamaRMSNorm(96, eps).to(dtype)
    theirs.weight.data = weight
    assert torch.equal(rms_norm(x, weight, eps), theirs(x))


def test_eps_bounds_the_scale_of_a_zero_row():
    x = torch.zeros(2, 8, requires_grad=True)
    output = rms_norm(x, torch.ones(8), EPS)
    output.sum().backward()
    assert not output.any()
    torch.testing.assert_close(x.grad, torch.full((2, 8), EPS**-0.5))


def test_strided_input_and_upstream_gradient_give_the_same():
    x, weight, upstream = case(6, 5, 16)
    expected = gradients(rms_norm, x, weight, upstream)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1), weight, upstream.expand(6, 5, 16).mT.contiguous().mT
    for a, e in zip(gradients(rms_norm, *strided), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-6)


def test_backward_keeps_the_input_and_one_number_a_row():
    x, weight, _ = case(10, 64, dtype=torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        rms_norm(x.requires_grad_(), weight.requires_grad_())
    assert sorted(kept) == [10, 64, 640]


def test_second_derivatives_are_refused_rather_than_wrong():
    x, weight, _ = case(3, 8)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(rms_norm(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
