"""Rotary frequencies of models whose context was stretched after pretraining."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError

_KEYS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True, kw_only=True)
class RoPEScaling:
    """How rotary frequencies differ from theta^(−2i/D), under the names of Hugging Face's `rope_parameters`."""

    rope_type: str
    """"linear": all divided by factor (Chen et al. 2023, arXiv 2306.15595). "dynamic": NTK-aware, theta grows with a
    document that is longer than max_position_embeddings (Peng et al. 2023, arXiv 2309.00071, section 3.1-3.3).
    "llama3": long wavelengths divided by factor, short ones kept, a ramp between (Llama-3.1, arXiv 2407.21783)."""
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> RoPEScaling | None:
        """Build from `rope_parameters` or version 4's `rope_scaling`; None where nothing is scaled."""
        rope_type = raw.get("rope_type", raw.get("type", "default"))
        if rope_type == "default":
            return None
        if rope_type not in _KEYS:
            raise CheckpointError(f"RoPE scaling of type {rope_type!r} is not supported; supported: {', '.join(_KEYS)}")
        if missing := [key for key in _KEYS[rope_type] if raw.get(key) is None]:
            raise CheckpointError(f"RoPE scaling of type {rope_type!r} needs {missing[0]}")
        return cls(rope_type=rope_type, **{key: raw[key] for key in _KEYS[rope_type]})

    def to_hf(self) -> dict[str, Any]:
        """The keys that `config.json` holds for this type."""
        return {"rope_type": self.rope_type, **{key: getattr(self, key) for key in _KEYS[self.rope_type]}}


def inverse_frequencies(
    head_dim: int,
    theta: float,
    scaling: RoPEScaling | None,
    max_position_embeddings: int,
    lengths: Sequence[int],
    counts: Sequence[int],
    device: torch.device,
) -> Tensor:
    """Radians per position of each rotated pair.

    Args:
        head_dim: D, the rotated dimensions of a head.
        theta: base of the progression; unscaled, pair i turns by theta^(−2i/D) per position.
        scaling: what stretches the context, or None.
        max_position_embeddings: length from which "dynamic" scaling acts.
        lengths: tokens of each text, those in a cache included.
        counts: tokens of each text that are to be rotated; they add up to N.
        device: of the result.

    Returns:
        [D/2] fp32, or [N, D/2] for "dynamic" scaling: each text is scaled by its own length, so that packing changes
        nothing.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    if scaling is None:
        return 1.0 / theta**exponents
    if scaling.rope_type == "linear":
        return 1.0 / theta**exponents / scaling.factor
    if scaling.rope_type == "llama3":
        return _llama3(1.0 / theta**exponents, scaling)
    stretch = [scaling.factor * max(n / max_position_embeddings, 1.0) - (scaling.factor - 1.0) for n in lengths]
    thetas = torch.tensor([theta * s ** (head_dim / (head_dim - 2)) for s in stretch], device=device)
    frequencies = 1.0 / thetas[:, None] ** exponents
    return frequencies.repeat_interleave(torch.tensor(counts, device=device), dim=0, output_size=sum(counts))


def _llama3(frequencies: Tensor, scaling: RoPEScaling) -> Tensor:
    """Keep wavelengths below context/high, divide those above context/low by the factor, blend between."""
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    # 1 where the wave turns at least `high` times within the original context, 0 where less than `low` times.
    keep = ((scaling.original_max_position_embeddings / wavelengths - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (keep + (1.0 - keep) / scaling.factor)
