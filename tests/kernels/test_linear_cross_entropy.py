"""The chunked loss of a linear layer equals float64 cross-entropy of all logits, and costs what it says."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_testing import BACKENDS, DEVICE, EPSILON, far_rows, normal, relative_error
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from redwhale.kernels.cross_entropy_rows import cross_entropy_rows_
from redwhale.kernels.launch import captured_launches
from redwhale.kernels.linear_cross_entropy import (
    LinearCrossEntropy,
    _gemm_adds_in_fp32,
    _WeightGradient,
    linear_cross_entropy,
)
from redwhale.kernels.row_range import row_range

TOKENS, HIDDEN, VOCABULARY = 37, 24, 61
UPSTREAM = 1 / 3  # bf16 rounds it by 0.2%
both_backends = pytest.mark.parametrize("backend", BACKENDS)


def case(dtype=torch.float32, tokens=TOKENS, hidden=HIDDEN, vocabulary=VOCABULARY, ignored=0.3, seed=0):
    """Logits of standard deviation 2, the spread of a trained model's."""
    x = normal(tokens, hidden, seed=seed, dtype=dtype).requires_grad_()
    weight = normal(vocabulary, hidden, seed=seed + 1, dtype=dtype, scale=2 / hidden**0.5).requires_grad_()
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < ignored] = -100
    return x, weight, targets.to(DEVICE)


def exact_losses(logits, targets, *, token_weights=None, z_loss=0.0, label_smoothing=0.0):
    """[N] in the logits' dtype: the definition, from PyTorch's own smoothed cross-entropy."""
    losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
    losses = losses + z_loss * torch.logsumexp(logits, -1).square() * (targets != -100)
    return losses if token_weights is None else losses * token_weights


def reference(x, weight, targets, upstream=1.0):
    """Token losses, gradients and hits from float64 autograd on the same (already rounded) inputs."""
    x, weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    logits = x @ weight.T
    losses = exact_losses(logits, targets)
    (losses * upstream).sum().backward()
    return losses.detach(), x.grad, weight.grad, int((logits.argmax(-1) == targets).sum())


@both_backends
@pytest.mark.parametrize("chunk_tokens", [1, 7, TOKENS, 1000])
def test_fp32_loss_and_gradients_equal_float64(backend, chunk_tokens):
    x, weight, targets = case()
    losses, grad_x, grad_weight, hits = reference(x, weight, targets, UPSTREAM)
    output = linear_cross_entropy(x, weight, targets, chunk_tokens=chunk_tokens, backend=backend)
    (output.loss_sum * UPSTREAM).backward()
    # fp32 keeps 24 bits: sums of some 60 terms stay within 1e-6 of the exact value.
    torch.testing.assert_close(output.token_losses.double(), losses, rtol=1e-6, atol=2e-6)
    lse = torch.logsumexp(x.detach().double() @ weight.detach().double().T, -1) * (targets != -100)
    torch.testing.assert_close(output.lse.double(), lse, rtol=1e-6, atol=2e-6)
    assert output.loss_sum.item() == pytest.approx(float(losses.sum()), rel=1e-6)
    assert int(output.correct) == hits
    assert relative_error(x.grad, grad_x) < 1e-6
    assert relative_error(weight.grad, grad_weight) < 1e-6


@both_backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
def test_half_precision_is_within_the_rounding_of_the_logits(backend, dtype, chunk_tokens):
    x, weight, targets = case(dtype)
    losses, grad_x, grad_weight, _ = reference(x, weight, targets, UPSTREAM)
    output = linear_cross_entropy(x, weight, targets, chunk_tokens=chunk_tokens, backend=backend)
    (output.loss_sum * UPSTREAM).backward()
    assert output.loss_sum.dtype == output.token_losses.dtype == output.lse.dtype == torch.float32
    assert x.grad.dtype == weight.grad.dtype == dtype
    # A logit z is rounded by at most |z|·ε; a loss is a difference of two numbers with such errors.
    largest = float((x.detach().double() @ weight.detach().double().T).abs().max())
    assert float((output.token_losses.double() - losses).abs().max()) <= 2 * largest * EPSILON[dtype]
    # Rounded logits, rounded probabilities and rounded products.
    assert relative_error(x.grad, grad_x) < 3 * EPSILON[dtype]
    assert relative_error(weight.grad, grad_weight) < 3 * EPSILON[dtype]


