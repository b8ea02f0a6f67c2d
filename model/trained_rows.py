"""How an embedding or an LM head trains: whole or some of its rows, into `.grad` or into a buffer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..kernels import row_range
from .errors import CheckpointError


@dataclass(frozen=True)
class MatrixTraining:
    """What the operations on a [V, H] matrix have to know in backward. A module holds it without registering it."""

    rows: nn.Parameter | None = None
    """[R, H]: the rows that train, in the matrix's memory; None for the matrix itself, if it requires a gradient."""
    first_row: int = 0
    """Number of the first of `rows` in the matrix."""
    gradient_buffer: Tensor | None = None
    """fp32, in the shape of what trains: backward adds to it; None for `.grad`."""

    def options(self) -> dict[str, Any]:
        """Arguments of `embedding` and `linear_cross_entropy`."""
        return {"trained_rows": self.rows, "first_row": self.first_row, "weight_grad": self.gradient_buffer}

    def with_buffer(self, buffer: Tensor | None) -> MatrixTraining:
        """The same with another gradient buffer."""
        return replace(self, gradient_buffer=buffer)


def rows_from(weight: Tensor, first_row: int | None, vocab_size: int) -> MatrixTraining:
    """Training of rows `first_row` … `vocab_size` − 1 of `weight` [≥ vocab_size, H], or of all of it where None.

    Raises:
        CheckpointError: if there are no such rows.
    """
    if first_row is None:
        return MatrixTraining()
    if not 0 <= first_row < vocab_size:
        raise CheckpointError(
            f"no rows to train from row {first_row} on in a vocabulary of {vocab_size}: extend the vocabulary first, "
            f"or name a first row from 0 to {vocab_size - 1}"
        )
    return MatrixTraining(row_range(weight, first_row, vocab_size - first_row), first_row)
