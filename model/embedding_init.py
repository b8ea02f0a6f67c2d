"""Rows for new vocabulary: the embedding and LM head of a hybrid tokenizer, from those of its base.

RedWhale (arXiv 2408.11294) compares ways to fill the new rows and keeps token decomposition: split the new piece with
the base tokenizer and average the base rows, in the embedding and in the LM head. The methods are in `init_methods`;
here their rows are finished (norms, byte-only pieces, collisions) and written, one tensor in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from .checkpoint import EMBEDDING, LM_HEAD, LM_HEAD_BIAS, VOCABULARY_TENSORS, CheckpointReader, write_checkpoint
from .errors import CheckpointError
from .init_methods import InitMethod, Matrix, NewVocabulary, RowWeights, fill_rows
from .row_collisions import coinciding

Matching = Literal["none", "norm", "variance"]
_SHARD_BYTES = 1 << 30
"""Of what is written: a shard, and once more while it is serialised, is what the extension needs of memory."""


@dataclass(frozen=True)
class RowFinish:
    """What happens to rows once a method has filled them."""

    match: Matching = "none"
    """"norm": each row gets the base rows' median norm. "variance": each row's distance from the mean base row becomes
    the base rows' root mean square distance."""
    byte_only: InitMethod | None = None
    """Another method for pieces none of whose base tokens is text by itself; None for the same."""
    break_collisions: float = 0.0
    """Noise for rows that coincide with another, in standard deviations of the base's entries; 0 leaves them."""


@dataclass(frozen=True)
class NewRows:
    """The rows of one matrix, and how they came about."""

    rows: Tensor
    """[N, H], or [N] of a bias, in the matrix's dtype."""
    method: str
    byte_only_method: str
    """That of pieces none of whose base tokens is text by itself."""
    weights: RowWeights | None
    """The base rows that were combined, before norms and noise; None where none were."""
    collisions: int
    """Rows that coincided with a base row or an earlier new row, before they were moved apart."""
    collisions_left: int
    """The same in what is stored."""


def new_rows(
    base_rows: Tensor,
    vocabulary: NewVocabulary,
    method: InitMethod,
    generator: torch.Generator,
    *,
    matrix: Matrix = "embedding",
    finish: RowFinish = RowFinish(),
) -> NewRows:
    """Fill, match, break collisions and round once to the dtype of `base_rows`.

    Args:
        base_rows: [V, H] rows of the base matrix, without padding rows, any floating dtype.
        vocabulary, method, generator, matrix: see `fill_rows`.
        finish: what happens to the rows then.

    Raises:
        CheckpointError: as `fill_rows` does, and for "norm" or "variance" matching of rows without any spread.
    """
    filled = fill_rows(base_rows, vocabulary, method, generator, matrix=matrix)
    rows, weights = filled.rows, filled.weights
    if finish.byte_only is not None:
        bytes_alone = torch.tensor(vocabulary.byte_only(), dtype=torch.bool)
        other = fill_rows(base_rows, vocabulary, finish.byte_only, generator, matrix=matrix)
        rows = torch.where(bytes_alone[:, None], other.rows, rows)
        weights = _chosen(weights, other.weights, bytes_alone)
    rows = match_rows(rows, base_rows, finish.match)
    rounded = rows.to(base_rows.dtype)
    coincide = coinciding(rounded, base_rows)
    left = coincide
    if finish.break_collisions and coincide.any():
        noise = torch.randn(int(coincide.sum()), rows.shape[1], generator=generator)
        rows[coincide] += noise * finish.break_collisions * base_rows.float().std()
        rounded = rows.to(base_rows.dtype)
        left = coinciding(rounded, base_rows)
    return NewRows(rounded, method, finish.byte_only or method, weights, int(coincide.sum()), int(left.sum()))


def match_rows(rows: Tensor, base_rows: Tensor, match: Matching) -> Tensor:
    """The fp32 `rows` [N, H] with the norms that `RowFinish.match` describes; a row of norm zero stays zero."""
    if match == "none" or len(rows) == 0:
        return rows
    if match == "norm":
        return rows * (base_rows.float().norm(dim=1).median() / rows.norm(dim=1, keepdim=True).clamp_min(1e-12))
    mean = base_rows.float().mean(0)
    spread = (base_rows.float() - mean).square().sum(1).mean().sqrt()
    deviation = rows - mean
    return mean + deviation * (spread / deviation.norm(dim=1, keepdim=True).clamp_min(1e-12))


def _chosen(first: RowWeights | None, second: RowWeights | None, take_second: Tensor) -> RowWeights | None:
    """The entries of `first`, but those of `second` for the rows that `take_second` marks."""
    parts = [
        (part.owner[keep], part.ids[keep], part.weights[keep])
        for part, marked in ((first, ~take_second), (second, take_second))
        if part is not None
        for keep in (marked[part.owner],)
    ]
    if not parts:
        return None
    owner, ids, weights = (torch.cat(column) for column in zip(*parts, strict=True))
    return RowWeights(owner, ids, weights)


