"""Dropout (Srivastava et al. 2014) whose mask is a function of a seed, so that backward draws it again and keeps none.

Entry (row, column) is kept if the first word of Philox-4x32 with 7 rounds (Salmon et al. 2011, doi
10.1145/2063384.2063405) of the counter (column, row, 0, 0) and the key `seed` is at least 2^32·p. Both backends draw
the same mask, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backend import Backend, use_triton
from .launch import ceil_div, kernel_op, launch, rows_of, tl, triton
from .philox import philox


def dropout_seed(device: torch.device, count: int = 1) -> Tensor:
    """[count] int64 below 2^31, drawn from torch's generator of `device`: recomputation and resuming draw the same."""
    return torch.randint(2**31 - 1, (count,), device=device)


@triton.jit
def keep_mask(seed, rows, columns, threshold):
    """Which entries are kept, for row and column numbers that broadcast to a block and `threshold` = 2^32·p, uint32."""
    # Everything in 32 bits: rows stay below 2^31 even where their offsets do not.
    zero = (rows * 0 + columns * 0).to(tl.uint32)
    column_words, row_words = zero + columns.to(tl.uint32), zero + rows.to(tl.uint32)
    words, _, _, _ = tl.philox(seed, column_words, row_words, zero, zero, n_rounds=7)  # type: ignore
    return words >= threshold


@triton.jit
def _dropout(x, y, seed, x_stride, rows, columns, threshold, scale, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    kept = keep_mask(tl.load(seed), row[:, None], column[None, :], tl.cast(threshold, tl.uint32))
    values = tl.load(x + row.to(tl.int64)[:, None] * x_stride + column[None, :], inside, other=0.0).to(tl.float32)
    values = tl.where(kept, values * scale, 0.0)
    tl.store(y + row.to(tl.int64)[:, None] * columns + column[None, :], values.to(y.dtype.element_ty), inside)


def keep_threshold(p: float) -> int:
    """2^32·p as the integer that `keep_mask` compares with."""
    return min(2**32 - 1, round(p * 2**32))


def _fake(x: Tensor, seed: Tensor, p: float) -> Tensor:
    return x.new_empty(x.shape)


@kernel_op(fake=_fake)
def masked_scale(x: Tensor, seed: Tensor, p: float) -> Tensor:
    y = x.new_empty(x.shape)
    x_rows = rows_of(x)
    rows, columns = x_rows.shape
    grid = (ceil_div(rows, 4), ceil_div(columns, 512))
    args = (x_rows, y, seed, x_rows.stride(0), rows, columns, keep_threshold(p), 1 / (1 - p))
    launch(_dropout, grid, *args, BLOCK_ROWS=4, BLOCK=512, num_warps=4)
    return y


def torch_keep_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """[rows, columns] bool: the mask that the kernels draw, in plain PyTorch."""
    column, row = torch.arange(columns, device=seed.device), torch.arange(rows, device=seed.device)[:, None]
    return philox((column, row, 0, 0), seed)[0] >= keep_threshold(p)


def apply_mask(x: Tensor, seed: Tensor, p: float, triton_kernels: bool) -> Tensor:
    """`dropout` without autograd: of inputs in forward, and of gradients in backward."""
    if triton_kernels:
        return masked_scale(x, seed, p)
    columns = x.shape[-1]
    kept = torch_keep_mask(seed, x.numel() // max(1, columns), columns, p).view(x.shape)
    return (x.float() * (1 / (1 - p))).to(x.dtype).masked_fill_(~kept, 0.0)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, seed: Tensor, p: float, triton_kernels: bool) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.p, ctx.triton_kernels = p, triton_kernels
        return apply_mask(x, seed, p, triton_kernels)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        (seed,) = ctx.saved_tensors
        return apply_mask(grads[0], seed, ctx.p, ctx.triton_kernels), None, None, None


def seeded_dropout(x: Tensor, seed: Tensor, p: float, *, backend: Backend | None = None) -> Tensor:
    """Zero entries of `x` with probability p, and scale the others by 1 / (1 − p).

    Args:
        x: [..., C], fp32, bf16 or fp16, of fewer than 2^31 rows.
        seed: [1] int64 on the same device, as from `dropout_seed`. It is read on the device alone.
        p: in [0, 1); in steps of 2^-32.
        backend: see `Backend`; None for the global choice.

    Returns:
        [..., C] in the dtype of `x`. Backward keeps the seed alone. One read and one write a value, and about 60
        integer operations.
    """
    return _Dropout.apply(x, seed, p, use_triton(backend, x))  # type: ignore[return-value]
