"""Root-mean-square layer normalisation (Zhang & Sennrich 2019, arXiv 1910.07467), alone or behind a residual addition.

y = weight · x / sqrt(mean(x²) + eps). Memory-bound: forward reads one value an entry and writes one (with the addition
two and two), backward reads two and writes one (with the addition three and one), at about 5 FLOPs a value. The
weight's gradient is summed in registers, one row of H fp32 numbers a program.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .backend import Backend, use_triton
from .launch import kernel_op, launch, multiprocessors, next_power_of_2, rows_of, tl, triton

_MOST_COLUMNS = 32_768
"""A row has to fit one program's registers."""


@triton.jit
def _rms_norm_forward(
    x, residual, weight, y, total, rstd, x_stride, residual_stride, columns, eps,
    HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # times a stride, it may pass 2^31
    column = tl.arange(0, BLOCK)
    inside = column < columns
    values = tl.load(x + row * x_stride + column, inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        values += tl.load(residual + row * residual_stride + column, inside, other=0.0).to(tl.float32)
        rounded = values.to(total.dtype.element_ty)  # normalised is what the next layers read
        tl.store(total + row * columns + column, rounded, inside)
        values = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / columns + eps)
    tl.store(rstd + row, scale)
    normalised = (values * scale).to(y.dtype.element_ty).to(tl.float32)
    weights = tl.load(weight + column, inside, other=0.0).to(tl.float32)
    tl.store(y + row * columns + column, (weights * normalised).to(y.dtype.element_ty), inside)


@triton.jit
def _rms_norm_backward(
    grad_y, grad_total, x, weight, rstd, grad_x, partial_weight, grad_y_stride, grad_total_stride, x_stride,
    rows, columns,
    HAS_GRAD_TOTAL: tl.constexpr, WEIGHT_GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    inside = column < columns
    weights = tl.load(weight + column, inside, other=0.0).to(tl.float32)
    weight_sum = tl.zeros((BLOCK,), tl.float32)
    for number in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(number, tl.int64)
        scale = tl.load(rstd + row)
        normalised = tl.load(x + row * x_stride + column, inside, other=0.0).to(tl.float32) * scale
        upstream = tl.load(grad_y + row * grad_y_stride + column, inside, other=0.0).to(tl.float32)
        if WEIGHT_GRAD:
            weight_sum += upstream * normalised
        upstream *= weights
        # The derivative of x·rstd(x) leaves out the component along the normalised row.
        gradient = scale * (upstream - normalised * (tl.sum(upstream * normalised, 0) / columns))
        if HAS_GRAD_TOTAL:
            gradient += tl.load(grad_total + row * grad_total_stride + column, inside, other=0.0).to(tl.float32)
        tl.store(grad_x + row * columns + column, gradient.to(grad_x.dtype.element_ty), inside)
    if WEIGHT_GRAD:
        tl.store(partial_weight + tl.program_id(0).to(tl.int64) * columns + column, weight_sum, inside)


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))


def _fake_forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    total = x.new_empty(x.shape if residual is not None else 0)
    return x.new_empty(x.shape), total, x.new_empty(x.shape[:-1], dtype=torch.float32)


@kernel_op(fake=_fake_forward)
def rms_norm_forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, total, rstd = _fake_forward(x, residual, weight, eps)
    columns, x_rows = x.shape[-1], rows_of(x)
    residual_rows = x_rows if residual is None else rows_of(residual)
    block = next_power_of_2(columns)
    launch(
        *(_rms_norm_forward, (len(x_rows),)),
        *(x_rows, residual_rows, weight.contiguous(), y, total, rstd),
        *(x_rows.stride(0), residual_rows.stride(0), columns, eps),
        HAS_RESIDUAL=residual is not None,
        BLOCK=block,
        num_warps=_warps(block),
    )
    return y, total, rstd


def _fake_backward(
    grad_y: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape if weight_grad else 0)


