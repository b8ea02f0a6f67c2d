"""Another space in which old and new tokens have vectors, and what its neighbourhoods say about base rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .errors import CheckpointError


def cooccurrence_vectors(
    documents: Iterable[Tensor], vocab_size: int, *, dimensions: int = 64, window: int = 4, seed: int = 0
) -> Tensor:
    """Token vectors from a corpus: truncated SVD of the positive pointwise mutual information.

    Levy and Goldberg (2014) show that skip-gram factorises this matrix implicitly; here it takes seconds, needs no
    learning rate, and gives the same bits for the same seed.

    Args:
        documents: token ids of texts under the hybrid tokenizer, [T] int64 each.
        vocab_size: V + N, of the hybrid tokenizer.
        dimensions: D, at most.
        window: tokens to each side that count as neighbours, all alike.
        seed: of the randomised SVD.

    Returns:
        [vocab_size, D] fp32 rows of unit length, since lengths follow frequency; zero for tokens without neighbours.

    Raises:
        CheckpointError: if no two tokens are neighbours.
    """
    keys, counts = torch.empty(0, dtype=torch.int64), torch.empty(0)
    pending: list[Tensor] = []
    waiting = 0

    def merged() -> tuple[Tensor, Tensor]:
        new = torch.cat(pending) if pending else keys[:0]
        unique, place = torch.unique(torch.cat((keys, new)), return_inverse=True)
        total = torch.zeros(len(unique)).index_add_(0, place, torch.cat((counts, torch.ones(len(new)))))
        return unique, total

    for ids in documents:
        for distance in range(1, min(window, len(ids) - 1) + 1):
            pending.append(ids[:-distance] * vocab_size + ids[distance:])
            pending.append(ids[distance:] * vocab_size + ids[:-distance])
            waiting += 2 * (len(ids) - distance)
        if waiting > 1 << 23:  # pairs are folded into their counts before they fill the memory
            (keys, counts), pending, waiting = merged(), [], 0
    keys, counts = merged()
    if len(keys) == 0:
        raise CheckpointError("the corpus for token vectors holds no two neighbouring tokens: give it more text")
    left, right = keys // vocab_size, keys % vocab_size
    token = torch.zeros(vocab_size, dtype=torch.float64).index_add_(0, left, counts.double())
    information = (counts.double() * token.sum() / (token[left] * token[right])).log()
    kept = information > 0
    if not kept.any():
        raise CheckpointError("all tokens of the corpus for token vectors are neighbours alike: give it more text")
    seen, place = torch.unique(left[kept], return_inverse=True)
    column = torch.searchsorted(seen, right[kept])  # the matrix is symmetric: the same tokens
    matrix = torch.sparse_coo_tensor(
        torch.stack((place, column)), information[kept].float(), (len(seen), len(seen)), check_invariants=True
    ).coalesce()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rank = min(dimensions, len(seen))
        left_vectors, values, _ = torch.svd_lowrank(matrix, q=min(rank + 8, len(seen)), niter=4)
    vectors = torch.zeros(vocab_size, rank)
    vectors[seen] = torch.nn.functional.normalize(left_vectors[:, :rank] * values[:rank].sqrt(), dim=1)
    return vectors


def sparsemax(scores: Tensor) -> Tensor:
    """Euclidean projection of each row [..., K] onto the probability simplex (Martins and Astudillo 2016)."""
    ordered = scores.sort(-1, descending=True).values
    sums = ordered.cumsum(-1)
    ranks = torch.arange(1, scores.shape[-1] + 1, dtype=scores.dtype, device=scores.device)
    support = (1 + ranks * ordered > sums).sum(-1, keepdim=True)
    threshold = (sums.gather(-1, support - 1) - 1) / support
    return (scores - threshold).clamp_min(0)


def _spaces(similarity: Tensor, new: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit vectors of base tokens and of new pieces that have one, each with its numbers."""
    norms = similarity.norm(dim=1)
    unit = similarity / norms.clamp_min(1e-12)[:, None]
    has = norms > 0
    base = has[: len(has) - new].nonzero()[:, 0]
    fresh = has[len(has) - new :].nonzero()[:, 0]
    return unit[base], base, unit[fresh + len(has) - new], fresh


