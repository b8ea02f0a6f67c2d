"""The operations of kernels/ at given shapes, as the other scripts here compile, check and time them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from redwhale.kernels.dropout import dropout_seed, seeded_dropout
from redwhale.kernels.rms_norm import add_rms_norm, rms_norm


@dataclass(frozen=True)
class Shapes:
    """Sizes of a model and of the batch that goes through it."""

    tokens: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    ranks: tuple[int, ...]


SOLAR = Shapes(8192, 4096, 14_336, 32, 8, 128, 49_152, (16, 64, 128))
"""SOLAR-10.7B with RedWhale's vocabulary, padded, and 8,192 tokens."""
SMALL = Shapes(256, 128, 352, 4, 2, 32, 1_024, (8,))
"""Small enough for Triton's interpreter on a CPU."""

Run = Callable[[], object]
CASES: dict[str, Callable[[Shapes, torch.device, torch.dtype], Run]] = {}
"""By name: makes inputs of those shapes on that device, and returns forward and backward on them with Triton."""


def case(name: str) -> Callable[[Callable], Callable]:
    """Add a function to `CASES`."""

    def decorate(make: Callable[[Shapes, torch.device, torch.dtype], Run]) -> Callable:
        CASES[name] = make
        return make

    return decorate


def random(*shape: int, device: torch.device, dtype: torch.dtype, grad: bool = True) -> Tensor:
    """Normal numbers, or only their shape on `meta`."""
    return torch.randn(shape, device=device, dtype=dtype).requires_grad_(grad)


@case("rms_norm")
def _rms_norm(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Run:
    x = random(shapes.tokens, shapes.hidden, device=device, dtype=dtype)
    weight = random(shapes.hidden, device=device, dtype=dtype)
    upstream = random(shapes.tokens, shapes.hidden, device=device, dtype=dtype, grad=False)
    return lambda: rms_norm(x, weight, backend="triton").backward(upstream)


@case("add_rms_norm")
def _add_rms_norm(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Run:
    x, residual = (random(shapes.tokens, shapes.hidden, device=device, dtype=dtype) for _ in range(2))
    weight = random(shapes.hidden, device=device, dtype=dtype, grad=False)
    upstream = random(shapes.tokens, shapes.hidden, device=device, dtype=dtype, grad=False)
    return lambda: torch.autograd.backward(add_rms_norm(x, residual, weight, backend="triton"), (upstream, upstream))


@case("seeded_dropout")
def _seeded_dropout(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Run:
    x = random(shapes.tokens, shapes.hidden, device=device, dtype=dtype)
    seed = dropout_seed(device)
    return lambda: seeded_dropout(x, seed, 0.05, backend="triton").backward(x.detach())