@kernel_op(fake=_fake_backward)
def rms_norm_backward(
    grad_y: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    grad_x = x.new_empty(x.shape)
    columns, x_rows, grad_rows = x.shape[-1], rows_of(x), rows_of(grad_y)
    total_rows = grad_rows if grad_total is None else rows_of(grad_total)
    programs = min(len(x_rows), 4 * multiprocessors(x))
    partial = torch.empty(programs if weight_grad else 0, columns, dtype=torch.float32, device=x.device)
    block = next_power_of_2(columns)
    launch(
        *(_rms_norm_backward, (programs,)),
        *(grad_rows, total_rows, x_rows, weight.contiguous(), rstd, grad_x, partial),
        *(grad_rows.stride(0), total_rows.stride(0), x_rows.stride(0), len(x_rows), columns),
        HAS_GRAD_TOTAL=grad_total is not None,
        WEIGHT_GRAD=weight_grad,
        BLOCK=block,
        num_warps=2 * _warps(block),
    )
    # Partial sums in a fixed order: the same bits every time, unlike atomic additions.
    return grad_x, partial.sum(0).to(weight.dtype) if weight_grad else weight.new_empty(0)


def torch_rms_norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    total = x if residual is None else x + residual
    x_fp32 = total.float()
    rstd = torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + eps)
    # Llama rounds the normalised activations to the input dtype before scaling them; doing the
    # same keeps bf16 logits equal to those of the checkpoints' own implementation.
    return weight * (x_fp32 * rstd).to(x.dtype), total, rstd.squeeze(-1)


def torch_rms_norm_backward(
    grad_y: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, weight_grad: bool
) -> tuple[Tensor, Tensor | None]:
    normalised = x.float() * rstd[..., None]
    upstream = grad_y.float()
    grad_normalised = upstream * weight.float()
    mean = (grad_normalised * normalised).mean(-1, keepdim=True)
    grad_x = rstd[..., None] * (grad_normalised - normalised * mean)
    if grad_total is not None:
        grad_x = grad_x + grad_total
    grad_weight = (upstream * normalised).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype) if weight_grad else None
    return grad_x.to(x.dtype), grad_weight


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, triton_kernels: bool) -> Tensor:
        forward = rms_norm_forward if triton_kernels else torch_rms_norm_forward
        y, _, rstd = forward(x, None, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        ctx.triton_kernels = triton_kernels
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        backward = rms_norm_backward if ctx.triton_kernels else torch_rms_norm_backward
        x, weight, rstd = ctx.saved_tensors
        grad_x, grad_weight = backward(grads[0], None, x, weight, rstd, ctx.needs_input_grad[1])
        return grad_x, grad_weight if ctx.needs_input_grad[1] else None, None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, residual: Tensor, weight: Tensor, eps: float, triton_kernels: bool):
        forward = rms_norm_forward if triton_kernels else torch_rms_norm_forward
        y, total, rstd = forward(x, residual, weight, eps)
        ctx.save_for_backward(total, weight, rstd)
        ctx.triton_kernels = triton_kernels
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        grad_y, grad_total = grads
        backward = rms_norm_backward if ctx.triton_kernels else torch_rms_norm_backward
        total, weight, rstd = ctx.saved_tensors
        grad_x, grad_weight = backward(grad_y, grad_total, total, weight, rstd, ctx.needs_input_grad[2])
        return grad_x, grad_x, grad_weight if ctx.needs_input_grad[2] else None, None, None


def norm_takes_triton(backend: Backend | None, *tensors: Tensor) -> bool:
    columns = tensors[0].shape[-1]
    chosen = use_triton(backend, *tensors)
    if chosen and columns > _MOST_COLUMNS:
        if backend == "triton":
            raise ValueError(f"rows of {columns} values are too long for the Triton kernel: at most {_MOST_COLUMNS}")
        return False
    return chosen


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, *, backend: Backend | None = None) -> Tensor:
    """Scale every vector of `x` to unit root mean square, then multiply by `weight`.

    y = weight · x / sqrt(mean(x²) + eps), with statistics in fp32.

    Args:
        x: [..., H], fp32, bf16 or fp16.
        weight: [H], same dtype as `x`. Frozen, it costs no gradient.
        eps: added to the mean square.
        backend: see `Backend`; None for the global choice.

    Returns:
        [..., H] in the dtype of `x`. Backward keeps `x` and one fp32 number a row.
    """
    return _RMSNorm.apply(x, weight, eps, norm_takes_triton(backend, x, weight))  # type: ignore[return-value]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5, *, backend: Backend | None = None
) -> tuple[Tensor, Tensor]:
    """`rms_norm(x + residual)` and the sum itself, reading each input once.

    Args:
        x: [..., H], fp32, bf16 or fp16: what a block adds to the residual stream.
        residual: [..., H], same dtype: the residual stream.
        weight: [H], same dtype.
        eps: added to the mean square.
        backend: see `Backend`; None for the global choice.

    Returns:
        (normalised sum, sum), each [..., H] in the dtype of `x`. Backward keeps the sum and one fp32 number a row.
    """
    chosen = norm_takes_triton(backend, x, residual, weight)
    return _AddRMSNorm.apply(x, residual, weight, eps, chosen)  # type: ignore[return-value]


class RMSNorm(nn.Module):
    """`rms_norm` with a weight of its own, which starts at one."""

    def __init__(self, size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
