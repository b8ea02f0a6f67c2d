"""The embedding's gradient equals float64 sums, for all rows or for a range of them, in the same bits every time."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_testing import BACKENDS, DEVICE, EPSILON, far_rows, normal, relative_error, strided
from torch.utils.checkpoint import checkpoint

from redwhale.kernels.embedding import Embedding, embedding, embedding_backward_add_
from redwhale.kernels.row_range import row_range

VOCABULARY, HIDDEN = 13, 24


def ids(tokens, seed=0, vocabulary=VOCABULARY):
    generator = torch.Generator().manual_seed(seed)
    # Half of them are one token, so that a row has more tokens than a block of the kernel.
    drawn = torch.randint(vocabulary, (tokens,), generator=generator)
    return torch.where(torch.rand(tokens, generator=generator) < 0.5, vocabulary // 2, drawn).to(DEVICE)


def exact(input_ids, upstream, vocabulary=VOCABULARY):
    one_hot = F.one_hot(input_ids.flatten(), vocabulary).double()
    return one_hot.T @ upstream.double().flatten(0, -2)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(0, 70), hidden=st.integers(1, 40), vocabulary=st.integers(1, 30), seed=st.integers(0, 2**16))
def test_output_and_gradient_of_the_whole_weight_equal_float64(backend, tokens, hidden, vocabulary, seed):
    input_ids = ids(tokens, seed, vocabulary)
    weight, upstream = normal(vocabulary, hidden, seed=seed), normal(tokens, hidden, seed=seed + 1)
    output = embedding(input_ids, weight.requires_grad_(), backend=backend)
    assert torch.equal(output, weight[input_ids])
    output.backward(upstream)
    torch.testing.assert_close(weight.grad.double(), exact(input_ids, upstream, vocabulary), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None)
@given(first=st.integers(0, VOCABULARY - 1), data=st.data(), into_buffer=st.booleans())
def test_a_row_range_gets_its_rows_of_the_gradient_alone(backend, first, data, into_buffer):
    rows = data.draw(st.integers(1, VOCABULARY - first))
    input_ids, weight, upstream = ids(40), normal(VOCABULARY, HIDDEN), normal(40, HIDDEN, seed=1)
    trained = row_range(weight, first, rows)
    buffer = normal(rows, HIDDEN, seed=2) if into_buffer else None
    before = None if buffer is None else buffer.clone()
    options = {"trained_rows": trained, "first_row": first, "weight_grad": buffer, "backend": backend}
    embedding(input_ids, weight, **options).backward(upstream)
    expected = exact(input_ids, upstream)[first : first + rows]
    if into_buffer:
        assert trained.grad is None
        torch.testing.assert_close(buffer.double(), before.double() + expected, rtol=1e-5, atol=1e-5)
        untouched = ~expected.any(1)
        assert torch.equal(buffer[untouched], before[untouched])
    else:
        torch.testing.assert_close(trained.grad.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_on_a_row_range_moves_those_rows_of_the_weight_and_no_others(backend):
    weight = normal(VOCABULARY, HIDDEN)
    before = weight.clone()
    trained = row_range(weight, 5, 3)
    optimizer = torch.optim.AdamW([trained], lr=0.1, weight_decay=0.5)
    embedding(ids(40), weight, trained_rows=trained, first_row=5, backend=backend).sum().backward()
    optimizer.step()
    changed = (weight != before).any(1)
    assert changed.nonzero().flatten().tolist() == [5, 6, 7]
    assert embedding(torch.tensor([6], device=DEVICE), weight)[0].equal(trained[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_many_half_precision_gradients_are_rounded_once(backend, dtype):
    input_ids = torch.zeros(500, dtype=torch.int64, device=DEVICE)
    upstream = normal(500, HIDDEN, dtype=dtype) + 1
    weight = normal(2, HIDDEN, dtype=dtype).requires_grad_()
    embedding(input_ids, weight, backend=backend).backward(upstream)
    assert weight.grad.dtype == dtype
    # Added up in bf16, 500 numbers near 1 would be off by more than 1%.
    assert relative_error(weight.grad[0], upstream.double().sum(0)) < EPSILON[dtype]
    assert not weight.grad[1].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_micro_batches_add_up_in_the_fp32_buffer_in_any_order(backend):
    weight = normal(VOCABULARY, HIDDEN, dtype=torch.bfloat16).requires_grad_()
    buffer = torch.zeros(VOCABULARY, HIDDEN, device=DEVICE)
    parts = [(ids(30, seed), normal(30, HIDDEN, seed=seed, dtype=torch.bfloat16)) for seed in range(3)]
    outputs = [embedding(part, weight, weight_grad=buffer, backend=backend) for part, _ in parts]
    for output, (_, upstream) in reversed(list(zip(outputs, parts, strict=True))):
        output.backward(upstream)
    assert weight.grad is None
    expected = sum(exact(part, upstream) for part, upstream in parts)
    torch.testing.assert_close(buffer.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_and_strided_upstream_gradients_give_the_same(backend):
    input_ids, weight, upstream = ids(12), normal(VOCABULARY, HIDDEN), normal(12, HIDDEN, seed=1)
    gradients = []
    for shape, change in (((12,), lambda t: t), ((3, 4), lambda t: t), ((12,), strided)):
        leaf = weight.clone().requires_grad_()
        output = embedding(input_ids.view(shape), leaf, backend=backend)
        output.backward(change(upstream.view(*shape, HIDDEN)))
        gradients.append(leaf.grad)
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


def test_upstream_rows_and_gradient_rows_behind_2_to_the_31_entries_are_found():
    upstream, gradient = far_rows(3, 16, torch.float16), far_rows(3, 16, torch.float32)
    upstream.copy_(normal(3, 16, dtype=torch.float16))
    gradient.zero_()
    input_ids = torch.tensor([2, 0, 2], device=DEVICE)
    embedding_backward_add_(input_ids, upstream, 0, gradient)
    torch.testing.assert_close(gradient.double(), exact(input_ids, upstream, 3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_frozen_weight_makes_no_graph(backend):
    assert not embedding(ids(5), normal(VOCABULARY, HIDDEN), backend=backend).requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_keeps_the_ids_alone(backend):
    weight, kept = normal(VOCABULARY, HIDDEN).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        embedding(ids(9), weight, backend=backend)
    assert kept == [(9,)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointed_and_compiled_it_gives_the_same(backend):
    input_ids, weight = ids(20), normal(VOCABULARY, HIDDEN)

    def function(leaf):
        return embedding(input_ids, leaf, backend=backend) ** 2

    gradients = []
    for changed in (
        function,
        lambda leaf: checkpoint(function, leaf, use_reentrant=False),
        torch.compile(function, backend="aot_eager", fullgraph=True),
    ):
        leaf = weight.clone().requires_grad_()
        changed(leaf).sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])


def test_rows_that_are_not_those_of_the_weight_are_refused():
    weight = normal(VOCABULARY, HIDDEN)
    rows = row_range(weight, 3, 4)
    with pytest.raises(ValueError, match="the trained rows are a copy"):
        embedding(ids(4), weight.clone(), trained_rows=rows, first_row=3)
    with pytest.raises(ValueError, match="the trained rows are a copy"):
        embedding(ids(4), weight, trained_rows=rows, first_row=2)
    with pytest.raises(ValueError, match="are not in a matrix of shape"):
        embedding(ids(4), weight, trained_rows=rows, first_row=11)
    with pytest.raises(ValueError, match="must not require a gradient itself"):
        embedding(ids(4), weight.requires_grad_(), trained_rows=rows, first_row=3)
    with pytest.raises(ValueError, match="rows 10 to 14 are not in a matrix of 13 rows"):
        row_range(weight, 10, 5)


def test_a_buffer_that_does_not_fit_is_refused():
    weight = normal(VOCABULARY, HIDDEN).requires_grad_()
    for buffer in (torch.zeros(3, HIDDEN, device=DEVICE), torch.zeros_like(weight, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match=r"weight_grad must be fp32 of shape \(13, 24\)"):
            embedding(ids(4), weight, weight_grad=buffer)
    with pytest.raises(ValueError, match=r"strides \(1, 13\): a row's entries must be next to each other"):
        embedding(ids(4), weight, weight_grad=torch.zeros(HIDDEN, VOCABULARY, device=DEVICE).T)


def test_the_module_is_an_embedding_with_this_backward_pass():
    module = Embedding(VOCABULARY, HIDDEN, device=DEVICE)
    module(ids(20)).sum().backward()
    assert relative_error(module.weight.grad, exact(ids(20), torch.ones(20, HIDDEN, device=DEVICE))) < 1e-6


def test_the_operators_are_what_they_tell_the_compiler():
    upstream, buffer = normal(20, HIDDEN), torch.zeros(VOCABULARY, HIDDEN, device=DEVICE)
    torch.library.opcheck(torch.ops.redwhale.embedding_backward, (ids(20), upstream, 2, 5))
    torch.library.opcheck(torch.ops.redwhale.embedding_backward_add_, (ids(20), upstream, 0, buffer))
