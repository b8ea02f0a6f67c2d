"""The chunked loss of a linear layer equals float64 cross-entropy of all logits, and costs what it says."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from redwhale.kernels import linear_cross_entropy

TOKENS, HIDDEN, VOCABULARY = 37, 24, 61
UPSTREAM = 1 / 3  # bf16 rounds it by 0.2%


def case(dtype=torch.float32, tokens=TOKENS, hidden=HIDDEN, vocabulary=VOCABULARY, ignored=0.3, seed=0):
    """Logits of standard deviation 2, the spread of a trained model's."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, hidden, generator=generator) * 2 / hidden**0.5).to(dtype)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < ignored] = -100
    return x.requires_grad_(), weight.requires_grad_(), targets


def reference(x, weight, targets, upstream=1.0):
    """Token losses, gradients and hits from float64 autograd on the same (already rounded) inputs."""
    x, weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    logits = x @ weight.T
    losses = F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
    (losses.sum() * upstream).backward()
    return losses.detach(), x.grad, weight.grad, int((logits.argmax(-1) == targets).sum())


def relative_error(actual, expected) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("chunk_tokens", [1, 7, TOKENS, 1000])
def test_fp32_loss_and_gradients_equal_float64(chunk_tokens):
    x, weight, targets = case()
    losses, grad_x, grad_weight, hits = reference(x, weight, targets, UPSTREAM)
    output = linear_cross_entropy(x, weight, targets, chunk_tokens=chunk_tokens)
    (output.loss_sum * UPSTREAM).backward()
    # fp32 keeps 24 bits: sums of some 60 terms stay within 1e-6 of the exact value.
    torch.testing.assert_close(output.token_losses.double(), losses, rtol=1e-6, atol=2e-6)
    assert output.loss_sum.item() == pytest.approx(float(losses.sum()), rel=1e-6)
    assert int(output.correct) == hits
    assert relative_error(x.grad, grad_x) < 1e-6
    assert relative_error(weight.grad, grad_weight) < 1e-6


@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
def test_bf16_loss_and_gradients_are_within_the_rounding_of_the_logits(chunk_tokens):
    x, weight, targets = case(torch.bfloat16)
    losses, grad_x, grad_weight, _ = reference(x, weight, targets, UPSTREAM)
    output = linear_cross_entropy(x, weight, targets, chunk_tokens=chunk_tokens)
    (output.loss_sum * UPSTREAM).backward()
    assert output.loss_sum.dtype == output.token_losses.dtype == torch.float32
    assert x.grad.dtype == weight.grad.dtype == torch.bfloat16
    # A logit z is rounded by at most |z|/256/2; a loss is a difference of two numbers with such errors.
    largest = float((x.detach().double() @ weight.detach().double().T).abs().max())
    assert float((output.token_losses.double() - losses).abs().max()) <= largest / 256
    # Rounded logits, rounded probabilities and rounded products: each about 2^-9.
    assert relative_error(x.grad, grad_x) < 3 * 2**-9
    assert relative_error(weight.grad, grad_weight) < 3 * 2**-9


def test_bf16_gradients_are_not_scaled_by_a_rounded_upstream_gradient():
    x, weight, targets = case(torch.bfloat16, tokens=400, ignored=0.0)
    _, grad_x, grad_weight, _ = reference(x, weight, targets, UPSTREAM)
    (linear_cross_entropy(x, weight, targets).loss_sum * UPSTREAM).backward()
    # Independent roundings of 10,000 entries average out; a common factor of bf16(1/3) would leave 2e-3.
    for actual, expected in ((x.grad, grad_x), (weight.grad, grad_weight)):
        scale = float((actual.double() * expected).sum() / expected.square().sum())
        assert scale == pytest.approx(1.0, abs=5e-4)


def test_correct_counts_the_tokens_whose_target_has_the_highest_logit():
    # Every hidden state points along one row of an orthogonal head: the likeliest token is known beforehand.
    weight = torch.eye(16)
    likeliest = torch.arange(40) % 16
    targets = likeliest.clone()
    targets[::5] = (targets[::5] + 1) % 16  # 8 misses
    targets[1::5] = -100  # 8 that do not count
    for dtype in (torch.float32, torch.bfloat16):
        output = linear_cross_entropy((weight[likeliest] * 5).to(dtype), weight.to(dtype), targets, chunk_tokens=6)
        assert int(output.correct) == 24
        assert output.correct.dtype == torch.int64


