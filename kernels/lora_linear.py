"""Frozen linear layers with low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685), alone or in groups.

y_i = x·W_iᵀ + bias_i + scale_i·(drop(x)·A_iᵀ)·B_iᵀ for layers that share their input, such as q, k and v, or gate and
up; x may be RMS-normalised on the way in. A token costs 2·I·ΣO FLOPs forward and as many again for the gradient of x,
all the base's, and 6·Σr_i·(I + O_i) of the adapters' own; a frozen W has no third product.

What plain autograd spends beyond that, and this does not:
- Memory. A frozen layer's input is kept for its adapter alone, once a group and before normalisation; the normalised
  and the dropped inputs are computed again. Beside x [N, I], backward keeps t = drop(x)·Aᵀ [N, Σr], and one number a
  row for the norm.
- Passes over activations. One product with all A of a group gives t, one product each their gradients. An update is
  added to y, and the parts of dX are added up, by the products themselves (beta = 1), never as separate sums.
Remaining: t costs a read of x, U = scale·dY·B one of dY, the gradients of A and B one more of either: each product is
bound by memory, at 2·r FLOPs a value. With the backend "triton" the updates take no reads and writes of y and dX
(see low_rank_gemm.py).

A base weight may be in FP8 with a scale for each output (see fp8_linear.py): then the shared input is quantised once
for the group, and one product gives the base's part of dX for all of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .backend import Backend, use_triton
from .dropout import apply_mask, dropout_seed
from .fp8_linear import Fp8Rows, fp8_input_gradient, fp8_linear, quantise_rows
from .launch import rows_of
from .low_rank_gemm import gemm, scaled_mm, triton_gemms
from .rms_norm import (
    norm_takes_triton,
    rms_norm_backward,
    rms_norm_forward,
    torch_rms_norm_backward,
    torch_rms_norm_forward,
)


class LoRAWeights(NamedTuple):
    """The tensors of one linear layer and of its adapter, if it has one."""

    weight: Tensor
    """[O, I]: the base's weight, frozen as a rule; float8_e4m3fn, and frozen, with `weight_scales`."""
    bias: Tensor | None = None
    """[O]."""
    A: Tensor | None = None
    """[r, I]; None for a layer without an adapter."""
    B: Tensor | None = None
    """[O, r]."""
    scale: float = 1.0
    """Of the update B·A."""
    weight_scales: Tensor | None = None
    """[O, 1] fp32: by them the rows of an FP8 weight are multiplied."""


class LoRAOptions(NamedTuple):
    scales: tuple[float, ...]
    norm_eps: float
    dropout: float
    triton_kernels: bool
    triton_gemms: bool


def _by_layer(values: Sequence) -> list[Sequence]:
    """What belongs to each layer: (weight, bias, A, B, scales of the weight)."""
    return [values[start : start + 5] for start in range(0, len(values), 5)]


def _columns_of(ranks: Sequence[int]) -> Iterator[slice]:
    """Of each layer in t and in U."""
    start = 0
    for rank in ranks:
        yield slice(start, start + rank)
        start += rank


def normalised_rows(x: Tensor, norm_weight: Tensor | None, options: LoRAOptions) -> tuple[Tensor, Tensor | None]:
    if norm_weight is None:
        return rows_of(x), None
    forward = rms_norm_forward if options.triton_kernels else torch_rms_norm_forward
    y, _, rstd = forward(x, None, norm_weight, options.norm_eps)
    return rows_of(y), rstd


def dropped_rows(x: Tensor, seed: Tensor | None, options: LoRAOptions) -> Tensor:
    return x if seed is None else apply_mask(x, seed, options.dropout, options.triton_kernels)


def joined(matrices: Sequence[Tensor | None]) -> Tensor:
    """All A of a group in one, [Σr, I]. A copy of r/O of the weights; kept, it would be one more of every adapter."""
    present = [matrix for matrix in matrices if matrix is not None]
    return present[0] if len(present) == 1 else torch.cat(present)


