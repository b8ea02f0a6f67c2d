"""Log-likelihoods of multiple-choice answers, as lm-evaluation-harness defines them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ..model import Llama
from ..tokenizer import Tokenizer
from .batches import IGNORE_INDEX, Batch, TokenSequence
from .kobest import MultipleChoiceItem


@torch.inference_mode()
def log_likelihoods(
    model: Llama, tokenizer: Tokenizer, items: Sequence[MultipleChoiceItem], *, max_tokens: int = 4096
) -> list[list[float]]:
    """ln p(choice | context) of every choice of every item, in nats.

    Context and choice are encoded together behind a BOS token; the tokens beyond the length of the encoded
    context alone are the choice's. A text longer than the model's context loses its beginning.

    Args:
        model: whose vocabulary is the tokenizer's.
        tokenizer: encodes the items.
        items: contexts and choices.
        max_tokens: most tokens in one forward pass (a longer text gets one of its own).
    """
    requests: list[TokenSequence] = []
    limit = model.config.context_length
    for item in items:
        context_length = 1 + len(tokenizer.encode(item.context))
        for choice in item.choices:
            ids = [tokenizer.bos_id, *tokenizer.encode(item.context + choice)]
            targets = np.asarray([*ids[1:], IGNORE_INDEX], dtype=np.int64)
            targets[: context_length - 1] = IGNORE_INDEX
            inputs = np.asarray(ids, dtype=np.int64)[-limit:]
            requests.append(TokenSequence(inputs, targets[-limit:], [len(inputs)]))

    totals = [0.0] * len(requests)
    device = model.lm_head.weight.device
    for numbers in _by_length(requests, max_tokens):
        batch = Batch.collate([requests[number] for number in numbers], device)
        output = model.loss(batch.input_ids, batch.targets, batch.documents)
        sums = [-float(part.double().sum()) for part in output.token_losses.cpu().split(batch.documents.lengths)]
        for number, total in zip(numbers, sums, strict=True):
            totals[number] = total
    remaining = iter(totals)
    return [[next(remaining) for _ in item.choices] for item in items]


def _by_length(requests: Sequence[TokenSequence], max_tokens: int) -> Iterator[list[int]]:
    """Request numbers, longest first, grouped so that a group holds at most `max_tokens` tokens."""
    group: list[int] = []
    tokens = 0
    for number in sorted(range(len(requests)), key=lambda n: (-len(requests[n].input_ids), n)):
        size = len(requests[number].input_ids)
        if group and tokens + size > max_tokens:
            yield group
            group, tokens = [], 0
        group.append(number)
        tokens += size
    if group:
        yield group