def test_ignored_targets_add_neither_loss_nor_gradient():
    x, weight, targets = case(ignored=0.5)
    counted = targets != -100
    alone = reference(x[counted], weight, targets[counted])
    output = linear_cross_entropy(x, weight, targets, chunk_tokens=5)
    output.loss_sum.backward()
    assert torch.equal(output.token_losses[~counted], torch.zeros(int((~counted).sum())))
    assert torch.equal(x.grad[~counted], torch.zeros_like(x.grad[~counted]))
    assert output.loss_sum.item() == pytest.approx(float(alone[0].sum()), rel=1e-6)
    assert relative_error(x.grad[counted], alone[1]) < 1e-6
    assert relative_error(weight.grad, alone[2]) < 1e-6


def test_another_ignore_index_is_respected():
    x, weight, targets = case()
    expected = linear_cross_entropy(x, weight, targets)
    renamed = linear_cross_entropy(x, weight, targets.masked_fill(targets == -100, 0x7FFF), ignore_index=0x7FFF)
    assert torch.equal(renamed.token_losses, expected.token_losses)


def test_all_targets_ignored_gives_zero_loss_and_zero_gradients():
    x, weight, targets = case(ignored=1.1)
    output = linear_cross_entropy(x, weight, targets, chunk_tokens=8)
    output.loss_sum.backward()
    assert output.loss_sum.item() == 0.0
    assert int(output.correct) == 0
    assert not x.grad.any()
    assert not weight.grad.any()


@pytest.mark.parametrize("poison", [float("inf"), float("nan"), 1e38])
def test_non_finite_hidden_states_of_ignored_tokens_reach_nothing(poison):
    x, weight, targets = case(ignored=0.5)
    ignored = targets == -100
    expected = reference(x[~ignored], weight, targets[~ignored])
    poisoned = x.detach().masked_fill(ignored[:, None], poison).requires_grad_()
    output = linear_cross_entropy(poisoned, weight, targets, chunk_tokens=9)
    output.loss_sum.backward()
    assert output.loss_sum.item() == pytest.approx(float(expected[0].sum()), rel=1e-6)
    assert relative_error(poisoned.grad[~ignored], expected[1]) < 1e-6
    assert not poisoned.grad[ignored].any()
    assert relative_error(weight.grad, expected[2]) < 1e-6


def test_frozen_weight_gets_no_gradient_and_leaves_that_of_hidden_right():
    x, weight, targets = case()
    weight.requires_grad_(False)
    _, grad_x, _, _ = reference(x, weight, targets)
    linear_cross_entropy(x, weight, targets, chunk_tokens=10).loss_sum.backward()
    assert weight.grad is None
    assert relative_error(x.grad, grad_x) < 1e-6


def test_frozen_hidden_gets_no_gradient_and_leaves_that_of_weight_right():
    x, weight, targets = case()
    x.requires_grad_(False)
    _, _, grad_weight, _ = reference(x, weight, targets)
    linear_cross_entropy(x, weight, targets, chunk_tokens=10).loss_sum.backward()
    assert x.grad is None
    assert relative_error(weight.grad, grad_weight) < 1e-6


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_loss_is_the_same_to_the_bit(mode):
    x, weight, targets = case()
    expected = linear_cross_entropy(x, weight, targets, chunk_tokens=10)
    with mode():
        output = linear_cross_entropy(x, weight, targets, chunk_tokens=10)
    assert not output.loss_sum.requires_grad
    assert torch.equal(output.loss_sum, expected.loss_sum)
    assert torch.equal(output.token_losses, expected.token_losses)


@pytest.mark.parametrize(
    ("trained", "products"),
    [((), 1), (("hidden",), 2), (("weight",), 2), (("hidden", "weight"), 3)],
)
def test_only_the_needed_products_are_computed(trained, products):
    x, weight, targets = case()
    x.requires_grad_("hidden" in trained)
    weight.requires_grad_("weight" in trained)
    with FlopCounterMode(display=False) as counter:
        loss = linear_cross_entropy(x, weight, targets, chunk_tokens=10).loss_sum
        if trained:
            loss.backward()
    assert counter.get_total_flops() == products * 2 * TOKENS * HIDDEN * VOCABULARY


def test_no_grad_costs_the_forward_product_alone():
    x, weight, targets = case()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        linear_cross_entropy(x, weight, targets, chunk_tokens=10)
    assert counter.get_total_flops() == 2 * TOKENS * HIDDEN * VOCABULARY


class _LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = result if isinstance(result, (tuple, list)) else (result,)
        self.elements = max([self.elements] + [t.numel() for t in tensors if isinstance(t, torch.Tensor)])
        return result


