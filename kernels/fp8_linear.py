"""Products with a frozen weight in FP8, forward and towards the input, from one copy of the weight.

Numbers are e4m3 (Micikevicius et al. 2022, arXiv 2209.05433): 4 bits of exponent, 3 of mantissa, at most 448, with one
fp32 scale a row so that the row's largest magnitude becomes 448. A weight W [O, I] has a scale for each output, an
activation or a gradient one for each token, found anew in each pass.

- y = x·Wᵀ: scales belong to rows of x and columns of y and so leave the sum: y[m, o] = s[m]·S[o]·Σ_i x̂[m, i]·Ŵ[o, i].
- dX = dY·W sums over outputs, along which W's scales differ. They go into dY before that is rounded: with
  g = dY·diag(S), quantised by row, dX[m, i] = s[m]·Σ_o ĝ[m, o]·Ŵ[o, i]. The same codes serve both directions, and
  layers that share an input need one product and no sum: their gradients lie side by side in ĝ, their codes below each
  other.

e4m3 for gradients too, not e5m2: with a scale for each token, the exponent has to cover the differences within a
token's gradient alone, for which 2^18 between the largest and the least code are enough, and a third bit of mantissa
halves the error.

FP8 tensor cores of Hopper read both operands along the inner dimension (`torch._scaled_mm` asks for a second factor
by columns). Forward finds W so; for dX its codes are transposed into a block that backward throws away: 2·O·I bytes of
traffic, at SOLAR's size and 8,192 tokens 3% of the product's time, where a second copy for good would cost as much
memory as bf16. FLOPs are those of bf16, at twice the rate. Quantising reads 2 bytes an entry and writes 1.

Elsewhere, and under Triton's interpreter, the products multiply the codes' values in fp32: the same numbers up to the
order of the sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .backend import Backend, use_triton
from .launch import ceil_div, kernel_op, launch, next_power_of_2, on_gpu, tl, triton

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""Largest finite number of e4m3."""
_LEAST = 1e-30
"""Rows of smaller numbers become zeros: their scale's inverse must be finite."""
MOST_PARTS = 3
"""Matrices that one row of codes can be made of, such as the gradients of q, k and v."""


