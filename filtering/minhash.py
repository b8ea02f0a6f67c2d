"""MinHash over characters: shingles of a batch of texts, their band keys for locality-sensitive hashing, exact Jaccard.

White space is left out, since Korean writers and crawlers differ in their spacing more than in anything else: two texts
that differ in spaces alone have the same shingles. All hashes are 64-bit and the same on every machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .hashing import MULTIPLIERS, SpanHashes, character_hashes

VERSION = 1
"""Of the shingles and the band keys: results of two versions cannot be compared."""

SHINGLE = 8
"""Characters of a shingle, white space left out: some three words."""

BANDS = 16
ROWS = 8
"""Two texts are compared when all rows of one band agree: probability 1 - (1 - J^8)^16, 0.994 at a Jaccard of 0.85."""

_PERMUTATIONS = 8
_BINS = BANDS * ROWS // _PERMUTATIONS
_BIN_BITS = _BINS.bit_length() - 1
_EMPTY = np.uint64(2**64 - 1)
_GENERATOR = np.random.Generator(np.random.PCG64(20241127))
# Odd, so that multiplication modulo 2^64 is a permutation.
_FACTORS = _GENERATOR.integers(2**62, 2**64 - 1, _PERMUTATIONS, dtype=np.uint64, endpoint=True) | np.uint64(1)
# Where an empty bin takes its value from, attempt by attempt.
_DONORS = np.stack([_GENERATOR.permutation(_BINS) for _ in range(4 * _BINS)])
_OWNER_BITS, _HASH_BITS = np.uint64(16), np.uint64(48)
_FOLD = MULTIPLIERS[1]


@dataclass(frozen=True, slots=True)
class Shingles:
    """Hashes of the shingles of a batch of texts (uint64), and the text of each (intp, ascending)."""

    hashes: np.ndarray
    text: np.ndarray
    texts: int


def shingles(texts: Sequence[str]) -> Shingles:
    """Hashes every run of `SHINGLE` characters of each text, white space left out; a shorter text is one shingle."""
    squeezed = ["".join(text.split()) for text in texts]
    sizes = np.fromiter(map(len, squeezed), dtype=np.int64, count=len(squeezed))
    span_hashes = SpanHashes(character_hashes("".join(squeezed)))
    counts = np.where(sizes > 0, np.maximum(sizes - SHINGLE + 1, 1), 0)
    text = np.repeat(np.arange(len(texts)), counts)
    first = np.cumsum(sizes) - sizes
    start = np.arange(len(text)) - (np.cumsum(counts) - counts)[text] + first[text]
    end = np.minimum(start + SHINGLE, (first + sizes)[text])
    hashes = span_hashes(start, end)
    # The low bits of a polynomial modulo 2^64 are those of few characters.
    hashes ^= hashes >> np.uint64(32)
    hashes *= _FOLD
    hashes ^= hashes >> np.uint64(29)
    return Shingles(hashes, text, len(texts))


def band_keys(batch: Shingles) -> np.ndarray:
    """Returns uint64 [texts, BANDS]; two texts may be near-duplicates where a column agrees.

    One permutation hashing with optimal densification (arXiv 1703.04664), eight permutations of 16 bins each. A row of
    a band is a bin of another permutation, so that the rows are independent; a pair of texts with Jaccard J agrees in
    a row with probability J.
    """
    least = np.full(batch.texts * _PERMUTATIONS * _BINS, _EMPTY)
    for permutation, factor in enumerate(_FACTORS):
        values = batch.hashes * factor
        place = (values >> np.uint64(64 - _BIN_BITS)).astype(np.intp)
        place += batch.text * (_PERMUTATIONS * _BINS) + permutation * _BINS
        np.minimum.at(least, place, values)
    least = least.reshape(batch.texts, _PERMUTATIONS, _BINS)
    _fill_empty_bins(least)
    keys = np.zeros((batch.texts, BANDS), dtype=np.uint64)
    rows = least.reshape(batch.texts, _PERMUTATIONS, BANDS, -1)
    for permutation in range(_PERMUTATIONS):
        for row in range(rows.shape[3]):
            keys = (keys ^ rows[:, permutation, :, row]) * _FOLD
            keys ^= keys >> np.uint64(31)
    return keys


def _fill_empty_bins(least: np.ndarray) -> None:
    lacking = np.flatnonzero((least == _EMPTY).any(axis=(1, 2)))
    if not len(lacking):
        return
    found = least[lacking]
    filled = found.copy()
    for attempt, donors in enumerate(_DONORS):
        empty = filled == _EMPTY
        if not empty.any():
            break
        # Another attempt must not give the value of an earlier one.
        filled = np.where(empty & (found[:, :, donors] != _EMPTY), found[:, :, donors] + np.uint64(attempt + 1), filled)
    least[lacking] = filled


def jaccard(batch: Shingles, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Returns the Jaccard similarity of the shingle sets of the texts `left[i]` and `right[i]`, as float64.

    Exact but for hashes of 48 bits that collide. At most 65,536 texts and as many pairs.
    """
    hashes = _owned(batch.hashes, batch.text)
    hashes.sort()
    fresh = np.ones(len(hashes), dtype=bool)
    np.not_equal(hashes[1:], hashes[:-1], out=fresh[1:])
    hashes = hashes[fresh]
    sizes = np.bincount((hashes >> _HASH_BITS).astype(np.intp), minlength=batch.texts)
    first = np.cumsum(sizes) - sizes
    # The sets of both texts of a pair one after the other: what occurs twice in a pair is common.
    texts = np.stack((left, right), axis=1).reshape(-1)
    size = sizes[texts]
    where = np.repeat(first[texts] - (np.cumsum(size) - size), size) + np.arange(size.sum())
    both = _owned(hashes[where] << _OWNER_BITS, np.repeat(np.arange(len(texts)) >> 1, size))
    both.sort()
    twice = both[1:][both[1:] == both[:-1]] >> _HASH_BITS
    common = np.bincount(twice.astype(np.intp), minlength=len(left))
    return common / np.maximum(size[::2] + size[1::2] - common, 1)


def _owned(hashes: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """The owner of each hash in the high bits and 48 bits of the hash below, so that one sort groups by both."""
    return (hashes >> _OWNER_BITS) | (owner.astype(np.uint64) << _HASH_BITS)
