"""Keys and values of sequences that grow together while generating."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import PackedDocuments, _sdpa, packed_attention


class KeyValueCache:
    """Keys and values of some growing sequences, for every layer, without padding between their tokens.

    A forward pass calls `reserve` once, `attend` in every layer, and `advance` at its end.

    Args:
        layers: number of decoder layers.
        capacity: most tokens that each sequence may reach.
        kv_heads, head_dim, dtype, device: of the keys and values.
        sequences: how many there are; each is a row of the cache.
    """

    def __init__(
        self,
        layers: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        sequences: int = 1,
    ) -> None:
        shape = (layers, sequences, capacity, kv_heads, head_dim)
        # Zeros, because places that a mask hides are multiplied by zero, and uninitialised memory may hold NaN.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = [0] * sequences
        """Cached tokens of each sequence, on the host."""
        self._new: PackedDocuments | None = None
        self._masks: dict[int | None, tuple[int, Tensor | None]] = {}

    @property
    def length(self) -> int:
        """Cached tokens of the longest sequence."""
        return max(self.lengths)

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def lengths_with(self, new: PackedDocuments) -> list[int]:
        """Tokens of each sequence once those of `new`, one document for each, are behind its cached ones."""
        return [length + count for length, count in zip(self.lengths, new.lengths, strict=True)]

    def reserve(self, new: PackedDocuments) -> Tensor:
        """Announce the tokens of a forward pass.

        Args:
            new: one document for each sequence, holding the tokens that come behind its cached ones.

        Returns:
            [N] int64, the position of each new token in its sequence.

        Raises:
            ValueError: if there is not one document for each sequence, or their tokens do not fit.
        """
        if len(new.lengths) != len(self.lengths):
            raise ValueError(f"{len(new.lengths)} documents for the {len(self.lengths)} sequences of the cache")
        end = max(self.lengths_with(new))
        if end > self.capacity:
            raise ValueError(f"{end} tokens do not fit a cache of capacity {self.capacity}: make a larger one")
        device = self.keys.device
        counts = torch.tensor(new.lengths, device=device)
        total = sum(new.lengths)
        starts = torch.tensor(self.lengths, device=device).repeat_interleave(counts, output_size=total)
        self._rows = torch.arange(len(self.lengths), device=device).repeat_interleave(counts, output_size=total)
        self._positions = new.position_ids + starts
        self._new, self._masks = new, {}
        return self._positions

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, sliding_window: int | None) -> Tensor:
        """Store the new tokens' `k` and `v` ([N, kv_heads, D]) and attend from `q` ([N, heads, D]) to all before.

        Returns:
            [N, heads, D].
        """
        assert self._new is not None, "reserve comes first"
        self.keys[layer, self._rows, self._positions] = k
        self.values[layer, self._rows, self._positions] = v
        if not any(self.lengths):
            return packed_attention(q, k, v, self._new, sliding_window)
        if len(q) == len(self.lengths):  # one token each
            first, mask = self._visible(sliding_window)
            rows, end = len(q), self.length + 1
            keys, values = (cached[layer, :rows, first:end].transpose(1, 2) for cached in (self.keys, self.values))
            return _attend_once(q, keys, values, mask)
        parts = q.split(self._new.lengths)
        return torch.cat([self._attend_chunk(layer, row, part, sliding_window) for row, part in enumerate(parts)])

    def advance(self) -> None:
        """Count the new tokens as cached, after every layer has stored them."""
        assert self._new is not None, "reserve comes first"
        self.lengths = self.lengths_with(self._new)
        self._new = None

    def drop(self, rows: Collection[int]) -> list[int]:
        """Give up finished sequences.

        Returns:
            The rows that stay, in their new order: the last ones take the places that become free, so that little
            is copied.
        """
        kept = list(range(len(self.lengths)))
        for row in sorted(rows, reverse=True):
            kept[row] = kept[-1]
            kept.pop()
        for row, source in enumerate(kept):
            if row != source:
                length = self.lengths[source]
                self.keys[:, row, :length] = self.keys[:, source, :length]
                self.values[:, row, :length] = self.values[:, source, :length]
        self.lengths = [self.lengths[source] for source in kept]
        return kept

    def _visible(self, sliding_window: int | None) -> tuple[int, Tensor | None]:
        """Where one more token of every sequence looks: (first key, mask [B, 1, 1, keys] or None for all of them)."""
        if sliding_window not in self._masks:
            first = 0 if sliding_window is None else max(0, min(self.lengths) + 1 - sliding_window)
            mask = None
            if len(set(self.lengths)) > 1:
                key = torch.arange(first, self.length + 1, device=self.keys.device)
                behind = self._positions[:, None] - key
                mask = behind >= 0
                if sliding_window is not None:
                    mask &= behind < sliding_window
                mask = mask[:, None, None, :]
            self._masks[sliding_window] = first, mask
        return self._masks[sliding_window]

    def _attend_chunk(self, layer: int, row: int, q: Tensor, sliding_window: int | None) -> Tensor:
        """Several tokens behind cached ones of one sequence: q [n, heads, D], which are stored already."""
        end = self.lengths[row] + len(q)
        keys, values = self.keys[layer, row, None, :end], self.values[layer, row, None, :end]
        return _sdpa(q[None], keys, values, sliding_window)[0]


def _attend_once(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """One query per sequence and head, [B, heads, D], to [B, kv_heads, L, D].

    The heads that share keys are laid out as the queries of one head, so that no key is repeated for them.
    """
    grouped = q.unflatten(1, (keys.shape[1], -1))
    return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask).flatten(1, 2)
