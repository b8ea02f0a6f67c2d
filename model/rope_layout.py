"""The two orders in which checkpoints keep the rotated dimensions of queries and keys.

Rotary embedding turns pairs of dimensions. Hugging Face checkpoints pair dimension i with i + D/2 ("half"), Meta's
original files, llama2.c and GGUF pair 2i with 2i + 1 ("interleaved"). Both compute the same attention scores if the
rows of q_proj and k_proj are put in the order that the rotation expects; here that is always "half".
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from .config import ModelConfig

RoPELayout = Literal["half", "interleaved"]
_ROTATED = ("q_proj", "k_proj")


def to_half(rows: Tensor, head_dim: int, rotary_dim: int | None = None) -> Tensor:
    """Reorder the output rows of a query or key projection from "interleaved" to "half".

    Args:
        rows: [heads · D, …], a weight or a bias.
        head_dim: D.
        rotary_dim: dimensions of each head that are rotated, the first ones; None for all.
    """
    return _reorder(rows, head_dim, rotary_dim or head_dim, (-1, 2))


def to_interleaved(rows: Tensor, head_dim: int, rotary_dim: int | None = None) -> Tensor:
    """The inverse of `to_half`."""
    return _reorder(rows, head_dim, rotary_dim or head_dim, (2, -1))


def _reorder(rows: Tensor, head_dim: int, rotary_dim: int, pairs: tuple[int, int]) -> Tensor:
    heads = rows.unflatten(0, (-1, head_dim))
    reordered = heads.clone()
    # [heads, D] seen as [heads, D/2, 2] (or [heads, 2, D/2]) and transposed: pairs side by side become halves.
    reordered[:, :rotary_dim] = heads[:, :rotary_dim].unflatten(1, pairs).transpose(1, 2).flatten(1, 2)
    return reordered.flatten(0, 1)


def to_half_if_rotated(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """`to_half` for the tensors of a checkpoint that need it, by name; others as they are."""
    if name.split(".")[-2] not in _ROTATED:
        return tensor
    return to_half(tensor, config.head_dim, config.rotary_dim)
