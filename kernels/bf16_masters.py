"""fp32 masters of bf16 weights: kept in 16 further bits a weight, or rounded away without bias.

A bf16 weight is the upper half of its fp32 master, rounded to nearest, ties away from zero. 16 more bits keep what
that rounding took away, so that together they are the master, exactly. Ties go away from zero because the difference
then always fits 16 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .minifloat import torch_dither, torch_random_words

_NAN = 0x7FC00000
"""Other NaN, such as a GPU's with all mantissa bits set, would be rounded up to -0."""


def fp32_masters(weights: Tensor, low: Tensor) -> Tensor:
    """fp32 masters of flat weights: exact where there are low halves, else the weights themselves.

    Args:
        weights: [n], bf16 or fp32.
        low: int16 [n], or [0] without masters.

    Returns:
        fp32 [n]; of fp32 weights, the same memory.
    """
    if weights.dtype == torch.float32 or not len(low):
        return weights.float()
    return weights.view(torch.int16).int().bitwise_left_shift_(16).add_(low).view(torch.float32)


def store_nearest_(weights: Tensor, masters: Tensor, low: Tensor | None = None) -> None:
    """Round masters into bf16 weights, to nearest with ties away from zero; keep what that takes away in `low`.

    Args:
        weights: bf16 [n], overwritten.
        masters: fp32 [n], contiguous.
        low: int16 [n], overwritten; None to drop it.
    """
    bits = _bits(masters)
    if low is not None:
        low.copy_(bits.view(torch.int16)[::2])  # modulo 2^16, the low half and the difference are the same
    weights.view(torch.int16).copy_(bits.add_(0x8000).view(torch.int16)[1::2])


def store_stochastic_(weights: Tensor, masters: Tensor, *, seed: int, number: int, step: int, first: int) -> None:
    """Round masters into bf16 weights, up or down with the probabilities that leave the mean unchanged.

    The random numbers are a function of the seed, the tensor's number, the step and the entry (see `minifloat`).
    Masters that are bf16 numbers stay as they are.

    Args:
        weights: bf16 [n], overwritten.
        masters: fp32 [n], contiguous.
        seed: from 0 to 2^63 − 1.
        number: of the tensor, below 2^32.
        step: of training, from 1.
        first: the tensor's entry that `weights` begins with, a multiple of 4.
    """
    count = len(masters) + -len(masters) % 4
    words = torch_random_words(seed, number, first, count, 1, masters.device)[: len(masters)]
    bits = _bits(masters).add_(torch_dither(words, step) >> 16)
    weights.view(torch.int16).copy_(bits.view(torch.int16)[1::2])


def _bits(masters: Tensor) -> Tensor:
    return masters.view(torch.int32).masked_fill(masters.isnan(), _NAN)
