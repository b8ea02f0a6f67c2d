"""Where a run computes, and in which precision."""

from __future__ import annotations

import torch

from .errors import RecipeError


def resolve_device(name: str) -> torch.device:
    """The device a recipe names; "auto" is a GPU if there is one.

    Raises:
        RecipeError: for a device that this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RecipeError(f"device {name!r} is not known; use auto, cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise RecipeError(f"device {name!r} is not supported; use auto, cpu or cuda")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise RecipeError(f'device {name!r} is not on this machine; use device = "auto" or "cpu"')
    return device


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """The weights' dtype; "auto" is bf16 where the processor multiplies it natively, else fp32."""
    if name == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported()
        else:
            native = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        name = "bf16" if native else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
