"""Causal attention over packed documents."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.launch import capturing
from .attention_backends import BACKENDS, flash_shapes, resolve_backend

_PADDED_TO = 64
"""Documents are padded to multiples of so many tokens for attention on a CPU."""


@dataclass(frozen=True)
class PackedDocuments:
    """Where the documents of a flat batch of N tokens begin and end.

    Documents are concatenated without padding, as variable-length attention kernels want them.
    `lengths` is a copy on the host, so that no device has to be asked for shapes.
    """

    lengths: tuple[int, ...]
    """Tokens of each document; they add up to N."""
    cu_seqlens: Tensor
    """[documents + 1] int32: cumulative lengths, starting at 0."""
    position_ids: Tensor
    """[N] int64: position of each token in its own document."""

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest document."""
        return max(self.lengths)

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> PackedDocuments:
        """Build from document lengths in tokens; empty documents are left out."""
        lengths = tuple(int(length) for length in lengths if length > 0)
        sizes = torch.tensor(lengths, dtype=torch.int64)
        ends = sizes.cumsum(0)
        position_ids = torch.arange(sum(lengths))
        position_ids -= (ends - sizes).repeat_interleave(sizes, output_size=len(position_ids))
        cu_seqlens = F.pad(ends, (1, 0)).to(torch.int32)
        return cls(lengths, cu_seqlens.to(device), position_ids.to(device))


def _window_mask(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """[queries, keys] bool, True where a query may look: not ahead, and at most `window` keys back, itself included."""
    query = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)[None, :]
    return (key <= query) & (key > query - window)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, sliding_window: int | None) -> Tensor:
    """Causal attention of [B, L, heads, D] tensors; the last query sits on the last key."""
    queries, keys = q.shape[1], k.shape[1]
    mask = None
    if sliding_window is not None and keys > sliding_window:
        mask = _window_mask(queries, keys, sliding_window, q.device)
    elif 1 < queries < keys:
        mask = _window_mask(queries, keys, keys, q.device)
    output = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None and queries == keys,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return output.transpose(1, 2)


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: PackedDocuments,
    sliding_window: int | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Causal softmax(q·kᵀ/√D)·v inside every document, never across documents.

    Args:
        q: [N, heads, D]; k, v: [N, kv_heads, D], heads a multiple of kv_heads (grouped-query attention).
        documents: the layout of the N tokens.
        sliding_window: keys a query may see, itself included; None for all of its document.
        backend: "sdpa", "flash-attn", "torch-varlen" or "reference"; None for that of `set_attention_backend`.

    Returns:
        [N, heads, D].
    """
    if q.is_meta and capturing():
        return flash_shapes(q, k, v, documents.lengths, sliding_window)
    name = resolve_backend(backend, q)
    if name != "sdpa":
        return BACKENDS[name](q, k, v, documents.cu_seqlens, documents.max_seqlen, sliding_window)
    lengths = documents.lengths
    if len(set(lengths)) == 1:  # one call serves all documents: full windows, batched evaluation
        shape = (len(lengths), lengths[0])
        output = _sdpa(q.unflatten(0, shape), k.unflatten(0, shape), v.unflatten(0, shape), sliding_window)
        return output.flatten(0, 1)
    if q.device.type == "cpu":
        return _attention_by_length(q, k, v, lengths, sliding_window)
    # On a GPU the indices of padding would have to be waited for, and no kernels are made for lengths.
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    return torch.cat([_sdpa(qi[None], ki[None], vi[None], sliding_window)[0] for qi, ki, vi in parts])


def _attention_by_length(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], sliding_window: int | None) -> Tensor:
    """Attention on a CPU of documents of different lengths, those in need of alike padding in one call.

    What pads a document stands behind it, where causal attention does not look. Torch's attention on CPUs makes kernels
    anew for every length and keeps them for good, with their buffers: memory would grow with every step.
    """
    begins = [0, *itertools.accumulate(lengths)]
    of_length: dict[int, list[int]] = {}
    for document, length in enumerate(lengths):
        of_length.setdefault(-(-length // _PADDED_TO) * _PADDED_TO, []).append(document)
    outputs, places = [], []
    for padded, group in of_length.items():
        steps = torch.arange(padded)
        first = torch.tensor([begins[document] for document in group])[:, None]
        length = torch.tensor([lengths[document] for document in group])[:, None]
        rows = first + torch.minimum(steps, length - 1)
        q_, k_, v_ = (x.index_select(0, rows.flatten()).unflatten(0, rows.shape) for x in (q, k, v))
        real = (steps < length).flatten().nonzero().squeeze(1)
        outputs.append(_sdpa(q_, k_, v_, sliding_window).flatten(0, 1).index_select(0, real))
        places.append(rows.flatten()[real])
    return torch.cat(outputs).index_select(0, torch.cat(places).argsort())
