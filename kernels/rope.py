"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) in the half-split layout of Hugging Face checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_cos_sin(position_ids: Tensor, inverse_frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotation angles, always computed in fp32.

    angle[n, i] = position[n] · inverse_frequency[i]. In bf16, positions above 256 would collide.

    Args:
        position_ids: [N] integer positions inside their documents.
        inverse_frequencies: [D/2] or [N, D/2] fp32, radians per position; unscaled, theta^(−2i/D).

    Returns:
        (cos, sin), each [N, D/2] fp32.
    """
    angles = position_ids.float()[:, None] * inverse_frequencies
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class _RoPE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        cos, sin = ctx.saved_tensors
        # A rotation's transpose is the rotation by the opposite angle, so x itself is not needed.
        return _rotate(grads[0], cos, -sin), None, None


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + D/2]) of every head by its position's angles.

    Args:
        x: [N, heads, D], any floating dtype; rotated in fp32.
        cos, sin: [N, D/2] fp32, from `rope_cos_sin`.

    Returns:
        [N, heads, D] in the dtype of `x`.
    """
    return _RoPE.apply(x, cos, sin)  # type: ignore[return-value]
