"""Best-fit decreasing bin packing: whole examples into as few sequences as it can."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .errors import DataError


def best_fit_decreasing(lengths: Sequence[int], capacity: int, seed: int) -> list[list[int]]:
    """Pack items, longest first, each into the fullest bin that has room for it.

    At most 11/9 of the fewest possible bins, plus one (Johnson et al. 1974, SIAM J. Comput. 3(4)). Takes O(n log n +
    n · capacity / 64) time.

    Args:
        lengths: sizes of the items, in tokens.
        capacity: size of a bin, in tokens.
        seed: decides which of equally long items comes first, and the order of the bins.

    Returns:
        Indices into `lengths` by bin, in bins of at most `capacity`; every item is in one of them.

    Raises:
        DataError: for an item that is longer than a bin.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(sizes) and sizes.max() > capacity:
        raise DataError(
            f"example {int(sizes.argmax())} has {int(sizes.max())} tokens, more than the {capacity} of a sequence: "
            "leave it out, cut it, or raise sequence_length"
        )
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(sizes))
    order = shuffled[np.argsort(-sizes[shuffled], kind="stable")].tolist()
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # bins by the room they have left
    rooms = 0  # bit r is set where a bin has room r
    for item in order:
        size = int(sizes[item])
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            chosen = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(item)
        with_room[room - size].append(chosen)
        rooms |= 1 << (room - size)
    return [bins[index] for index in rng.permutation(len(bins))]
