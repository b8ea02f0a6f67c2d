"""The choice of the next token: repetition penalty, temperature, nucleus."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import GenerationError


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make the tokens of the text so far less likely: positive logits are divided by the penalty, negative multiplied.

    Source: Keskar et al. 2019, arXiv 1909.05858, section 4.1, as transformers computes it.

    Args:
        logits: [..., V].
        seen: [..., V] bool, True for each token id of the text, prompt included.
        penalty: 1 changes nothing; below 1 repetition becomes more likely.
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None = None) -> int:
    """Choose the next token id from logits [V].

    Args:
        logits: [V], any floating dtype.
        temperature: 0 takes the most likely token; higher flattens the distribution.
        top_p: keep the smallest set of most likely tokens whose probabilities reach this sum
            (nucleus sampling, Holtzman et al. 2019, arXiv 1904.09751).
        generator: source of randomness, on the CPU.
    """
    return choose(logits[None].float(), temperature, top_p, [generator])[0]


def choose(logits: Tensor, temperature: float, top_p: float, generators: Sequence[torch.Generator | None]) -> list[int]:
    """`sample` for each row of fp32 logits [B, V], with a generator for each."""
    if temperature == 0:
        return logits.argmax(-1).tolist()
    # The largest logit goes first, so that no temperature, however low, divides to infinity.
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature
    probabilities = torch.softmax(scaled, -1, dtype=torch.float64)
    ids = None
    if top_p < 1:
        probabilities, ids = probabilities.sort(dim=-1, descending=True, stable=True)
        # The token that crosses the threshold still belongs to the nucleus.
        outside = probabilities.cumsum(-1) - probabilities >= top_p
        probabilities = probabilities.masked_fill(outside, 0.0)
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1:].contiguous()
    # One uniform number a row, found in the cumulative distribution: the distributions stay on their device.
    uniform = torch.cat([torch.rand(1, dtype=torch.float64, generator=generator) for generator in generators])
    chosen = torch.searchsorted(cumulative, uniform[:, None].to(logits.device) * total, right=True)
    # Rounding may put the number on the total, behind the last token that can be drawn; top_p = 0 always does.
    chosen = chosen.minimum(torch.searchsorted(cumulative, total))
    return (chosen if ids is None else ids.gather(-1, chosen))[:, 0].tolist()


def check_settings(*, max_new_tokens: int, temperature: float, top_p: float, repetition_penalty: float) -> None:
    """Raise GenerationError for a setting of `generate` that is out of range."""
    if max_new_tokens < 0:
        raise GenerationError(f"max_new_tokens is {max_new_tokens}; it must be at least 0")
    if not 0 <= temperature < math.inf:
        raise GenerationError(f"temperature is {temperature}; it must be at least 0 (greedy) and finite")
    if not 0 < top_p <= 1:
        raise GenerationError(f"top_p is {top_p}; it must be above 0 and at most 1 (all tokens)")
    if not 0 < repetition_penalty < math.inf:
        raise GenerationError(f"repetition_penalty is {repetition_penalty}; it must be above 0 (1 is none) and finite")
