"""SwiGLU of inputs to which, as to the gradient of its output, a LoRA adapter's update is still to be added.

    gate = gate_base + s_gate·t_gate·B_gateᵀ,  up = up_base + s_up·t_up·B_upᵀ,  act = silu(gate) · up        (forward)
    d_act = d_act_base + mask∘(u_down·A_down), then d_gate and d_up as SwiGLU has them                      (backward)
    dB_gate = s_gate·d_gateᵀ·t_gate,  dB_up = s_up·d_upᵀ·t_up,  dA_down = u_downᵀ·(mask∘act)                (backward)

t and u [N, r] are the narrow sides of the updates (Hu et al. 2021, arXiv 2106.09685). SwiGLU reads gate, up and d_act
anyway: adding the updates there, and taking the gradients of the wide adapter halves while act, d_gate and d_up are in
registers, leaves 6·F bytes a token in forward (8·F with dropout) and 10·F in backward (bf16), the same as without
adapters. Passes of their own would take 4·F bytes an update and 2·F a gradient: 14·F and 28·F in all. The price is
arithmetic, 4·F·r FLOPs a token in forward and 12·F·r in backward, which at the peak rates of an H100 takes less time
than the traffic up to r = 128.

A program owns a strip of features and a share of the tokens: the wide adapter halves of its strip stay on the chip,
gradients grow in registers. Tiles have features down and tokens across, so that Hopper's matrix instructions, which
take 64 rows, find those however few tokens fit the registers, and so that products of d_gate, d_up and act take them
from the registers they are in. Gradients of the shares are added in fp32 and in a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .dropout import apply_mask, keep_mask, keep_threshold
from .launch import compute_capability, kernel_op, launch, multiprocessors, next_power_of_2, rows_of, tl, triton
from .low_rank_gemm import scaled_mm
from .swiglu import silu_and_slope, swiglu_backward, swiglu_forward, torch_swiglu_backward, torch_swiglu_forward

MOST_RANKS = 128
MOST_RANKS_FP32 = 32
"""Gradients of larger adapters would not fit a program's registers: those are left to library products."""


class Update(NamedTuple):
    """scale·narrow·wideᵀ, of a layer with an adapter; without one, both are None."""

    narrow: Tensor | None = None
    """t [N, r]."""
    wide: Tensor | None = None
    """B [F, r]."""
    scale: float = 1.0


class _Blocks(NamedTuple):
    tokens: int
    features: int
    num_warps: int
    num_stages: int


_FP32 = _Blocks(16, 32, 4, 1)  # without tensor cores, so that products are those of fp32
_FORWARD = _Blocks(32, 64, 4, 2)


def _backward_blocks(rank: int, dropout: bool, x: Tensor) -> _Blocks:
    """Three sums of [features, rank] fp32 numbers, and the masks of dropout, have to fit the registers."""
    if x.dtype == torch.float32:
        return _FP32
    if rank <= 32:
        return _Blocks(32, 64, 4, 3)
    generation = compute_capability(x) // 10
    if generation == 9:
        return _Blocks(16 if dropout else 32, 64, 4 if rank <= 64 else 8, 3)
    if generation == 10:  # sums are in tensor memory
        return _Blocks(32, 64, 4, 2) if rank <= 64 else _Blocks(16, 64, 8, 2)
    return _Blocks(16, 64, 4, 2) if rank <= 64 else _Blocks(32, 32, 8, 2)


@triton.jit
def wide_tile(weights, column_stride, rank_stride, rank, column, columns, R: tl.constexpr):
    """[BLOCK, R]: a strip of the wide half of an adapter, zero beyond its rank."""
    r = tl.arange(0, R)[None, :]
    pointers = weights + column.to(tl.int64)[:, None] * column_stride + r.to(tl.int64) * rank_stride
    return tl.load(pointers, (column < columns)[:, None] & (r < rank), other=0.0)


