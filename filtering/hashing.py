"""Hashes of stretches of characters, made for whole batches with numpy and the same on every machine.

The hash of a stretch is a polynomial of its characters' hashes modulo 2^64, taken from prefix sums.
"""

import functools

import numpy as np

TABLE_SIZE = 0x20000
"""Characters from here on, rare CJK ideographs, share one hash."""

MULTIPLIERS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93))


def character_codes(text: str) -> np.ndarray:
    """Returns the code points of a text (intp), those beyond the table as its last."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    return np.minimum(codes, TABLE_SIZE - 1).astype(np.intp)


def character_hashes(text: str) -> np.ndarray:
    """Returns 64 well-mixed bits for each character of a text (uint64)."""
    return mixed_table().take(character_codes(text))


@functools.cache
def mixed_table() -> np.ndarray:
    """Well-mixed bits for every character code: the finaliser of SplitMix64."""
    mixed = np.arange(1, TABLE_SIZE + 1, dtype=np.uint64) * MULTIPLIERS[0]
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


class SpanHashes:
    """Polynomial hashes modulo 2^64 of any spans of a sequence of characters, given as well-mixed bits (uint64)."""

    def __init__(self, characters: np.ndarray):
        factors, self._inverses = _powers(max(1 << 18, 1 << len(characters).bit_length()))
        self._sums = np.zeros(len(characters) + 1, dtype=np.uint64)
        np.cumsum(characters * factors[: len(characters)], out=self._sums[1:])

    def __call__(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Returns the hashes of spans [start, end), wherever they lie (uint64)."""
        return (self._sums[ends] - self._sums[starts]) * self._inverses[starts]


@functools.lru_cache(maxsize=4)
def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Powers of the polynomials' base, and their inverses modulo 2^64 (uint64)."""
    base = int(MULTIPLIERS[1])
    factors = np.full(count, base, dtype=np.uint64)
    inverse_factors = np.full(count, pow(base, -1, 2**64), dtype=np.uint64)
    factors[0] = inverse_factors[0] = 1
    return np.cumprod(factors), np.cumprod(inverse_factors)