def backend_of(options: LoRAOptions) -> Backend:
    """The backend of quantisation."""
    return "triton" if options.triton_kernels else "torch"


def input_gradient(
    grads: Sequence[Tensor], weights: Sequence[Tensor], weight_scales: Sequence[Tensor | None], u: Tensor | None,
    A: Tensor | None, seed: Tensor | None, options: LoRAOptions,
) -> Tensor:  # fmt: skip
    """Σ dY_i·W_i + mask∘(U·A) of layers that share their input."""
    in_fp8 = [(grad, Fp8Rows(W, S)) for grad, W, S in zip(grads, weights, weight_scales, strict=True) if S is not None]
    grad_x = None
    if in_fp8:
        grad_x = fp8_input_gradient(*zip(*in_fp8, strict=True), backend=backend_of(options))
        if u is not None and A is not None:
            if seed is None:
                grad_x.addmm_(u, A)
            else:
                grad_x += apply_mask(u @ A, seed, options.dropout, options.triton_kernels)
    for grad, W, S in zip(grads, weights, weight_scales, strict=True):
        if S is None:
            first = grad_x is None
            grad_x = gemm(
                *(grad, W),
                t=u if first else None,
                b=A if first else None,
                addend=grad_x,
                seed=seed,
                dropout=options.dropout,
                triton_kernels=options.triton_gemms,
                triton_masks=options.triton_kernels,
            )
    assert grad_x is not None
    return grad_x


class _LoRALinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, norm_weight: Tensor | None, seed: Tensor | None, options: LoRAOptions, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Rows of every layer's output."""
        layers = _by_layer(tensors)
        ranks = [0 if A is None else A.shape[0] for _, _, A, _, _ in layers]
        rows, rstd = normalised_rows(x, norm_weight, options)
        t = None
        if any(ranks):
            t = dropped_rows(rows, seed, options) @ joined([A for _, _, A, _, _ in layers]).T
        in_fp8 = any(S is not None for *_, S in layers)
        coded = quantise_rows([rows], backend=backend_of(options)) if in_fp8 else None
        outputs = []
        for (W, bias, _, B, S), columns, scale in zip(layers, _columns_of(ranks), options.scales, strict=True):
            update = (None, None) if t is None or B is None else (t[:, columns], B.T)
            if coded is None or S is None:
                y = gemm(rows, W.T, *update, scale, bias=bias, triton_kernels=options.triton_gemms)
            else:
                y = fp8_linear(coded, Fp8Rows(W, S), rows.dtype, bias)
                y = y if t is None or B is None else y.addmm_(t[:, columns], B.T, alpha=scale)
            outputs.append(y)

        needs = _by_layer(ctx.needs_input_grad[4:])
        needs_x = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        needs_A, needs_B = any(need[2] for need in needs), any(need[3] for need in needs)
        reads_x = needs_A or any(need[0] for need in needs) or (needs_x and norm_weight is not None)
        ctx.save_for_backward(
            *(x if reads_x else None, rstd if reads_x else None, t if needs_B else None),
            *(norm_weight, seed),
            *(W if needs_x else None for W, _, _, _, _ in layers),
            *(S if needs_x else None for _, _, _, _, S in layers),
            *(A if needs_x else None for _, _, A, _, _ in layers),
            *(B if needs_x or needs_A else None for _, _, _, B, _ in layers),
        )
        ctx.ranks, ctx.options, ctx.shape = ranks, options, x.shape
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        options: LoRAOptions = ctx.options
        x, rstd, t, norm_weight, seed, *matrices = ctx.saved_tensors
        count = len(grads)
        weights, weight_scales, As, Bs = (matrices[first : first + count] for first in range(0, 4 * count, count))
        grads = tuple(rows_of(grad) for grad in grads)
        columns = list(_columns_of(ctx.ranks))
        needs = _by_layer(ctx.needs_input_grad[4:])
        needs_x, needs_norm = ctx.needs_input_grad[:2]
        needs_A, needs_W = any(need[2] for need in needs), any(need[0] for need in needs)
        results: list[list[Tensor | None]] = [[None] * 5 for _ in range(count)]

        u = None
        if any(ctx.ranks) and (needs_x or needs_norm or needs_A):
            u = grads[0].new_zeros(len(grads[0]), sum(ctx.ranks))
            for grad, B, part, scale in zip(grads, Bs, columns, options.scales, strict=True):
                if B is not None:
                    u[:, part].addmm_(grad, B, beta=0, alpha=scale)
        if needs_A or needs_W:
            rows, _ = normalised_rows(x, norm_weight, options)
            if u is not None and needs_A:
                grad_A = u.T @ dropped_rows(rows, seed, options)
                for result, need, part in zip(results, needs, columns, strict=True):
                    result[2] = grad_A[part] if need[2] else None
            for result, need, grad in zip(results, needs, grads, strict=True):
                result[0] = grad.T @ rows if need[0] else None
            del rows
        for result, need, grad, part, scale in zip(results, needs, grads, columns, options.scales, strict=True):
            result[1] = grad.sum(0) if need[1] else None
            result[3] = scaled_mm(grad.T, t[:, part], scale) if need[3] else None

        grad_x = grad_norm = None
        if needs_x or needs_norm:
            A = None if u is None else joined(As)
            grad_x = input_gradient(grads, weights, weight_scales, u, A, seed, options)
            grad_x = grad_x.view(ctx.shape)
            if norm_weight is not None:
                norm_backward = rms_norm_backward if options.triton_kernels else torch_rms_norm_backward
                grad_x, grad_norm = norm_backward(grad_x, None, x, norm_weight, rstd, needs_norm)
        flat = [gradient for result in results for gradient in result]
        return grad_x if needs_x else None, grad_norm if needs_norm else None, None, None, *flat