@triton.jit
def narrow_tile(t, stride, rank, row, rows, R: tl.constexpr):
    """[BLOCK_TOKENS, R]: the narrow side of an update, zero beyond its rank."""
    r = tl.arange(0, R)[None, :]
    return tl.load(t + row.to(tl.int64)[:, None] * stride + r, (row < rows)[:, None] & (r < rank), other=0.0)


@triton.jit
def load_tile(x, stride, row, rows, column, columns):
    inside = (column < columns)[:, None] & (row < rows)[None, :]
    return tl.load(x + row.to(tl.int64)[None, :] * stride + column[:, None], inside, other=0.0)


@triton.jit
def store_tile(x, values, row, rows, column, columns):
    inside = (column < columns)[:, None] & (row < rows)[None, :]
    tl.store(x + row.to(tl.int64)[None, :] * columns + column[:, None], values.to(x.dtype.element_ty), inside)


@triton.jit
def store_partial(partial, sums, rank, column, columns, R: tl.constexpr):
    """Write the sums [BLOCK, R] of one share of the tokens to its plane of `partial` [shares, columns, rank]."""
    r = tl.arange(0, R)[None, :]
    pointers = partial + (tl.program_id(1).to(tl.int64) * columns + column[:, None]) * rank + r
    tl.store(pointers, sums, (column < columns)[:, None] & (r < rank))


