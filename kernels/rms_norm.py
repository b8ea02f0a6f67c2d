"""Root-mean-square layer normalisation (Zhang & Sennrich 2019, arXiv 1910.07467)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x_fp32 = x.float()
        rstd = torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, rstd)
        # Llama rounds the normalised activations to the input dtype before scaling them; doing the
        # same keeps bf16 logits equal to those of the checkpoints' own implementation.
        return weight * (x_fp32 * rstd).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        x, weight, rstd = ctx.saved_tensors
        grad_output = grads[0].float()
        normalised = x.float() * rstd
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_normalised = grad_output * weight.float()
            # d/dx of x·rstd(x): project out the component along the normalised vector.
            mean = (grad_normalised * normalised).mean(-1, keepdim=True)
            grad_x = (rstd * (grad_normalised - normalised * mean)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = (grad_output * normalised).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
        return grad_x, grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Scale every vector of `x` to unit root mean square, then multiply by `weight`.

    y = weight · x / sqrt(mean(x²) + eps), with statistics in fp32.

    Args:
        x: [..., H], fp32, bf16 or fp16.
        weight: [H], same dtype as `x`.
        eps: added to the mean square.

    Returns:
        [..., H] in the dtype of `x`. Backward keeps `x` and one fp32 number a row.
    """
    return _RMSNorm.apply(x, weight, eps)  # type: ignore[return-value]
