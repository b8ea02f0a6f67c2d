"""Philox-4x32-7 (Salmon et al. 2011, doi 10.1145/2063384.2063405) in plain PyTorch: the words of `tl.philox`."""

from __future__ import annotations

from torch import Tensor

_ROUNDS = 7
"""The fewest that pass all statistical tests of the paper; the kernels name it as a literal."""
_WORD = 0xFFFFFFFF


def _high_and_low(a: Tensor | int, constant: int) -> tuple[Tensor | int, Tensor | int]:
    product = a * constant  # of tensors, it wraps modulo 2^64, which leaves both 32-bit halves right
    return (product >> 32) & _WORD, product & _WORD


def philox(counter: tuple[Tensor | int, Tensor | int, Tensor | int, Tensor | int], seed: Tensor | int) -> list:
    """Four words below 2^32 of a counter of four.

    Args:
        counter: int64 tensors that broadcast, or ints, each below 2^32. Small ones stay small for the first rounds.
        seed: 64 bits, as an int or an int64 tensor.

    Returns:
        Four int64 tensors of the shape that the counter's words broadcast to.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(_ROUNDS):
        high0, low0 = _high_and_low(c0, 0xD2511F53)
        high2, low2 = _high_and_low(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return [c0, c1, c2, c3]
