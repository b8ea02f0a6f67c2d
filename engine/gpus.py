"""GPUs by what plans need to know of them."""

from __future__ import annotations

import os
import re

import msgspec
import torch

from ..model.fp8_base import multiplies_fp8
from .errors import RecipeError
from .flops import peak_flops_by_name


class Gpu(msgspec.Struct, frozen=True):
    """A GPU's memory and its rates by the data sheet."""

    name: str
    bytes: int
    """Of memory. The driver of an "80 GB" card reports up to 85·10⁹; the name's are planned with."""
    flops: float
    """Dense bf16 FLOP/s."""
    bandwidth: float
    """Bytes of memory a second."""
    fp8_flops: float | None = None
    """Dense FP8 FLOP/s with sums in fp32; None for a GPU that does not multiply FP8."""


GPUS = {
    "h100-80gb": Gpu("h100-80gb", 80 * 10**9, 989.4e12, 3.35e12, 1978.9e12),
    "h200": Gpu("h200", 141 * 10**9, 989.4e12, 4.8e12, 1978.9e12),
    "a100-80gb": Gpu("a100-80gb", 80 * 10**9, 312e12, 2.039e12),
    "a100-40gb": Gpu("a100-40gb", 40 * 10**9, 312e12, 1.555e12),
    "l40s": Gpu("l40s", 48 * 10**9, 362.05e12, 0.864e12, 733e12),
    "rtx4090": Gpu("rtx4090", 24 * 10**9, 165.2e12, 1.008e12, 330.3e12),
}
"""By NVIDIA's data sheets; SXM where there are several."""

_SIZES = {"k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


def find_gpu(text: str) -> Gpu:
    """A GPU of `GPUS` by its name, or one described as NAME=BYTES,TFLOPS,GBPS, such as mine=48GB,180,900.

    A fourth number are TFLOP/s in FP8.

    Raises:
        RecipeError: for anything else.
    """
    if text in GPUS:
        return GPUS[text]
    name, separator, described = text.partition("=")
    number = r"([\d.]+)"
    pattern = rf"{number}\s*([kmgt]?)b?,{number},{number}(?:,{number})?"
    fields = re.fullmatch(pattern, described.strip().lower()) if name else None
    try:
        if separator and fields is not None:
            size, unit, tflops, gbps, fp8 = fields.groups()
            rates = [float(tflops) * 1e12, float(gbps) * 1e9, *([] if fp8 is None else [float(fp8) * 1e12])]
            gpu = Gpu(name, int(float(size) * _SIZES.get(unit, 1)), *rates)
            if min(gpu.bytes, *rates) > 0:
                return gpu
    except ValueError:
        pass
    raise RecipeError(
        f"gpu {text!r} is not known; known are {', '.join(GPUS)}, and NAME=BYTES,TFLOPS,GBPS such as mine=48GB,180,900 "
        "(a fourth number: TFLOP/s in FP8)"
    )


def gpu_at_hand(device: torch.device) -> Gpu:
    """The GPU of a device, with the memory that the driver reports and rates as far as they are known."""
    properties = torch.cuda.get_device_properties(device)
    flops = peak_flops_by_name(properties.name, torch.bfloat16) or GPUS["a100-80gb"].flops
    fp8 = 2 * flops if multiplies_fp8(device) else None
    return Gpu(properties.name, properties.total_memory, flops, GPUS["h100-80gb"].bandwidth * flops / 989.4e12, fp8)


def this_machine() -> Gpu:
    """Half of this machine's memory, with rates of a CPU that serve to compare settings and predict no speed."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Gpu("this machine", memory // 2, 1e12, 50e9)
