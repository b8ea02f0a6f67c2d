"""Token-by-token generation with a key/value cache."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from .attention import KeyValueCache
from .errors import CheckpointError
from .llama import Llama


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None = None) -> int:
    """Choose the next token id from logits [V].

    Args:
        logits: [V], any floating dtype.
        temperature: 0 takes the most likely token; higher flattens the distribution.
        top_p: keep the smallest set of most likely tokens whose probabilities reach this sum
            (nucleus sampling, Holtzman et al. 2019, arXiv 1904.09751).
        generator: source of randomness, on the CPU.
    """
    if temperature == 0:
        return int(logits.argmax())
    probabilities, ids = torch.softmax(logits.float().cpu() / temperature, -1).sort(descending=True)
    # The token that crosses the threshold still belongs to the nucleus, and the first always does.
    outside = probabilities.cumsum(0) - probabilities >= top_p
    outside[0] = False
    probabilities[outside] = 0.0
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])


@torch.inference_mode()
def generate(
    model: Llama,
    prompt: Sequence[int],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop_ids: Collection[int] = (),
    seed: int = 0,
) -> Iterator[int]:
    """Yield new token ids one by one, ending before a stop id, at the limit, or where the context is full.

    Args:
        model: any model of this package, on any device.
        prompt: token ids, at least one.
        max_new_tokens: most tokens to yield.
        temperature, top_p: see `sample`.
        stop_ids: ids that end the text, such as the end-of-sequence token; they are not yielded.
        seed: of the sampling.

    Raises:
        CheckpointError: if the prompt is empty or longer than the model's context.
    """
    config = model.config
    if not prompt:
        raise CheckpointError("the prompt is empty")
    if len(prompt) > config.context_length:
        raise CheckpointError(f"the prompt has {len(prompt)} tokens, the model's context only {config.context_length}")
    weight = model.lm_head.weight
    capacity = min(len(prompt) + max_new_tokens, config.context_length)
    cache = KeyValueCache(
        config.num_hidden_layers, capacity, config.num_key_value_heads, config.head_dim, weight.dtype, weight.device
    )
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor(prompt, dtype=torch.int64, device=weight.device)
    for _ in range(max_new_tokens):
        hidden = model.model(tokens, cache=cache)
        token = sample(model.logits(hidden[-1]), temperature, top_p, generator)
        if token in stop_ids:
            return
        yield token
        if cache.length >= capacity:
            return
        tokens = torch.tensor([token], dtype=torch.int64, device=weight.device)
