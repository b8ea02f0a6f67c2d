"""Training some rows of an embedding or an LM head: a parameter of their own that shares the matrix's memory.

Gradient and optimizer state then exist for those rows alone, and nothing, weight decay included, can move the others.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def row_range(weight: Tensor, first_row: int, rows: int) -> nn.Parameter:
    """Rows first_row … first_row + rows − 1 of `weight` [V, H] as a trainable parameter [rows, H] in the same memory.

    Make it after `weight` has its final device and dtype: moving either would part them, which `embedding` and
    `linear_cross_entropy` refuse.

    Raises:
        ValueError: if `weight` has no such rows.
    """
    if first_row < 0 or rows < 1 or first_row + rows > weight.shape[0]:
        raise ValueError(f"rows {first_row} to {first_row + rows - 1} are not in a matrix of {weight.shape[0]} rows")
    return nn.Parameter(weight.detach()[first_row : first_row + rows])


def check_row_range(weight: Tensor, trained_rows: Tensor, first_row: int) -> None:
    """Refuse trained rows that are not those of the matrix.

    Raises:
        ValueError: if shapes or dtypes do not fit, `weight` trains as well, or the memory is not shared.
    """
    rows = trained_rows.shape[0]
    fits = trained_rows.dim() == 2 and trained_rows.shape[1] == weight.shape[1]
    if not fits or first_row < 0 or first_row + rows > weight.shape[0]:
        raise ValueError(
            f"trained rows of shape {tuple(trained_rows.shape)} from row {first_row} on are not in a matrix of shape "
            f"{tuple(weight.shape)}"
        )
    if weight.requires_grad:
        raise ValueError("a weight of which only some rows train must not require a gradient itself")
    # Storages are unknown while a graph is traced.
    if not torch.compiler.is_compiling() and not _shares(trained_rows, weight[first_row:]):
        raise ValueError("the trained rows are a copy: make them with row_range once the weight is where it stays")


def _shares(rows: Tensor, of: Tensor) -> bool:
    """Whether `rows` begin where `of` does. Storages are compared, since tensors without contents have no address."""
    same = rows.untyped_storage()._cdata == of.untyped_storage()._cdata
    return same and rows.storage_offset() == of.storage_offset()
