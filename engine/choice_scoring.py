"""Log-likelihoods of continuations as lm-evaluation-harness defines them, with each shared context run once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import NamedTuple

import torch

from ..model import Llama
from ..model.shared_prefix import PrefixGroup, SharedPrefixes
from ..tokenizer import Tokenizer
from .multiple_choice import MultipleChoiceItem

# Rows of logits at a time: 64 MB of them for a vocabulary of 32,000.
_LOGIT_ROWS = 512


class TokenRequest(NamedTuple):
    """A continuation to score behind a context that is not empty, both token ids."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class ContinuationScore(NamedTuple):
    """What the model thinks of a continuation."""

    log_likelihood: float
    """ln p(continuation | context) in nats."""
    greedy: bool
    """Whether each of its tokens is the most likely one."""


class _Group(NamedTuple):
    """Requests that share a prefix: places in the list of requests, and the token ids they are made of."""

    places: list[int]
    prefix: tuple[int, ...]
    branches: list[tuple[int, ...]]

    @property
    def tokens(self) -> int:
        return len(self.prefix) + sum(map(len, self.branches))


def log_likelihoods(
    model: Llama,
    tokenizer: Tokenizer,
    items: Sequence[MultipleChoiceItem],
    *,
    max_tokens: int = 4096,
    on_batch: Callable[[int], object] = lambda choices: None,
) -> list[list[float]]:
    """ln p(choice | context) of every choice of every item, in nats.

    Args:
        model: whose vocabulary is the tokenizer's.
        tokenizer: encodes the items; see `encode_request`.
        items: contexts and choices.
        max_tokens: most tokens in one forward pass (a longer text gets one of its own).
        on_batch: called with the number of choices scored by each forward pass.
    """
    requests = encode_requests(tokenizer, [(item.context, choice) for item in items for choice in item.choices])
    scores = iter(score_continuations(model, requests, max_tokens=max_tokens, on_batch=on_batch))
    return [[next(scores).log_likelihood for _ in item.choices] for item in items]


def encode_requests(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[TokenRequest]:
    """Encode pairs of context and continuation, behind a BOS token where the tokenizer has one.

    The context is encoded alone, and context and continuation together; the tokens of the latter beyond the length
    of the former are the continuation's (`TemplateLM._encode_pair` of lm-evaluation-harness). Where the last token
    of the context swallows the continuation, the last token of both together is scored.
    """
    contexts = list(dict.fromkeys(context for context, _ in pairs))
    encoded = dict(zip(contexts, tokenizer.encode_batch(contexts), strict=True))
    bos = [tokenizer.bos_id] * (tokenizer.bos_id >= 0)
    requests = []
    for (context, _), whole in zip(pairs, tokenizer.encode_batch([a + b for a, b in pairs]), strict=True):
        head = encoded[context]
        head, tail = (head, whole[len(head) :]) if len(whole) > len(head) else (whole[:-1], whole[-1:])
        requests.append(TokenRequest((*bos, *head), tuple(tail)))
    return requests


@torch.inference_mode()
def score_continuations(
    model: Llama,
    requests: Sequence[TokenRequest],
    *,
    max_tokens: int = 4096,
    share_prefixes: bool = True,
    on_batch: Callable[[int], object] = lambda requests: None,
) -> list[ContinuationScore]:
    """Score every continuation, in the order of the requests.

    Texts that are longer than the model's context lose their beginning. Batches hold texts of similar length; nothing
    is padded, and logits exist at the scored tokens alone.

    Args:
        model: any model of this package.
        requests: continuations behind contexts.
        max_tokens: most tokens in one forward pass (a longer group gets one of its own).
        share_prefixes: run a context that several requests have once.
        on_batch: called with the number of requests scored by each forward pass.

    Raises:
        ValueError: if a context is empty, so that nothing predicts the first token behind it.
    """
    if not all(request.context for request in requests):
        raise ValueError("a continuation needs a context of at least one token, such as the beginning-of-text token")
    scaling = model.config.rope_scaling
    if scaling is not None and scaling.rope_type == "dynamic":
        share_prefixes = False  # the length of the whole text turns its keys
    scores = [ContinuationScore(0.0, True)] * len(requests)
    for groups in _batches(_groups(requests, model.config.context_length, share_prefixes), max_tokens):
        _score_batch(model, requests, groups, scores)
        on_batch(sum(len(group.places) for group in groups))
    return scores


def _groups(requests: Sequence[TokenRequest], limit: int, share: bool) -> list[_Group]:
    """Requests by what they share. The last token of a text is predicted, but not read."""
    together: dict[object, list[int]] = {}
    for place, (context, continuation) in enumerate(requests):
        # Texts that lose different beginnings stand at different positions, and share nothing.
        dropped = max(0, len(context) + len(continuation) - (limit + 1))
        together.setdefault((context, dropped) if share else place, []).append(place)
    groups = []
    for places in together.values():
        texts = [(requests[place].context + requests[place].continuation)[-(limit + 1) :][:-1] for place in places]
        common = 0
        if len(texts) > 1:
            common = sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, zip(*texts, strict=False)))
        groups.append(_Group(places, texts[0][:common], [text[common:] for text in texts]))
    return groups


def _batches(groups: Sequence[_Group], max_tokens: int) -> Iterator[list[_Group]]:
    """Groups, longest first, as many at a time as fit `max_tokens`."""
    batch: list[_Group] = []
    tokens = 0
    for group in sorted(groups, key=lambda group: -group.tokens):
        if batch and tokens + group.tokens > max_tokens:
            yield batch
            batch, tokens = [], 0
        batch.append(group)
        tokens += group.tokens
    if batch:
        yield batch


def _score_batch(
    model: Llama, requests: Sequence[TokenRequest], groups: Sequence[_Group], scores: list[ContinuationScore]
) -> None:
    device = model.lm_head.weight.device
    ids: list[int] = []
    rows: list[int] = []  # the flat token that each target is predicted from
    targets: list[int] = []
    places: list[int] = []
    for group in groups:
        prefix_end = len(ids) + len(group.prefix)
        ids += group.prefix
        for place, branch in zip(group.places, group.branches, strict=True):
            continuation = requests[place].continuation
            own_begin = len(ids)
            ids += branch
            scored = min(len(continuation), len(group.prefix) + len(branch))
            in_branch = min(scored, len(branch))
            rows += range(prefix_end - (scored - in_branch), prefix_end)
            rows += range(own_begin + len(branch) - in_branch, own_begin + len(branch))
            targets += continuation[-scored:]
            places += [place] * scored

    shared = SharedPrefixes([PrefixGroup(len(g.prefix), tuple(map(len, g.branches))) for g in groups], device)
    hidden = model.model(torch.tensor(ids, device=device), shared.documents, shared)
    hidden = hidden[torch.tensor(rows, device=device)]
    target_ids = torch.tensor(targets, device=device)
    nats, best = [], []
    for some, wanted in zip(hidden.split(_LOGIT_ROWS), target_ids.split(_LOGIT_ROWS), strict=True):
        logits = model.logits(some).float()
        nats.append(logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(1))
        best.append(logits.argmax(1) == wanted)
    for place, value, greedy in zip(places, torch.cat(nats).tolist(), torch.cat(best).tolist(), strict=True):
        scores[place] = ContinuationScore(scores[place].log_likelihood + value, scores[place].greedy and greedy)