def make_rows(
    base: Path,
    vocabulary: NewVocabulary,
    *,
    embedding: InitMethod = "decomposition",
    head: InitMethod = "decomposition",
    finish: RowFinish = RowFinish(),
    seed: int = 0,
    first_new_row: int | None = None,
) -> dict[str, NewRows]:
    """New rows of every vocabulary tensor of a checkpoint, of which nothing else is read.

    Args:
        base: Hugging Face checkpoint.
        vocabulary: the new pieces.
        embedding, head: the method of each matrix; a tied head is the embedding. A head's bias follows the head.
        finish: what happens to the rows then; a bias is only filled.
        seed: of the random methods.
        first_new_row: tokens of the base tokenizer, where its matrices are padded with rows that no token has; those
            take no part, and are overwritten. None: as many as rows.

    Returns:
        By tensor name.

    Raises:
        CheckpointError: if a decomposition names an id outside the base vocabulary, or a matrix of the base has
            other rows than its configuration says.
    """
    reader = CheckpointReader(base)
    tokens = _base_tokens(reader, first_new_row)
    outside = [i for ids in vocabulary.decompositions for i in ids if not 0 <= i < tokens]
    if outside:
        raise CheckpointError(
            f"a new piece decomposes into token {outside[0]}, but {base} has only tokens 0 to {tokens - 1}: "
            "the tokenizer's base is not the checkpoint's tokenizer"
        )
    made = {}
    for name in _vocabulary_tensors(reader):
        tensor = _matrix(reader, name)[:tokens]
        # A seed of its own for each matrix, so that file order does not matter.
        generator = torch.Generator().manual_seed(seed * 2 + (name == LM_HEAD))
        matrix: Matrix = "embedding" if name == EMBEDDING else "head"
        method = embedding if name == EMBEDDING else head
        if name == LM_HEAD_BIAS:
            filled = fill_rows(tensor[:, None], vocabulary, method, generator, matrix=matrix)
            made[name] = NewRows(filled.rows[:, 0].to(tensor.dtype), method, method, filled.weights, 0, 0)
        else:
            made[name] = new_rows(tensor, vocabulary, method, generator, matrix=matrix, finish=finish)
    return made


def write_extended(
    base: Path,
    output: Path,
    rows: Mapping[str, Tensor],
    *,
    first_new_row: int | None = None,
    extra_files: Sequence[Path] = (),
    max_shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Write `base` with new rows behind its tokens', one tensor and one shard in memory at a time.

    Args:
        base: Hugging Face checkpoint.
        output: folder of the new checkpoint.
        rows: by tensor name, as many for each, in the tensor's dtype.
        first_new_row: see `make_rows`. Padding rows that the new ones do not reach stay.
        extra_files: copied into `output`, such as tokenizer files.
        max_shard_bytes: a new safetensors file begins before this size is passed.

    Raises:
        CheckpointError: if a vocabulary tensor of the base has no new rows, or others than the next one.
    """
    reader = CheckpointReader(base)
    tokens = _base_tokens(reader, first_new_row)
    missing = [name for name in _vocabulary_tensors(reader) if name not in rows]
    counts = {len(tensor) for tensor in rows.values()}
    if missing or len(counts) != 1:
        raise CheckpointError(f"all vocabulary tensors need the same number of new rows; {base}: {missing or counts}")
    for name in _vocabulary_tensors(reader):
        _matrix(reader, name)
    vocab_size = max(reader.config.vocab_size, tokens + counts.pop())

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in reader:
            if name == LM_HEAD and reader.config.tie_word_embeddings:
                continue  # a stored copy of the embedding: extended another way, it would untie the two
            if name in rows:
                new = rows[name]
                tensor = torch.cat((tensor[:tokens], new.to(tensor.dtype), tensor[tokens + len(new) :]))
            yield name, tensor

    config = replace(reader.config, vocab_size=vocab_size)
    write_checkpoint(output, config, tensors(), extra_files=extra_files, max_shard_bytes=max_shard_bytes)


def extend_checkpoint(
    base: Path,
    output: Path,
    vocabulary: NewVocabulary,
    *,
    embedding: InitMethod = "decomposition",
    head: InitMethod = "decomposition",
    finish: RowFinish = RowFinish(),
    seed: int = 0,
    first_new_row: int | None = None,
    extra_files: Sequence[Path] = (),
) -> dict[str, NewRows]:
    """`make_rows`, then `write_extended`; returns the rows."""
    made = make_rows(
        base, vocabulary, embedding=embedding, head=head, finish=finish, seed=seed, first_new_row=first_new_row
    )
    rows = {name: new.rows for name, new in made.items()}
    write_extended(base, output, rows, first_new_row=first_new_row, extra_files=extra_files)
    return made


def _base_tokens(reader: CheckpointReader, first_new_row: int | None) -> int:
    rows = reader.config.vocab_size
    if first_new_row is not None and not 0 < first_new_row <= rows:
        raise CheckpointError(f"{reader.folder} has {rows} rows, its tokenizer {first_new_row} pieces: not a pair")
    return rows if first_new_row is None else first_new_row


def _vocabulary_tensors(reader: CheckpointReader) -> list[str]:
    tied = reader.config.tie_word_embeddings
    return [name for name in VOCABULARY_TENSORS if name in reader.file_of and not (tied and name == LM_HEAD)]


def _matrix(reader: CheckpointReader, name: str) -> Tensor:
    tensor = reader.tensor(name)
    if len(tensor) != reader.config.vocab_size:
        raise CheckpointError(
            f"{name} of {reader.folder} has {len(tensor)} rows, its config.json says {reader.config.vocab_size}"
        )
    return tensor