# Triton's interpreter truncates, which shifts all gradients the same way.
@pytest.mark.parametrize("backend", BACKENDS if DEVICE.type == "cuda" else ["torch"])
def test_bf16_gradients_are_not_scaled_by_a_rounded_upstream_gradient(backend):
    x, weight, targets = case(torch.bfloat16, tokens=400, ignored=0.0)
    _, grad_x, grad_weight, _ = reference(x, weight, targets, UPSTREAM)
    (linear_cross_entropy(x, weight, targets, backend=backend).loss_sum * UPSTREAM).backward()
    # Independent roundings of 10,000 entries average out; a common factor of bf16(1/3) would leave 2e-3.
    for actual, expected in ((x.grad, grad_x), (weight.grad, grad_weight)):
        scale = float((actual.double() * expected).sum() / expected.square().sum())
        assert scale == pytest.approx(1.0, abs=5e-4)


@both_backends
@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(0, 12),
    hidden=st.integers(1, 17),
    vocabulary=st.integers(1, 33),
    chunk_tokens=st.integers(1, 15),
    ignored=st.sampled_from([0.0, 0.4, 1.1]),
    seed=st.integers(0, 2**16),
)
def test_any_shape_equals_float64(backend, tokens, hidden, vocabulary, chunk_tokens, ignored, seed):
    x, weight, targets = case(torch.float32, tokens, hidden, vocabulary, ignored, seed)
    losses, grad_x, grad_weight, _ = reference(x, weight, targets)
    output = linear_cross_entropy(x, weight, targets, chunk_tokens=chunk_tokens, backend=backend)
    output.loss_sum.backward()
    torch.testing.assert_close(output.token_losses.double(), losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), grad_x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight.grad.double(), grad_weight, rtol=1e-5, atol=1e-5)


@both_backends
@settings(max_examples=15, deadline=None)
@given(
    vocab_size=st.integers(1, 40),
    with_bias=st.booleans(),
    weighted=st.booleans(),
    z_loss=st.sampled_from([0.0, 1e-2]),
    label_smoothing=st.sampled_from([0.0, 0.1, 0.9]),
    chunk_tokens=st.integers(1, 12),
    seed=st.integers(0, 2**16),
)
def test_any_options_together_equal_float64(
    backend, vocab_size, with_bias, weighted, z_loss, label_smoothing, chunk_tokens, seed
):
    x, weight, targets = case(tokens=11, hidden=8, vocabulary=40, seed=seed)
    targets = torch.where(targets == -100, -100, targets % vocab_size)
    bias = normal(40, seed=seed + 2).requires_grad_() if with_bias else None
    # Of either sign, as in reinforcement learning, and one of them 0.
    token_weights = normal(11, seed=seed + 3).index_fill(0, torch.tensor([4], device=DEVICE), 0.0) if weighted else None
    options = {"token_weights": token_weights, "z_loss": z_loss, "label_smoothing": label_smoothing}
    inputs = [tensor for tensor in (x, weight, bias) if tensor is not None]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    logits = exact[0] @ exact[1].T + (exact[2] if with_bias else 0.0)
    expected = exact_losses(logits[:, :vocab_size], targets, **options).sum()
    actual = linear_cross_entropy(
        x, weight, targets, bias=bias, vocab_size=vocab_size, chunk_tokens=chunk_tokens, backend=backend, **options
    )
    torch.testing.assert_close(actual.loss_sum.double(), expected.detach(), rtol=1e-5, atol=2e-5)
    bare = exact_losses(logits[:, :vocab_size], targets).detach()
    torch.testing.assert_close(actual.token_losses.double(), bare, rtol=1e-5, atol=1e-5)
    actual_grads = torch.autograd.grad(3 * actual.loss_sum, inputs)
    for ours, theirs in zip(actual_grads, torch.autograd.grad(3 * expected, exact), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=3e-5)
    for grad in actual_grads[1:]:  # of rows that are no tokens
        assert not grad[vocab_size:].any()


