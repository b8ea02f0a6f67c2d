"""Cross-entropy of a linear layer's logits without holding the logits of more than one chunk of tokens.

With logits z = x·Wᵀ + b of a token and lse = ln Σ_j exp(z_j), over V tokens of the vocabulary:

    loss = lse − (1 − ε)·z_target − (ε/V)·Σ_j z_j + λ·lse²

ε is label smoothing (Szegedy et al. 2016, arXiv 1512.00567), λ the z-loss of PaLM (Chowdhery et al. 2022, 2204.02311).

The gradient is computed in the forward pass, while a chunk's logits exist, and multiplied by the upstream scalar in
backward. FLOPs a token: 2·V·H for the logits and 2·V·H for each gradient that is needed (2·R·H where R rows train), the
least possible. Computing the logits once more in backward, as Cut Cross-Entropy does (Wijmans et al. 2024, 2411.09009),
costs 2·V·H more and saves the block of logits. The three products are library GEMMs, and between them one kernel reads
and writes the block once (`cross_entropy_rows`): 4·V bytes a token in bf16, a few percent of the products' time.

Chunks are large, because small ones starve the GEMMs and because the weight's gradient, in fp32 so that adding chunks
loses nothing, is read and written once a chunk: 8·V·H bytes, which 4,096 tokens pay back. Beside the gradients, peak
memory is one [chunk, V] block in the model's dtype; PyTorch on a GPU takes two more in fp32, and on a CPU a few rows.
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .backend import Backend, use_triton
from .cross_entropy_rows import cross_entropy_rows_
from .launch import kernel_op
from .row_range import check_row_range

_GEMM_TILE = 128
"""Tokens in a tile of the GEMMs, of which chunks are multiples where they may be as long."""
_ADDED_ROWS = 1024
"""Rows of the weight's gradient that are computed and added at once where the GEMM does not add in fp32."""


class LinearCrossEntropyOutput(NamedTuple):
    """What `linear_cross_entropy` returns; only `loss_sum` carries a gradient."""

    loss_sum: Tensor
    """Scalar fp32: sum over counted tokens of their losses, in nats, with weights, smoothing and z-loss."""
    token_losses: Tensor
    """[N] fp32: −ln p(target) of each token, without any of these; 0 where it does not count."""
    lse: Tensor
    """[N] fp32: ln Σ_j exp(logit_j) of each token, 0 where it does not count."""
    correct: Tensor
    """Scalar int64: counted tokens whose target has the highest logit, the first of equals."""