@triton.jit
def _swiglu_low_rank_forward(
    gate_base, up_base, t_gate, b_gate, t_up, b_up, seed, act, dropped,
    gate_stride, up_stride, t_gate_stride, b_gate_stride, t_up_stride, b_up_stride,
    rank_gate, rank_up, scale_gate, scale_up, rows, columns, share, threshold, keep_scale,
    R_GATE: tl.constexpr, R_UP: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if R_GATE > 0:
        b_gates = wide_tile(b_gate, b_gate_stride, 1, rank_gate, column, columns, R_GATE)
    if R_UP > 0:
        b_ups = wide_tile(b_up, b_up_stride, 1, rank_up, column, columns, R_UP)
    start = tl.program_id(1) * share
    stop = tl.minimum(start + share, rows)
    row = start + tl.arange(0, BLOCK_TOKENS)
    # Triton prefetches only what matrix instructions read from shared memory.
    next_gate = load_tile(gate_base, gate_stride, row, stop, column, columns)
    next_up = load_tile(up_base, up_stride, row, stop, column, columns)
    for done in range(0, share, BLOCK_TOKENS):
        row = start + done + tl.arange(0, BLOCK_TOKENS)
        gate, up = next_gate.to(tl.float32), next_up.to(tl.float32)
        next_gate = load_tile(gate_base, gate_stride, row + BLOCK_TOKENS, stop, column, columns)
        next_up = load_tile(up_base, up_stride, row + BLOCK_TOKENS, stop, column, columns)
        if R_GATE > 0:
            t_gates = narrow_tile(t_gate, t_gate_stride, rank_gate, row, rows, R_GATE)
            gate += scale_gate * tl.dot(b_gates, tl.trans(t_gates), input_precision=PRECISION)
        if R_UP > 0:
            t_ups = narrow_tile(t_up, t_up_stride, rank_up, row, rows, R_UP)
            up += scale_up * tl.dot(b_ups, tl.trans(t_ups), input_precision=PRECISION)
        activated, _ = silu_and_slope(gate)  # pyright: ignore[reportGeneralTypeIssues]
        activated *= up
        store_tile(act, activated, row, rows, column, columns)
        if DROPOUT:
            kept = keep_mask(tl.load(seed), row[None, :], column[:, None], tl.cast(threshold, tl.uint32))
            store_tile(dropped, tl.where(kept, activated * keep_scale, 0.0), row, rows, column, columns)


@triton.jit
def _swiglu_low_rank_backward(
    grad_base, gate_base, up_base, t_gate, b_gate, t_up, b_up, u_down, a_down, seed,
    grad_gate, grad_up, act, partial_gate, partial_up, partial_down,
    grad_stride, gate_stride, up_stride,
    t_gate_stride, b_gate_stride, t_up_stride, b_up_stride, u_down_stride, a_down_stride,
    rank_gate, rank_up, rank_down, scale_gate, scale_up, rows, columns, share, threshold, keep_scale,
    R_GATE: tl.constexpr, R_UP: tl.constexpr, R_DOWN: tl.constexpr,
    B_GATE_GRAD: tl.constexpr, B_UP_GRAD: tl.constexpr, A_DOWN_GRAD: tl.constexpr, OUTPUT: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if R_GATE > 0:
        b_gates = wide_tile(b_gate, b_gate_stride, 1, rank_gate, column, columns, R_GATE)
    if R_UP > 0:
        b_ups = wide_tile(b_up, b_up_stride, 1, rank_up, column, columns, R_UP)
    if R_DOWN > 0:
        a_downs = wide_tile(a_down, 1, a_down_stride, rank_down, column, columns, R_DOWN)
    if B_GATE_GRAD:
        gate_sum = tl.zeros((BLOCK, R_GATE), tl.float32)
    if B_UP_GRAD:
        up_sum = tl.zeros((BLOCK, R_UP), tl.float32)
    if A_DOWN_GRAD:
        down_sum = tl.zeros((BLOCK, R_DOWN), tl.float32)
    start = tl.program_id(1) * share
    stop = tl.minimum(start + share, rows)
    row = start + tl.arange(0, BLOCK_TOKENS)
    next_gate = load_tile(gate_base, gate_stride, row, stop, column, columns)
    next_up = load_tile(up_base, up_stride, row, stop, column, columns)
    next_grad = load_tile(grad_base, grad_stride, row, stop, column, columns)
    for done in range(0, share, BLOCK_TOKENS):
        row = start + done + tl.arange(0, BLOCK_TOKENS)
        gate, up, upstream = next_gate.to(tl.float32), next_up.to(tl.float32), next_grad.to(tl.float32)
        next_gate = load_tile(gate_base, gate_stride, row + BLOCK_TOKENS, stop, column, columns)
        next_up = load_tile(up_base, up_stride, row + BLOCK_TOKENS, stop, column, columns)
        next_grad = load_tile(grad_base, grad_stride, row + BLOCK_TOKENS, stop, column, columns)
        if R_GATE > 0:
            t_gates = narrow_tile(t_gate, t_gate_stride, rank_gate, row, rows, R_GATE)
            gate += scale_gate * tl.dot(b_gates, tl.trans(t_gates), input_precision=PRECISION)
        if R_UP > 0:
            t_ups = narrow_tile(t_up, t_up_stride, rank_up, row, rows, R_UP)
            up += scale_up * tl.dot(b_ups, tl.trans(t_ups), input_precision=PRECISION)
        silu, slope = silu_and_slope(gate)  # pyright: ignore[reportGeneralTypeIssues]
        if OUTPUT:
            store_tile(act, silu * up, row, rows, column, columns)
        if R_DOWN > 0:
            u_downs = narrow_tile(u_down, u_down_stride, rank_down, row, rows, R_DOWN)
            update = tl.dot(a_downs, tl.trans(u_downs), input_precision=PRECISION)
            activated = silu * up
            if DROPOUT:
                kept = keep_mask(tl.load(seed), row[None, :], column[:, None], tl.cast(threshold, tl.uint32))
                update = tl.where(kept, update * keep_scale, 0.0)
                activated = tl.where(kept, activated * keep_scale, 0.0)
            upstream += update
            if A_DOWN_GRAD:
                down_sum = tl.dot(activated.to(u_downs.dtype), u_downs, down_sum, input_precision=PRECISION)
        d_gate = (upstream * up * slope).to(grad_gate.dtype.element_ty)
        store_tile(grad_gate, d_gate, row, rows, column, columns)
        if B_GATE_GRAD:
            gate_sum = tl.dot(d_gate, t_gates, gate_sum, input_precision=PRECISION)
        d_up = (upstream * silu).to(grad_up.dtype.element_ty)
        store_tile(grad_up, d_up, row, rows, column, columns)
        if B_UP_GRAD:
            up_sum = tl.dot(d_up, t_ups, up_sum, input_precision=PRECISION)
    if B_GATE_GRAD:
        store_partial(partial_gate, gate_sum * scale_gate, rank_gate, column, columns, R_GATE)
    if B_UP_GRAD:
        store_partial(partial_up, up_sum * scale_up, rank_up, column, columns, R_UP)
    if A_DOWN_GRAD:
        store_partial(partial_down, down_sum, rank_down, column, columns, R_DOWN)


def _blocks_in(length: int, block: int) -> int:
    return (length + block - 1) // block


def _grid(rows: int, columns: int, blocks: _Blocks, programs: int) -> tuple[tuple[int, int], int]:
    """((strips, shares), tokens of a share) with as many shares as bring about `programs` programs."""
    strips = max(1, _blocks_in(columns, blocks.features))
    steps = _blocks_in(_blocks_in(rows, blocks.tokens), max(1, _blocks_in(programs, strips)))
    share = max(1, steps) * blocks.tokens
    return (strips, _blocks_in(rows, share)), share


def _padded(rank: int) -> int:
    return max(16, next_power_of_2(rank)) if rank else 0


def _operands(narrow: Tensor | None, wide: Tensor | None, absent: Tensor) -> tuple[Tensor, Tensor, int]:
    """(narrow, wide, rank); `absent` stands for what no kernel will read."""
    return (absent, absent, 0) if narrow is None or wide is None else (rows_of(narrow), rows_of(wide), narrow.shape[1])


def _constants(x: Tensor, seed: Tensor | None, blocks: _Blocks) -> dict[str, object]:
    return {
        "DROPOUT": seed is not None,
        "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",  # the latter means nothing to other dtypes
        "BLOCK_TOKENS": blocks.tokens,
        "BLOCK": blocks.features,
        "num_warps": blocks.num_warps,
        "num_stages": blocks.num_stages,
    }


def _fake_forward(
    gate_base: Tensor, up_base: Tensor, t_gate: Tensor | None, b_gate: Tensor | None, scale_gate: float,
    t_up: Tensor | None, b_up: Tensor | None, scale_up: float, seed: Tensor | None, p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return gate_base.new_empty(gate_base.shape), gate_base.new_empty(0 if seed is None else gate_base.shape)


@kernel_op(fake=_fake_forward)
def swiglu_low_rank_forward(
    gate_base: Tensor, up_base: Tensor, t_gate: Tensor | None, b_gate: Tensor | None, scale_gate: float,
    t_up: Tensor | None, b_up: Tensor | None, scale_up: float, seed: Tensor | None, p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    results = _fake_forward(gate_base, up_base, t_gate, b_gate, scale_gate, t_up, b_up, scale_up, seed, p)
    gate_base, up_base = rows_of(gate_base), rows_of(up_base)
    t_gate, b_gate, rank_gate = _operands(t_gate, b_gate, gate_base)
    t_up, b_up, rank_up = _operands(t_up, b_up, gate_base)
    blocks = _FP32 if gate_base.dtype == torch.float32 else _FORWARD
    rows, columns = gate_base.shape
    # Many, so that the last ones to finish are short: a share costs no more than reading its strips of B again.
    grid, share = _grid(rows, columns, blocks, programs=16 * multiprocessors(gate_base))
    launch(
        *(_swiglu_low_rank_forward, grid),
        *(gate_base, up_base, t_gate, b_gate, t_up, b_up, gate_base if seed is None else seed, *results),
        *(tensor.stride(0) for tensor in (gate_base, up_base, t_gate, b_gate, t_up, b_up)),
        *(rank_gate, rank_up, scale_gate, scale_up, rows, columns, share, keep_threshold(p), 1 / (1 - p)),
        R_GATE=_padded(rank_gate),
        R_UP=_padded(rank_up),
        **_constants(gate_base, seed, blocks),
    )
    return results


def _fake_backward(
    grad_base: Tensor, gate_base: Tensor, up_base: Tensor, t_gate: Tensor | None, b_gate: Tensor | None,
    scale_gate: float, t_up: Tensor | None, b_up: Tensor | None, scale_up: float, u_down: Tensor | None,
    a_down: Tensor | None, seed: Tensor | None, p: float, b_gate_grad: bool, b_up_grad: bool, a_down_grad: bool,
    output: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grad_gate, grad_up, act = (gate_base.new_empty(gate_base.shape if some else 0) for some in (True, True, output))
    wanted = ((b_gate, b_gate_grad), (b_up, b_up_grad), (a_down, a_down_grad))
    grad_wides = [gate_base.new_empty(0 if wide is None or not some else wide.shape) for wide, some in wanted]
    return grad_gate, grad_up, act, grad_wides[0], grad_wides[1], grad_wides[2]


@kernel_op(fake=_fake_backward)
def swiglu_low_rank_backward(
    grad_base: Tensor, gate_base: Tensor, up_base: Tensor, t_gate: Tensor | None, b_gate: Tensor | None,
    scale_gate: float, t_up: Tensor | None, b_up: Tensor | None, scale_up: float, u_down: Tensor | None,
    a_down: Tensor | None, seed: Tensor | None, p: float, b_gate_grad: bool, b_up_grad: bool, a_down_grad: bool,
    output: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grad_gate, grad_up, act = (gate_base.new_empty(gate_base.shape if some else 0) for some in (True, True, output))
    grad_base, gate_base, up_base = rows_of(grad_base), rows_of(gate_base), rows_of(up_base)
    t_gate, b_gate, rank_gate = _operands(t_gate, b_gate, gate_base)
    t_up, b_up, rank_up = _operands(t_up, b_up, gate_base)
    u_down, a_down, rank_down = _operands(u_down, a_down, gate_base)
    ranks, grads = (rank_gate, rank_up, rank_down), (b_gate_grad, b_up_grad, a_down_grad)
    blocks = _backward_blocks(max(ranks), seed is not None, gate_base)
    rows, columns = gate_base.shape
    # Fewer, because every share writes partial sums as large as the gradients.
    grid, share = _grid(rows, columns, blocks, programs=4 * multiprocessors(gate_base))
    partials = [
        torch.empty(grid[1] if some else 0, columns, rank, dtype=torch.float32, device=gate_base.device)
        for rank, some in zip(ranks, grads, strict=True)
    ]
    launch(
        *(_swiglu_low_rank_backward, grid),
        *(grad_base, gate_base, up_base, t_gate, b_gate, t_up, b_up, u_down, a_down),
        *(gate_base if seed is None else seed, grad_gate, grad_up, act, *partials),
        *(t.stride(0) for t in (grad_base, gate_base, up_base, t_gate, b_gate, t_up, b_up, u_down, a_down)),
        *(*ranks, scale_gate, scale_up, rows, columns, share, keep_threshold(p), 1 / (1 - p)),
        R_GATE=_padded(rank_gate),
        R_UP=_padded(rank_up),
        R_DOWN=_padded(rank_down),
        B_GATE_GRAD=b_gate_grad,
        B_UP_GRAD=b_up_grad,
        A_DOWN_GRAD=a_down_grad,
        OUTPUT=output,
        **_constants(gate_base, seed, blocks),
    )
    # Each its own empty tensor: an operator's results must not be the same one.
    sums = [
        partial.sum(0).to(gate_base.dtype) if some else gate_base.new_empty(0)
        for partial, some in zip(partials, grads, strict=True)
    ]
    return grad_gate, grad_up, act, sums[0], sums[1], sums[2].T.contiguous() if a_down_grad else sums[2]


def _updated(base: Tensor, update: Update) -> Tensor:
    narrow, wide, scale = update
    return base if narrow is None or wide is None else torch.addmm(base, narrow, wide.T, alpha=scale)


def _wide_gradient(grad: Tensor, update: Update, wanted: bool) -> Tensor | None:
    return scaled_mm(grad.T, update.narrow, update.scale) if wanted and update.narrow is not None else None


def _fits(triton_kernels: bool, x: Tensor, *narrows: Tensor | None) -> bool:
    ranks = [narrow.shape[1] for narrow in narrows if narrow is not None]
    most = MOST_RANKS_FP32 if x.dtype == torch.float32 else MOST_RANKS
    return triton_kernels and bool(ranks) and max(ranks) <= most


def low_rank_swiglu(
    gate_base: Tensor, up_base: Tensor, gate: Update, up: Update, seed: Tensor | None, p: float, triton_kernels: bool
) -> tuple[Tensor, Tensor]:
    """silu(gate_base + update) · (up_base + update), without autograd.

    Args:
        gate_base: [N, F]; stays as it is.
        up_base: [N, F], same dtype.
        gate: what is added to `gate_base`.
        up: what is added to `up_base`.
        seed: [1] int64 of the mask that the adapter behind sees; None for no dropout.
        p: share of the entries that it drops.
        triton_kernels: False for the same steps in plain PyTorch, with library products.

    Returns:
        (the activation, the same after dropout), each [N, F]; one and the same without dropout.
    """
    if _fits(triton_kernels, gate_base, gate.narrow, up.narrow):
        act, dropped = swiglu_low_rank_forward(gate_base, up_base, *gate, *up, seed, p)
        return act, act if seed is None else dropped
    swiglu = swiglu_forward if triton_kernels else torch_swiglu_forward
    act = swiglu(_updated(gate_base, gate), _updated(up_base, up))
    return act, act if seed is None else apply_mask(act, seed, p, triton_kernels)


def low_rank_swiglu_backward(
    grad_base: Tensor,
    gate_base: Tensor,
    up_base: Tensor,
    gate: Update,
    up: Update,
    u_down: Tensor | None,
    a_down: Tensor | None,
    seed: Tensor | None,
    p: float,
    wide_grads: tuple[bool, bool, bool],
    output: bool,
    triton_kernels: bool,
) -> tuple[Tensor, Tensor, Tensor | None, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Backward of `low_rank_swiglu` and of the product with A_down behind it.

    Args:
        grad_base: [N, F]: gradient of the activation but for the part through the adapter behind. Its memory may be
            taken for the sum of both.
        gate_base, up_base, gate, up, seed, p, triton_kernels: as in forward.
        u_down: [N, r], or None: gradient of act·A_downᵀ.
        a_down: [r, F], or None.
        wide_grads: whether B_gate, B_up and A_down want theirs.
        output: whether the activation is wanted once more.

    Returns:
        (d_gate [N, F], d_up [N, F], activation, (dB_gate [F, r], dB_up [F, r], dA_down [r, F])), with None for what
        is not wanted.
    """
    if _fits(triton_kernels, gate_base, gate.narrow, up.narrow, u_down):
        d_gate, d_up, act, *grads = swiglu_low_rank_backward(
            grad_base, gate_base, up_base, *gate, *up, u_down, a_down, seed, p, *wide_grads, output
        )
        dB_gate, dB_up, dA_down = (grad if some else None for grad, some in zip(grads, wide_grads, strict=True))
        return d_gate, d_up, act if output else None, (dB_gate, dB_up, dA_down)
    inputs = _updated(gate_base, gate), _updated(up_base, up)
    upstream = grad_base
    if u_down is not None and a_down is not None:
        if seed is None:
            upstream = grad_base.addmm_(u_down, a_down)
        else:
            upstream = grad_base.add_(apply_mask(u_down @ a_down, seed, p, triton_kernels))
    backward = swiglu_backward if triton_kernels else torch_swiglu_backward
    d_gate, d_up, act = backward(upstream, *inputs, True, True, output or wide_grads[2])
    dA_down = None
    if wide_grads[2] and u_down is not None:
        dA_down = u_down.T @ (act if seed is None else apply_mask(act, seed, p, triton_kernels))
    wides = (_wide_gradient(d_gate, gate, wide_grads[0]), _wide_gradient(d_up, up, wide_grads[1]), dA_down)
    return d_gate, d_up, act if output else None, wides
