"""Ways to fill the rows of new vocabulary entries from the base's rows alone.

Every method gives fp32 rows. Those that combine base rows also give the weights, as provenance. `PAPER_METHODS` are the
five that the project's account of RedWhale (arXiv 2408.11294) names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .errors import CheckpointError
from .init_similarity import focus_weights, pursuit_weights

InitMethod = Literal[
    "random",
    "mean",
    "multivariate",
    "decomposition",
    "first",
    "length-weighted",
    "position-weighted",
    "exponential",
    "focus",
    "omp",
    "distillation",
]
Matrix = Literal["embedding", "head"]

PAPER_METHODS: tuple[InitMethod, ...] = ("random", "mean", "multivariate", "decomposition", "first")
SIMILARITY_METHODS = frozenset({"focus", "omp"})
"""Those that need `NewVocabulary.similarity`."""
EXPONENT = 2.0
"""AdaptiVocab's rate: each sub-token weighs e² times its neighbour."""


@dataclass(frozen=True)
class NewVocabulary:
    """What the methods know of the new pieces."""

    decompositions: Sequence[Sequence[int]]
    """Base ids that spell each new piece, in id order."""
    surfaces: Sequence[bytes] | None = None
    """Bytes of text that each base token stands for; needed by "length-weighted" and to tell byte-only pieces."""
    similarity: Tensor | None = None
    """[V + N, D] vectors of base tokens and new pieces in one other space, zero where a token has none; needed by
    "focus" and "omp"."""

    def byte_only(self) -> list[bool]:
        """For each new piece, whether its base tokens are bytes of characters, but for a space, and no text."""
        if self.surfaces is None:
            return [False] * len(self.decompositions)
        kinds = [_kind(surface) for surface in self.surfaces]
        return [{kinds[i] for i in ids} in ({"bytes"}, {"bytes", "space"}) for ids in self.decompositions]


@dataclass(frozen=True)
class RowWeights:
    """A sparse [N, V] matrix: row `owner[k]` takes `weights[k]` of base row `ids[k]`; all are [K]."""

    owner: Tensor
    ids: Tensor
    weights: Tensor

    def combine(self, base_rows: Tensor, count: int) -> Tensor:
        """[count, H] fp32 combinations of `base_rows`, computed some thousand entries at a time."""
        rows = torch.zeros(count, base_rows.shape[1])
        for begin in range(0, len(self.ids), 1 << 14):
            part = slice(begin, begin + (1 << 14))
            rows.index_add_(0, self.owner[part], base_rows[self.ids[part]].float() * self.weights[part, None])
        return rows


@dataclass(frozen=True)
class FilledRows:
    """[N, H] fp32 rows, and the base rows they combine where they do."""

    rows: Tensor
    weights: RowWeights | None = None


def fill_rows(
    base_rows: Tensor,
    vocabulary: NewVocabulary,
    method: InitMethod,
    generator: torch.Generator,
    *,
    matrix: Matrix = "embedding",
) -> FilledRows:
    """Rows of the new vocabulary entries by one method.

    Args:
        base_rows: [V, H] rows of the base matrix, without padding rows, any floating dtype.
        vocabulary: the new pieces.
        method: "random": normal, zero mean, the base's standard deviation. "mean": of all base rows. "multivariate":
            normal with the base rows' mean and covariance (Hewitt 2021; arXiv 2407.05841). "decomposition": mean of the
            sub-tokens' rows (RedWhale). "first": the first sub-token's row (EEVE, arXiv 2402.14714, for the head).
            "length-weighted", "position-weighted", "exponential": means weighted by bytes, by rank, and by powers of e²
            (AdaptiVocab, arXiv 2503.19693); the last two favour the last sub-token in the embedding, which a causal
            model reads last, and the first in the head, which it predicts first. "focus": similar tokens by sparsemax
            (FOCUS, arXiv 2305.14481). "omp": orthogonal matching pursuit (arXiv 2506.06607).
        generator: source of the random methods.
        matrix: which of the two the rows are for.

    Raises:
        CheckpointError: for an unknown method, one that needs what `vocabulary` lacks, and an empty decomposition.
    """
    if method == "random":
        rows = torch.randn(len(vocabulary.decompositions), base_rows.shape[1], generator=generator)
        return FilledRows(rows * base_rows.float().std())
    if method == "mean":
        return FilledRows(base_rows.float().mean(0).expand(len(vocabulary.decompositions), -1).clone())
    if method == "multivariate":
        return FilledRows(_multivariate(base_rows, len(vocabulary.decompositions), generator))
    if method == "distillation":
        raise CheckpointError('"distillation" fits rows with the whole model: use fit_input_rows, for the embedding')
    if method not in _WEIGHTS:
        raise CheckpointError(
            f"unknown initialisation {method!r}; known: {', '.join([*_WEIGHTS, 'random', 'mean', 'multivariate'])}"
        )
    if any(len(ids) == 0 for ids in vocabulary.decompositions):
        raise CheckpointError("a new piece decomposes into no base token at all")
    weights = _WEIGHTS[method](vocabulary, matrix)
    return FilledRows(weights.combine(base_rows, len(vocabulary.decompositions)), weights)


