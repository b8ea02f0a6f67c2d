"""Packed documents cannot see each other, and the key/value cache computes what the full pass computes."""

import functools
import inspect

import pytest
import torch

from redwhale.model import (
    CheckpointError,
    KeyValueCache,
    Llama,
    PackedDocuments,
    load_model,
    packed_attention,
    set_attention_backend,
)


def slow_attention(q, k, v, lengths, window):
    """Query by query and head by head in float64."""
    output = torch.empty_like(q, dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    start = 0
    for length in lengths:
        for i in range(start, start + length):
            first = start if window is None else max(start, i + 1 - window)
            for head in range(q.shape[1]):
                keys, values = k[first : i + 1, head // group].double(), v[first : i + 1, head // group].double()
                weights = torch.softmax(keys @ q[i, head].double() / q.shape[2] ** 0.5, 0)
                output[i, head] = weights @ values
        start += length
    return output


@pytest.mark.parametrize("lengths", [(9,), (4, 4, 4), (1, 7, 3), (1, 1, 1)])
@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_packed_attention_equals_a_slow_loop(lengths, window, kv_heads):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(sum(lengths), 4, 8, generator=generator)
    k, v = (torch.randn(sum(lengths), kv_heads, 8, generator=generator) for _ in range(2))
    actual = packed_attention(q, k, v, PackedDocuments.from_lengths(lengths), window)
    torch.testing.assert_close(actual.double(), slow_attention(q, k, v, lengths, window), rtol=0, atol=1e-6)


def test_layout_of_packed_documents():
    documents = PackedDocuments.from_lengths([3, 0, 1, 2])
    assert documents.lengths == (3, 1, 2)
    assert documents.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert documents.cu_seqlens.dtype == torch.int32
    assert documents.position_ids.tolist() == [0, 1, 2, 0, 0, 1]


@pytest.mark.parametrize("lengths", [(20, 1, 31, 8), (15, 15, 15, 15), (60,)], ids=["mixed", "equal", "one"])
def test_packed_documents_have_the_logits_they_have_alone(variant, ids, lengths):
    model = load_model(variant[1])
    with torch.no_grad():
        packed = model(ids, PackedDocuments.from_lengths(lengths))
        alone = [model(part, PackedDocuments.from_lengths([len(part)])) for part in ids.split(lengths)]
    # Matrix products of other sizes add in another order; a leak between documents changes the first digit.
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=2e-5)


@pytest.mark.parametrize("lengths", [(20, 1, 31, 8), (30, 30)])
def test_no_gradient_flows_between_packed_documents(base, ids, lengths):
    model = load_model(base)
    embedded = model.model.embed_tokens(ids).detach().requires_grad_()
    model.model.embed_tokens.register_forward_hook(lambda *_: embedded)
    logits = model(ids, PackedDocuments.from_lengths(lengths))
    logits[lengths[0] :].square().sum().backward()
    assert not embedded.grad[: lengths[0]].any()
    assert embedded.grad[lengths[0] :].any(-1).all()


def cache_for(model: Llama, capacity: int) -> KeyValueCache:
    config = model.config
    return KeyValueCache(
        config.num_hidden_layers,
        capacity,
        config.num_key_value_heads,
        config.head_dim,
        torch.float32,
        torch.device("cpu"),
    )


@pytest.mark.parametrize("pieces", [(60,), (25, 35), (5, 50, 5), (40, *[1] * 20)], ids=str)
def test_the_cache_gives_the_logits_of_the_full_pass(variant, ids, pieces):
    model = load_model(variant[1])
    cache = cache_for(model, 60)
    with torch.no_grad():
        expected = model(ids, PackedDocuments.from_lengths([60]))
        actual = torch.cat([model(part, cache=cache) for part in ids.split(pieces)])
    assert cache.length == 60
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("surplus", [1, 2])
def test_a_full_cache_refuses_more_tokens(base, ids, surplus):
    model = load_model(base)
    cache = cache_for(model, 10)
    with torch.no_grad():
        model(ids[:10], cache=cache)
        with pytest.raises(ValueError, match=f"{10 + surplus} tokens do not fit a cache of capacity 10"):
            model(ids[:surplus], cache=cache)


@pytest.mark.parametrize("frozen", ["nothing", "embedding and first layers"])
def test_recomputed_layers_give_bit_identical_gradients(variant, ids, frozen):
    model = load_model(variant[1]).requires_grad_()
    if frozen != "nothing":
        model.model.embed_tokens.requires_grad_(False)
        model.model.layers[:2].requires_grad_(False)
    documents = PackedDocuments.from_lengths([20, 40])

    def gradients():
        model.zero_grad()
        model.loss(ids, ids.roll(-1), documents).loss_sum.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    kept = gradients()
    model.model.activations = "full"
    recomputed = gradients()
    assert recomputed.keys() == kept.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(torch.equal(recomputed[name], kept[name]) for name in kept)


def test_recomputed_layers_keep_only_their_inputs(base, ids):
    model = load_model(base).requires_grad_()

    def saved_elements() -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model.hidden_states(ids, PackedDocuments.from_lengths([len(ids)]))
        return sum(sizes)

    everything = saved_elements()
    model.model.activations = "full"
    assert saved_elements() < everything / 5


LAYOUTS = {"one": [24], "equal": [8, 8, 8], "mixed": [1, 13, 3, 7], "single tokens": [1, 1, 1]}


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("lengths", LAYOUTS.values(), ids=LAYOUTS)
def test_sdpa_and_the_reference_equal_a_loop_over_queries_in_float64(lengths, window):
    tokens, heads, kv_heads, size = sum(lengths), 4, 2, 6
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(tokens, n, size, dtype=torch.float64, generator=generator) for n in (heads, kv_heads, kv_heads)
    )
    expected = slow_attention(q, k, v, lengths, window)
    documents = PackedDocuments.from_lengths(lengths)
    for backend in ("sdpa", "reference"):
        actual = packed_attention(q, k, v, documents, window, backend=backend)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12, msg=backend)


