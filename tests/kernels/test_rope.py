"""Rotary embedding equals complex rotation in float64 and Llama's own, and sees relative positions only."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from redwhale.kernels import apply_rope, rope_cos_sin


def rotated(x, position_ids, theta):
    """Pair (x[i], x[i + D/2]) as one complex number, times e^(i·angle), in float64."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    turns = torch.polar(torch.ones((), dtype=torch.float64), position_ids.double()[:, None] * frequencies)
    pairs = torch.complex(x.double()[..., :half], x.double()[..., half:]) * turns[:, None, :]
    return torch.cat((pairs.real, pairs.imag), -1)


def frequencies(head_dim, theta):
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 9),
    heads=st.integers(1, 4),
    half=st.integers(1, 16),
    theta=st.sampled_from([100.0, 10_000.0, 1e6]),
    first=st.integers(0, 4096),
)
def test_output_and_gradient_equal_complex_rotation_in_float64(tokens, heads, half, theta, first):
    x, upstream = random(tokens, heads, 2 * half), random(tokens, heads, 2 * half, seed=1)
    position_ids = torch.arange(first, first + tokens)
    exact = x.double().requires_grad_()
    expected = rotated(exact, position_ids, theta)
    (expected_grad,) = torch.autograd.grad(expected, exact, upstream.double())
    x.requires_grad_()
    actual = apply_rope(x, *rope_cos_sin(position_ids, frequencies(2 * half, theta)))
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
    position_ids = torch.arange(tokens)
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
        cos_sin = rope_cos_sin(torch.arange(first, first + tokens), frequencies(head_dim, 10_000.0))
        scores.append(torch.einsum("mhd,nhd->mn", apply_rope(q, *cos_sin), apply_rope(k, *cos_sin)))
    # fp32 angles near 4,096 are exact to 5e-4; bf16 ones would be wrong by 16 radians.
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=2e-2 if shift > 1000 else 1e-4)
    unrotated = torch.einsum("mhd,nhd->mn", q, k)
    assert float((scores[0] - unrotated).abs().max()) > 1.0


def test_angles_stay_fp32_for_bf16_activations():
    x = random(4, 2, 16).bfloat16()
    position_ids = torch.tensor([1000, 1001, 1002, 1003])  # one and the same number in bf16
    cos, sin = rope_cos_sin(position_ids, frequencies(16, 10_000.0))
    assert cos.dtype == sin.dtype == torch.float32
    output = apply_rope(x, cos, sin)
    assert output.dtype == torch.bfloat16
    exact = rotated(x, position_ids, 10_000.0)
    assert float((output.double() - exact).abs().max()) < float(exact.abs().max()) * 2**-8


def test_rotation_keeps_lengths_and_position_zero():
    x = random(5, 2, 8)
    output = apply_rope(x, *rope_cos_sin(torch.arange(5), frequencies(8, 10_000.0)))
    assert torch.equal(output[0], x[0])
    torch.testing.assert_close(output.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)


def test_strided_heads_give_the_same():
    wide = random(6, 3, 32)
    cos, sin = rope_cos_sin(torch.arange(6), frequencies(16, 10_000.0))
    assert torch.equal(apply_rope(wide[..., ::2], cos, sin), apply_rope(wide[..., ::2].contiguous(), cos, sin))


def test_backward_keeps_the_angles_and_not_the_activations():
    x = random(6, 3, 16).requires_grad_()
    cos, sin = rope_cos_sin(torch.arange(6), frequencies(16, 10_000.0))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        apply_rope(x, cos, sin)
    assert kept == [(6, 8), (6, 8)]
