"""New rows that look at hidden states: input rows by distillation, head rows with a unigram prior.

Both need the base model itself, in memory; everything else about new rows reads two matrices of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .attention import PackedDocuments
from .checkpoint import EMBEDDING, LM_HEAD, LM_HEAD_BIAS
from .errors import CheckpointError
from .llama import Llama


def extend_in_memory(model: Llama, rows: Mapping[str, Tensor], first_new_row: int | None = None) -> None:
    """Give a loaded model the rows that `write_extended` would write, in place."""
    first = model.config.vocab_size if first_new_row is None else first_new_row
    model.train_rows(None, None)

    def extended(old: Tensor, new: Tensor) -> nn.Parameter:
        tensor = torch.cat((old[:first], new.to(old), old[first + len(new) :]))
        return nn.Parameter(tensor, requires_grad=False)

    model.model.embed_tokens.weight = extended(model.model.embed_tokens.weight, rows[EMBEDDING])
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    else:
        model.lm_head.weight = extended(model.lm_head.weight, rows[LM_HEAD])
    if model.lm_head.bias is not None:
        model.lm_head.bias = extended(model.lm_head.bias, rows[LM_HEAD_BIAS])
    model.lm_head.out_features = len(model.lm_head.weight)
    size = len(model.model.embed_tokens.weight)
    model.config = model.model.config = replace(model.config, vocab_size=size)


def spelled_out(ids: Tensor, first_new_row: int, decompositions: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """The base ids that spell hybrid ids [T], and where in them the spelling of each ends, [T]."""
    spelled = [[i] if i < first_new_row else list(decompositions[i - first_new_row]) for i in ids.tolist()]
    lengths = torch.tensor([len(part) for part in spelled], dtype=torch.int64)
    return torch.tensor([i for part in spelled for i in part], dtype=torch.int64), lengths.cumsum(0) - 1


def fit_input_rows(
    model: Llama,
    decompositions: Sequence[Sequence[int]],
    documents: Sequence[Tensor],
    *,
    first_new_row: int,
    steps: int = 100,
    batch_size: int = 8,
    lr: float = 0.02,
    seed: int = 0,
) -> Tensor:
    """Fit new input rows so that a text's hidden states become those of the base for the same text spelled out.

    In the manner of Token Distillation (Dobler et al., arXiv 2505.20133): mean squared error of the final hidden states
    where a token ends, relative to the base's mean square, by Adam on the new rows alone.

    Args:
        model: extended in memory with the rows to begin with. Left with the fitted rows in its embedding.
        decompositions: base ids that spell each new piece.
        documents: hybrid ids of texts, [T] int64 each; cut where the spelled-out text reaches the context's length.
        first_new_row: id of the first new piece.
        steps, batch_size: documents in a step.
        lr: step size, in standard deviations of the embedding's entries; decays linearly to zero.
        seed: of the order of documents.

    Returns:
        [N, H] in the embedding's dtype, on the CPU.

    Raises:
        CheckpointError: if no document has two tokens.
    """
    device = model.model.embed_tokens.weight.device
    window = model.config.context_length
    cut = [_cut(ids, first_new_row, decompositions, window) for ids in documents]
    cut = [(ids, spelled, ends) for ids, spelled, ends in cut if len(ids) > 1]
    if not cut:
        raise CheckpointError("distillation needs texts of two tokens or more")
    trained = model.train_rows(first_new_row, None)[f"{EMBEDDING}[{first_new_row}:]"]
    count = len(decompositions)
    master = trained.detach().float().clone().requires_grad_()
    scale = float(model.model.embed_tokens.weight.detach()[:first_new_row].float().std())
    optimizer = torch.optim.Adam([master], lr=lr * scale, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        picked = [cut[int(i)] for i in torch.randint(len(cut), (batch_size,), generator=generator)]
        offsets = torch.tensor([0, *(len(spelled) for _, spelled, _ in picked)]).cumsum(0)
        ends = torch.cat([end + offset for (_, _, end), offset in zip(picked, offsets[:-1], strict=True)])
        with torch.no_grad():
            teacher = _hidden(model, [spelled for _, spelled, _ in picked])[ends.to(device)]
        student = _hidden(model, [ids for ids, _, _ in picked])
        loss = (student - teacher).float().square().mean() / teacher.float().square().mean()
        loss.backward()
        assert trained.grad is not None
        master.grad = trained.grad.float()
        master.grad[count:] = 0  # padding rows of the base stay
        for group in optimizer.param_groups:
            group["lr"] = lr * scale * (1 - step / steps)
        optimizer.step()
        with torch.no_grad():
            trained.copy_(master)
        trained.grad = None
    model.train_rows(None, None)
    return model.model.embed_tokens.weight.detach()[first_new_row : first_new_row + count].cpu().clone()


def _cut(
    ids: Tensor, first_new_row: int, decompositions: Sequence[Sequence[int]], window: int
) -> tuple[Tensor, Tensor, Tensor]:
    spelled, ends = spelled_out(ids[:window], first_new_row, decompositions)
    kept = int((ends < window).sum())
    return ids[:kept], spelled[: int(ends[kept - 1]) + 1 if kept else 0], ends[:kept]


def _hidden(model: Llama, texts: Sequence[Tensor]) -> Tensor:
    device = model.model.embed_tokens.weight.device
    documents = PackedDocuments.from_lengths([len(ids) for ids in texts], device)
    return model.hidden_states(torch.cat(list(texts)).to(device), documents)


@dataclass(frozen=True)
class HiddenStatistics:
    """Moments over texts of final hidden states h, each with ln Σ exp(logit) over the base's tokens behind it."""

    mean: Tensor
    """[H + 1] fp64, on the CPU."""
    second: Tensor
    """[H + 1, H + 1] fp64: mean of the outer products."""


