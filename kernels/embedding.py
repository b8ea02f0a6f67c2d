"""Token embedding whose gradient may be that of a range of rows alone.

Forward reads and writes N·H values (a library gather). Backward sorts the N ids and then adds up, for every row that
trains, the upstream rows of its tokens in their order: fp32 sums, no atomics, so the same bits every time. It reads
N·H values and writes R·H (or, into a buffer that gradients add up in, only the rows that occur), where the usual dense
gradient writes V·H.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .backend import Backend, use_triton
from .launch import ceil_div, kernel_op, launch, next_power_of_2, rows_of, tl, triton
from .row_range import check_row_range


@triton.jit
def _embedding_backward(
    upstream, order, starts, gradient, upstream_stride, gradient_stride, columns,
    ADD: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first, end = tl.load(starts + row), tl.load(starts + row + 1)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    sums = tl.zeros((BLOCK,), tl.float32)
    for block in range(first, end, BLOCK_TOKENS):
        number = block + tl.arange(0, BLOCK_TOKENS)
        token = tl.load(order + number, number < end, other=0)  # int64, as torch sorts
        here = (number < end)[:, None] & inside[None, :]
        values = tl.load(upstream + token[:, None] * upstream_stride + column[None, :], here, other=0.0)
        sums += tl.sum(values.to(tl.float32), 0)
    target = gradient + row * gradient_stride + column
    if ADD:
        if end > first:  # rows that do not occur are not touched
            tl.store(target, tl.load(target, inside) + sums, inside)
    else:
        tl.store(target, sums.to(gradient.dtype.element_ty), inside)


def _start(input_ids: Tensor, upstream: Tensor, first_row: int, gradient: Tensor, add: bool) -> None:
    sorted_rows, order = torch.sort(input_ids.reshape(-1) - first_row, stable=True)
    boundaries = torch.arange(len(gradient) + 1, device=input_ids.device)
    starts = torch.searchsorted(sorted_rows, boundaries)
    columns, upstream_rows = gradient.shape[1], rows_of(upstream)
    block = min(512, next_power_of_2(columns))
    launch(
        *(_embedding_backward, (len(gradient), ceil_div(columns, block))),
        *(upstream_rows, order, starts, gradient, upstream_rows.stride(0), gradient.stride(0), columns),
        ADD=add,
        BLOCK_TOKENS=8,
        BLOCK=block,
        num_warps=4,
    )


def _fake(input_ids: Tensor, upstream: Tensor, first_row: int, rows: int) -> Tensor:
    return upstream.new_empty(rows, upstream.shape[-1])


@kernel_op(fake=_fake)
def embedding_backward(input_ids: Tensor, upstream: Tensor, first_row: int, rows: int) -> Tensor:
    gradient = upstream.new_empty(rows, upstream.shape[-1])
    _start(input_ids, upstream, first_row, gradient, add=False)
    return gradient


def _fake_add(input_ids: Tensor, upstream: Tensor, first_row: int, gradient: Tensor) -> None:
    return None


@kernel_op(fake=_fake_add, mutates_args=("gradient",))
def embedding_backward_add_(input_ids: Tensor, upstream: Tensor, first_row: int, gradient: Tensor) -> None:
    _start(input_ids, upstream, first_row, gradient, add=True)


def _torch_backward_add_(input_ids: Tensor, upstream: Tensor, first_row: int, gradient: Tensor) -> None:
    rows = input_ids.reshape(-1) - first_row
    outside = (rows < 0) | (rows >= len(gradient))
    values = upstream.reshape(-1, upstream.shape[-1]).float().masked_fill(outside[:, None], 0.0)
    rows = rows.masked_fill(outside, 0)
    if gradient.is_cuda:  # index_add_ uses atomics there; this one sorts
        gradient.index_put_((rows,), values, accumulate=True)
    else:
        gradient.index_add_(0, rows, values)


def _torch_backward(input_ids: Tensor, upstream: Tensor, first_row: int, rows: int) -> Tensor:
    gradient = torch.zeros(rows, upstream.shape[-1], dtype=torch.float32, device=upstream.device)
    _torch_backward_add_(input_ids, upstream, first_row, gradient)
    return gradient.to(upstream.dtype)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        input_ids: Tensor,
        weight: Tensor,
        trained_rows: Tensor | None,
        first_row: int,
        weight_grad: Tensor | None,
        triton_kernels: bool,
    ) -> Tensor:
        ctx.save_for_backward(input_ids)
        ctx.first_row, ctx.triton_kernels = first_row, triton_kernels
        ctx.rows = (weight if trained_rows is None else trained_rows).shape[0]
        # Not a saved tensor: every backward pass changes it, which autograd would take for a mistake.
        ctx.weight_grad = weight_grad
        return F.embedding(input_ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        (input_ids,) = ctx.saved_tensors
        gradient = None
        if ctx.weight_grad is not None:
            add = embedding_backward_add_ if ctx.triton_kernels else _torch_backward_add_
            add(input_ids, grads[0], ctx.first_row, ctx.weight_grad)
        else:
            backward = embedding_backward if ctx.triton_kernels else _torch_backward
            gradient = backward(input_ids, grads[0], ctx.first_row, ctx.rows)
        whole = ctx.needs_input_grad[1]
        return None, gradient if whole else None, None if whole else gradient, None, None, None


def embedding(
    input_ids: Tensor,
    weight: Tensor,
    *,
    trained_rows: Tensor | None = None,
    first_row: int = 0,
    weight_grad: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Rows of `weight` by token id.

    Args:
        input_ids: [...] int64 in [0, V).
        weight: [V, H], fp32, bf16 or fp16. Frozen, it costs nothing in backward.
        trained_rows: [R, H] parameter that is rows first_row … first_row + R − 1 of `weight` in the same memory (see
            `row_range`). It gets the gradient, in place of `weight`, which must not require one.
        first_row: first row of `trained_rows`.
        weight_grad: fp32 buffer of the shape that the gradient has, the entries of a row next to each other. Backward
            adds the gradient to it instead of returning one, so that micro-batches add up in fp32 and `.grad` stays
            None.
        backend: see `Backend`; None for the global choice. It decides about the backward pass only.

    Returns:
        [..., H] in the dtype of `weight`. Backward keeps the ids.

    Raises:
        ValueError: if `trained_rows` or `weight_grad` does not fit `weight`.
    """
    if trained_rows is not None:
        check_row_range(weight, trained_rows, first_row)
    trained = weight if trained_rows is None else trained_rows
    if weight_grad is not None and (weight_grad.shape != trained.shape or weight_grad.dtype != torch.float32):
        raise ValueError(
            f"weight_grad must be fp32 of shape {tuple(trained.shape)}, not {weight_grad.dtype} of shape "
            f"{tuple(weight_grad.shape)}"
        )
    if weight_grad is not None and weight_grad.shape[1] > 1 and weight_grad.stride(1) != 1:
        raise ValueError(f"weight_grad has strides {weight_grad.stride()}: a row's entries must be next to each other")
    chosen = use_triton(backend, weight)
    first_row = 0 if trained_rows is None else first_row
    return _Embedding.apply(input_ids, weight, trained_rows, first_row, weight_grad, chosen)  # type: ignore[return-value]


class Embedding(nn.Embedding):
    """`nn.Embedding`, without its options, with this module's backward pass: fp32 sums in a fixed order."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)

    def forward(
        self,
        input: Tensor,
        *,
        trained_rows: Tensor | None = None,
        first_row: int = 0,
        weight_grad: Tensor | None = None,
    ) -> Tensor:
        """See `embedding`."""
        options = {"trained_rows": trained_rows, "first_row": first_row, "weight_grad": weight_grad}
        return embedding(input, self.weight, **options)