def checked_dropout(
    layers: Sequence[LoRAWeights], dropout: float, seed: Tensor | None, seeds: int = 1
) -> tuple[float, Tensor | None]:
    """The dropout and seed to go by: none where no layer has an adapter.

    Raises:
        ValueError: if a layer has A without B or the reverse, or if `dropout` is not in [0, 1) or lacks its `seeds`.
    """
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout {dropout} is not in [0, 1)")
    if dropout and (seed is None or seed.numel() != seeds):
        wanted = "a seed, as" if seeds == 1 else "two seeds, each as"
        raise ValueError(f"dropout needs {wanted} from dropout_seed")
    if any((layer.A is None) != (layer.B is None) for layer in layers):
        raise ValueError("an adapter needs both A and B")
    if not (dropout and any(layer.A is not None for layer in layers)):
        return 0.0, None
    return dropout, seed


def same_dtype(layers: Sequence[LoRAWeights]) -> list[Tensor | None]:
    """What of the layers has the dtype of their input: all but FP8 weights and their scales."""
    weights = [None if layer.weight_scales is not None else layer.weight for layer in layers]
    return [*weights, *(tensor for layer in layers for tensor in layer[1:4])]


def lora_linears(
    x: Tensor,
    layers: Sequence[LoRAWeights],
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, ...]:
    """Linear layers of the same input, each with or without an adapter.

    Args:
        x: [..., I], fp32, bf16 or fp16.
        layers: tensors in the dtype of `x`, but for weights in FP8. Whatever is frozen costs no gradient.
        norm_weight: [I] for layers that read `rms_norm(x, norm_weight, norm_eps)`; None for those that read x.
        norm_eps: see `rms_norm`.
        dropout: probability with which an entry of the adapters' input is zero, the others growing by 1 / (1 − p).
        seed: [1] int64 of the mask, which all adapters of the group share, as from `dropout_seed`.
        backend: see `Backend`; None for the global choice. `auto` takes Triton for norms and masks, but see
            `low_rank_gemm.AUTO_TAKES_TRITON` for the products.

    Returns:
        One [..., O_i] a layer, in the dtype of `x`.

    Raises:
        ValueError: if a layer has A without B or the reverse, if `dropout` is not in [0, 1), or lacks a seed.
    """
    dropout, seed = checked_dropout(layers, dropout, seed)
    tensors = [tensor for layer in layers for tensor in (*layer[:4], layer.weight_scales)]
    kernels = use_triton(backend, x) if norm_weight is None else norm_takes_triton(backend, x, norm_weight)
    scales = tuple(layer.scale for layer in layers)
    options = LoRAOptions(scales, norm_eps, dropout, kernels, triton_gemms(backend, x, *same_dtype(layers)))
    outputs: tuple[Tensor, ...] = _LoRALinears.apply(x, norm_weight, seed, options, *tensors)  # type: ignore[assignment]
    # Views are made here: one that an autograd Function returns must not be changed in place, as RoPE would.
    return outputs if x.dim() == 2 else tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)