@both_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_longer_than_a_block_equal_float64(backend, dtype):
    # Two blocks of 8,192 and a third one that holds the vocabulary's end and padding.
    logits, vocab_size = normal(5, 20_003, dtype=dtype, scale=3), 17_001
    targets = torch.tensor([0, 8_191, 8_192, 17_000, -100], device=DEVICE)
    options = {"token_weights": normal(5, seed=1), "z_loss": 1e-3, "label_smoothing": 0.1}
    exact = logits.double().requires_grad_()
    losses = exact_losses(exact[:, :vocab_size], targets, **options)
    (expected,) = torch.autograd.grad(losses.sum(), exact)
    actual = cross_entropy_rows_(logits, targets, vocab_size=vocab_size, backend=backend, **options)
    torch.testing.assert_close(actual[0].double(), losses.detach(), rtol=1e-6, atol=1e-6)
    assert relative_error(logits, expected) < max(EPSILON[dtype], 1e-6)
    assert not logits[:, vocab_size:].any()
    assert not logits[4].any()


@both_backends
def test_correct_counts_the_tokens_whose_target_has_the_highest_logit(backend):
    # Every hidden state points along one row of an orthogonal head: the likeliest token is known beforehand.
    weight = torch.eye(16, device=DEVICE)
    likeliest = torch.arange(40, device=DEVICE) % 16
    targets = likeliest.clone()
    targets[::5] = (targets[::5] + 1) % 16  # 8 misses
    targets[1::5] = -100  # 8 that do not count
    for dtype in (torch.float32, torch.bfloat16):
        x = (weight[likeliest] * 5).to(dtype)
        output = linear_cross_entropy(x, weight.to(dtype), targets, chunk_tokens=6, backend=backend)
        assert int(output.correct) == 24
        assert output.correct.dtype == torch.int64


@both_backends
def test_of_equal_logits_the_first_is_the_hit(backend):
    logits = torch.zeros(7, 20_000, device=DEVICE)
    logits[:, [5, 700, 9_000, 19_000]] = 2.0
    logits[5:, 9_000] = 3.0
    targets = torch.tensor([5, 700, 9_000, 19_000, 4, 9_000, 5], device=DEVICE)
    *_, hits = cross_entropy_rows_(logits, targets, backend=backend)
    assert hits.tolist() == [1, 0, 0, 0, 0, 1, 0]


@both_backends
def test_ignored_targets_add_neither_loss_nor_gradient(backend):
    x, weight, targets = case(ignored=0.5)
    counted = targets != -100
    alone = reference(x[counted], weight, targets[counted])
    output = linear_cross_entropy(x, weight, targets, chunk_tokens=5, backend=backend)
    output.loss_sum.backward()
    assert not output.token_losses[~counted].any()
    assert not output.lse[~counted].any()
    assert not x.grad[~counted].any()
    assert output.loss_sum.item() == pytest.approx(float(alone[0].sum()), rel=1e-6)
    assert relative_error(x.grad[counted], alone[1]) < 1e-6
    assert relative_error(weight.grad, alone[2]) < 1e-6


@both_backends
def test_another_ignore_index_is_respected(backend):
    x, weight, targets = case()
    expected = linear_cross_entropy(x, weight, targets, backend=backend)
    for index in (0x7FFF, -1):
        others = targets.masked_fill(targets == -100, index)
        renamed = linear_cross_entropy(x, weight, others, ignore_index=index, backend=backend)
        assert torch.equal(renamed.token_losses, expected.token_losses)


@both_backends
@pytest.mark.parametrize("tokens", [0, 12])
def test_no_tokens_that_count_give_zero_loss_and_zero_gradients(backend, tokens):
    x, weight, targets = case(tokens=tokens, ignored=1.1)
    output = linear_cross_entropy(x, weight, targets, chunk_tokens=8, backend=backend)
    output.loss_sum.backward()
    assert output.loss_sum.item() == 0.0
    assert int(output.correct) == 0
    assert output.token_losses.shape == output.lse.shape == (tokens,)
    assert x.grad.shape == (tokens, HIDDEN)
    assert not x.grad.any()
    assert weight.grad.shape == (VOCABULARY, HIDDEN)
    assert not weight.grad.any()


