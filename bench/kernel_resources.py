"""Compile every Triton kernel ahead of time, with no GPU, and list what it takes of a multiprocessor.

The starts are those that the operations make at the shapes of SOLAR-10.7B in bf16, with their own constants and
options. Writes registers a thread, shared memory a program, bytes spilled to local memory, and which matrix
instructions are used.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel cannot be compiled

import torch
from common import parser, write_result
from kernel_cases import CASES, SOLAR, Shapes

from redwhale.kernels.launch import captured_launches

SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448}
"""Most bytes of shared memory of a program, by compute capability (CUDA C++ Programming Guide, technical limits)."""


class OfflineDriver:
    """Stands for Triton's GPU driver, which kernels ask what to compile for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 1000 + self.capability  # kernels keep one cache a device

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled_launches(name: str, capability: int, shapes: Shapes = SOLAR) -> Iterator[dict[str, Any]]:
    """Resources of each different kernel that one operation starts, forward and backward."""
    import triton

    with captured_launches(capability) as launches:
        CASES[name](shapes, torch.device("meta"), torch.bfloat16)()
    triton.runtime.driver.set_active(OfflineDriver(capability))
    seen = set()
    for kernel, grid, args, options in launches:
        compiled = kernel.run(*args, grid=grid, warmup=True, **options)
        if compiled.hash in seen:
            continue
        seen.add(compiled.hash)
        yield {
            "operation": name,
            "kernel": compiled.metadata.name.lstrip("_"),
            "capability": capability,
            "constants": {key: value for key, value in options.items() if key.isupper()},
            "num_warps": compiled.metadata.num_warps,
            "num_stages": compiled.metadata.num_stages,
            **resource_usage(compiled.asm["cubin"]),
            "shared_bytes": compiled.metadata.shared,
            "shared_limit": SHARED_MEMORY[capability],
            "matrix_instructions": matrix_instructions(compiled.asm["ptx"]),
        }


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Registers a thread and bytes of local memory a thread, which are spills, from the cubin's own table."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        table = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", table)}
    return {"registers": found["REG"], "spilled_bytes": found["STACK"] + found["LOCAL"]}


def matrix_instructions(ptx: str) -> list[str]:
    """Which tensor-core instructions the kernel uses: mma.sync (Ampere), wgmma (Hopper), tcgen05 (Blackwell)."""
    kinds = {"mma.sync": r"\bmma\.sync", "wgmma": r"\bwgmma\.mma_async", "tcgen05": r"\btcgen05\.mma"}
    return [kind for kind, pattern in kinds.items() if re.search(pattern, ptx)]


def _compile(job: tuple[str, int]) -> list[dict[str, Any]]:
    return list(compiled_launches(*job))


def main() -> None:
    """Compile, print a table, write the result."""
    arguments = parser(__doc__, "kernel_resources")
    arguments.formatter_class = argparse.RawDescriptionHelpFormatter
    arguments.add_argument("--capabilities", type=int, nargs="+", default=[80, 90, 100], choices=sorted(SHARED_MEMORY))
    arguments.add_argument("--operations", nargs="+", default=list(CASES), choices=list(CASES), metavar="NAME")
    arguments.add_argument("--json", type=Path, help="write the rows to this file instead of bench/results")
    arguments.add_argument("--processes", type=int, default=os.cpu_count(), help="default: all cores")
    given = arguments.parse_args()
    jobs = [(name, capability) for name in given.operations for capability in given.capabilities]
    with multiprocessing.get_context("spawn").Pool(given.processes) as pool:
        rows = [row for found in pool.imap(_compile, jobs) for row in found]
    print(f"{'kernel':34} sm  warps stages registers spilled  shared  matrix instructions")
    for row in rows:
        print(
            f"{row['kernel']:34} {row['capability']:3} {row['num_warps']:4} {row['num_stages']:6} {row['registers']:9} "
            f"{row['spilled_bytes']:7} {row['shared_bytes']:7}  {' '.join(row['matrix_instructions'])}"
        )
    if given.json:
        given.json.write_text(json.dumps(rows), encoding="utf-8")
    else:
        import triton

        write_result(given.result, __file__, {"triton": triton.__version__, "kernels": rows})


if __name__ == "__main__":
    sys.exit(main())