def lora_linear(
    x: Tensor,
    layer: LoRAWeights,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """`lora_linears` of one layer: [..., O]."""
    options = {"norm_eps": norm_eps, "dropout": dropout, "seed": seed, "backend": backend}
    return lora_linears(x, [layer], norm_weight=norm_weight, **options)[0]


class LoRALinear(nn.Linear):
    """y = x·Wᵀ + scale·(dropout(x)·Aᵀ)·Bᵀ with W as in the layer it replaces, A [r, in] and B [out, r].

    scale is alpha/r, or alpha/√r with `rslora` (Kalajdzievski 2023, arXiv 2312.03732). B starts at zero, so the
    layer starts as the one it replaces. W keeps its name, `weight`; in FP8 it goes with `weight_scales`, and
    `fp8_bias` in place of the bias. Dropout follows `train()` and `eval()`, and draws its seed from torch's generator
    of the input's device.
    """

    def __init__(
        self,
        base: nn.Linear,
        r: int,
        alpha: float,
        generator: torch.Generator | None = None,
        *,
        dropout: float = 0.0,
        rslora: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.train(base.training)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        self.weight_scales: Tensor | None
        self.register_buffer("weight_scales", None, persistent=False)
        self.fp8_bias: Tensor | None
        self.register_buffer("fp8_bias", None, persistent=False)
        self.r, self.alpha, self.dropout, self.rslora = r, alpha, dropout, rslora
        self.scale = alpha / math.sqrt(r) if rslora else alpha / r
        like = {"dtype": base.weight.dtype, "device": base.weight.device}
        bound = 1.0 / math.sqrt(base.in_features)  # Kaiming uniform with a = √5, as in the paper's code
        values = torch.empty(r, base.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(values.to(**like))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, **like))

    def adapter_weights(self) -> LoRAWeights:
        """The layer's own tensors, for operations that take several layers at once."""
        bias = self.bias if self.fp8_bias is None else self.fp8_bias
        return LoRAWeights(self.weight, bias, self.lora_A, self.lora_B, self.scale, self.weight_scales)

    def forward(self, input: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        seed = dropout_seed(input.device) if dropout else None
        return lora_linear(input, self.adapter_weights(), dropout=dropout, seed=seed)

    def merged_weight(self) -> Tensor:
        """W + scale·B·A, computed in fp32 and rounded once to the dtype of W.

        Raises:
            ValueError: if W is in FP8: adapters are merged into what it was made from.
        """
        if self.weight_scales is not None:
            raise ValueError("the weight is in FP8: put back what it was made from before merging the adapter")
        delta = self.lora_B.detach().float() @ self.lora_A.detach().float()
        return (self.weight.detach().float() + self.scale * delta).to(self.weight.dtype)