@both_backends
@pytest.mark.parametrize("poison", [float("inf"), float("nan"), 1e38])
def test_non_finite_hidden_states_of_ignored_tokens_reach_nothing(backend, poison):
    x, weight, targets = case(ignored=0.5)
    ignored = targets == -100
    expected = reference(x[~ignored], weight, targets[~ignored])
    poisoned = x.detach().masked_fill(ignored[:, None], poison).requires_grad_()
    bias = torch.zeros(VOCABULARY, device=DEVICE, requires_grad=True)
    token_weights = torch.ones(TOKENS, device=DEVICE)
    options = {"bias": bias, "token_weights": token_weights, "chunk_tokens": 9, "backend": backend}
    output = linear_cross_entropy(poisoned, weight, targets, **options)
    output.loss_sum.backward()
    assert output.loss_sum.item() == pytest.approx(float(expected[0].sum()), rel=1e-6)
    assert relative_error(poisoned.grad[~ignored], expected[1]) < 1e-6
    assert not poisoned.grad[ignored].any()
    assert relative_error(weight.grad, expected[2]) < 1e-6
    assert bias.grad.isfinite().all()


@both_backends
def test_frozen_weight_gets_no_gradient_and_leaves_that_of_hidden_right(backend):
    x, weight, targets = case()
    weight.requires_grad_(False)
    _, grad_x, _, _ = reference(x, weight, targets)
    linear_cross_entropy(x, weight, targets, chunk_tokens=10, backend=backend).loss_sum.backward()
    assert weight.grad is None
    assert relative_error(x.grad, grad_x) < 1e-6


@both_backends
def test_frozen_hidden_gets_no_gradient_and_leaves_that_of_weight_right(backend):
    x, weight, targets = case()
    x.requires_grad_(False)
    _, _, grad_weight, _ = reference(x, weight, targets)
    linear_cross_entropy(x, weight, targets, chunk_tokens=10, backend=backend).loss_sum.backward()
    assert x.grad is None
    assert relative_error(weight.grad, grad_weight) < 1e-6


@both_backends
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_loss_is_the_same_to_the_bit(backend, mode):
    x, weight, targets = case()
    options = {"z_loss": 1e-3, "label_smoothing": 0.1, "chunk_tokens": 10, "backend": backend}
    expected = linear_cross_entropy(x, weight, targets, **options)
    with mode():
        output = linear_cross_entropy(x, weight, targets, **options)
    assert not output.loss_sum.requires_grad
    for ours, theirs in zip(output, expected, strict=True):
        assert torch.equal(ours, theirs)


@both_backends
def test_trained_rows_get_their_part_of_the_weights_gradient(backend):
    x, weight, targets = case()
    _, grad_x, grad_weight, _ = reference(x, weight, targets, UPSTREAM)
    rows = row_range(weight.requires_grad_(False), 20, 30)
    options = {"trained_rows": rows, "first_row": 20, "chunk_tokens": 10, "backend": backend}
    (linear_cross_entropy(x, weight, targets, **options).loss_sum * UPSTREAM).backward()
    assert weight.grad is None
    assert relative_error(rows.grad, grad_weight[20:50]) < 1e-6
    assert relative_error(x.grad, grad_x) < 1e-6


@both_backends
@pytest.mark.parametrize("part", ["weight", "rows"])
def test_a_buffer_adds_the_gradients_of_micro_batches_in_fp32(backend, part):
    _, weight, _ = case(torch.bfloat16)
    trained, first_row, options = weight, 0, {}
    if part == "rows":
        first_row = 20
        trained = row_range(weight.requires_grad_(False), first_row, 30)
        options = {"trained_rows": trained, "first_row": first_row}
    buffer = torch.ones(trained.shape, device=DEVICE)
    expected, losses = torch.ones(trained.shape, dtype=torch.float64, device=DEVICE), []
    for seed in range(3):
        x, _, targets = case(torch.bfloat16, seed=10 * seed)
        output = linear_cross_entropy(x, weight, targets, weight_grad=buffer, backend=backend, **options)
        losses.append(output.loss_sum * UPSTREAM)
        expected += reference(x, weight, targets, UPSTREAM)[2][first_row : first_row + len(trained)]
    for loss in losses:  # all forward passes before the first backward: the buffer changes between the two
        loss.backward()
    assert trained.grad is None
    assert buffer.dtype == torch.float32
    assert relative_error(buffer - 1, expected - 1) < 3 * EPSILON[torch.bfloat16]