@functools.cache
def _gemm_adds_in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `addmm` adds products of `dtype` to an fp32 matrix unrounded; tried out once, which waits for the GPU."""
    total = torch.full((64, 64), math.nan, device=device)  # beta = 0 has to ignore it
    a, b = torch.full_like(total, 2**-6, dtype=dtype), torch.full_like(total, 2**-12, dtype=dtype)
    try:
        torch.addmm(total, a.T, b, out_dtype=torch.float32, beta=0, out=total)
        torch.addmm(total.add_(1), a.T, b, out_dtype=torch.float32, out=total)
        works = bool((total == 1 + 2**-11).all())  # bf16 and fp16 would round this to 1
    except (RuntimeError, TypeError):
        works = False
    if not works:
        warnings.warn(
            f"torch {torch.__version__} cannot add {dtype} products to fp32 within its GEMM on {device}: the weight "
            "gradient of linear_cross_entropy is rounded once a chunk and takes more time and memory",
            stacklevel=2,
        )
    return works


class _WeightGradient:
    """Sum of gᵀ·x over chunks in fp32, [rows, H].

    The addition happens inside the GEMM where PyTorch offers that (CUDA; fp32 anywhere): each product stays in fp32 and
    takes no memory of its own. The first product overwrites, so nothing has to be zeroed.
    """

    def __init__(self, rows: int, like: Tensor) -> None:
        shape = (rows, like.shape[1])
        self.total = torch.empty(shape, dtype=torch.float32, device=like.device)
        self.in_gemm = like.dtype == torch.float32 or (like.is_cuda and _gemm_adds_in_fp32(like.device, like.dtype))
        self.empty = True

    def add(self, gradient: Tensor, x: Tensor) -> None:
        beta = 0 if self.empty else 1
        if not self.in_gemm:
            # In blocks of rows that stay in the caches: adding bf16 to fp32, PyTorch writes an fp32 copy of it first.
            for start in range(0, len(self.total), _ADDED_ROWS):
                part = self.total[start : start + _ADDED_ROWS]
                product = torch.mm(gradient[:, start : start + _ADDED_ROWS].T, x)
                (part.copy_ if self.empty else part.add_)(product)
        elif x.dtype == torch.float32:
            torch.addmm(self.total, gradient.T, x, beta=beta, out=self.total)
        else:
            torch.addmm(self.total, gradient.T, x, out_dtype=torch.float32, beta=beta, out=self.total)
        self.empty = False


_Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _fake_forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *options: Any) -> _Results:
    *_, rows, hidden_grad, bias_grad, _ = options
    tokens, size = hidden.shape

    def fp32(*shape: int) -> Tensor:
        return hidden.new_empty(shape, dtype=torch.float32)

    correct = hidden.new_empty((), dtype=torch.int64)
    grad_hidden = hidden.new_empty((tokens, size) if hidden_grad else 0)
    grad_weight = fp32(rows, size) if rows else fp32(0)
    return fp32(), fp32(tokens), fp32(tokens), correct, grad_hidden, grad_weight, fp32(len(weight) if bias_grad else 0)


def linear_cross_entropy_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, token_weights: Tensor | None,
    ignore_index: int, vocab_size: int, chunk_tokens: int, z_loss: float, label_smoothing: float, first_row: int,
    rows: int, hidden_grad: bool, bias_grad: bool, triton_kernels: bool,
) -> _Results:  # fmt: skip
    """Loss sum, token losses, lse, hits, and the gradients that are wanted: `rows` rows of the weight's in fp32."""
    tokens = hidden.shape[0]
    grad_hidden = hidden.new_empty(hidden.shape if hidden_grad else 0)
    grad_weight = _WeightGradient(rows, weight) if rows else None
    grad_bias = torch.zeros(len(weight) if bias_grad else 0, dtype=torch.float32, device=weight.device)
    # As even as the tiles allow: a short last chunk would read the whole weight for a few tokens.
    even = math.ceil(tokens / max(1, math.ceil(tokens / chunk_tokens)))
    chunk = max(1, min(chunk_tokens, math.ceil(even / _GEMM_TILE) * _GEMM_TILE, tokens))
    # Every chunk works in the same block: on a CPU, mapping fresh ones takes a third more time.
    logits_block = hidden.new_empty(chunk, len(weight))
    found = []
    for start in range(0, max(1, tokens), chunk):
        part = slice(start, start + chunk)
        x = hidden[part]
        block = logits_block[: len(x)]
        logits = torch.mm(x, weight.T, out=block) if bias is None else torch.addmm(bias, x, weight.T, out=block)
        found.append(
            cross_entropy_rows_(
                logits,
                targets[part],
                token_weights=None if token_weights is None else token_weights[part],
                ignore_index=ignore_index,
                vocab_size=vocab_size,
                z_loss=z_loss,
                label_smoothing=label_smoothing,
                gradient=hidden_grad or bias_grad or rows > 0,
                backend="triton" if triton_kernels else "torch",
            )
        )
        gradient = logits
        if hidden_grad:
            torch.mm(gradient, weight, out=grad_hidden[part])
        if grad_weight is not None:
            # The gradient of an ignored token is 0, but its hidden state may hold inf, and inf · 0 is NaN.
            x = x.masked_fill((targets[part] == ignore_index)[:, None], 0.0)
            grad_weight.add(gradient[:, first_row : first_row + rows], x)
        if bias_grad:
            grad_bias += gradient.sum(0, dtype=torch.float32)
    losses, token_losses, lse, hits = (torch.cat(parts) for parts in zip(*found, strict=True))
    grad_rows = hidden.new_empty(0, dtype=torch.float32) if grad_weight is None else grad_weight.total
    return losses.sum(), token_losses, lse, hits.sum(), grad_hidden, grad_rows, grad_bias