def test_gradients_of_sdpa_equal_those_of_the_reference():
    documents = PackedDocuments.from_lengths([9, 2, 5])
    gradients = []
    for backend in ("sdpa", "reference"):
        generator = torch.Generator().manual_seed(0)
        inputs = [torch.randn(16, n, 6, dtype=torch.float64, generator=generator) for n in (4, 2, 2)]
        inputs = [tensor.requires_grad_() for tensor in inputs]
        output = packed_attention(*inputs, documents, 3, backend=backend)
        gradients.append(torch.autograd.grad(output.square().sum(), inputs))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_the_whole_model_agrees_across_the_backends_that_run_here(variant, ids):
    model = load_model(variant[1])
    documents = PackedDocuments.from_lengths([23, 37])
    try:
        outputs = []
        for backend in ("sdpa", "reference"):
            set_attention_backend(backend)
            outputs.append(model(ids, documents))
    finally:
        set_attention_backend("auto")
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("window", [None, 5])
def test_gpu_backends_are_called_with_what_their_signatures_mean(monkeypatch, window):
    """No GPU here: the real signature of torch's function is bound, and its arguments are computed by the reference."""
    from torch.nn.attention import varlen

    from redwhale.model import attention_backends

    signature = inspect.signature(varlen.varlen_attn)

    def varlen_attn(*args, **kwargs):
        bound = signature.bind(*args, **kwargs).arguments
        assert bound["cu_seq_q"].dtype == torch.int32
        assert (bound["max_q"], bound["max_k"]) == (9, 9)
        left, right = bound["window_size"]
        assert right == 0  # causal, by torch's documentation
        assert bound["enable_gqa"]
        reach = None if left == -1 else left + 1
        return attention_backends.reference(
            bound["query"], bound["key"], bound["value"], bound["cu_seq_q"], bound["max_q"], reach
        )

    monkeypatch.setattr(varlen, "varlen_attn", functools.wraps(varlen.varlen_attn)(varlen_attn))
    documents = PackedDocuments.from_lengths([9, 2, 5])
    q, k, v = (torch.randn(16, n, 6, generator=torch.Generator().manual_seed(n)) for n in (4, 2, 2))
    actual = packed_attention(q, k, v, documents, window, backend="torch-varlen")
    expected = packed_attention(q, k, v, documents, window, backend="sdpa")
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", ["flash-attn", "torch-varlen"])
@pytest.mark.parametrize("window", [None, 64])
def test_gpu_backends_equal_the_reference(backend, window):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if backend == "flash-attn":
        pytest.importorskip("flash_attn")
    lengths = [300, 1, 77, 512]
    documents = PackedDocuments.from_lengths(lengths, "cuda")
    q, k, v = (torch.randn(sum(lengths), n, 64, device="cuda", dtype=torch.bfloat16) for n in (8, 2, 2))
    actual = packed_attention(q, k, v, documents, window, backend=backend)
    expected = packed_attention(q.float(), k.float(), v.float(), documents, window, backend="reference")
    torch.testing.assert_close(actual.float(), expected, rtol=0, atol=2e-2)


def test_an_unknown_backend_is_refused():
    with pytest.raises(CheckpointError, match="unknown attention backend 'magic'; known: auto, sdpa, flash-attn"):
        set_attention_backend("magic")
