"""Token-by-token generation with a key/value cache, of one text or of several at once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence

import torch

from .attention import PackedDocuments
from .errors import GenerationError
from .kv_cache import KeyValueCache
from .llama import Llama
from .sampling import check_settings, choose, penalize_repetition


def generate(
    model: Llama,
    prompt: Sequence[int],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    stop_ids: Collection[int] = (),
    seed: int = 0,
    index: int = 0,
) -> Iterator[int]:
    """Yield new token ids one by one, ending before a stop id, at the limit, or where the context is full.

    Args:
        model: any model of this package, on any device.
        prompt: token ids, at least one.
        max_new_tokens: most tokens to yield.
        temperature, top_p: see `sample`.
        repetition_penalty: see `penalize_repetition`; it comes first, then temperature, then top_p.
        stop_ids: ids that end the text, such as the end-of-sequence token; they are not yielded.
        seed: of the sampling.
        index: which of the seed's random streams to use; the prompt at place i of `generate_batch` has stream i.

    Raises:
        GenerationError: if a setting is out of range, or the prompt empty, longer than the model's context, or not
            of its vocabulary.
    """
    check_settings(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, repetition_penalty=repetition_penalty
    )
    _check_prompt(model, prompt, "the prompt")
    decoding = _decode(
        model,
        [prompt],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        stop_ids=stop_ids,
        generators=[_generator(seed, index)],
    )
    return (token for _, token in decoding)


def generate_batch(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    stop_ids: Collection[int] = (),
    seed: int = 0,
    on_token: Callable[[int, int], bool] | None = None,
) -> list[list[int]]:
    """New token ids of several prompts that are continued at the same time; arguments as in `generate`.

    Nothing is padded: prompts are prefilled as packed documents, then every unfinished text gets one token a step.
    The result is that of `generate` for each prompt alone, as far as rounding goes: matrix products of another size
    add in another order, so two tokens that are equally likely to the last digits may change places.

    Args:
        on_token: called with (place of the prompt, new token) for every token; True ends that text behind it.

    Returns:
        For each prompt, in order, what `generate` yields.

    Raises:
        GenerationError: as `generate`, naming the prompt by its number from 1.
    """
    check_settings(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, repetition_penalty=repetition_penalty
    )
    for number, prompt in enumerate(prompts, 1):
        _check_prompt(model, prompt, f"prompt {number} of {len(prompts)}")
    texts: list[list[int]] = [[] for _ in prompts]
    decoding = _decode(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        stop_ids=stop_ids,
        generators=[_generator(seed, index) for index in range(len(prompts))],
        on_token=on_token,
    )
    for index, token in decoding:
        texts[index].append(token)
    return texts


def _check_prompt(model: Llama, prompt: Sequence[int], name: str) -> None:
    config = model.config
    if not len(prompt):
        raise GenerationError(f"{name} is empty; it needs at least one token, such as the beginning-of-text token")
    if len(prompt) > config.context_length:
        raise GenerationError(f"{name} has {len(prompt)} tokens, the model's context only {config.context_length}")
    if outside := [token for token in prompt if not 0 <= token < config.vocab_size]:
        raise GenerationError(
            f"{name} has the token id {outside[0]}, the model only {config.vocab_size} tokens; "
            "use the tokenizer that belongs to the checkpoint"
        )


def _generator(seed: int, index: int) -> torch.Generator:
    """Random stream `index` of a seed; torch looks at the low 32 bits only, so the streams are told apart by a hash."""
    digest = hashlib.blake2b(f"{seed} {index}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


@torch.inference_mode()
def _decode(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    repetition_penalty: float,
    stop_ids: Collection[int],
    generators: Sequence[torch.Generator],
    on_token: Callable[[int, int], bool] | None = None,
) -> Iterator[tuple[int, int]]:
    """Yield (index of the prompt, new token); what is finished leaves the batch."""
    if not prompts or max_new_tokens == 0:
        return
    config = model.config
    weight = model.model.embed_tokens.weight
    device = weight.device
    # The last token is yielded, but never read.
    capacity = min(max(map(len, prompts)) + max_new_tokens - 1, config.context_length)
    cache = KeyValueCache(
        config.num_hidden_layers,
        capacity,
        config.num_key_value_heads,
        config.head_dim,
        weight.dtype,
        device,
        sequences=len(prompts),
    )
    indices = list(range(len(prompts)))  # the prompt that each row of the cache continues
    counts = [0] * len(prompts)
    seen = None
    if repetition_penalty != 1:
        seen = torch.zeros(len(prompts), config.vocab_size, dtype=torch.bool, device=device)
        for row, prompt in enumerate(prompts):
            seen[row, torch.tensor(prompt, device=device)] = True
    new = PackedDocuments.from_lengths([len(prompt) for prompt in prompts], device)
    tokens = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    while True:
        hidden = model.model(tokens, new, cache)
        logits = model.logits(hidden[new.cu_seqlens[1:] - 1]).float()
        if seen is not None:
            logits = penalize_repetition(logits, seen, repetition_penalty)
        if not bool(logits.amax(-1).isfinite().all()):
            raise GenerationError(
                f"the logits are not finite in {weight.dtype}: the weights are damaged, or need a wider precision"
            )
        chosen = choose(logits, temperature, top_p, [generators[index] for index in indices])
        finished = []
        for row, (index, token) in enumerate(zip(indices, chosen, strict=True)):
            if token in stop_ids:
                finished.append(row)
                continue
            yield index, token
            counts[index] += 1
            stopped = on_token is not None and on_token(index, token)
            if stopped or counts[index] == max_new_tokens or cache.lengths[row] >= config.context_length:
                finished.append(row)
        if finished:
            rows = cache.drop(finished)
            indices, chosen = [indices[row] for row in rows], [chosen[row] for row in rows]
            seen = seen[rows] if seen is not None else None
            if not indices:
                return
        tokens = torch.tensor(chosen, device=device)
        if seen is not None:
            seen.scatter_(1, tokens[:, None], True)
        if len(indices) != sum(new.lengths):
            new = PackedDocuments.from_lengths([1] * len(indices), device)