class Fp8Rows(NamedTuple):
    """A matrix in e4m3 with a scale for each row: it stands for scales·codes."""

    codes: Tensor
    """[M, K] float8_e4m3fn."""
    scales: Tensor
    """[M, 1] fp32."""

    def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[M, K]: what the codes stand for."""
        return (self.codes.to(torch.float32) * self.scales).to(dtype)


@triton.jit
def e4m3_bits(values):
    """uint8 codes of fp32 `values` of at most 448, rounded to nearest, ties to even; 0x7F for NaN."""
    bits = values.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # The code of a normal number is the beginning of its bits in fp32, but for what is added to the exponent.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 8 * 120
    # Added to 2^23, a number is rounded to a whole one, which then ends its bits.
    subnormal = (tl.abs(values) * 512.0 + 8388608.0).to(tl.int32, bitcast=True) - 0x4B000000
    code = tl.where(magnitude < 0x3C800000, subnormal, tl.minimum(normal, 0x7F))
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _scaled_values(x, factors, column, columns, HAS_FACTORS: tl.constexpr):
    values = tl.load(x + column, column < columns, other=0.0).to(tl.float32)
    if HAS_FACTORS:
        values *= tl.load(factors + column, column < columns, other=0.0)
    return values


@triton.jit
def _largest_of(largest, x, factors, columns, HAS_FACTORS: tl.constexpr, BLOCK: tl.constexpr):
    for start in range(0, columns, BLOCK):
        values = _scaled_values(x, factors, start + tl.arange(0, BLOCK), columns, HAS_FACTORS)
        largest = tl.maximum(largest, tl.abs(values))
    return largest


@triton.jit
def _store_codes(codes, inverse, x, factors, columns, HAS_FACTORS: tl.constexpr, BLOCK: tl.constexpr):
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        values = _scaled_values(x, factors, column, columns, HAS_FACTORS) * inverse
        tl.store(codes + column, e4m3_bits(values), column < columns)


@triton.jit
def _quantise_rows(
    x0, x1, x2, factors0, factors1, factors2, codes, scales, stride0, stride1, stride2, columns0, columns1, columns2,
    PARTS: tl.constexpr, HAS_FACTORS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x0, x1, x2 = x0 + row * stride0, x1 + row * stride1, x2 + row * stride2
    codes += row * (columns0 + columns1 + columns2)
    largest = _largest_of(tl.zeros((BLOCK,), tl.float32), x0, factors0, columns0, HAS_FACTORS, BLOCK)
    if PARTS > 1:
        largest = _largest_of(largest, x1, factors1, columns1, HAS_FACTORS, BLOCK)
    if PARTS > 2:
        largest = _largest_of(largest, x2, factors2, columns2, HAS_FACTORS, BLOCK)
    peak = tl.maximum(tl.max(largest, 0), 1e-30)
    inverse = tl.div_rn(tl.zeros_like(peak) + 448.0, peak)
    tl.store(scales + row, peak * (1 / 448.0))
    # Read again: a row's numbers are in the cache.
    _store_codes(codes, inverse, x0, factors0, columns0, HAS_FACTORS, BLOCK)
    if PARTS > 1:
        _store_codes(codes + columns0, inverse, x1, factors1, columns1, HAS_FACTORS, BLOCK)
    if PARTS > 2:
        _store_codes(codes + columns0 + columns1, inverse, x2, factors2, columns2, HAS_FACTORS, BLOCK)


@triton.jit
def _transpose_bytes(x, y, rows, columns, y_stride, BLOCK: tl.constexpr):
    blocks = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // blocks * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    column = (tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tile = tl.load(x + row[:, None] * columns + column[None, :], inside, other=0)
    tl.store(y + column[:, None] * y_stride + row[None, :], tl.trans(tile), tl.trans(inside))


def _fake_quantise(parts: Sequence[Tensor], factors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    rows, columns = len(parts[0]), sum(part.shape[1] for part in parts)
    codes = parts[0].new_empty(rows, columns, dtype=E4M3)
    return codes, parts[0].new_empty(rows, 1, dtype=torch.float32)


@kernel_op(fake=_fake_quantise)
def triton_quantise_rows(parts: Sequence[Tensor], factors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    codes, scales = _fake_quantise(parts, factors)
    matrices = [part if part.stride(1) == 1 else part.contiguous() for part in parts]
    sizes = [matrix.shape[1] for matrix in matrices]
    absent = MOST_PARTS - len(matrices)
    # Absent tensors are never read; the kernel takes one in their places.
    given = [*matrices, *absent * [scales]]
    weights = [*factors, *absent * [scales]] if factors else MOST_PARTS * [scales]
    block = min(2048, next_power_of_2(max(sizes)))
    launch(
        *(_quantise_rows, (len(scales),)),
        *(*given, *weights, codes.view(torch.uint8), scales),
        *(*(matrix.stride(0) for matrix in given), *sizes, *absent * [0]),
        PARTS=len(matrices),
        HAS_FACTORS=bool(factors),
        BLOCK=block,
        num_warps=min(8, max(1, block // 256)),
    )
    return codes, scales


def torch_quantise_rows(parts: Sequence[Tensor], factors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """`triton_quantise_rows` in plain PyTorch."""
    values = [part.float() for part in parts]
    if factors:
        values = [value * factor.view(1, -1) for value, factor in zip(values, factors, strict=True)]
    together = values[0] if len(values) == 1 else torch.cat(values, 1)
    del values
    peak = together.abs().amax(1, keepdim=True).clamp_min(_LEAST)
    inverse = torch.full_like(peak, LARGEST) / peak  # not a multiple of the reciprocal, which is rounded twice
    return (together * inverse).to(E4M3), peak * (1 / LARGEST)


def _fake_transposed(matrices: Sequence[Tensor]) -> Tensor:
    return matrices[0].new_empty(matrices[0].shape[1], sum(map(len, matrices)))


@kernel_op(fake=_fake_transposed)
def triton_transposed(matrices: Sequence[Tensor]) -> Tensor:
    transposed = _fake_transposed(matrices)
    target, first, block = transposed.view(torch.uint8), 0, 64
    for matrix in matrices:
        rows, columns = matrix.shape
        launch(
            *(_transpose_bytes, (ceil_div(rows, block) * ceil_div(columns, block),)),
            *(matrix.view(torch.uint8), target[:, first:], rows, columns, target.stride(0)),
            BLOCK=block,
            num_warps=4,
        )
        first += rows
    return transposed


def torch_transposed(matrices: Sequence[Tensor]) -> Tensor:
    """[I, ΣO] of matrices of bytes [O_i, I], side by side."""
    transposed = _fake_transposed(matrices)
    target, first = transposed.view(torch.uint8), 0
    for matrix in matrices:
        target[:, first : first + len(matrix)] = matrix.view(torch.uint8).T
        first += len(matrix)
    return transposed


def quantise_rows(
    parts: Sequence[Tensor], factors: Sequence[Tensor] = (), *, backend: Backend | None = None
) -> Fp8Rows:
    """Matrices side by side in e4m3, with one scale for each row of all of them together.

    Args:
        parts: one to three matrices [M, K_i], fp32, bf16 or fp16.
        factors: if given, [K_i] or [K_i, 1] fp32 each: columns are multiplied by them first.
        backend: see `Backend`; None for the global choice.

    Returns:
        [M, ΣK_i]. Codes are rounded to nearest. A row with a NaN or an infinity has a NaN.

    Raises:
        ValueError: for no matrix, or more than three.
    """
    if not 1 <= len(parts) <= MOST_PARTS:
        raise ValueError(f"{len(parts)} matrices side by side: quantise_rows takes 1 to {MOST_PARTS}")
    kernels = use_triton(backend, *parts)
    return Fp8Rows(*(triton_quantise_rows if kernels else torch_quantise_rows)(list(parts), list(factors)))


def _library_product(
    a: Tensor, b: Tensor, row_scales: Tensor, column_scales: Tensor, dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    """a·b by the library, b by columns; sums stay in the tensor cores, which keep fewer bits than fp32."""
    scaled_mm = torch._scaled_mm  # type: ignore[attr-defined]
    return scaled_mm(a, b, row_scales, column_scales, bias=bias, out_dtype=dtype, use_fast_accum=True)


def fp8_linear(x: Fp8Rows, weight: Fp8Rows, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """x·Wᵀ + bias, [M, O] in `dtype` (bf16 on a GPU), with sums in fp32.

    Args:
        x: [M, I].
        weight: [O, I].
        dtype: of the result.
        bias: [O], in that dtype.
    """
    if on_gpu(x.codes):
        return _library_product(x.codes, weight.codes.t(), x.scales, weight.scales.view(1, -1), dtype, bias)
    y = x.codes.float() @ weight.codes.float().T
    y.mul_(x.scales).mul_(weight.scales.view(1, -1))
    return (y if bias is None else y.add_(bias)).to(dtype)


def fp8_input_gradient(
    grads: Sequence[Tensor], weights: Sequence[Fp8Rows], *, backend: Backend | None = None
) -> Tensor:
    """Σ dY_i·W_i over layers that share their input, [M, I] in the dtype of the gradients, with sums in fp32.

    Args:
        grads: one to three [M, O_i].
        weights: [O_i, I] each.
        backend: see `Backend`; None for the global choice.
    """
    codes, scales = quantise_rows(grads, [weight.scales for weight in weights], backend=backend)
    matrices = [weight.codes for weight in weights]
    if on_gpu(codes):
        transposed = (triton_transposed if use_triton(backend, *grads) else torch_transposed)(matrices)
        ones = scales.new_ones(1, len(transposed))
        return _library_product(codes, transposed.t(), scales, ones, grads[0].dtype)
    parts = codes.float().split([len(matrix) for matrix in matrices], 1)
    grad_x = parts[0] @ matrices[0].float()
    for part, matrix in zip(parts[1:], matrices[1:], strict=True):
        grad_x.addmm_(part, matrix.float())
    return grad_x.mul_(scales).to(grads[0].dtype)
