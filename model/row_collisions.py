"""Which rows coincide: tokens that a model cannot tell apart."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = 1e-3
"""Distance, relative to a row's norm, up to which it coincides with another: sums of the same rows in another order
differ in the last place, which is less in every dtype, and noise that is to tell rows apart should be more."""
_DIRECTIONS = 64
_BLOCK = 512


def coinciding(rows: Tensor, base_rows: Tensor, tolerance: float = TOLERANCE) -> Tensor:
    """Which rows are those of a base row, or of an earlier new row, up to rounding.

    Equal bits are found by hashing. Distances are computed for those pairs alone that are near in a projection onto a
    few random directions, which shortens every distance.

    Args:
        rows: [N, H] new rows, any floating dtype.
        base_rows: [V, H] of the same dtype.
        tolerance: most distance, relative to the row's norm.

    Returns:
        [N] bool.
    """
    found = _same_bits(rows, base_rows)
    left = (~found).nonzero()[:, 0]
    if len(left) == 0:
        return found
    size = rows.shape[1]
    directions = torch.randn(size, min(size, _DIRECTIONS), generator=torch.Generator().manual_seed(0))
    directions = torch.linalg.qr(directions).Q
    base = torch.cat([block.float() @ directions for block in base_rows.split(_BLOCK)])
    fresh = torch.cat([block.float() @ directions for block in rows[left].split(_BLOCK)])
    reach = tolerance * torch.cat([block.float().norm(dim=1) for block in rows[left].split(_BLOCK)])
    # |a − b|² ≤ reach² in one product: (2a, −1)·(b, |b|²) ≥ |a|² − reach², but for what fp32 loses in the difference.
    lengths = fresh.square().sum(1)
    least = lengths * (1 - 1e-6) - reach.square()
    others = torch.cat((base, fresh))
    others = torch.cat((others, others.square().sum(1, keepdim=True)), 1)
    seekers = torch.cat((2 * fresh, -torch.ones(len(fresh), 1)), 1)

    def coincide(number: Tensor, place: Tensor) -> Tensor:
        """Whether new rows `number` are those at `place` in `others`, each with its own."""
        is_base = place < len(base)
        second = rows[left[(place - len(base)).clamp_min(0)]].float()
        second[is_base] = base_rows[place[is_base]].float()
        first = rows[number].float()
        return (first - second).norm(dim=1) <= tolerance * first.norm(dim=1)

    for begin in range(0, len(left), _BLOCK):
        end = min(begin + _BLOCK, len(left))
        near = seekers[begin:end] @ others[: len(base) + end].T >= least[begin:end, None]
        near[:, len(base) + begin :] = near[:, len(base) + begin :].tril(-1)  # earlier rows alone
        seeking = near.any(1).nonzero()[:, 0]
        # One candidate each to begin with: where a base has thousands of rows alike, it settles most.
        number = left[begin + seeking]
        found[number] = coincide(number, near[seeking].int().argmax(1))
        seeking = seeking[~found[number]]
        one, other = near[seeking].nonzero(as_tuple=True)
        number = left[begin + seeking[one]]
        for pairs in range(0, len(number), _BLOCK):
            some = number[pairs : pairs + _BLOCK]
            found[some[coincide(some, other[pairs : pairs + _BLOCK])]] = True
    return found


def _same_bits(rows: Tensor, base_rows: Tensor) -> Tensor:
    seen: set[int] = set()
    for block in base_rows.split(_BLOCK):
        seen.update(map(hash, _row_bytes(block)))
    # Hashes alone stay in memory; two different rows share one with a probability of N·V / 2⁶⁴.
    found = []
    for block in rows.split(_BLOCK):
        for row in _row_bytes(block):
            found.append(hash(row) in seen)
            seen.add(hash(row))
    return torch.tensor(found, dtype=torch.bool)


def _row_bytes(rows: Tensor) -> list[bytes]:
    return [row.tobytes() for row in rows.contiguous().view(torch.uint8).numpy()] if len(rows) else []
