"""SwiGLU equals its formula in float64 and keeps nothing but its inputs."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_testing import BACKENDS, DEVICE, EPSILON, far_rows, normal, relative_error, strided
from torch.utils.checkpoint import checkpoint

from redwhale.kernels.swiglu import (
    SwiGLU,
    swiglu,
    swiglu_backward,
    swiglu_forward,
    torch_swiglu_backward,
    torch_swiglu_forward,
)

on_both = pytest.mark.parametrize("backend", BACKENDS)


def formula(gate, up):
    return gate / (1 + torch.exp(-gate)) * up


def gradients(function, gate, up, upstream, **options):
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    output = function(gate, up, **options)
    return output.detach(), *torch.autograd.grad(output, (gate, up), upstream)


def case(*shape, seed=0, dtype=torch.float32):
    """gate, up, and an upstream gradient."""
    return [normal(*shape, seed=seed + n, dtype=dtype, scale=3) for n in range(3)]


def exact_gradients(gate, up, upstream):
    return gradients(formula, gate.double(), up.double(), upstream.double())


@on_both
@settings(max_examples=20, deadline=None)
@given(shape=st.lists(st.integers(0, 5), max_size=2), width=st.integers(1, 70), seed=st.integers(0, 2**16))
def test_fp32_output_and_gradients_equal_float64(backend, shape, width, seed):
    inputs = case(*shape, width, seed=seed)
    for a, e in zip(gradients(swiglu, *inputs, backend=backend), exact_gradients(*inputs), strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5)


@on_both
def test_rows_longer_than_a_block_equal_float64(backend):
    inputs = case(3, 2_500)
    for a, e in zip(gradients(swiglu, *inputs, backend=backend), exact_gradients(*inputs), strict=True):
        assert relative_error(a, e) < 1e-6


@on_both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_within_its_roundings_of_float64(backend, dtype):
    inputs = case(40, 64, dtype=dtype)
    actual, expected = gradients(swiglu, *inputs, backend=backend), exact_gradients(*inputs)
    assert all(tensor.dtype == dtype for tensor in actual)
    # The kernels round once; PyTorch rounds silu(gate), and the product with up in backward, first.
    bound = (1 if backend == "triton" else 3) * EPSILON[dtype]
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < bound


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@on_both
def test_large_gates_saturate_without_overflow(backend):
    gate = torch.tensor([-200.0, -1e4, 200.0, 1e4], device=DEVICE)
    output, grad_gate, grad_up = gradients(
        swiglu, gate, torch.full_like(gate, 2.0), torch.ones_like(gate), backend=backend
    )
    assert output.tolist() == [0.0, 0.0, 400.0, 20000.0]
    assert grad_gate.tolist() == [0.0, 0.0, 2.0, 2.0]
    assert grad_up.tolist() == [0.0, 0.0, 200.0, 10000.0]


def test_output_of_the_torch_backend_is_bit_equal_to_that_of_llama():
    gate, up, _ = case(16, 40, dtype=torch.bfloat16)
    assert torch.equal(swiglu(gate, up, backend="torch"), F.silu(gate) * up)


@on_both
def test_strided_inputs_and_upstream_gradients_give_the_same(backend):
    gate, up, upstream = case(6, 5, 8)

    def of_strided(gate, up):
        return swiglu(strided(gate), strided(up), backend=backend)

    actual = gradients(of_strided, gate, up, strided(upstream))
    for a, e in zip(actual, gradients(swiglu, gate, up, upstream, backend=backend), strict=True):
        # The vectorised exponential and the scalar one of strided memory differ in the last bits.
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-6)


@on_both
def test_halves_of_one_tensor_are_read_where_they_are(backend):
    gate, up, upstream = case(7, 24)
    both = torch.cat([gate, up], 1).requires_grad_()
    (grad,) = torch.autograd.grad(swiglu(*both.chunk(2, 1), backend=backend), both, upstream)
    _, grad_gate, grad_up = gradients(swiglu, gate, up, upstream, backend=backend)
    torch.testing.assert_close(grad, torch.cat([grad_gate, grad_up], 1), rtol=1e-6, atol=1e-6)


@on_both
def test_rows_behind_2_to_the_31_entries_are_read_where_they_are(backend):
    near = case(3, 16, dtype=torch.float16)
    far = [far_rows(3, 16, torch.float16).copy_(tensor) for tensor in near]
    actual = gradients(swiglu, *far, backend=backend)
    for a, e in zip(actual, gradients(swiglu, *near, backend=backend), strict=True):
        assert torch.equal(a, e)


@on_both
def test_backward_keeps_the_two_inputs_and_nothing_else(backend):
    gate, up, _ = case(6, 8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        swiglu(gate.requires_grad_(), up.requires_grad_(), backend=backend)
    assert kept == [gate.data_ptr(), up.data_ptr()]


@on_both
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_input_gets_no_gradient_and_the_other_its_own(backend, frozen):
    gate, up, upstream = case(5, 12)
    inputs = [tensor.requires_grad_(number != frozen) for number, tensor in enumerate((gate, up))]
    swiglu(*inputs, backend=backend).backward(upstream)
    assert inputs[frozen].grad is None
    assert relative_error(inputs[1 - frozen].grad, exact_gradients(gate, up, upstream)[2 - frozen]) < 1e-6


@on_both
def test_gradients_of_two_backward_passes_add_up(backend):
    gate, up, upstream = case(5, 12)
    _, *once = gradients(swiglu, gate, up, upstream, backend=backend)
    gate.requires_grad_(), up.requires_grad_()
    for _ in range(2):
        swiglu(gate, up, backend=backend).backward(upstream)
    for tensor, single in zip((gate, up), once, strict=True):
        torch.testing.assert_close(tensor.grad, 2 * single, rtol=1e-6, atol=1e-6)


@on_both
def test_activation_checkpointing_changes_nothing(backend):
    inputs = case(9, 32)

    def checkpointed(gate, up):
        return checkpoint(swiglu, gate, up, backend=backend, use_reentrant=False)

    again = gradients(checkpointed, *inputs)
    for a, e in zip(again, gradients(swiglu, *inputs, backend=backend), strict=True):
        assert torch.equal(a, e)


@on_both
def test_compiled_without_graph_breaks_it_gives_the_same(backend):
    inputs = case(9, 32)
    compiled = torch.compile(lambda g, u: swiglu(g, u, backend=backend), backend="aot_eager", fullgraph=True)
    for a, e in zip(gradients(compiled, *inputs), gradients(swiglu, *inputs, backend=backend), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_the_operators_are_what_they_claim_to_be():
    gate, up, upstream = case(5, 20)
    torch.library.opcheck(torch.ops.redwhale.swiglu_forward, (gate, strided(up)))
    for wanted in ((True, True, False), (False, True, True)):
        torch.library.opcheck(torch.ops.redwhale.swiglu_backward, (upstream, gate, up, *wanted))


@pytest.mark.parametrize(
    ("forward", "backward"), [(swiglu_forward, swiglu_backward), (torch_swiglu_forward, torch_swiglu_backward)]
)
def test_backward_gives_the_activation_once_more_where_it_is_wanted(forward, backward):
    gate, up, upstream = case(5, 20)
    grad_gate, grad_up, again = backward(upstream, gate, up, False, False, True)
    assert torch.equal(again, forward(gate, up))
    assert grad_gate.numel() == grad_up.numel() == 0


@on_both
def test_the_module_is_the_function(backend):
    gate, up, _ = case(5, 20)
    assert relative_error(SwiGLU()(gate, up), swiglu(gate, up, backend=backend)) < 1e-6


@on_both
def test_inputs_of_different_shapes_are_refused(backend):
    gate, up, _ = case(5, 20)
    with pytest.raises(ValueError, match=r"gate \[5, 20\] and up \[1, 20\] have to have the same shape"):
        swiglu(gate, up[:1], backend=backend)


@on_both
def test_second_derivatives_are_refused_rather_than_wrong(backend):
    gate, up, _ = case(3, 8)
    gate.requires_grad_()
    (grad,) = torch.autograd.grad(swiglu(gate, up, backend=backend).square().sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
