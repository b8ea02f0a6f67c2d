"""Randomly initialised checkpoints of any size, written without ever holding the model."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import write_checkpoint
from .config import ModelConfig
from .phi import build_model

_BLOCK = 1 << 20
"""Entries that one generator fills. Part of what the values depend on: another size, other values."""


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters under their checkpoint names; a tied head is not there, being the embedding."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in build_model(config).named_parameters()}


def parameter_count(config: ModelConfig) -> int:
    """Parameters of a model in all, a tied head counted once."""
    return sum(torch.Size(shape).numel() for shape in parameter_shapes(config).values())


def create_checkpoint(
    config: ModelConfig,
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = 4 * 1024**3,
    on_tensor: Callable[[int], None] | None = None,
) -> None:
    """Write a checkpoint of random weights; no more than one shard and one tensor are in memory.

    Matrices are N(0, initializer_range²), norms one, biases zero. The values of a tensor depend on the seed and its
    name alone, so that every machine, thread count and shard size gives the same ones.

    Args:
        config: the model's shape.
        folder: the new checkpoint; an existing folder of this name is replaced.
        seed: of the weights.
        dtype: of the weights; they are drawn in fp64 and rounded.
        max_shard_bytes: a new safetensors file begins before this size is passed.
        on_tensor: called with the bytes of each tensor once it is made.
    """

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, shape in parameter_shapes(config).items():
            tensor = torch.empty(shape, dtype=dtype)
            if len(shape) == 1:
                tensor.fill_(0.0 if name.endswith(".bias") else 1.0)
            else:
                _fill_normal(tensor, config.initializer_range, f"{seed} {name}")
            if on_tensor is not None:
                on_tensor(tensor.nbytes)
            yield name, tensor

    write_checkpoint(folder, config, tensors(), max_shard_bytes=max_shard_bytes)


def _fill_normal(tensor: Tensor, std: float, key: str) -> None:
    def fill(index: int) -> None:
        block = flat[index * _BLOCK : (index + 1) * _BLOCK]
        digest = hashlib.sha256(f"{key} {index}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        # In fp32, torch draws normal numbers by vector instructions where there are some: other machines, other bits.
        block.copy_(torch.empty(len(block), dtype=torch.float64).normal_(0.0, std, generator=generator))

    flat = tensor.view(-1)
    blocks = range((len(flat) + _BLOCK - 1) // _BLOCK)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(fill, blocks))
