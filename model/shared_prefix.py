"""Attention of one forward pass over prefixes that several continuations share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .attention import PackedDocuments, _sdpa
from .kv_cache import KeyValueCache


class PrefixGroup(NamedTuple):
    """A prefix and what may follow it, laid end to end: prefix, first continuation, second continuation, ..."""

    prefix: int
    """Tokens of the prefix; 0 for none."""
    continuations: tuple[int, ...]
    """Tokens of each continuation, at least one continuation; one of 0 tokens ends with the prefix."""

    @property
    def tokens(self) -> int:
        """Tokens of all of it."""
        return self.prefix + sum(self.continuations)


class SharedPrefixes(KeyValueCache):
    """In place of a cache, for a single forward pass: every continuation sees its group's prefix and itself.

    A prefix passes through the model once, however many continuations it has. Nothing is stored, so that the pass
    costs no copies; pass it as the `cache` of `Llama.forward` or `Decoder.forward`, with `documents`.

    Args:
        groups: how the flat tokens of the pass are divided.
        device: of the model.
    """

    def __init__(self, groups: Sequence[PrefixGroup], device: torch.device | str = "cpu") -> None:
        self.groups = groups
        positions = [
            torch.arange(begin, begin + count)
            for group in groups
            for begin, count in [(0, group.prefix), *((group.prefix, count) for count in group.continuations)]
        ]
        self.documents = PackedDocuments.from_lengths([group.tokens for group in groups], device)
        """One document a group."""
        self._position_ids = torch.cat(positions).to(device)

    def lengths_with(self, new: PackedDocuments) -> list[int]:
        """Tokens of the longest sequence of each group."""
        return [group.prefix + max(group.continuations) for group in self.groups]

    def reserve(self, new: PackedDocuments) -> Tensor:
        """[N] int64, the position of each token behind the start of its prefix."""
        if new.lengths != self.documents.lengths:
            raise ValueError("the documents of the forward pass are not those of the groups")
        return self._position_ids

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, sliding_window: int | None) -> Tensor:
        """Attention of q [N, heads, D] to k and v [N, kv_heads, D]: [N, heads, D]."""
        parts = []
        begin = 0
        for group in self.groups:
            prefix_end = begin + group.prefix
            # The first continuation goes on from the prefix as one sequence.
            end = prefix_end + group.continuations[0]
            parts.append(_sdpa(q[None, begin:end], k[None, begin:end], v[None, begin:end], sliding_window)[0])
            for count in group.continuations[1:]:
                if count == 0:
                    continue
                own = slice(end, end + count)
                keys, values = (torch.cat([kept[begin:prefix_end], kept[own]])[None] for kept in (k, v))
                parts.append(_sdpa(q[None, own], keys, values, sliding_window)[0])
                end += count
            begin = end
        return torch.cat(parts)

    def advance(self) -> None:
        """Nothing was stored, nothing is counted."""