_operator = kernel_op(fake=_fake_forward)(linear_cross_entropy_forward)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        trained_rows: Tensor | None,
        weight_grad: Tensor | None,
        targets: Tensor,
        token_weights: Tensor | None,
        *options: Any,
    ):
        # Eagerly, the function itself: so profilers, FLOP counters and dispatch modes see its products.
        run = _operator if torch.compiler.is_compiling() else linear_cross_entropy_forward
        results = run(hidden, weight, bias, targets, token_weights, *options)
        loss_sum, token_losses, lse, correct, grad_hidden, grad_weight, grad_bias = results
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.weight_dtype = weight.dtype
        # Not saved: other micro-batches add to the buffer before this one's backward, as they may.
        ctx.weight_grad = weight_grad
        ctx.mark_non_differentiable(token_losses, lse, correct)
        return loss_sum, token_losses, lse, correct

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        upstream = grads[0].view(1)
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        hidden, weight, bias, trained_rows = ctx.needs_input_grad[:4]
        grad_hidden = _scaled(grad_hidden, upstream, grad_hidden.dtype) if hidden else None
        grad_bias = _scaled(grad_bias, upstream, ctx.weight_dtype) if bias else None
        if not (weight or trained_rows):
            grad_weight = None
        elif ctx.weight_grad is not None:
            ctx.weight_grad.addcmul_(grad_weight, upstream)
            grad_weight = None
        else:
            grad_weight = _scaled(grad_weight, upstream, ctx.weight_dtype)
        grad_weight, grad_rows = (None, grad_weight) if trained_rows else (grad_weight, None)
        return grad_hidden, grad_weight, grad_bias, grad_rows, *([None] * (len(ctx.needs_input_grad) - 4))