def test_the_buffers_gradient_is_not_rounded_to_the_weights_dtype():
    x, weight, targets = case(torch.bfloat16)
    buffer = torch.zeros(weight.shape, device=DEVICE)
    linear_cross_entropy(x, weight, targets, weight_grad=buffer).loss_sum.backward()
    linear_cross_entropy(x, weight, targets).loss_sum.backward()
    assert torch.equal(buffer.to(torch.bfloat16), weight.grad)
    linear_cross_entropy(x, weight, targets, weight_grad=buffer, chunk_tokens=5).loss_sum.backward()
    assert not torch.equal(buffer.to(torch.bfloat16).float(), buffer)


@both_backends
def test_micro_batches_add_up_in_grad(backend):
    x, weight, targets = case()
    _, _, expected, _ = reference(x, weight, targets)
    for half in (slice(0, 20), slice(20, None)):
        linear_cross_entropy(x[half], weight, targets[half], backend=backend).loss_sum.backward()
    assert relative_error(weight.grad, expected) < 1e-6


@both_backends
def test_a_head_tied_to_the_embedding_gets_both_gradients(backend):
    _, weight, targets = case()
    ids = torch.arange(TOKENS, device=DEVICE)
    exact = weight.detach().double().requires_grad_()
    exact_losses(exact[ids] @ exact.T, targets).sum().backward()
    linear_cross_entropy(weight[ids], weight, targets, backend=backend).loss_sum.backward()
    assert relative_error(weight.grad, exact.grad) < 1e-6


@both_backends
@pytest.mark.parametrize(
    ("trained", "products"),
    [((), 1), (("hidden",), 2), (("weight",), 2), (("hidden", "weight"), 3)],
)
def test_only_the_needed_products_are_computed(backend, trained, products):
    x, weight, targets = case()
    x.requires_grad_("hidden" in trained)
    weight.requires_grad_("weight" in trained)
    with FlopCounterMode(display=False) as counter:
        loss = linear_cross_entropy(x, weight, targets, chunk_tokens=10, backend=backend).loss_sum
        if trained:
            loss.backward()
    assert counter.get_total_flops() == products * 2 * TOKENS * HIDDEN * VOCABULARY


def test_trained_rows_cost_their_own_product_alone():
    x, weight, targets = case()
    rows = row_range(weight.requires_grad_(False), 50, 11)
    with FlopCounterMode(display=False) as counter:
        linear_cross_entropy(x, weight, targets, trained_rows=rows, first_row=50).loss_sum.backward()
    assert counter.get_total_flops() == 2 * TOKENS * HIDDEN * (2 * VOCABULARY + 11)


@both_backends
def test_no_grad_costs_the_forward_product_alone(backend):
    x, weight, targets = case()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        linear_cross_entropy(x, weight, targets, chunk_tokens=10, backend=backend)
    assert counter.get_total_flops() == 2 * TOKENS * HIDDEN * VOCABULARY


class _Allocations(TorchDispatchMode):
    """Sizes in bytes of all memory that operations return tensors in."""

    def __init__(self):
        super().__init__()
        self.sizes, self.largest, self.kept = {}, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
                self.sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                self.kept.append(tensor)  # so that no address is used twice
        return result


@both_backends
def test_the_logits_of_all_tokens_never_exist_together(backend):
    x, weight, targets = case(tokens=300, hidden=8, vocabulary=200)
    with _Allocations() as found:
        linear_cross_entropy(x, weight, targets, chunk_tokens=32, backend=backend).loss_sum.backward()
    assert found.largest == 32 * 200  # all logits would be 300 · 200


@both_backends
def test_all_chunks_share_one_block_in_the_models_dtype_and_fp32_copies_are_of_few_rows(backend, monkeypatch):
    if backend == "torch" and DEVICE.type == "cuda":
        pytest.skip("on a GPU, PyTorch takes fp32 copies of all rows of a chunk")
    monkeypatch.setattr("redwhale.kernels.cross_entropy_rows._CACHED_LOGITS", 5 * 200)
    x, weight, targets = case(torch.bfloat16, tokens=100, hidden=4, vocabulary=200)
    with _Allocations() as found:
        linear_cross_entropy(x, weight, targets, chunk_tokens=20, backend=backend).loss_sum.backward()
    whole = [size for size in found.sizes.values() if size > 5 * 200 * 4]
    assert whole == [20 * 200 * 2]


