"""How good new rows are before any training: loss, bits per byte, accuracy and ranks on held-out text."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import torch

from ..model import Llama
from .batches import IGNORE_INDEX, batched
from .evaluation import TextEncoder, text_windows

_LOGIT_ROWS = 512
"""Positions whose logits are in memory at a time."""


class VocabularyResult(msgspec.Struct, frozen=True, kw_only=True):
    """What an extended model makes of some text."""

    loss: float
    """Mean cross-entropy in nats per predicted token; not comparable across tokenizers."""
    accuracy: float
    """Share of tokens whose most likely prediction is right."""
    bits_per_byte: float
    """Total cross-entropy in bits over the UTF-8 bytes of the text, comparable across tokenizers."""
    tokens: int
    """Predicted tokens."""
    median_rank: float
    """Median place of the right token among all by logit; 1 is the most likely one."""
    mean_reciprocal_rank: float
    new_tokens: int
    """Predicted tokens that are new pieces."""
    median_rank_new: float | None
    """Median rank of those."""
    new_mass: float
    """Mean probability of all new pieces together."""
    new_mass_bits_per_byte: float
    """−log₂(1 − that), summed over the old tokens and per byte of text: what the new rows cost through the softmax."""


@torch.inference_mode()
def evaluate_vocabulary(
    model: Llama,
    tokenizer: TextEncoder,
    texts: Sequence[str],
    first_new_row: int,
    *,
    window: int = 512,
    batch_size: int = 8,
) -> VocabularyResult:
    """Loss, ranks and the probability of new pieces on plain texts, as `evaluate_text` lays them out.

    Args:
        model: whose vocabulary is the tokenizer's.
        tokenizer: encodes the texts.
        texts: documents.
        first_new_row: id of the first new piece.
        window: most tokens of context; the model's own limit where that is lower.
        batch_size: windows in a forward pass.
    """
    device = model.model.embed_tokens.weight.device
    source = text_windows(tokenizer, texts, min(window, model.config.context_length))
    nats, correct, old_nats, mass = 0.0, 0, 0.0, 0.0
    ranks: list[torch.Tensor] = []
    is_new: list[torch.Tensor] = []
    for batch in batched(source, range(len(source)), batch_size, device):
        hidden = model.hidden_states(batch.input_ids, batch.documents)
        kept = batch.targets != IGNORE_INDEX
        for states, targets in zip(
            hidden[kept].split(_LOGIT_ROWS), batch.targets[kept].split(_LOGIT_ROWS), strict=True
        ):
            logits = model.logits(states).float()[:, : tokenizer.vocab_size]  # padding rows are no tokens
            everything = logits.logsumexp(-1)
            right = logits.gather(1, targets[:, None])
            log_old = logits[:, :first_new_row].logsumexp(-1) - everything  # ln of what the old tokens keep
            new = targets >= first_new_row
            nats += float((everything - right[:, 0]).double().sum())
            old_nats -= float(log_old[~new].double().sum())
            mass += float((1 - log_old.exp()).double().sum())
            ranks.append(((logits > right).sum(-1) + 1).cpu())
            is_new.append(new.cpu())
            correct += int((logits.argmax(-1) == targets).sum())
    rank, new = torch.cat(ranks).double(), torch.cat(is_new)
    text_bytes = max(1, sum(len(text.encode("utf-8")) for text in texts))
    return VocabularyResult(
        loss=nats / len(rank),
        accuracy=correct / len(rank),
        bits_per_byte=nats / math.log(2) / text_bytes,
        tokens=len(rank),
        median_rank=float(rank.median()),
        mean_reciprocal_rank=float((1 / rank).mean()),
        new_tokens=int(new.sum()),
        median_rank_new=float(rank[new].median()) if new.any() else None,
        new_mass=mass / len(rank),
        new_mass_bits_per_byte=old_nats / math.log(2) / text_bytes,
    )