def _scaled(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient · upstream, multiplied in fp32 and rounded once, without an fp32 copy on a GPU.

    The upstream scalar rounded to bf16 would scale every entry by the same error, up to 0.4%.
    """
    return torch.mul(gradient, upstream, out=torch.empty_like(gradient, dtype=dtype))


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, token_weights: Tensor | None) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {list(hidden.shape)} and weight {list(weight.shape)} are not [N, H] and [V, H]")
    if hidden.dtype != weight.dtype or (bias is not None and bias.dtype != weight.dtype):
        raise ValueError(f"hidden states, weight and bias differ in dtype: {hidden.dtype} and {weight.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {list(bias.shape)} is not [V] for a weight {list(weight.shape)}")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets {list(targets.shape)} {targets.dtype} are not [N] int64, N = {hidden.shape[0]}")
    if token_weights is not None:
        if token_weights.shape != targets.shape or token_weights.dtype != torch.float32:
            kind = f"{list(token_weights.shape)} {token_weights.dtype}"
            raise ValueError(f"token_weights {kind} are not [N] fp32, N = {hidden.shape[0]}")
        if token_weights.requires_grad:
            raise ValueError("token_weights get no gradient: detach them")


def _check_trained(weight: Tensor, trained_rows: Tensor | None, first_row: int, weight_grad: Tensor | None) -> Tensor:
    """The tensor that the weight's gradient goes to."""
    if trained_rows is not None:
        check_row_range(weight, trained_rows, first_row)
    elif first_row:
        raise ValueError(f"first_row = {first_row} says where trained_rows begin, which are missing")
    trained = weight if trained_rows is None else trained_rows
    if weight_grad is not None:
        if weight_grad.shape != trained.shape or weight_grad.dtype != torch.float32 or weight_grad.requires_grad:
            raise ValueError(
                f"weight_grad {list(weight_grad.shape)} {weight_grad.dtype} is not an fp32 buffer of "
                f"{list(trained.shape)} that needs no gradient"
            )
        if torch.is_grad_enabled() and not trained.requires_grad:
            raise ValueError("weight_grad is given for a weight that needs no gradient")
    return trained


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    token_weights: Tensor | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    trained_rows: Tensor | None = None,
    first_row: int = 0,
    weight_grad: Tensor | None = None,
    chunk_tokens: int | None = None,
    backend: Backend | None = None,
) -> LinearCrossEntropyOutput:
    """Sum of the cross-entropies of `hidden @ weight.T + bias` against `targets`.

    Args:
        hidden: [N, H], fp32, bf16 or fp16.
        weight: [V, H], same dtype: the LM head. Frozen, it costs no gradient product.
        targets: [N] int64 in [0, vocab_size), or `ignore_index` for tokens that do not count: what their hidden
            states hold, even inf or NaN, reaches nothing. Other values are the caller's error (`cross_entropy_rows_`).
        bias: [V], same dtype, or None.
        vocab_size: rows of `weight` that are tokens; those behind are padding with probability 0. None for all.
        ignore_index: target value that contributes neither loss nor gradient.
        token_weights: [N] fp32 factors of the tokens in `loss_sum`; None for 1. They get no gradient.
        z_loss: λ, adds λ·lse² to the loss of each counted token.
        label_smoothing: ε in [0, 1), moves that share of the target's probability evenly onto the vocabulary.
        trained_rows: [R, H]: the parameter, of `row_range`, that gets the gradient of rows `first_row` to
            `first_row` + R − 1 of `weight`, for 2·N·R·H FLOPs; `weight` must not require a gradient itself. The product
            is fastest where `first_row` is a multiple of 8. None if the whole weight trains, or nothing of it.
        first_row: see `trained_rows`.
        weight_grad: fp32 buffer in the shape of `weight`, or of `trained_rows` where given. Backward adds the gradient
            to it in place of `.grad`, which stays as it is (and whose hooks do not run), so that micro-batches, too,
            are added in fp32.
        chunk_tokens: most tokens whose logits exist at once: 2·chunk_tokens·V bytes in bf16, and with PyTorch on a GPU
            8 more each. None takes 1,024 on a CPU and 4,096 elsewhere.
        backend: see `Backend`; None for the global choice.

    Returns:
        `LinearCrossEntropyOutput`. The same inputs give the same bits. Nothing is read back to the host, but for one
        trial of the GEMM at the first bf16 or fp16 weight gradient on a GPU.

    Raises:
        ValueError: for shapes, dtypes and options that do not fit, a weight that requires a gradient beside
            `trained_rows`, and trained rows that are a copy of the weight's.
    """
    _check(hidden, weight, targets, bias, token_weights)
    trained = _check_trained(weight, trained_rows, first_row, weight_grad)
    vocab_size = len(weight) if vocab_size is None else vocab_size
    if chunk_tokens is None:
        chunk_tokens = 1024 if hidden.device.type == "cpu" else 4096
    if not 1 <= vocab_size <= len(weight):
        raise ValueError(f"vocab_size {vocab_size} is not between 1 and the {len(weight)} rows of the weight")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be positive, not {chunk_tokens}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing {label_smoothing} is not in [0, 1)")
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss {z_loss} is neither 0 nor a positive number")
    grad = torch.is_grad_enabled()
    result = _LinearCrossEntropy.apply(
        *(hidden, weight, bias, trained_rows, weight_grad, targets, token_weights),
        *(ignore_index, vocab_size, chunk_tokens, float(z_loss), float(label_smoothing)),
        *(first_row, len(trained) if grad and trained.requires_grad else 0),
        *(grad and hidden.requires_grad, grad and bias is not None and bias.requires_grad),
        use_triton(backend, hidden, weight, bias),
    )
    return LinearCrossEntropyOutput(*result)  # type: ignore[misc]


class LinearCrossEntropy(nn.Module):
    """`linear_cross_entropy` with its options; the weight belongs to the model.

    Args:
        vocab_size, ignore_index, z_loss, label_smoothing, chunk_tokens, backend: see there.
    """

    def __init__(
        self,
        *,
        vocab_size: int | None = None,
        ignore_index: int = -100,
        z_loss: float = 0.0,
        label_smoothing: float = 0.0,
        chunk_tokens: int | None = None,
        backend: Backend | None = None,
    ) -> None:
        super().__init__()
        self.options = {
            "vocab_size": vocab_size,
            "ignore_index": ignore_index,
            "z_loss": z_loss,
            "label_smoothing": label_smoothing,
            "chunk_tokens": chunk_tokens,
            "backend": backend,
        }

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        *,
        bias: Tensor | None = None,
        token_weights: Tensor | None = None,
        trained_rows: Tensor | None = None,
        first_row: int = 0,
        weight_grad: Tensor | None = None,
    ) -> LinearCrossEntropyOutput:
        """See `linear_cross_entropy`."""
        return linear_cross_entropy(
            hidden,
            weight,
            targets,
            bias=bias,
            token_weights=token_weights,
            trained_rows=trained_rows,
            first_row=first_row,
            weight_grad=weight_grad,
            **self.options,
        )