def test_chunks_are_even_as_far_as_tiles_of_the_products_allow():
    x, weight, targets = case(tokens=520, hidden=2, vocabulary=3)
    rows = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.mm.out and args[1].shape == (2, 3):
                rows.append(len(args[0]))
            return func(*args, **(kwargs or {}))

    with Products(), torch.no_grad():
        linear_cross_entropy(x, weight, targets, chunk_tokens=512)
    assert rows == [384, 136]  # not 512 and 8


@both_backends
def test_backward_can_run_twice_and_is_linear_in_the_upstream_gradient(backend):
    x, weight, targets = case()
    loss = linear_cross_entropy(x, weight, targets, chunk_tokens=10, backend=backend).loss_sum
    once = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    fourfold = torch.autograd.grad(loss * 4, (x, weight))
    for a, b in zip(once, fourfold, strict=True):
        assert torch.equal(a * 4, b)


@both_backends
def test_only_the_loss_sum_carries_a_gradient(backend):
    output = linear_cross_entropy(*case(), backend=backend)
    assert [result.requires_grad for result in output] == [True, False, False, False]


@pytest.mark.parametrize("trained", [(), ("hidden",), ("weight",), ("bias",)])
def test_the_logits_are_overwritten_by_gradients_only_where_some_are_needed(trained):
    inputs = {
        name: torch.empty(shape, device="meta", requires_grad=name in trained)
        for name, shape in (("hidden", (9, 8)), ("weight", (20, 8)), ("bias", (20,)))
    }
    targets = torch.empty(9, dtype=torch.int64, device="meta")
    with captured_launches() as launches:
        linear_cross_entropy(**inputs, targets=targets, backend="triton")
        with torch.no_grad():
            linear_cross_entropy(**inputs, targets=targets, backend="triton")
    assert [options["GRADIENT"] for *_, options in launches] == [bool(trained), False]