def test_the_logits_of_all_tokens_never_exist_together():
    x, weight, targets = case(tokens=300, hidden=8, vocabulary=200)
    with _LargestTensor() as largest:
        linear_cross_entropy(x, weight, targets, chunk_tokens=32).loss_sum.backward()
    assert largest.elements == 32 * 200  # all logits would be 300 · 200


def test_backward_can_run_twice_and_is_linear_in_the_upstream_gradient():
    x, weight, targets = case()
    loss = linear_cross_entropy(x, weight, targets, chunk_tokens=10).loss_sum
    once = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    fourfold = torch.autograd.grad(loss * 4, (x, weight))
    for a, b in zip(once, fourfold, strict=True):
        assert torch.equal(a * 4, b)


def test_second_derivatives_are_refused_rather_than_wrong():
    x, weight, targets = case()
    (grad,) = torch.autograd.grad(linear_cross_entropy(x, weight, targets).loss_sum.square(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_non_contiguous_inputs_give_the_same(layout):
    x, weight, targets = case()
    x, weight = x.detach(), weight.detach()
    if layout == "transposed":
        views = x.T.contiguous().T, weight.T.contiguous().T
    elif layout == "strided":
        views = x.repeat_interleave(2, 1)[:, ::2], weight.repeat_interleave(3, 0)[::3]
    else:
        x = x[:1].expand(TOKENS, -1)
        views = x, weight.repeat_interleave(2, 1)[:, ::2]
    assert not any(view.is_contiguous() for view in views)
    view_x, view_weight = (view.detach().requires_grad_() for view in views)
    losses, grad_x, grad_weight, hits = reference(x, weight, targets)
    strided_targets = targets.repeat_interleave(2)[::2]
    output = linear_cross_entropy(view_x, view_weight, strided_targets, chunk_tokens=10)
    got_x, got_weight = torch.autograd.grad(output.loss_sum, (view_x, view_weight))
    torch.testing.assert_close(output.token_losses.double(), losses, rtol=1e-6, atol=2e-6)
    assert int(output.correct) == hits
    assert relative_error(got_x, grad_x) < 1e-6
    assert relative_error(got_weight, grad_weight) < 1e-6


def test_extreme_logits_stay_finite():
    x = torch.tensor([[300.0], [-300.0]], requires_grad=True)
    weight = torch.tensor([[100.0], [-100.0]], requires_grad=True)
    output = linear_cross_entropy(x, weight, torch.tensor([0, 0]))
    output.loss_sum.backward()
    assert output.token_losses.tolist() == [0.0, 60000.0]
    assert x.grad.tolist() == [[0.0], [-200.0]]
    assert weight.grad.tolist() == [[300.0], [-300.0]]


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 20),
    hidden=st.integers(1, 17),
    vocabulary=st.integers(1, 33),
    chunk_tokens=st.integers(1, 25),
    ignored=st.sampled_from([0.0, 0.4, 1.1]),
    seed=st.integers(0, 2**16),
)
def test_any_shape_equals_float64(tokens, hidden, vocabulary, chunk_tokens, ignored, seed):
    x, weight, targets = case(torch.float32, tokens, hidden, vocabulary, ignored, seed)
    losses, grad_x, grad_weight, _ = reference(x, weight, targets)
    output = linear_cross_entropy(x, weight, targets, chunk_tokens=chunk_tokens)
    output.loss_sum.backward()
    torch.testing.assert_close(output.token_losses.double(), losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), grad_x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight.grad.double(), grad_weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_tokens", [1, 5, 64])
def test_bias_and_padding_rows_equal_float64(chunk_tokens):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(23, 8, generator=generator), torch.randn(40, 8, generator=generator)
    bias, targets = torch.randn(40, generator=generator), torch.randint(0, 33, (23,), generator=generator)
    targets[[3, 9]] = -100
    inputs = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    logits = (exact[0] @ exact[1].T + exact[2])[:, :33]
    expected = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    expected_grads = torch.autograd.grad(3 * expected, exact)
    actual = linear_cross_entropy(hidden, weight, targets, bias=bias, vocab_size=33, chunk_tokens=chunk_tokens)
    actual_grads = torch.autograd.grad(3 * actual.loss_sum, inputs)
    torch.testing.assert_close(actual.loss_sum.double(), expected, rtol=1e-6, atol=0)
    for ours, theirs in zip(actual_grads, expected_grads, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    assert not actual_grads[1][33:].any()
    assert not actual_grads[2][33:].any()
