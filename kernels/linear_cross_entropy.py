"""Cross-entropy of a linear layer's logits without holding the logits of more than one chunk of tokens.

The gradient is computed in the forward pass, while a chunk's logits exist: d loss / d logits =
softmax(logits) − onehot(target). Peak memory is one [chunk, V] fp32 block instead of [N, V].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class LinearCrossEntropyOutput(NamedTuple):
    """What `linear_cross_entropy` returns; only `loss_sum` carries a gradient."""

    loss_sum: Tensor
    """Scalar fp32: sum over counted tokens of −ln p(target), in nats."""
    token_losses: Tensor
    """[N] fp32: −ln p(target) of each token, 0 where it does not count."""
    correct: Tensor
    """Scalar int64: counted tokens whose target has the highest logit."""


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        ignore_index: int,
        vocab_size: int,
        chunk_tokens: int,
        grad_enabled: bool,
    ):
        # needs_input_grad says what requires a gradient, even under no_grad where none will be asked for.
        needs_hidden, needs_weight, needs_bias = (needed and grad_enabled for needed in ctx.needs_input_grad[:3])
        tokens, rows_of_weight = hidden.shape[0], weight.shape[0]
        token_losses = torch.empty(tokens, dtype=torch.float32, device=hidden.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # fp32, so that adding many chunks loses nothing when the weight itself is bf16.
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if needs_weight else None
        grad_bias = torch.zeros(rows_of_weight, dtype=torch.float32, device=weight.device) if needs_bias else None

        # Every chunk works in the same three blocks: on a CPU, mapping fresh ones takes a third more time.
        rows = min(chunk_tokens, tokens)
        logits_block = torch.empty(rows, rows_of_weight, dtype=hidden.dtype, device=hidden.device)
        fp32_block = torch.empty(rows, rows_of_weight, dtype=torch.float32, device=hidden.device)
        weight_block = torch.empty_like(weight) if needs_weight else None
        for start in range(0, tokens, chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            counted = targets[chunk] != ignore_index
            # Zeroed here, V/H times cheaper than in the logits: an ignored row may hold inf, and inf · 0 is NaN.
            x = hidden[chunk].masked_fill(~counted[:, None], 0.0)
            target = targets[chunk].masked_fill(~counted, 0)[:, None]
            if bias is None:
                logits = torch.mm(x, weight.T, out=logits_block[: len(x)])
            else:
                logits = torch.addmm(bias, x, weight.T, out=logits_block[: len(x)])
            logits[:, vocab_size:] = float("-inf")
            log_p = torch.log_softmax(logits, -1, dtype=torch.float32, out=fp32_block[: len(x)])
            token_losses[chunk] = torch.where(counted, -log_p.gather(1, target).squeeze(1), 0.0)
            correct += ((log_p.argmax(-1) == target.squeeze(1)) & counted).sum()
            if not (needs_hidden or needs_weight or needs_bias):
                continue
            grad_logits = log_p.exp_()
            grad_logits.scatter_add_(1, target, grad_logits.new_full(target.shape, -1.0))
            if grad_bias is not None:
                grad_bias += counted.float() @ grad_logits
            grad_logits = logits.copy_(grad_logits)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[chunk]).masked_fill_(~counted[:, None], 0.0)
            if grad_weight is not None:
                grad_weight += torch.mm(grad_logits.T, x, out=weight_block)

        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(token_losses, correct)
        return token_losses.sum(), token_losses, correct

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        grad_loss = grads[0]
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        if grad_hidden is not None:
            # In fp32: the upstream gradient rounded to bf16 would scale every row by the same error, up to 0.4%.
            grad_hidden = (grad_hidden * grad_loss.view(1, 1)).to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_loss).to(ctx.weight_dtype)
        if grad_bias is not None:
            grad_bias = (grad_bias * grad_loss).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
) -> LinearCrossEntropyOutput:
    """Sum of the cross-entropies of `hidden @ weight.T + bias` against `targets`.

    Args:
        hidden: [N, H], fp32, bf16 or fp16.
        weight: [V, H], same dtype: the LM head. Frozen, it costs no gradient product.
        targets: [N] int64 in [0, vocab_size), or `ignore_index` for tokens that do not count.
        bias: [V], same dtype, or None.
        vocab_size: rows of `weight` that are tokens; those behind are padding with probability 0. None for all.
        ignore_index: target value that contributes neither loss nor gradient.
        chunk_tokens: tokens whose logits exist at once; a chunk takes 4·chunk_tokens·V bytes in fp32. None takes 128
            on a CPU, where larger blocks fall out of the caches, and 4,096 elsewhere.

    Returns:
        `LinearCrossEntropyOutput`. Nothing is read back to the host. FLOPs: 2·N·V·H, and as many again
        for each of the two gradients that is needed.
    """
    if chunk_tokens is None:
        chunk_tokens = 128 if hidden.device.type == "cpu" else 4096
    tokens_in_vocabulary = weight.shape[0] if vocab_size is None else vocab_size
    result = _LinearCrossEntropy.apply(
        hidden, weight, bias, targets, ignore_index, tokens_in_vocabulary, chunk_tokens, torch.is_grad_enabled()
    )
    return LinearCrossEntropyOutput(*result)  # type: ignore[misc]
