"""Cross-entropy of rows of logits, each row overwritten by its gradient: what stands between two matrix products.

For a token with logits z, target t and weight w, over the V tokens of the vocabulary, with label smoothing ε (Szegedy
et al. 2016, arXiv 1512.00567), z-loss λ (Chowdhery et al. 2022, 2204.02311), lse = ln Σ_j exp(z_j) and
p_j = exp(z_j − lse):

    loss = w·(lse − (1 − ε)·z_t − (ε/V)·Σ_j z_j + λ·lse²)
    d loss / d z_j = w·(p_j·(1 + 2λ·lse) − (1 − ε)·[j = t] − ε/V)

One program a row. The first pass keeps a running maximum and the sum of exponentials under it (online softmax: Milakov
& Gimelshein 2018, arXiv 1805.02867), at one exponential a logit because the maximum is reduced block by block. The
second pass finds the row in cache (96 kB at V = 49,152 in bf16) and writes the gradient over it. Memory traffic: one
read and one write of each logit, the least possible, at about 15 FLOPs; without gradients one read.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .backend import Backend, use_triton
from .launch import kernel_op, launch, next_power_of_2, tl, triton

_MOST_COLUMNS_A_BLOCK = 8192
"""16 logits a thread in 16 warps: two 16-byte loads in flight each, and no spills."""
_CACHED_LOGITS = 2**19
"""Logits in fp32 that a CPU's caches hold beside what else is read: 2 MB, as one core's second-level cache."""


@triton.jit
def _cross_entropy_rows(
    logits, targets, weights, losses, token_losses, lse, hits,
    logits_stride, columns, vocab_size, ignore_index, z_loss, label_smoothing,
    HAS_WEIGHTS: tl.constexpr, SMOOTHING: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # times a stride, it may pass 2^31
    logits += row * logits_stride
    block = tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    if target == ignore_index:  # the row may hold anything: it is not read
        tl.store(losses + row, 0.0)
        tl.store(token_losses + row, 0.0)
        tl.store(lse + row, 0.0)
        tl.store(hits + row, 0)
        if GRADIENT:
            for start in range(0, columns, BLOCK):
                column = start + block
                tl.store(logits + column, tl.zeros((BLOCK,), logits.dtype.element_ty), column < columns)
        return

    known = (target >= 0) & (target < vocab_size)  # else the loss is infinite, and nothing beside the row is read
    target_logit = tl.load(logits + target, known, other=float("-inf")).to(tl.float32)
    maximum = tl.full((), float("-inf"), tl.float32)
    exponentials = tl.zeros((BLOCK,), tl.float32)
    logit_sum = 0.0
    likeliest = 0  # where the block with the first of the highest logits starts
    for start in range(0, columns, BLOCK):
        column = start + block
        # Loads are masked by the row's length: by vocab_size, often an odd number, they would be of one logit each.
        z = tl.load(logits + column, column < columns, other=float("-inf"), eviction_policy="evict_last").to(tl.float32)
        real = column < vocab_size
        z = tl.where(real, z, float("-inf"))
        if SMOOTHING:
            logit_sum += tl.sum(tl.where(real, z, 0.0), 0)
        highest = tl.max(z, 0)
        likeliest = tl.where(highest > maximum, start, likeliest)
        higher = tl.maximum(maximum, highest)
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # a block of −inf alone must not give −inf − (−inf)
        exponentials = exponentials * tl.exp(maximum - shift) + tl.exp(z - shift)
        maximum = higher
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.sum(exponentials, 0)
    row_lse = shift + tl.log(total)
    token_loss = (shift - target_logit) + tl.log(total)  # nothing cancels where the target has the highest logit
    loss = token_loss
    if SMOOTHING:
        loss += label_smoothing * ((row_lse - logit_sum / vocab_size) - token_loss)
    loss += z_loss * row_lse * row_lse
    weight = 1.0
    if HAS_WEIGHTS:
        weight = tl.load(weights + row)
    tl.store(losses + row, weight * loss)
    tl.store(token_losses + row, token_loss)
    tl.store(lse + row, row_lse)
    column = tl.multiple_of(likeliest, BLOCK) + block
    z = tl.load(logits + column, column < columns, other=float("-inf")).to(tl.float32)
    before = tl.max(tl.where(column < target, z, float("-inf")), 0)
    hit = (target_logit == maximum) & (target < likeliest + BLOCK) & (before < maximum)
    tl.store(hits + row, hit.to(tl.int32))

    if GRADIENT:
        scale = weight * (1.0 + 2.0 * z_loss * row_lse) / total
        for start in range(0, columns, BLOCK):
            column = start + block
            inside = column < columns
            z = tl.load(logits + column, inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
            gradient = tl.exp(z - shift) * scale
            if SMOOTHING:
                gradient -= weight * label_smoothing / vocab_size
            gradient = tl.where(column == target, gradient - weight * (1.0 - label_smoothing), gradient)
            gradient = tl.where(column < vocab_size, gradient, 0.0)
            tl.store(logits + column, gradient.to(logits.dtype.element_ty), inside)


def _fake(
    logits: Tensor, targets: Tensor, token_weights: Tensor | None, ignore_index: int, vocab_size: int, z_loss: float,
    label_smoothing: float, gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    losses, token_losses, lse = (logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(3))
    return losses, token_losses, lse, logits.new_empty(logits.shape[0], dtype=torch.int32)


@kernel_op(fake=_fake, mutates_args=("logits",))
def cross_entropy_rows(
    logits: Tensor, targets: Tensor, token_weights: Tensor | None, ignore_index: int, vocab_size: int, z_loss: float,
    label_smoothing: float, gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    results = _fake(logits, targets, token_weights, ignore_index, vocab_size, z_loss, label_smoothing, gradient)
    rows, columns = logits.shape
    block = min(_MOST_COLUMNS_A_BLOCK, next_power_of_2(columns))
    launch(
        *(_cross_entropy_rows, (rows,)),
        *(logits, targets.contiguous(), targets if token_weights is None else token_weights.contiguous(), *results),
        *(logits.stride(0), columns, vocab_size, ignore_index, z_loss, label_smoothing),
        HAS_WEIGHTS=token_weights is not None,
        SMOOTHING=label_smoothing != 0.0,
        GRADIENT=gradient,
        BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
    )
    return results


def _torch_rows(
    logits: Tensor, targets: Tensor, token_weights: Tensor | None, ignore_index: int, vocab_size: int, z_loss: float,
    label_smoothing: float, gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    ignored = targets == ignore_index
    target = targets.masked_fill(ignored, 0)[:, None]
    if vocab_size < logits.shape[1]:
        logits[:, vocab_size:] = float("-inf")
    # One exponential a logit: lse comes from the highest logit and its probability, 1 / Σ exp(z − z_max).
    z = logits.float()
    highest = z.amax(-1, keepdim=True)
    target_logit = z.gather(1, target)
    hits = _first_of_the_highest(z, target, (target_logit == highest) & ~ignored[:, None])
    mean = z[:, :vocab_size].mean(-1) if label_smoothing else None
    p = torch.softmax(z, -1)
    log_total = -p.amax(-1).log()
    token_losses = (highest - target_logit).squeeze(1) + log_total
    lse = highest.squeeze(1) + log_total
    losses = token_losses.clone()
    if mean is not None:
        losses += label_smoothing * ((lse - mean) - token_losses)
    losses += z_loss * lse.square()
    if token_weights is not None:
        losses *= token_weights
    if gradient:
        if z_loss:
            p *= (1 + 2 * z_loss * lse)[:, None]
        if label_smoothing:
            p[:, :vocab_size] -= label_smoothing / vocab_size
        p.scatter_add_(1, target, p.new_full(target.shape, label_smoothing - 1))
        if token_weights is not None:
            p *= token_weights[:, None]
        logits.copy_(p)
        if logits.is_cuda:
            logits.masked_fill_(ignored[:, None], 0.0)
        else:  # the same, without a slow pass over all bf16 entries; a GPU would have to be waited for
            logits.index_fill_(0, ignored.nonzero().squeeze(1), 0.0)
    return (
        losses.masked_fill_(ignored, 0.0),
        token_losses.masked_fill_(ignored, 0.0),
        lse.masked_fill_(ignored, 0.0),
        hits,
    )


def _first_of_the_highest(z: Tensor, target: Tensor, among_highest: Tensor) -> Tensor:
    """[N] int32: 1 where the target, one of the highest logits, is the first of them. An argmax is the slowest pass."""
    if z.is_cuda:
        return (among_highest & (z.argmax(-1, keepdim=True) == target)).squeeze(1).int()
    hits = among_highest.squeeze(1).int()
    rows = hits.nonzero().squeeze(1)
    hits[rows] = (z[rows].argmax(-1) == target[rows, 0]).int()
    return hits


def _rows_at_once(logits: Tensor) -> int:
    """Rows whose fp32 copies stay in a CPU core's caches from one pass to the next; all of them on a GPU."""
    return max(1, len(logits) if logits.is_cuda else _CACHED_LOGITS // logits.shape[1])


def cross_entropy_rows_(
    logits: Tensor,
    targets: Tensor,
    *,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    gradient: bool = True,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses of rows of logits, which are overwritten by d Σ losses / d logits. Autograd does not see it.

    Args:
        logits: [N, V], fp32, bf16 or fp16, the entries of a row next to each other. Afterwards the gradient, 0 in the
            rows of ignored targets, whatever they held, and in columns from `vocab_size` on. Without `gradient`
            undefined.
        targets: [N] int64 in [0, vocab_size), or `ignore_index`. Any other value is the caller's error: Triton makes
            it an infinite loss, PyTorch an exception (on a GPU, a failed assertion of the device).
        token_weights: [N] fp32 factor of each loss and gradient; None for 1.
        ignore_index: target of rows that do not count.
        vocab_size: columns that are tokens; None for all.
        z_loss: λ of the module's formula.
        label_smoothing: ε of the module's formula, in [0, 1).
        gradient: whether it is wanted.
        backend: see `Backend`; None for the global choice.

    With the PyTorch backend, logits and probabilities exist in fp32 of a few rows at a time on a CPU, of all on a GPU.

    Returns:
        (losses, −ln p(target), lse, hits), each [N] and 0 where ignored: fp32 weighted losses with smoothing and
        z-loss; fp32 bare ones; fp32; int32, 1 where the target has the highest logit, the first of equals.

    Raises:
        ValueError: if the entries of a row are not next to each other.
    """
    options = (ignore_index, logits.shape[1] if vocab_size is None else vocab_size, z_loss, label_smoothing, gradient)
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError(f"logits have strides {logits.stride()}: the entries of a row must be next to each other")
    if use_triton(backend, logits):
        return cross_entropy_rows(logits, targets, token_weights, *options)
    size = _rows_at_once(logits)
    weights = itertools.repeat(None) if token_weights is None else token_weights.split(size)
    parts = [
        _torch_rows(*part, *options) for part in zip(logits.split(size), targets.split(size), weights, strict=False)
    ]
    losses, token_losses, lse, hits = (torch.cat(results) for results in zip(*parts, strict=True))
    return losses, token_losses, lse, hits