@both_backends
def test_second_derivatives_are_refused_rather_than_wrong(backend):
    x, weight, targets = case()
    loss = linear_cross_entropy(x, weight, targets, backend=backend).loss_sum
    (grad,) = torch.autograd.grad(loss.square(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@both_backends
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_non_contiguous_inputs_give_the_same(backend, layout):
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
    token_weights = normal(2 * TOKENS, seed=5)[::2]
    losses, grad_x, grad_weight, hits = reference(x, weight, targets, token_weights.double())
    strided_targets = (
        normal(2 * TOKENS).to(torch.int64).index_copy_(0, torch.arange(0, 2 * TOKENS, 2, device=DEVICE), targets)[::2]
    )
    output = linear_cross_entropy(
        view_x, view_weight, strided_targets, token_weights=token_weights, chunk_tokens=10, backend=backend
    )
    got_x, got_weight = torch.autograd.grad(output.loss_sum, (view_x, view_weight))
    torch.testing.assert_close(output.token_losses.double(), losses, rtol=1e-6, atol=2e-6)
    assert int(output.correct) == hits
    assert relative_error(got_x, grad_x) < 1e-6
    assert relative_error(got_weight, grad_weight) < 1e-6


@both_backends
def test_logits_behind_2_to_the_31_entries_are_found_where_they_are(backend):
    near, targets = normal(3, 16, dtype=torch.float16), torch.tensor([3, 15, -100], device=DEVICE)
    far = far_rows(3, 16, torch.float16)
    far.copy_(near)
    expected = cross_entropy_rows_(near, targets, backend=backend)
    actual = cross_entropy_rows_(far, targets, backend=backend)
    assert torch.equal(far, near)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


@both_backends
def test_extreme_logits_stay_finite(backend):
    x = torch.tensor([[300.0], [-300.0]], device=DEVICE, requires_grad=True)
    weight = torch.tensor([[100.0], [-100.0]], device=DEVICE, requires_grad=True)
    output = linear_cross_entropy(x, weight, torch.tensor([0, 0], device=DEVICE), backend=backend)
    output.loss_sum.backward()
    assert output.token_losses.tolist() == [0.0, 60000.0]
    assert x.grad.tolist() == [[0.0], [-200.0]]
    assert weight.grad.tolist() == [[300.0], [-300.0]]


@both_backends
def test_tokens_banned_by_a_bias_of_minus_infinity_have_probability_0(backend):
    logits = torch.zeros(2, 9_000, device=DEVICE)
    logits[0, :8_500] = float("-inf")  # more than a block
    logits[1, 100:] = float("-inf")
    targets = torch.tensor([8_600, 5], device=DEVICE)
    _, token_losses, _, _ = cross_entropy_rows_(logits, targets, backend=backend)
    torch.testing.assert_close(token_losses, torch.tensor([500.0, 100.0], device=DEVICE).log())
    assert not logits[0, :8_500].any()
    assert not logits[1, 100:].any()
    torch.testing.assert_close(logits[0, 8_600], torch.tensor(1 / 500 - 1, device=DEVICE))


def test_targets_outside_the_vocabulary_are_an_infinite_loss_with_triton_and_read_nothing_else():
    logits = torch.full((4, 16), float("nan"), device=DEVICE)
    logits[1] = 0.0
    for target in (16, -7, 2**40):
        _, token_losses, _, hits = cross_entropy_rows_(
            logits[1:2], torch.tensor([target], device=DEVICE), gradient=False, backend="triton"
        )
        assert token_losses.tolist() == [float("inf")]
        assert hits.tolist() == [0]


def both_losses(x, weight, targets, backend, **options):
    output = linear_cross_entropy(x, weight, targets, chunk_tokens=10, z_loss=1e-3, backend=backend, **options)
    return output.loss_sum * UPSTREAM, output.lse, output.correct


@both_backends
def test_the_same_inputs_give_the_same_bits(backend):
    runs = []
    for _ in range(2):
        x, weight, targets = case(torch.bfloat16)
        results = both_losses(x, weight, targets, backend)
        results[0].backward()
        runs.append([*results, x.grad, weight.grad])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@both_backends
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(backend, use_reentrant):
    x, weight, targets = case()
    plain = torch.autograd.grad(both_losses(x, weight, targets, backend)[0], (x, weight))
    checkpoint(both_losses, x, weight, targets, backend, use_reentrant=use_reentrant)[0].backward()
    assert torch.equal(x.grad, plain[0])
    assert torch.equal(weight.grad, plain[1])


@both_backends
@pytest.mark.parametrize("kind", ["weight", "buffer", "rows", "frozen"])
def test_compiled_without_graph_breaks_it_gives_the_same(backend, kind):
    torch._dynamo.reset()
    x, weight, targets = case()
    options, trained = {}, weight
    if kind in ("rows", "frozen"):
        weight.requires_grad_(False)
    if kind == "rows":
        trained = row_range(weight, 20, 30)
        options = {"trained_rows": trained, "first_row": 20}
    if kind == "buffer":
        options = {"weight_grad": torch.zeros(weight.shape, device=DEVICE)}
    found = []
    for function in (both_losses, torch.compile(both_losses, backend="aot_eager", fullgraph=True)):
        x.grad = trained.grad = None
        if kind == "buffer":
            options["weight_grad"].zero_()
        results = function(x, weight, targets, backend, **options)
        results[0].backward()
        grads = {"buffer": options.get("weight_grad"), "frozen": x.grad}.get(kind, trained.grad).clone()
        found.append([*(result.detach() for result in results), x.grad, grads])
    for a, e in zip(*found, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-6)


@both_backends
def test_the_operators_are_what_torch_compile_takes_them_for(backend):
    x, weight, targets = case(tokens=5)
    x, weight = x.detach(), weight.detach()
    options = (-100, VOCABULARY, 3, 1e-3, 0.1, 20, 30, True, True, backend == "triton")
    torch.library.opcheck(
        torch.ops.redwhale.linear_cross_entropy_forward.default,
        (x, weight, weight[:, 0].contiguous(), targets, torch.ones(5, device=DEVICE), *options),
    )
    torch.library.opcheck(
        torch.ops.redwhale.cross_entropy_rows.default,
        ((x @ weight.T), targets, None, -100, VOCABULARY, 0.0, 0.0, True),
    )


def test_the_module_holds_the_options():
    x, weight, targets = case()
    options = {"vocab_size": 50, "z_loss": 1e-3, "label_smoothing": 0.1, "ignore_index": -1, "chunk_tokens": 10}
    targets = torch.where(targets == -100, -1, targets % 50)
    token_weights = torch.rand(TOKENS, device=DEVICE)
    expected = linear_cross_entropy(x, weight, targets, token_weights=token_weights, **options)
    actual = LinearCrossEntropy(**options)(x, weight, targets, token_weights=token_weights)
    assert torch.equal(actual.loss_sum, expected.loss_sum)


def test_where_the_product_cannot_add_to_fp32_a_warning_says_so():
    _gemm_adds_in_fp32.cache_clear()
    if DEVICE.type == "cuda":  # pragma: no cover
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert _gemm_adds_in_fp32(DEVICE, torch.bfloat16)
            assert _gemm_adds_in_fp32(DEVICE, torch.float16)
    with pytest.warns(UserWarning, match="cannot add torch.bfloat16 products to fp32"):
        assert not _gemm_adds_in_fp32(torch.device("cpu"), torch.bfloat16)


def test_pytorch_has_the_product_that_adds_to_fp32():
    like = torch.empty(8, 4, dtype=torch.bfloat16, device="meta")
    sum_of_products = _WeightGradient(6, like)
    sum_of_products.in_gemm = True  # as on a GPU
    for _ in range(2):
        sum_of_products.add(like.new_empty(5, 6), like.new_empty(5, 4))
    assert sum_of_products.total.shape == (6, 4)
    assert sum_of_products.total.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_gradient_does_not_lose_small_chunks_behind_large_ones(dtype):
    like = torch.empty(1, 1, dtype=dtype, device=DEVICE)
    total = _WeightGradient(1, like)
    total.add(torch.full_like(like, 256.0), torch.ones_like(like))
    for _ in range(100):
        total.add(torch.full_like(like, 0.125), torch.ones_like(like))
    assert total.total.item() == 256 + 12.5  # bf16 would stay at 256


WRONG = {
    r"hidden \[37, 24\] and weight \[61, 23\]": lambda x, w, t: {"weight": w[:, 1:]},
    "differ in dtype: torch.float32 and torch.bfloat16": lambda x, w, t: {"weight": w.bfloat16()},
    r"bias \[60\] is not \[V\]": lambda x, w, t: {"bias": w[1:, 0]},
    r"targets \[36\] torch.int64 are not \[N\] int64": lambda x, w, t: {"targets": t[1:]},
    r"targets \[37\] torch.int32 are not": lambda x, w, t: {"targets": t.int()},
    r"token_weights \[36\] torch.float32 are not": lambda x, w, t: {"token_weights": torch.ones(36)},
    r"token_weights \[37\] torch.float64 are not": lambda x, w, t: {"token_weights": torch.ones(37).double()},
    "detach": lambda x, w, t: {"token_weights": torch.ones(37, requires_grad=True)},
    "vocab_size 62 is not between 1 and": lambda x, w, t: {"vocab_size": 62},
    "vocab_size 0 is not between 1 and": lambda x, w, t: {"vocab_size": 0},
    "chunk_tokens must be positive, not 0": lambda x, w, t: {"chunk_tokens": 0},
    r"label_smoothing 1.0 is not in \[0, 1\)": lambda x, w, t: {"label_smoothing": 1.0},
    "z_loss -0.1": lambda x, w, t: {"z_loss": -0.1},
    "first_row = 3 says where": lambda x, w, t: {"first_row": 3},
    "must not require a gradient itself": lambda x, w, t: {"trained_rows": w.detach()[:5], "first_row": 0},
    "are not in a matrix": lambda x, w, t: {"weight": w.detach(), "trained_rows": w.detach()[:5], "first_row": 60},
    "are a copy": lambda x, w, t: {"weight": w.detach(), "trained_rows": w.detach()[:5].clone()},
    r"weight_grad \[61, 23\] torch.float32 is not": lambda x, w, t: {"weight_grad": torch.ones(61, 23)},
    r"weight_grad \[61, 24\] torch.bfloat16 is not": lambda x, w, t: {"weight_grad": torch.ones(61, 24).bfloat16()},
    "for a weight that needs no gradient": lambda x, w, t: {"weight": w.detach(), "weight_grad": torch.ones(61, 24)},
}


@pytest.mark.parametrize("message", WRONG)
def test_arguments_that_do_not_fit_are_refused(message):
    x, weight, targets = case()
    arguments = {"hidden": x, "weight": weight, "targets": targets} | WRONG[message](x, weight, targets)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)


def test_rows_of_logits_with_gaps_between_their_entries_are_refused():
    with pytest.raises(ValueError, match="must be next to each other"):
        cross_entropy_rows_(torch.zeros(4, 6, device=DEVICE).T, torch.zeros(6, dtype=torch.int64, device=DEVICE))
