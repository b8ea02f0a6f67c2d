"""Matrix product with a low-rank second product in the same kernel: C = X·W + scale·T·B, for both directions of LoRA.

Forward of a layer with an adapter is Y = X·Wᵀ + scale·(X·Aᵀ)·Bᵀ, and the gradient of its input is dX = dY·W + U·A with
U = scale·dY·B (Hu et al. 2021, arXiv 2106.09685). A library computes the update apart, and reads and writes C for it:
4·M·N bytes in bf16 for 2·M·N·r FLOPs, at r = 64 a tenth of the FLOPs a byte that keep an H100 busy. Here the update is
what the accumulator starts from, and C is written once: 2·M·N·(K + r) FLOPs and M·K + K·N + M·N + (M + N)·r values,
the minimum but for blocks of X and W that several programs read.

Dropout masks the update alone, not the base's product. The mask is drawn slice by slice of a block, and the masked
update goes through C itself, which the same program fills: masking the whole accumulator at once would spill hundreds
of registers. The price are 4·M·N more bytes, mostly of the L2 cache, as one more kernel would take of memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .backend import Backend, current_backend, use_triton
from .dropout import apply_mask, keep_mask, keep_threshold
from .launch import ceil_div, compute_capability, kernel_op, launch, multiprocessors, next_power_of_2, tl, triton


class GemmConfig(NamedTuple):
    """How the product is cut into programs."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    least_capability: int = 80
    """Of the GPU: on older ones the configuration spills registers."""


CONFIGS = (
    GemmConfig(128, 256, 64, 8, 3, 90),
    GemmConfig(128, 256, 64, 8, 4, 90),
    GemmConfig(128, 128, 64, 8, 3),
    GemmConfig(128, 128, 64, 8, 4),
    GemmConfig(128, 128, 32, 8, 4),
    GemmConfig(64, 128, 64, 4, 3),
)
"""For bf16 and fp16, from the largest blocks down."""
_FP32 = GemmConfig(64, 64, 16, 4, 2)  # for plain multiplications: tensor cores would round fp32 to 10 bits
_GROUP_M = 8
"""Rows of blocks whose programs run next to each other, so that they find their columns of W in the L2 cache."""

AUTO_TAKES_TRITON = False
"""Whether the backend `auto` takes this kernel on a GPU. It takes the library's products, which read and write C once
more for the update, until a measurement (bench/lora_variants.py) says that this kernel is faster than they are."""


def default_config(x: Tensor, columns: int) -> GemmConfig:
    """Block sizes for `x` [M, K] times [K, columns]: the largest that give every multiprocessor a program."""
    if x.dtype == torch.float32:
        return _FP32
    known = [config for config in CONFIGS if config.least_capability <= compute_capability(x)]
    wanted = multiprocessors(x)
    return next(
        (c for c in known if ceil_div(x.shape[0], c.block_m) * ceil_div(columns, c.block_n) >= wanted), known[-1]
    )


def triton_gemms(backend: Backend | None, *tensors: Tensor | None) -> bool:
    """`use_triton` for this kernel, whose choice under `auto` is `AUTO_TAKES_TRITON`."""
    insists = (current_backend() if backend is None else backend) != "auto"
    return use_triton(backend, *tensors) and (insists or AUTO_TAKES_TRITON)


