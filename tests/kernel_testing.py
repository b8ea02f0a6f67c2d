"""What the tests of kernels share. Without a GPU, Triton kernels run in Triton's interpreter on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = ["torch", "triton"]

EPSILON = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}
"""Relative error of rounding once; for bf16 that of truncation, which is what Triton's interpreter does."""


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normal numbers that depend on the seed and the shape alone."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64; NaN never passes a comparison with it."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-300))


def strided(x: Tensor) -> Tensor:
    """The same values with other numbers between the rows and between the entries of a row."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 3), float("nan"), dtype=x.dtype, device=x.device)
    view = wide[..., 1 : 2 * x.shape[-1] + 1 : 2]
    return view.copy_(x)


def far_rows(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """[rows, columns] whose last row begins more than 2^31 entries behind the first, without using that much memory.

    The pages in between are never touched, so the system does not provide them.
    """
    stride = 2**31 // max(1, rows - 1) + 8
    assert stride < 2**31  # it is given to kernels as an int32: only the product passes the limit
    storage = torch.empty((rows - 1) * stride + columns, dtype=dtype, device=DEVICE)
    return storage.as_strided((rows, columns), (stride, 1))
