"""Rotary embedding equals complex rotation in float64 and Llama's own, and sees relative positions only."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_testing import BACKENDS, DEVICE, EPSILON, far_rows, relative_error, strided
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from redwhale.kernels.rope import RotaryEmbedding, apply_rope, rope_cos_sin


def rotated(x, position_ids, theta):
    """Pair (x[i], x[i + D/2]) as one complex number, times e^(i·angle), in float64."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64, device=DEVICE) / half)
    turns = torch.polar(
        torch.ones((), dtype=torch.float64, device=DEVICE), position_ids.double()[:, None] * frequencies
    )
    pairs = torch.complex(x.double()[..., :half], x.double()[..., half:]) * turns[:, None, :]
    return torch.cat((pairs.real, pairs.imag), -1)


def frequencies(head_dim, theta):
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=DEVICE) / head_dim)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def positions(*range_):
    return torch.arange(*range_, device=DEVICE)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=20, deadline=None)
@given(
    tokens=st.integers(1, 9),
    heads=st.integers(1, 4),
    half=st.integers(1, 16),
    theta=st.sampled_from([100.0, 10_000.0, 1e6]),
    first=st.integers(0, 4096),
)
def test_output_and_gradient_equal_complex_rotation_in_float64(backend, inplace, tokens, heads, half, theta, first):
    x, upstream = random(tokens, heads, 2 * half), random(tokens, heads, 2 * half, seed=1)
    position_ids = positions(first, first + tokens)
    exact = x.double().requires_grad_()
    expected = rotated(exact, position_ids, theta)
    (expected_grad,) = torch.autograd.grad(expected, exact, upstream.double())
    x.requires_grad_()
    cos_sin = rope_cos_sin(position_ids, frequencies(2 * half, theta))
    actual = apply_rope(x * 1.0, *cos_sin, inplace=inplace, backend=backend)
    (actual_grad,) = torch.autograd.grad(actual, x, upstream)
    # An fp32 angle of up to 4,100 radians is wrong by up to 4,100 · 2^-23 = 5e-4, and entries are below 5.
    atol = 1e-5 + (first + tokens) * 2**-23 * 5
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=atol)
    torch.testing.assert_close(actual_grad.double(), expected_grad, rtol=0, atol=atol)


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0, 1e6])
def test_output_equals_llamas_own_rotary_embedding(theta):
    heads, head_dim, tokens = 3, 16, 300
    config = LlamaConfig(
        hidden_size=heads * head_dim,
        num_attention_heads=heads,
        head_dim=head_dim,
        rope_parameters={"rope_theta": theta, "rope_type": "default"},
    )
    q, k = random(tokens, heads, head_dim), random(tokens, heads, head_dim, seed=1)
    position_ids = positions(tokens)
    their_cos, their_sin = LlamaRotaryEmbedding(config)(q, position_ids[None])
    their_q, their_k = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], their_cos, their_sin)
    cos, sin = rope_cos_sin(position_ids, frequencies(head_dim, theta))
    torch.testing.assert_close(apply_rope(q, cos, sin), their_q[0].transpose(0, 1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(apply_rope(k, cos, sin), their_k[0].transpose(0, 1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shift", [1, 17, 4096])
def test_dot_products_depend_on_the_distance_only(shift):
    head_dim, tokens = 32, 12
    q, k = random(tokens, 1, head_dim), random(tokens, 1, head_dim, seed=1)
    scores = []
    for first in (0, shift):
        cos_sin = rope_cos_sin(positions(first, first + tokens), frequencies(head_dim, 10_000.0))
        scores.append(torch.einsum("mhd,nhd->mn", apply_rope(q, *cos_sin), apply_rope(k, *cos_sin)))
    # fp32 angles near 4,096 are exact to 5e-4; bf16 ones would be wrong by 16 radians.
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=2e-2 if shift > 1000 else 1e-4)
    unrotated = torch.einsum("mhd,nhd->mn", q, k)
    assert float((scores[0] - unrotated).abs().max()) > 1.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inplace", [False, True])
def test_angles_stay_fp32_for_bf16_activations(backend, inplace):
    x = random(4, 2, 16).bfloat16()
    position_ids = positions(1000, 1004)  # one and the same number in bf16
    cos, sin = rope_cos_sin(position_ids, frequencies(16, 10_000.0))
    assert cos.dtype == sin.dtype == torch.float32
    exact = rotated(x, position_ids, 10_000.0)
    output = apply_rope(x, cos, sin, inplace=inplace, backend=backend)
    assert output.dtype == torch.bfloat16
    assert relative_error(output, exact) < EPSILON[torch.bfloat16]
    assert (output.data_ptr() == x.data_ptr()) == inplace


def test_rotation_keeps_lengths_and_position_zero():
    x = random(5, 2, 8)
    output = apply_rope(x, *rope_cos_sin(positions(5), frequencies(8, 10_000.0)))
    assert torch.equal(output[0], x[0])
    torch.testing.assert_close(output.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inplace", [False, True])
def test_strided_heads_give_the_same(backend, inplace):
    x = random(6, 3, 16)
    cos, sin = rope_cos_sin(positions(6), frequencies(16, 10_000.0))
    expected = apply_rope(x, cos, sin, backend=backend)
    # Entries apart; and heads that are a part of a wider projection.
    for view in (strided(x), torch.cat((x, x), 1)[:, 3:], torch.cat((x, x), 2)[..., 16:]):
        assert torch.equal(apply_rope(view, cos, sin, inplace=inplace, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rotation_in_place_of_a_part_of_a_projection_leaves_the_rest_and_trains_what_is_before(backend):
    x, weight, upstream = random(5, 8), random(24, 8, seed=1).requires_grad_(), random(5, 2, 8, seed=2)
    cos, sin = rope_cos_sin(positions(5), frequencies(8, 100.0))
    gradients = []
    for inplace in (False, True):
        projected = x @ weight.T
        kept = projected[:, 16:].detach().clone()
        q = apply_rope(projected[:, :16].unflatten(1, (2, 8)), cos, sin, inplace=inplace, backend=backend)
        assert torch.equal(projected[:, 16:], kept)
        gradients.append(torch.autograd.grad(q, weight, upstream)[0])
    assert torch.equal(*gradients)


def test_values_needed_by_another_backward_pass_are_not_overwritten_silently():
    x = random(3, 2, 8).requires_grad_()
    cos, sin = rope_cos_sin(positions(3), frequencies(8, 100.0))
    exponential = x.exp()  # its backward pass needs its own result
    rotated = apply_rope(exponential, cos, sin, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        rotated.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inplace", [False, True])
def test_backward_keeps_the_angles_and_not_the_activations(backend, inplace):
    x = random(6, 3, 16).requires_grad_() * 1.0
    cos, sin = rope_cos_sin(positions(6), frequencies(16, 10_000.0))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        apply_rope(x, cos, sin, inplace=inplace, backend=backend)
    assert kept == [(6, 8), (6, 8)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inplace", [False, True])
def test_checkpointed_and_compiled_it_gives_the_same(backend, inplace):
    cos, sin = rope_cos_sin(positions(6), frequencies(16, 10_000.0))

    def function(x):
        return apply_rope(x * 2.0, cos, sin, inplace=inplace, backend=backend) * 3.0

    results = []
    for changed in (
        function,
        lambda x: checkpoint(function, x, use_reentrant=False),
        torch.compile(function, backend="aot_eager", fullgraph=True),
    ):
        x = random(6, 3, 16).requires_grad_()
        changed(x).square().sum().backward()
        results.append(x.grad)
    assert torch.equal(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


@pytest.mark.parametrize("inplace", [False, True])
def test_tokens_behind_2_to_the_31_entries_are_rotated_where_they_are(inplace):
    values = random(3, 2, 8).half()
    x = far_rows(3, 16, torch.float16)
    x.copy_(values.flatten(1))
    cos, sin = rope_cos_sin(positions(3), frequencies(8, 100.0))
    output = apply_rope(x.unflatten(1, (2, 8)), cos, sin, inplace=inplace, backend="triton")
    assert torch.equal(output, apply_rope(values, cos, sin, backend="triton"))


@pytest.mark.parametrize("inplace", [False, True])
def test_heads_behind_2_to_the_31_entries_are_rotated_where_they_are(inplace):
    values = random(2, 3, 8).half()
    # Tokens within heads, as attention has them.
    x = far_rows(3, 16, torch.float16).unflatten(1, (2, 8)).transpose(0, 1)
    x.copy_(values)
    cos, sin = rope_cos_sin(positions(2), frequencies(8, 100.0))
    output = apply_rope(x, cos, sin, inplace=inplace, backend="triton")
    assert torch.equal(output, apply_rope(values, cos, sin, backend="triton"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_give_no_tokens(backend):
    cos, sin = rope_cos_sin(positions(0), frequencies(8, 100.0))
    assert apply_rope(random(0, 2, 8), cos, sin, backend=backend).shape == (0, 2, 8)


def test_the_module_rotates_queries_and_keys_by_positions_within_documents():
    q, k = random(5, 4, 8), random(5, 2, 8, seed=1)
    position_ids = torch.tensor([0, 1, 2, 0, 1], device=DEVICE)  # two packed documents
    rotated_q, rotated_k = RotaryEmbedding(8, 500.0).to(DEVICE)(q, k, position_ids)
    torch.testing.assert_close(rotated_q.double(), rotated(q, position_ids, 500.0), rtol=0, atol=1e-5)
    torch.testing.assert_close(rotated_k.double(), rotated(k, position_ids, 500.0), rtol=0, atol=1e-5)


def test_angles_of_another_shape_are_refused():
    cos, sin = rope_cos_sin(positions(4), frequencies(8, 100.0))
    with pytest.raises(ValueError, match=r"needs cosines and sines of shape \(5, 4\)"):
        apply_rope(random(5, 2, 8), cos, sin)
    with pytest.raises(ValueError, match="even head dimension"):
        apply_rope(random(4, 2, 9), cos, sin)


def test_the_operators_are_what_they_tell_the_compiler():
    cos, sin = rope_cos_sin(positions(3), frequencies(8, 100.0))
    torch.library.opcheck(torch.ops.redwhale.rope_rotate, (random(3, 2, 8), cos, sin, True))
    torch.library.opcheck(torch.ops.redwhale.rope_rotate_, (random(3, 2, 8), cos, sin, False))