@triton.jit
def add_product(
    accumulator, x, w, row, column, rows, columns, inner, x_stride, w_row_stride, w_column_stride,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`accumulator` + X·W for the given rows of X and columns of W, in steps of BLOCK along the inner dimension."""
    k = tl.arange(0, BLOCK)
    row_inside, column_inside = (row < rows)[:, None], (column < columns)[None, :]
    x_pointers = x + row.to(tl.int64)[:, None] * x_stride + k[None, :]
    w_pointers = w + k.to(tl.int64)[:, None] * w_row_stride + column.to(tl.int64)[None, :] * w_column_stride
    for start in tl.range(0, inner, BLOCK, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        left = inner - start
        x_block = tl.load(x_pointers, row_inside & (k < left)[None, :], other=0.0)
        w_block = tl.load(w_pointers, column_inside & (k < left)[:, None], other=0.0)
        accumulator = tl.dot(x_block, w_block, accumulator, input_precision=PRECISION)
        x_pointers += BLOCK
        w_pointers += tl.cast(w_row_stride, tl.int64) * BLOCK
    return accumulator


@triton.jit
def _low_rank_gemm(
    x, w, t, b, bias, addend, seed, c, rows, columns, inner, rank,
    x_stride, w_row_stride, w_column_stride, t_stride, b_row_stride, b_column_stride, addend_stride,
    scale, threshold,
    LOW_RANK: tl.constexpr, DROPOUT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ADDEND: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_RANK: tl.constexpr, STAGES: tl.constexpr, SLICE: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    blocks_m, blocks_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    group, member = tl.program_id(0) // (GROUP_M * blocks_n), tl.program_id(0) % (GROUP_M * blocks_n)
    group_rows = min(blocks_m - group * GROUP_M, GROUP_M)
    row = (group * GROUP_M + member % group_rows) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_column = member // group_rows * BLOCK_N
    c_rows, addend_rows = c + row.to(tl.int64)[:, None] * columns, addend + row.to(tl.int64)[:, None] * addend_stride
    if DROPOUT:
        # By way of C, slice by slice: drawing the mask of a whole block leaves its accumulator no registers.
        for start in range(0, BLOCK_N, SLICE):
            column = first_column + start + tl.arange(0, SLICE)
            inside = (row < rows)[:, None] & (column < columns)[None, :]
            update = add_product(
                tl.zeros((BLOCK_M, SLICE), tl.float32), t, b, row, column, rows, columns, rank,
                t_stride, b_row_stride, b_column_stride, PRECISION, BLOCK_RANK, 1,
            )  # fmt: skip
            kept = keep_mask(tl.load(seed), row[:, None], column[None, :], tl.cast(threshold, tl.uint32))
            update = tl.where(kept, update * scale, 0.0)
            if HAS_ADDEND:
                update += tl.load(addend_rows + column[None, :], inside, other=0.0).to(tl.float32)
            tl.store(c_rows + column[None, :], update.to(c.dtype.element_ty), inside)
        tl.debug_barrier()  # below, other threads read what these wrote
    column = first_column + tl.arange(0, BLOCK_N)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    if DROPOUT:
        accumulator = tl.load(c_rows + column[None, :], inside, other=0.0).to(tl.float32)
    elif HAS_ADDEND:
        accumulator = tl.load(addend_rows + column[None, :], inside, other=0.0).to(tl.float32)
    else:
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if LOW_RANK and not DROPOUT:
        accumulator += scale * add_product(
            tl.zeros((BLOCK_M, BLOCK_N), tl.float32), t, b, row, column, rows, columns, rank,
            t_stride, b_row_stride, b_column_stride, PRECISION, BLOCK_RANK, 1,
        )  # fmt: skip
    accumulator = add_product(
        accumulator, x, w, row, column, rows, columns, inner, x_stride, w_row_stride, w_column_stride,
        PRECISION, BLOCK_K, STAGES,
    )  # fmt: skip
    if HAS_BIAS:
        accumulator += tl.load(bias + column, column < columns, other=0.0).to(tl.float32)[None, :]
    tl.store(c_rows + column[None, :], accumulator.to(c.dtype.element_ty), inside)


def _rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def _fake(
    x: Tensor, w: Tensor, t: Tensor | None, b: Tensor | None, bias: Tensor | None, addend: Tensor | None,
    seed: Tensor | None, scale: float, dropout: float, config: Sequence[int],
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], w.shape[1])


@kernel_op(fake=_fake)
def triton_low_rank_gemm(
    x: Tensor, w: Tensor, t: Tensor | None, b: Tensor | None, bias: Tensor | None, addend: Tensor | None,
    seed: Tensor | None, scale: float, dropout: float, config: Sequence[int],
) -> Tensor:  # fmt: skip
    c = x.new_empty(x.shape[0], w.shape[1])
    x, total = _rows(x), c if addend is None else _rows(addend)
    # Absent tensors are never read; the kernel takes others in their places.
    t, b, rank = (x, w, 0) if t is None or b is None else (_rows(t), b, t.shape[1])
    block_m, block_n, block_k, num_warps, num_stages = config or default_config(x, c.shape[1])[:5]
    launch(
        *(_low_rank_gemm, (ceil_div(c.shape[0], block_m) * ceil_div(c.shape[1], block_n),)),
        *(x, w, t, b, c if bias is None else bias.contiguous(), total, c if seed is None else seed, c),
        *(*c.shape, x.shape[1], rank, x.stride(0), *w.stride(), t.stride(0), *b.stride(), total.stride(0)),
        *(scale / (1 - dropout), keep_threshold(dropout)),
        LOW_RANK=rank > 0,
        DROPOUT=rank > 0 and dropout > 0,
        HAS_BIAS=bias is not None,
        HAS_ADDEND=addend is not None,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",  # the latter means nothing to other dtypes
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        BLOCK_RANK=min(block_k, max(16, next_power_of_2(rank))),
        STAGES=num_stages,
        SLICE=block_n // 4,
        GROUP_M=_GROUP_M,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return c


def gemm(
    x: Tensor,
    w: Tensor,
    t: Tensor | None = None,
    b: Tensor | None = None,
    scale: float = 1.0,
    *,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    seed: Tensor | None = None,
    dropout: float = 0.0,
    config: GemmConfig | None = None,
    triton_kernels: bool,
    triton_masks: bool = False,
) -> Tensor:
    """`low_rank_gemm` with the choices made: a mask is drawn by PyTorch only where the product is its, too."""
    if triton_kernels:
        # None is left to the operator: torch.compile cannot trace asking a GPU for its capability.
        chosen = [] if config is None else list(config[:5])
        return triton_low_rank_gemm(x, w, t, b, bias, addend, seed, scale, dropout, chosen)
    if t is not None and b is not None and seed is not None and dropout:
        update = apply_mask(scaled_mm(t, b, scale), seed, dropout, triton_masks)
        addend, t = update if addend is None else addend.add_(update), None
    if addend is not None:
        c = addend.addmm_(x, w)
        if bias is not None:
            c += bias
    else:
        c = torch.mm(x, w) if bias is None else torch.addmm(bias, x, w)
    return c if t is None or b is None else c.addmm_(t, b, alpha=scale)


def scaled_mm(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale·a·b, scaled before it is rounded and without another pass."""
    return torch.mm(a, b) if scale == 1 else torch.addmm(a.new_zeros(1), a, b, beta=0, alpha=scale)


def low_rank_gemm(
    x: Tensor,
    w: Tensor,
    t: Tensor | None = None,
    b: Tensor | None = None,
    scale: float = 1.0,
    *,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    seed: Tensor | None = None,
    dropout: float = 0.0,
    config: GemmConfig | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """X·W + scale·mask∘(T·B) + bias + addend, without autograd; W and B may be transposed views.

    Args:
        x: [M, K], fp32, bf16 or fp16.
        w: [K, N], same dtype as all the others, with any strides.
        t: [M, r], or None for no update.
        b: [r, N], with any strides.
        scale: of the update, in fp32.
        bias: [N].
        addend: [M, N]; its memory may be taken for the result.
        seed: [1] int64, of the mask of `dropout`.
        dropout: share of the update's entries that become zero, the others growing by 1 / (1 − dropout), as in
            `seeded_dropout`; a mask is rounded to the dtype of `x` before the rest is added.
        config: of the Triton kernel; None for `default_config`.
        backend: see `Backend`; None for the global choice. `auto` goes by `AUTO_TAKES_TRITON`.

    Returns:
        [M, N] in the dtype of `x`; sums are in fp32.

    Raises:
        ValueError: if `t` comes without `b` or the reverse, or dropout without a seed or an update.
    """
    if (t is None) != (b is None):
        raise ValueError("the update needs both t and b")
    if dropout and (seed is None or t is None):
        raise ValueError("dropout needs a seed, and an update to mask")
    return gemm(
        *(x, w, t, b, scale),
        bias=bias,
        addend=addend,
        seed=seed,
        dropout=dropout,
        config=config,
        triton_kernels=triton_gemms(backend, x, w, t, b, bias, addend),
        triton_masks=use_triton(backend, x),
    )
