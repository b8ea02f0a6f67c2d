"""SwiGLU equals its formula in float64 and keeps nothing but its inputs."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from redwhale.kernels import swiglu


def formula(gate, up):
    return gate / (1 + torch.exp(-gate)) * up


def gradients(function, gate, up, upstream):
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    output = function(gate, up)
    return output.detach(), *torch.autograd.grad(output, (gate, up), upstream)


def case(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(*shape, generator=generator) * 3).to(dtype) for _ in range(3)]


@settings(max_examples=40, deadline=None)
@given(shape=st.lists(st.integers(1, 9), min_size=1, max_size=3), seed=st.integers(0, 2**16))
def test_fp32_output_and_gradients_equal_float64(shape, seed):
    inputs = case(*shape, seed=seed)
    expected = gradients(formula, *(tensor.double() for tensor in inputs))
    for a, e in zip(gradients(swiglu, *inputs), expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5)


def test_bf16_output_and_gradients_are_within_three_roundings():
    inputs = case(40, 64, dtype=torch.bfloat16)
    expected = gradients(formula, *(tensor.double() for tensor in inputs))
    for a, e in zip(gradients(swiglu, *inputs), expected, strict=True):
        assert a.dtype == torch.bfloat16
        assert float((a.double() - e).norm() / e.norm()) < 3 * 2**-9


def test_large_gates_saturate_without_overflow():
    gate = torch.tensor([-200.0, -1e4, 200.0, 1e4], requires_grad=True)
    up = torch.full((4,), 2.0, requires_grad=True)
    output = swiglu(gate, up)
    output.sum().backward()
    assert output.tolist() == [0.0, 0.0, 400.0, 20000.0]
    assert gate.grad.tolist() == [0.0, 0.0, 2.0, 2.0]
    assert up.grad.tolist() == [0.0, 0.0, 200.0, 10000.0]


def test_strided_inputs_give_the_same():
    gate, up, upstream = case(6, 8)
    expected = gradients(swiglu, gate, up, upstream)
    actual = gradients(swiglu, gate.T.contiguous().T, up.repeat_interleave(2, 1)[:, ::2], upstream.T.contiguous().T)
    for a, e in zip(actual, expected, strict=True):
        # The vectorised exponential and the scalar one of strided memory differ in the last bits.
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-6)


def test_backward_keeps_the_two_inputs_and_nothing_else():
    gate, up, _ = case(6, 8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        swiglu(gate.requires_grad_(), up.requires_grad_())
    assert kept == [gate.data_ptr(), up.data_ptr()]