def focus_weights(similarity: Tensor, new: int, *, block: int = 512) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of overlapping tokens by the sparsemax of cosine similarities (FOCUS, arXiv 2305.14481).

    Args:
        similarity: [V + N, D]; the last `new` rows are the new pieces', zero rows have no vector.
        new: N.
        block: new pieces whose similarities are in memory at a time.

    Returns:
        (owner, base ids, weights), each [K]; nothing for pieces without a vector.
    """
    base, base_ids, fresh, numbers = _spaces(similarity, new)
    parts = []
    for begin in range(0, len(fresh) if len(base) else 0, block):
        weights = sparsemax(fresh[begin : begin + block] @ base.T)
        row, column = weights.nonzero(as_tuple=True)
        parts.append((numbers[begin + row], base_ids[column], weights[row, column]))
    return _joined(parts)


def pursuit_weights(
    similarity: Tensor, new: int, *, sparsity: int = 8, block: int = 512
) -> tuple[Tensor, Tensor, Tensor]:
    """Least-squares weights of the base tokens that orthogonal matching pursuit picks (arXiv 2506.06607).

    Args:
        similarity: as in `focus_weights`: vectors of the second vocabulary, which explain a new piece's vector.
        new: N.
        sparsity: base tokens for each piece, at most.
        block: new pieces at a time.

    Returns:
        (owner, base ids, weights), each [K]; nothing for pieces without a vector.
    """
    base, base_ids, fresh, numbers = _spaces(similarity, new)
    lengths = similarity.norm(dim=1)
    parts = []
    for begin in range(0, len(fresh) if len(base) else 0, block):
        target = fresh[begin : begin + block]
        residual, picked = target, torch.empty(len(target), 0, dtype=torch.int64)
        weights = target.new_empty(len(target), 0)
        for _ in range(min(sparsity, len(base), base.shape[1])):
            match = (residual @ base.T).abs()
            match.scatter_(1, picked, -1.0)
            picked = torch.cat((picked, match.argmax(1, keepdim=True)), 1)
            atoms = base[picked]  # [B, k, D]
            gram = atoms @ atoms.transpose(1, 2)
            # A ridge of 1e-6: two tokens may have the same vector.
            gram += 1e-6 * torch.eye(gram.shape[1])
            weights = torch.linalg.solve(gram, (atoms @ target[:, :, None]))[:, :, 0]
            residual = target - (weights[:, None] @ atoms)[:, 0]
        owner = numbers[begin : begin + block, None].expand_as(picked)
        ids = base_ids[picked]
        # The fit was on unit vectors: the weights of the vectors themselves carry their lengths.
        scale = lengths[len(lengths) - new + owner] / lengths[ids]
        parts.append((owner.flatten(), ids.flatten(), (weights * scale).flatten()))
    return _joined(parts)


def _joined(parts: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    if not parts:
        empty = torch.empty(0, dtype=torch.int64)
        return empty, empty, torch.empty(0)
    owner, ids, weights = (torch.cat(column) for column in zip(*parts, strict=True))
    return owner, ids, weights


def second_vocabulary_vectors(
    second_rows: Tensor,
    second_surfaces: Sequence[bytes],
    surfaces: Sequence[bytes],
    new_decompositions: Sequence[Sequence[int]],
) -> Tensor:
    """Vectors of the hybrid vocabulary from another model's embedding, for "omp" as in mergekit's token surgery.

    Args:
        second_rows: [W, D] embedding of the other model, any floating dtype.
        second_surfaces: bytes of text that its tokens stand for, in id order, none for special ones.
        surfaces: the same of the hybrid vocabulary.
        new_decompositions: for each of the last tokens, the new ones, the other model's ids that spell it.

    Returns:
        [V + N, D] fp32: the row of the token of the same bytes; for a new one that the other vocabulary lacks, the mean
        of the rows that spell it; zero for others.
    """
    # Of tokens that share their bytes, the last: <0x41>, which comes first, is a fallback that no text has beside "A".
    second = {surface: index for index, surface in enumerate(second_surfaces) if surface}
    own = {surface: index for index, surface in enumerate(surfaces) if surface}
    vectors = torch.zeros(len(surfaces), second_rows.shape[1])
    first_new_row = len(surfaces) - len(new_decompositions)
    for number, ids in enumerate(new_decompositions):
        vectors[first_new_row + number] = second_rows[list(ids)].float().mean(0)
    for surface, index in own.items():
        if surface in second:
            vectors[index] = second_rows[second[surface]].float()
    return vectors
