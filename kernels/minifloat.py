"""8-bit floats that share an exponent by block, rounded by a dither: optimizer states in a byte an entry.

A block of 256 numbers has one exponent T, a byte. A code of E exponent bits x and M mantissa bits f stands for 2^(T −
127) · 2^(x − 2^E + 1) · (1 + f / 2^M), and for x = 0, like the subnormal numbers of IEEE 754, for 2^(T − 127) · 2^(2
− 2^E) · f / 2^M. T is the least from 1 with which the largest code reaches the block's largest magnitude, so that
rounding never clips. T = 255 says that the block held a NaN, an infinity, or a magnitude of about 2^127 or more: all
its codes stand for NaN.

Scaled by 2^(2^E − 1 − T), a number's bits in fp32 begin with its code, subnormal ones included: encoding is two
multiplications by powers of two, an addition and a shift, decoding the reverse. Both backends agree in every bit.

The addition rounds. With a dither u from [0, 1) that covers the bits to be shifted out, a number goes to the next
larger code with the probability that leaves its mean unchanged. An entry's u is a random number, drawn once and for
all with Philox-4x32 (Salmon et al. 2011, doi 10.1145/2063384.2063405), plus the training step times the golden ratio,
modulo one. Each u alone is uniform, hence each rounding unbiased; those of successive steps fill [0, 1) evenly (Weyl
1916). A value that creeps by a hundredth of a code's width a step is thereby rounded up in every hundredth step,
where independent random numbers would add noise like the square root of that count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import tl, triton
from .philox import philox

BLOCK = 256
"""Entries that share an exponent."""
_WEYL_STEP = 0x9E3779B9  # 2^32 over the golden ratio


@triton.jit
def minifloat_decode(codes, exponents, EXPONENT_BITS: tl.constexpr, MANTISSA_BITS: tl.constexpr):
    """fp32 [K, 256] of uint8 `codes` [K, 256] and uint8 `exponents` [K, 1]; signed if there is a bit left for it."""
    codes, exponents = codes.to(tl.int32), exponents.to(tl.int32)
    scale = tl.where(exponents == 255, 0x7FC00000, exponents << 23).to(tl.float32, bitcast=True)
    bits = codes << (23 - MANTISSA_BITS)
    if EXPONENT_BITS + MANTISSA_BITS < 8:
        bits = (bits & (2 ** (23 + EXPONENT_BITS) - 1)) | ((codes >> 7) << 31)
    # Two factors: their product may lie beyond fp32's range.
    return bits.to(tl.float32, bitcast=True) * (2.0 ** (128 - 2**EXPONENT_BITS)) * scale


@triton.jit
def minifloat_encode(values, dither, EXPONENT_BITS: tl.constexpr, MANTISSA_BITS: tl.constexpr):
    """uint8 codes [K, 256] and uint8 exponents [K, 1] of fp32 `values`; `dither` is uint32 [K, 256], in units of 2^-32.

    Without a bit for the sign, `values` are at least 0, and those above 0 get no code of 0.
    """
    bits = values.to(tl.int32, bitcast=True)
    # As integers, magnitudes are ordered like the numbers, and NaN comes last.
    largest = tl.minimum(tl.max(bits & 0x7FFFFFFF, 1, keep_dims=True), 0x7F800000)
    exponents = tl.maximum((largest + (2 ** (23 - MANTISSA_BITS) - 1)) >> 23, 1)
    overflow = exponents >= 254
    exponents = tl.where(overflow, 255, exponents)
    scale = tl.where(overflow, 0, (254 - exponents) << 23).to(tl.float32, bitcast=True)
    scaled = (values * scale * (2.0 ** (2**EXPONENT_BITS - 128))).to(tl.int32, bitcast=True)
    scaled = scaled & tl.where(overflow, 0, 0x7FFFFFFF)
    codes = (scaled + (dither >> (9 + MANTISSA_BITS)).to(tl.int32)) >> (23 - MANTISSA_BITS)
    if EXPONENT_BITS + MANTISSA_BITS < 8:
        codes = codes | ((bits >> 24) & 128)
    else:
        codes = tl.maximum(codes, tl.where(bits != 0, 1, 0))
    return codes.to(tl.uint8), exponents.to(tl.uint8)


@triton.jit
def random_words(seed, number, first, stream, K: tl.constexpr):
    """uint32 [K, 256] of the entries from `first`, a multiple of 4, of tensor `number`: one Philox call for four."""
    quad = (first >> 2).to(tl.uint32) + (tl.arange(0, K)[:, None] * 64 + tl.arange(0, 64)[None, :]).to(tl.uint32)
    zero = quad & 0
    a, b, c, d = tl.philox(seed, quad, zero + number.to(tl.uint32), zero + stream, zero, n_rounds=7)  # pyright: ignore
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (K, 256))


@triton.jit
def dither_of(words, step):
    """uint32, in units of 2^-32: random `words`, advanced by `step` training steps."""
    return words + (step * 0x9E3779B9).to(tl.uint32)


def torch_decode(codes: Tensor, exponents: Tensor, exponent_bits: int, mantissa_bits: int) -> Tensor:
    """`minifloat_decode` in plain PyTorch, for uint8 [..., 256] and uint8 [..., 1]."""
    codes, exponents = codes.int(), exponents.int()
    scale = (exponents << 23).masked_fill(exponents == 255, 0x7FC00000).view(torch.float32)
    bits = codes << (23 - mantissa_bits)
    if exponent_bits + mantissa_bits < 8:
        bits = (bits & (2 ** (23 + exponent_bits) - 1)) | ((codes >> 7) << 31)
    return bits.view(torch.float32) * 2.0 ** (128 - 2**exponent_bits) * scale


def torch_encode(values: Tensor, dither: Tensor, exponent_bits: int, mantissa_bits: int) -> tuple[Tensor, Tensor]:
    """`minifloat_encode` in plain PyTorch, for fp32 [..., 256] and int64 [..., 256] below 2^32."""
    bits = values.view(torch.int32)
    largest = (bits & 0x7FFFFFFF).amax(-1, keepdim=True).clamp_max(0x7F800000)
    exponents = ((largest + (2 ** (23 - mantissa_bits) - 1)) >> 23).clamp_min(1)
    overflow = exponents >= 254
    exponents = exponents.masked_fill(overflow, 255)
    scale = ((254 - exponents) << 23).masked_fill(overflow, 0).view(torch.float32)
    scaled = (values * scale * 2.0 ** (2**exponent_bits - 128)).view(torch.int32)
    scaled = (scaled & 0x7FFFFFFF).masked_fill(overflow, 0)
    codes = (scaled + (dither >> (9 + mantissa_bits)).int()) >> (23 - mantissa_bits)
    signed = exponent_bits + mantissa_bits < 8
    codes = codes | ((bits >> 24) & 128) if signed else torch.maximum(codes, (bits != 0).int())
    return codes.to(torch.uint8), exponents.to(torch.uint8)


def torch_random_words(seed: int, number: int, first: int, count: int, stream: int, device: torch.device) -> Tensor:
    """int64 [count] below 2^32, `count` a multiple of 4: the numbers of `random_words` in plain PyTorch."""
    quads = torch.arange(first // 4, (first + count) // 4, device=device)
    return torch.stack(philox((quads, number, stream, 0), seed), -1).view(-1)


def torch_dither(words: Tensor, step: int) -> Tensor:
    """`dither_of` in plain PyTorch, as int64."""
    return (words + step * _WEYL_STEP) & 0xFFFFFFFF
