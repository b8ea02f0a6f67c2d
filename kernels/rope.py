"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) in the half-split layout of Hugging Face checkpoints.

Each pair (x[i], x[i + D/2]) of a head turns by its position's angle; angles, cosines and sines are fp32 and computed
once for all layers. Memory-bound: one read and one write a value, 3 FLOPs, and one row of D/2 cosines and sines a token
for all its heads. Backward is the opposite rotation and keeps no activations.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .backend import Backend, use_triton
from .launch import ceil_div, kernel_op, launch, next_power_of_2, tl, triton


@triton.jit
def _rope(
    x, y, cos, sin, heads, half, x_token_stride, x_head_stride, y_token_stride, y_head_stride, angle_stride,
    OPPOSITE: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)  # times a stride, it may pass 2^31
    head = tl.program_id(1).to(tl.int64) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    pair = tl.arange(0, BLOCK)
    inside = (head < heads)[:, None] & (pair < half)[None, :]
    cosines = tl.load(cos + token * angle_stride + pair, pair < half, other=0.0)[None, :]
    sines = tl.load(sin + token * angle_stride + pair, pair < half, other=0.0)[None, :]
    if OPPOSITE:
        sines = -sines
    start = x + token * x_token_stride + head[:, None] * x_head_stride + pair[None, :]
    first = tl.load(start, inside, other=0.0).to(tl.float32)
    second = tl.load(start + half, inside, other=0.0).to(tl.float32)
    start = y + token * y_token_stride + head[:, None] * y_head_stride + pair[None, :]
    tl.store(start, (first * cosines - second * sines).to(y.dtype.element_ty), inside)
    tl.store(start + half, (second * cosines + first * sines).to(y.dtype.element_ty), inside)


def _start(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor, opposite: bool) -> None:
    tokens, heads, dimension = x.shape
    block = next_power_of_2(dimension // 2)
    block_heads = min(next_power_of_2(heads), max(1, 4096 // block))
    launch(
        *(_rope, (tokens, ceil_div(heads, block_heads)), x, y, cos, sin, heads, dimension // 2),
        *(x.stride(0), x.stride(1), y.stride(0), y.stride(1), cos.stride(0)),
        OPPOSITE=opposite,
        BLOCK_HEADS=block_heads,
        BLOCK=block,
        num_warps=4,
    )


def _fake(x: Tensor, cos: Tensor, sin: Tensor, opposite: bool) -> Tensor:
    return x.new_empty(x.shape)


@kernel_op(fake=_fake)
def rope_rotate(x: Tensor, cos: Tensor, sin: Tensor, opposite: bool) -> Tensor:
    y = x.new_empty(x.shape)
    _start(x if x.stride(-1) == 1 else x.contiguous(), y, cos, sin, opposite)
    return y


def _fake_in_place(x: Tensor, cos: Tensor, sin: Tensor, opposite: bool) -> None:
    return None


@kernel_op(fake=_fake_in_place, mutates_args=("x",))
def rope_rotate_(x: Tensor, cos: Tensor, sin: Tensor, opposite: bool) -> None:
    if x.stride(-1) == 1:
        _start(x, x, cos, sin, opposite)
    else:
        y = x.new_empty(x.shape)
        _start(x.contiguous(), y, cos, sin, opposite)
        x.copy_(y)


def _torch_rotate(x: Tensor, cos: Tensor, sin: Tensor, opposite: bool) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None, :], (-sin if opposite else sin)[:, None, :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class _RoPE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor, triton_kernels: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.triton_kernels = triton_kernels
        return (rope_rotate if triton_kernels else _torch_rotate)(x, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        cos, sin = ctx.saved_tensors
        # A rotation's transpose is the rotation by the opposite angle, so x itself is not needed.
        rotate = rope_rotate if ctx.triton_kernels else _torch_rotate
        return rotate(grads[0], cos, sin, True), None, None, None


class _RoPEInPlace(_RoPE):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor, triton_kernels: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.triton_kernels = triton_kernels
        ctx.mark_dirty(x)
        if triton_kernels:
            rope_rotate_(x, cos, sin, False)
        else:
            x.copy_(_torch_rotate(x, cos, sin, False))
        return x


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


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, *, inplace: bool = False, backend: Backend | None = None) -> Tensor:
    """Rotate each pair (x[i], x[i + D/2]) of every head by its position's angles.

    Args:
        x: [N, heads, D], fp32, bf16 or fp16; rotated in fp32.
        cos, sin: [N, D/2] fp32, from `rope_cos_sin`. They carry no gradient.
        inplace: overwrite `x`, which must then be needed by no other operation's backward, as a projection's output is
            not; inside `torch.compile` this is left to the compiler.
        backend: see `Backend`; None for the global choice.

    Returns:
        [N, heads, D] in the dtype of `x`. Backward keeps the angles, not `x`.
    """
    if cos.shape != (x.shape[0], x.shape[2] // 2) or sin.shape != cos.shape or x.shape[2] % 2:
        raise ValueError(
            f"x {tuple(x.shape)} needs cosines and sines of shape {(x.shape[0], x.shape[2] // 2)} and an even head "
            f"dimension, not {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    chosen = use_triton(backend, x)
    if chosen:
        cos, sin = cos.contiguous(), sin.contiguous()
    in_place = inplace and not torch.compiler.is_compiling()
    return (_RoPEInPlace if in_place else _RoPE).apply(x, cos, sin, chosen)  # type: ignore[return-value]


class RotaryEmbedding(nn.Module):
    """Rotates queries and keys of packed documents by their positions.

    Args:
        head_dim: D, even.
        theta: base of the angles.
    """

    inverse_frequencies: Tensor

    def __init__(self, head_dim: int, theta: float = 10_000.0) -> None:
        super().__init__()
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        self.register_buffer("inverse_frequencies", 1.0 / theta**exponents, persistent=False)

    def forward(self, q: Tensor, k: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated copies of q [N, heads, D] and k [N, kv_heads, D]; `position_ids` [N] counts within each document."""
        cos, sin = rope_cos_sin(position_ids, self.inverse_frequencies.float())
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin)
