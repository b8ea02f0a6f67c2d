"""SwiGLU activation (Shazeer 2020, arXiv 2002.05202): y = silu(gate) · up, with silu(x) = x / (1 + exp(-x)).

Memory-bound, at about 10 FLOPs a value: forward reads two values an entry and writes one, backward reads three and
writes two, which is the least there is. Only the two inputs are kept, so that backward computes the sigmoid again. The
kernels compute in fp32 and round once; PyTorch rounds silu(gate) first, as the checkpoints' own implementation does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .backend import Backend, use_triton
from .launch import kernel_op, launch, next_power_of_2, rows_of, tl, triton


@triton.jit
def silu_and_slope(gate):
    """silu(gate) and its derivative, for a block in fp32."""
    sigmoid = tl.sigmoid(gate)
    return gate * sigmoid, sigmoid * (1 + gate * (1 - sigmoid))


@triton.jit
def _swiglu_forward(
    gate, up, y, gate_stride, up_stride, rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < columns)
    gates = tl.load(gate + row * gate_stride + column, inside, other=0.0).to(tl.float32)
    ups = tl.load(up + row * up_stride + column, inside, other=0.0).to(tl.float32)
    activated, _ = silu_and_slope(gates)  # pyright: ignore[reportGeneralTypeIssues]
    tl.store(y + row * columns + column, (activated * ups).to(y.dtype.element_ty), inside)


@triton.jit
def _swiglu_backward(
    grad_y, gate, up, grad_gate, grad_up, y, grad_y_stride, gate_stride, up_stride, rows, columns,
    GATE_GRAD: tl.constexpr, UP_GRAD: tl.constexpr, OUTPUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < columns)
    upstream = tl.load(grad_y + row * grad_y_stride + column, inside, other=0.0).to(tl.float32)
    gates = tl.load(gate + row * gate_stride + column, inside, other=0.0).to(tl.float32)
    activated, slope = silu_and_slope(gates)  # pyright: ignore[reportGeneralTypeIssues]
    offset = row * columns + column
    if UP_GRAD:
        tl.store(grad_up + offset, (upstream * activated).to(grad_up.dtype.element_ty), inside)
    if GATE_GRAD or OUTPUT:
        ups = tl.load(up + row * up_stride + column, inside, other=0.0).to(tl.float32)
        if GATE_GRAD:
            tl.store(grad_gate + offset, (upstream * ups * slope).to(grad_gate.dtype.element_ty), inside)
        if OUTPUT:
            tl.store(y + offset, (activated * ups).to(y.dtype.element_ty), inside)


def _grid(rows: int, columns: int) -> tuple[tuple[int, int], dict[str, int]]:
    block = min(1024, next_power_of_2(columns))
    block_rows = 2048 // block  # 16 values a thread: two loads of 16 bytes from each tensor in bf16
    options = {"BLOCK_ROWS": block_rows, "BLOCK": block, "num_warps": 4}
    return ((rows + block_rows - 1) // block_rows, (columns + block - 1) // block), options


def _fake_forward(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@kernel_op(fake=_fake_forward)
def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    y = _fake_forward(gate, up)
    gate_rows, up_rows = rows_of(gate), rows_of(up)
    grid, options = _grid(*gate_rows.shape)
    strides = (gate_rows.stride(0), up_rows.stride(0))
    launch(_swiglu_forward, grid, gate_rows, up_rows, y, *strides, *gate_rows.shape, **options)
    return y


def _fake_backward(
    grad_y: Tensor, gate: Tensor, up: Tensor, gate_grad: bool, up_grad: bool, output: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_gate, grad_up, y = (gate.new_empty(gate.shape if wanted else 0) for wanted in (gate_grad, up_grad, output))
    return grad_gate, grad_up, y


@kernel_op(fake=_fake_backward)
def swiglu_backward(
    grad_y: Tensor, gate: Tensor, up: Tensor, gate_grad: bool, up_grad: bool, output: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _fake_backward(grad_y, gate, up, gate_grad, up_grad, output)
    grad_rows, gate_rows, up_rows = rows_of(grad_y), rows_of(gate), rows_of(up)
    grid, options = _grid(*gate_rows.shape)
    launch(
        *(_swiglu_backward, grid, grad_rows, gate_rows, up_rows, *grads),
        *(grad_rows.stride(0), gate_rows.stride(0), up_rows.stride(0), *gate_rows.shape),
        GATE_GRAD=gate_grad,
        UP_GRAD=up_grad,
        OUTPUT=output,
        **options,
    )
    return grads


def torch_swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu` without autograd, in plain PyTorch."""
    return F.silu(gate).mul_(up)


def torch_swiglu_backward(
    grad_y: Tensor, gate: Tensor, up: Tensor, gate_grad: bool, up_grad: bool, output: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient of `gate`, gradient of `up`, silu(gate) · up), each only if it is wanted, else empty."""
    none = gate.new_empty(0)
    grad_gate = none
    if gate_grad:
        grad_gate = grad_y * up
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
    # The activation is computed again: keeping it would cost another [N, F] tensor a layer.
    activated = F.silu(gate) if up_grad or output else none
    grad_up = grad_y * activated if up_grad else none
    return grad_gate, grad_up, activated.mul_(up) if output else none


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, triton_kernels: bool) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.triton_kernels = triton_kernels
        return (swiglu_forward if triton_kernels else torch_swiglu_forward)(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        gate, up = ctx.saved_tensors
        needs_gate, needs_up = ctx.needs_input_grad[:2]
        backward = swiglu_backward if ctx.triton_kernels else torch_swiglu_backward
        grad_gate, grad_up, _ = backward(grads[0], gate, up, needs_gate, needs_up, False)
        return grad_gate if needs_gate else None, grad_up if needs_up else None, None


def swiglu(gate: Tensor, up: Tensor, *, backend: Backend | None = None) -> Tensor:
    """Return silu(gate) · up, keeping only the two inputs for the backward pass.

    Args:
        gate: [..., F], fp32, bf16 or fp16; with PyTorch any floating dtype.
        up: [..., F], same shape and dtype. The two may be halves of one [..., 2·F].
        backend: see `Backend`; None for the global choice.

    Returns:
        [..., F], same dtype.

    Raises:
        ValueError: if the two differ in shape.
    """
    if gate.shape != up.shape:
        raise ValueError(f"gate {list(gate.shape)} and up {list(up.shape)} have to have the same shape")
    return _SwiGLU.apply(gate, up, use_triton(backend, gate, up))  # type: ignore[return-value]


class SwiGLU(nn.Module):
    """`swiglu` as a module; it has no weights."""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return swiglu(gate, up)
