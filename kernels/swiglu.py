"""SwiGLU activation (Shazeer 2020, arXiv 2002.05202)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, *grads: Tensor):
        gate, up = ctx.saved_tensors
        (grad_output,) = grads
        # The activation is recomputed: keeping it would cost another [N, F] tensor a layer.
        activated = F.silu(gate)
        grad_up = grad_output * activated
        grad_gate = torch.ops.aten.silu_backward(grad_output * up, gate)
        return grad_gate, grad_up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) · up, keeping only the two inputs for the backward pass.

    Args:
        gate: [..., F], any floating dtype.
        up: [..., F], same shape and dtype.

    Returns:
        [..., F], same dtype.
    """
    return _SwiGLU.apply(gate, up)  # type: ignore[return-value]