@torch.inference_mode()
def hidden_statistics(model: Llama, documents: Iterable[Tensor], first_new_row: int) -> HiddenStatistics:
    """Moments of the final hidden states of `documents`, hybrid ids [T] int64 each.

    Raises:
        CheckpointError: if there is no token.
    """
    size = model.config.hidden_size + 1
    total, outer, count = torch.zeros(size).double(), torch.zeros(size, size).double(), 0
    for ids in documents:
        for part in ids.split(model.config.context_length):
            hidden = _hidden(model, [part])
            log_mass = model.logits(hidden)[:, :first_new_row].float().logsumexp(-1)
            wide = torch.cat((hidden.double(), log_mass[:, None].double()), 1).cpu()
            total += wide.sum(0)
            outer += wide.T @ wide
            count += len(part)
    if count == 0:
        raise CheckpointError("a unigram prior needs text to take hidden states from")
    return HiddenStatistics(total / count, outer / count)


def add_unigram_prior(
    head_rows: Tensor,
    frequencies: Tensor,
    target: HiddenStatistics,
    other: HiddenStatistics | None = None,
    *,
    other_mass: float = 1e-3,
    ridge: float = 1e-3,
) -> Tensor:
    """Shift head rows so that each new token's mean probability on the target text is about its frequency there.

    A head without bias can only express a token's frequency along directions that hidden states share. With f the
    frequencies and d = logit − ln Σ exp(old logits), a shift is wanted for which mean d + ½ var d, the logarithm of a
    log-normal variable's mean, is ln f − ln(1 − Σ f) on the target text, and on the other text the same with
    frequencies that sum to `other_mass`. Of the shifts that move mean logits by a given amount it is the smallest in
    mean squared logit: with mean states as columns of M and C = E[h hᵀ], a combination of C⁻¹ M (Mᵀ C⁻¹ M)⁻¹.

    Args:
        head_rows: [N, H] rows of the new tokens.
        frequencies: [N] share of the target text's tokens; positive, with a sum below 1.
        target: statistics of text in the new language.
        other: of text in the base's language, whose probabilities should stay; None to leave it out.
        other_mass: what all new tokens together may take there.
        ridge: of C, relative to its mean diagonal.

    Returns:
        [N, H] fp32.
    """
    spaces = [target] if other is None else [target, other]
    means = torch.stack([space.mean[:-1] for space in spaces], 1)
    second = torch.stack([space.second[:-1, :-1] for space in spaces]).mean(0)
    second = second + ridge * second.diagonal().mean() * torch.eye(len(second), dtype=second.dtype)
    shift = torch.linalg.solve(second, means)
    shift = shift @ torch.linalg.inv(means.T @ shift)  # [H, 1 or 2]: M^T shift is the identity
    total = float(frequencies.sum())
    shares = frequencies.double()[:, None] / total
    masses = torch.tensor([total, other_mass][: len(spaces)], dtype=torch.float64)
    wanted = (shares * masses).log() - torch.log1p(-masses)
    return (head_rows.double() + _solve_shift(head_rows.double(), shift, spaces, wanted) @ shift.T).float()


def _solve_shift(rows: Tensor, shift: Tensor, spaces: Sequence[HiddenStatistics], wanted: Tensor) -> Tensor:
    """[N, S] coefficients t of `shift` [H, S] for which each row has `wanted` [N, S], as `add_unigram_prior` says.

    By Newton's method, since the shift changes the variance that it has to allow for. Where a row's variance leaves no
    solution, the coefficients that came nearest are taken.
    """
    rows = torch.nn.functional.pad(rows, (0, 1), value=-1.0)  # times (h, ln Σ exp): d
    shift = torch.nn.functional.pad(shift, (0, 0, 0, 1))
    covariances = torch.stack([space.second - torch.outer(space.mean, space.mean) for space in spaces])
    means = rows @ torch.stack([space.mean for space in spaces], 1)
    spread = torch.einsum("shg,ng->nsh", covariances, rows)
    own, cross = (spread * rows[:, None]).sum(-1), spread @ shift
    square = torch.einsum("hi,shg,gk->sik", shift, covariances, shift)
    coefficients = torch.zeros_like(wanted)
    best, least = coefficients, torch.full((len(rows),), math.inf, dtype=wanted.dtype)
    for _ in range(20):
        change = torch.einsum("sik,nk->nsi", square, coefficients)
        variance = own + ((2 * cross + change) * coefficients[:, None]).sum(-1)
        missing = wanted - means - coefficients - 0.5 * variance
        error = missing.abs().amax(1)
        best = torch.where((error < least)[:, None], coefficients, best)
        least = torch.minimum(error, least)
        slope = torch.eye(len(spaces), dtype=wanted.dtype) + cross + change
        step = torch.linalg.lstsq(slope, missing[:, :, None]).solution[:, :, 0]
        coefficients = coefficients + step * (5 / step.norm(dim=1, keepdim=True).clamp_min(5))
    return best
