"""The gated MLP of Llama (Shazeer 2020, arXiv 2002.05202) with low-rank adapters (LoRA, Hu et al. 2021, arXiv
2106.09685), and with the normalisation in front of it: one operation that keeps little.

y = down(silu(gate(x)) · up(x)), x = rms_norm(h), where each of the three layers is W·x + scale·B·(A·drop(x)). A token
costs 6·H·F FLOPs forward and 6·H·F for the gradient of x, which are the base's, and an adapter 2·r·(I + O) forward and
twice that backward; a base weight that trains costs 2·H·F more.

Kept for backward: h [N, H] and one number a row, gate and up without their adapters' updates [N, F] each, and the
products with A [N, r]. In bf16 with H = 4,096 and F = 14,336 these are 65.5 kB a token, of which h is the residual
stream's own; plain autograd keeps the normalised h, and gate, silu(gate), up and their product, 4·F values, and with
dropout the masked inputs besides. The normalised h is computed again from 4·H bytes a token; the activation is, without
a pass of its own, in the kernel that needs gate and up anyway.

The large products are the library's. Updates of gate, up and d_act, and the gradients of the wide adapter halves there,
take no pass of their own: see swiglu_low_rank.py. The update of y, and the parts of dX, are added up by the products
themselves (beta = 1).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backend import Backend, use_triton
from .fp8_linear import Fp8Rows, fp8_linear, quantise_rows
from .launch import rows_of
from .lora_linear import (
    LoRAOptions,
    LoRAWeights,
    backend_of,
    checked_dropout,
    dropped_rows,
    input_gradient,
    joined,
    normalised_rows,
    same_dtype,
)
from .low_rank_gemm import scaled_mm
from .rms_norm import norm_takes_triton, rms_norm_backward, torch_rms_norm_backward
from .swiglu_low_rank import Update, low_rank_swiglu, low_rank_swiglu_backward


def _updates(
    t: Tensor | None, B_gate: Tensor | None, B_up: Tensor | None, options: LoRAOptions
) -> tuple[Update, Update]:
    """What is added to gate and to up; t has the columns of gate's adapter before those of up's."""
    if t is None:
        return Update(), Update()
    rank = 0 if B_gate is None else B_gate.shape[1]
    gate = Update() if B_gate is None else Update(t[:, :rank], B_gate, options.scales[0])
    return gate, Update() if B_up is None else Update(t[:, rank:], B_up, options.scales[1])


def _seeds(seed: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Of the masks of x and of the activation."""
    return (None, None) if seed is None else (seed[:1], seed[1:])


def _base_products(
    x: Tensor,
    weights: Sequence[Tensor],
    weight_scales: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    options: LoRAOptions,
) -> list[Tensor]:
    """x·Wᵀ of each weight; those in FP8 may have a bias."""
    in_fp8 = any(S is not None for S in weight_scales)
    coded = quantise_rows([x], backend=backend_of(options)) if in_fp8 else None
    return [
        x @ W.T if coded is None or S is None else fp8_linear(coded, Fp8Rows(W, S), x.dtype, bias)
        for W, S, bias in zip(weights, weight_scales, biases, strict=True)
    ]