def _multivariate(base_rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    mean = base_rows.float().mean(0)
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for block in base_rows.split(4096):
        centred = (block.float() - mean).double()
        covariance += centred.T @ centred
    values, vectors = torch.linalg.eigh(covariance / max(1, len(base_rows) - 1))
    root = (vectors * values.clamp_min(0).sqrt()).float()  # root @ root.T is the covariance, singular or not
    return torch.randn(count, len(mean), generator=generator) @ root.T + mean


def sub_token_weights(vocabulary: NewVocabulary, weigh: Callable[[Sequence[int]], Sequence[float]]) -> RowWeights:
    """Weights over each piece's own sub-tokens; `weigh` gives those of one decomposition, in any scale."""
    owner, ids, weights = [], [], []
    for number, decomposition in enumerate(vocabulary.decompositions):
        values = weigh(decomposition)
        total = sum(values)
        owner += [number] * len(decomposition)
        ids += decomposition
        weights += [value / total for value in values]
    return RowWeights(
        torch.tensor(owner, dtype=torch.int64), torch.tensor(ids, dtype=torch.int64), torch.tensor(weights)
    )


def _equal(vocabulary: NewVocabulary, matrix: Matrix) -> RowWeights:
    return sub_token_weights(vocabulary, lambda ids: [1.0] * len(ids))


def _first(vocabulary: NewVocabulary, matrix: Matrix) -> RowWeights:
    return sub_token_weights(NewVocabulary([list(ids[:1]) for ids in vocabulary.decompositions]), lambda ids: [1.0])


def _by_length(vocabulary: NewVocabulary, matrix: Matrix) -> RowWeights:
    surfaces = vocabulary.surfaces
    if surfaces is None:
        raise CheckpointError('"length-weighted" needs the bytes that each base token stands for')
    return sub_token_weights(vocabulary, lambda ids: [float(max(1, len(surfaces[i]))) for i in ids])


def _by_position(vocabulary: NewVocabulary, matrix: Matrix) -> RowWeights:
    return sub_token_weights(vocabulary, lambda ids: [float(rank) for rank in _ranks(len(ids), matrix)])


def _exponential(vocabulary: NewVocabulary, matrix: Matrix) -> RowWeights:
    # Relative to the highest rank, so that long pieces do not overflow.
    return sub_token_weights(
        vocabulary, lambda ids: [math.e ** (EXPONENT * (r - len(ids))) for r in _ranks(len(ids), matrix)]
    )


def _ranks(length: int, matrix: Matrix) -> range:
    """Ranks 1 to `length`, the highest where the matrix looks."""
    return range(1, length + 1) if matrix == "embedding" else range(length, 0, -1)


def _similarity(vocabulary: NewVocabulary, method: str) -> Tensor:
    if vocabulary.similarity is None:
        raise CheckpointError(f'"{method}" needs vectors of old and new tokens in one other space')
    return vocabulary.similarity


def _focus(vocabulary: NewVocabulary, matrix: Matrix) -> RowWeights:
    found = focus_weights(_similarity(vocabulary, "focus"), len(vocabulary.decompositions))
    return _with_decomposition(found, vocabulary, matrix)


def _pursuit(vocabulary: NewVocabulary, matrix: Matrix) -> RowWeights:
    found = pursuit_weights(_similarity(vocabulary, "omp"), len(vocabulary.decompositions))
    return _with_decomposition(found, vocabulary, matrix)


def _with_decomposition(found: tuple[Tensor, Tensor, Tensor], vocabulary: NewVocabulary, matrix: Matrix) -> RowWeights:
    """The weights found, and those of decomposition for pieces that have none, having no vector."""
    owner, ids, weights = found
    fallback = _equal(vocabulary, matrix)
    missing = ~torch.isin(fallback.owner, owner)
    return RowWeights(
        torch.cat((owner, fallback.owner[missing])),
        torch.cat((ids, fallback.ids[missing])),
        torch.cat((weights, fallback.weights[missing])),
    )


_WEIGHTS: dict[str, Callable[[NewVocabulary, Matrix], RowWeights]] = {
    "decomposition": _equal,
    "first": _first,
    "length-weighted": _by_length,
    "position-weighted": _by_position,
    "exponential": _exponential,
    "focus": _focus,
    "omp": _pursuit,
}


def _kind(surface: bytes) -> Literal["bytes", "space", "text"]:
    try:
        return "text" if surface.decode().strip() else "space"
    except UnicodeDecodeError:
        return "bytes"
