"""Where every new row came from, as a parquet table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..model import NewRows, NewVocabulary
from .errors import RunError

_GROUP = 4096
"""Rows of the table in memory at a time."""


def require_parquet() -> None:
    """Raise RunError where the package that writes parquet is missing."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ModuleNotFoundError:
        raise RunError(
            'init.provenance needs pyarrow: pip install "redwhale[filtering]", or set init.provenance=false'
        ) from None


def write_provenance(
    path: Path,
    made: Mapping[str, NewRows],
    vocabulary: NewVocabulary,
    pieces: Sequence[str],
    base_pieces: Sequence[str],
    first_new_row: int,
) -> None:
    """Write one line for each new row of each matrix.

    Columns: `id`, `piece`, `tensor`, `method`, `byte_only`, `decomposition` (base pieces), `base_ids`, `base_pieces`
    and `weights` (what was combined, before norms, noise and prior; empty for rows that were drawn or fitted), `norm`
    (of the stored row).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [
            ("id", pa.int32()),
            ("piece", pa.string()),
            ("tensor", pa.string()),
            ("method", pa.string()),
            ("byte_only", pa.bool_()),
            ("decomposition", pa.list_(pa.string())),
            ("base_ids", pa.list_(pa.int32())),
            ("base_pieces", pa.list_(pa.string())),
            ("weights", pa.list_(pa.float32())),
            ("norm", pa.float32()),
        ]
    )
    byte_only = vocabulary.byte_only()
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for tensor, new in made.items():
            norms = new.rows.float().view(len(pieces), -1).norm(dim=1).tolist()
            for begin in range(0, len(pieces), _GROUP):
                numbers = range(begin, min(begin + _GROUP, len(pieces)))
                ids, weights = _combined(new, begin, numbers.stop)
                columns = {
                    "id": [first_new_row + n for n in numbers],
                    "piece": [pieces[n] for n in numbers],
                    "tensor": [tensor] * len(numbers),
                    "method": [new.byte_only_method if byte_only[n] else new.method for n in numbers],
                    "byte_only": [byte_only[n] for n in numbers],
                    "decomposition": [[base_pieces[i] for i in vocabulary.decompositions[n]] for n in numbers],
                    "base_ids": ids,
                    "base_pieces": [[base_pieces[i] for i in row] for row in ids],
                    "weights": weights,
                    "norm": norms[begin : numbers.stop],
                }
                writer.write_table(pa.table(columns, schema=schema))


def _combined(new: NewRows, begin: int, end: int) -> tuple[list[list[int]], list[list[float]]]:
    ids: list[list[int]] = [[] for _ in range(begin, end)]
    weights: list[list[float]] = [[] for _ in range(begin, end)]
    if new.weights is None:
        return ids, weights
    inside = ((new.weights.owner >= begin) & (new.weights.owner < end)).nonzero()[:, 0]
    columns: list[torch.Tensor] = [new.weights.owner[inside], new.weights.ids[inside], new.weights.weights[inside]]
    for owner, base_id, weight in zip(*(column.tolist() for column in columns), strict=True):
        ids[owner - begin].append(base_id)
        weights[owner - begin].append(weight)
    return ids, weights