class _LoRAMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, h: Tensor, norm_weight: Tensor | None, seed: Tensor | None, options: LoRAOptions,
        W_gate: Tensor, A_gate: Tensor | None, B_gate: Tensor | None,
        W_up: Tensor, A_up: Tensor | None, B_up: Tensor | None,
        W_down: Tensor, A_down: Tensor | None, B_down: Tensor | None,
        S_gate: Tensor | None, S_up: Tensor | None, S_down: Tensor | None,
        bias_gate: Tensor | None, bias_up: Tensor | None, bias_down: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Rows of the output."""
        x, rstd = normalised_rows(h, norm_weight, options)
        seed_x, seed_act = _seeds(seed)
        t = t_down = None
        if A_gate is not None or A_up is not None:
            t = dropped_rows(x, seed_x, options) @ joined([A_gate, A_up]).T
        gate_base, up_base = _base_products(x, (W_gate, W_up), (S_gate, S_up), (bias_gate, bias_up), options)
        del x
        act, dropped = low_rank_swiglu(
            *(gate_base, up_base, *_updates(t, B_gate, B_up, options)),
            *(None if A_down is None else seed_act, options.dropout, options.triton_kernels),
        )
        (y,) = _base_products(act, (W_down,), (S_down,), (bias_down,), options)
        if A_down is not None and B_down is not None:
            t_down = dropped @ A_down.T
            y.addmm_(t_down, B_down.T, alpha=options.scales[2])
        ctx.save_for_backward(
            *(h, rstd, gate_base, up_base, t, t_down if ctx.needs_input_grad[12] else None, norm_weight, seed),
            *(W_gate, A_gate, B_gate, W_up, A_up, B_up, W_down, A_down, B_down, S_gate, S_up, S_down),
        )
        ctx.options = options
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        options: LoRAOptions = ctx.options
        h, rstd, gate_base, up_base, t, t_down, norm_weight, seed, *matrices = ctx.saved_tensors
        W_gate, A_gate, B_gate, W_up, A_up, B_up, W_down, A_down, B_down, S_gate, S_up, S_down = matrices
        needs_h, needs_norm, _, _, *needs = ctx.needs_input_grad
        needs_W_gate, needs_A_gate, needs_B_gate, needs_W_up, needs_A_up, needs_B_up, *needs_down = needs
        seed_x, seed_act = _seeds(seed)
        grad_y = rows_of(grads[0])

        u_down = None if B_down is None else scaled_mm(grad_y, B_down, options.scales[2])
        dB_down = scaled_mm(grad_y.T, t_down, options.scales[2]) if needs_down[2] else None
        d_gate, d_up, act, (dB_gate, dB_up, dA_down) = low_rank_swiglu_backward(
            input_gradient([grad_y], [W_down], [S_down], None, None, None, options),
            *(gate_base, up_base, *_updates(t, B_gate, B_up, options), u_down, A_down),
            *(None if A_down is None else seed_act, options.dropout),
            wide_grads=(needs_B_gate, needs_B_up, needs_down[1]),
            output=needs_down[0],
            triton_kernels=options.triton_kernels,
        )
        dW_down = None if act is None else grad_y.T @ act
        del act

        u, rank = None, 0 if B_gate is None else B_gate.shape[1]
        if t is not None and (needs_h or needs_norm or needs_A_gate or needs_A_up):
            u = torch.empty_like(t)
            if B_gate is not None:
                u[:, :rank].addmm_(d_gate, B_gate, beta=0, alpha=options.scales[0])
            if B_up is not None:
                u[:, rank:].addmm_(d_up, B_up, beta=0, alpha=options.scales[1])
        dW_gate = dA_gate = dW_up = dA_up = None
        if needs_W_gate or needs_A_gate or needs_W_up or needs_A_up:
            x, _ = normalised_rows(h, norm_weight, options)
            dW_gate = d_gate.T @ x if needs_W_gate else None
            dW_up = d_up.T @ x if needs_W_up else None
            if u is not None and (needs_A_gate or needs_A_up):
                dA = u.T @ dropped_rows(x, seed_x, options)
                dA_gate, dA_up = dA[:rank] if needs_A_gate else None, dA[rank:] if needs_A_up else None
            del x
        grad_h = grad_norm = None
        if needs_h or needs_norm:
            A = None if u is None else joined([A_gate, A_up])
            grad_x = input_gradient([d_gate, d_up], [W_gate, W_up], [S_gate, S_up], u, A, seed_x, options).view(h.shape)
            grad_h = grad_x
            if norm_weight is not None:
                norm_backward = rms_norm_backward if options.triton_kernels else torch_rms_norm_backward
                grad_h, grad_norm = norm_backward(grad_x, None, h, norm_weight, rstd, needs_norm)
        return (
            *(grad_h if needs_h else None, grad_norm if needs_norm else None, None, None),
            *(dW_gate, dA_gate, dB_gate, dW_up, dA_up, dB_up, dW_down, dA_down, dB_down),
            *(None for _ in range(6)),
        )


def lora_mlp(
    h: Tensor,
    gate: LoRAWeights,
    up: LoRAWeights,
    down: LoRAWeights,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """down(silu(gate(x)) · up(x)) with x = rms_norm(h), each layer with or without an adapter.

    Args:
        h: [..., H], fp32, bf16 or fp16.
        gate: weight [F, H], A [r, H] and B [F, r], in the dtype of `h` like all others, but for weights in FP8.
            Whatever is frozen costs no gradient; a base weight that is not gets its own.
        up: the same shapes; r may differ.
        down: weight [H, F], A [r, F] and B [H, r].
        norm_weight: [H]; None for an MLP that reads h as it is.
        norm_eps: see `rms_norm`.
        dropout: probability with which an entry of the adapters' inputs is zero, the others growing by 1 / (1 − p).
        seed: [2] int64, of the mask of x, which gate and up share, and of that of the activation: as from
            `dropout_seed(device, 2)`.
        backend: see `Backend`; None for the global choice. Either way the large products are the library's.

    Returns:
        [..., H] in the dtype of `h`.

    Raises:
        ValueError: if a layer that is not in FP8 has a bias, which no Llama has here, or A without B or the reverse; if
            `dropout` is not in [0, 1), or lacks a seed of two numbers.
    """
    layers = (gate, up, down)
    if any(layer.bias is not None and layer.weight_scales is None for layer in layers):
        raise ValueError("biases are not supported: use lora_linear and swiglu for an MLP that has them")
    dropout, seed = checked_dropout(layers, dropout, seed, seeds=2)
    tensors = [tensor for layer in layers for tensor in (layer.weight, layer.A, layer.B)]
    of_fp8 = [*(layer.weight_scales for layer in layers), *(layer.bias for layer in layers)]
    kernels = use_triton(backend, h, *same_dtype(layers)) and (
        norm_weight is None or norm_takes_triton(backend, h, norm_weight)
    )
    options = LoRAOptions(tuple(layer.scale for layer in layers), norm_eps, dropout, kernels, triton_gemms=False)
    y: Tensor = _LoRAMLP.apply(h, norm_weight, seed, options, *tensors, *of_fp8)  # type: ignore[assignment]
    # Viewed out here: what an autograd Function returns as a view must not be changed in place.
    return y if h.dim() == 2 else y.view(h.shape)
