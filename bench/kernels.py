"""Every operation of kernels/ against its peers, in one process on one device: first correctness, then time and memory.

Correctness is the largest relative error of outputs and gradients against the formula in float64, at small shapes in
the same dtype. Time is the median of forward plus backward at the shapes of SOLAR-10.7B (hidden 4,096, feed-forward
14,336, vocabulary 49,152, 8,192 tokens) or, on a CPU, at small ones. The floor is the larger of the operation's FLOPs
at the best measured rate of a large matrix product and its bytes at the best rate of a large copy; the share is floor /
time. Memory is what a run allocates at its peak beyond its inputs (on a GPU).

Peers that are not installed are left out: torch's own linear_cross_entropy, liger-kernel, cut-cross-entropy, peft. In
Triton's interpreter (TRITON_INTERPRET=1 on a CPU) Triton kernels are checked, but not timed, and not in bf16.
"""

from __future__ import annotations

import argparse
import functools
import gc
import statistics
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from common import QuietTimer, parser, write_result
from kernel_cases import SOLAR, Shapes
from kernel_operations import Forward, Operation, operations
from torch import Tensor

from redwhale.kernels.launch import INTERPRETED

CHECKED = Shapes(300, 256, 704, 8, 2, 32, 2_000, (16, 64))
"""For correctness: token counts and vocabularies that are no multiples of a kernel's blocks."""
SMALL = Shapes(1024, 512, 1408, 8, 2, 64, 16_384, (16, 64))
"""For timing on a CPU."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def tensors(inputs: SimpleNamespace) -> dict[str, Tensor]:
    """What an operation is given, by name."""
    return {name: value for name, value in vars(inputs).items() if isinstance(value, Tensor)}


def run(
    forward: Forward, inputs: SimpleNamespace, upstream: Sequence[Tensor], allow_unused: bool = False
) -> list[Tensor]:
    """Outputs of a forward pass, and the gradients of a backward pass with these upstream gradients."""
    wanted = [value for value in tensors(inputs).values() if value.requires_grad]
    outputs = forward(inputs)
    upstream = [gradient.to(output.dtype) for gradient, output in zip(upstream, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, wanted, upstream, allow_unused=allow_unused)
    return [output.detach() for output in outputs] + list(gradients)


def upstream_gradients(operation: Operation, dtype: torch.dtype) -> list[Tensor]:
    """One for the loss, random numbers for everything else; the same for every implementation."""
    with torch.no_grad():
        outputs = operation.exact(operation.inputs)
    generators = {output.device: torch.Generator(output.device).manual_seed(1) for output in outputs}
    return [
        torch.randn(output.shape, device=output.device, generator=generators[output.device]).to(dtype)
        if output.dim()
        else torch.ones_like(output)
        for output in outputs
    ]


def largest_relative_error(operation: Operation, forward: Forward, upstream: Sequence[Tensor]) -> float:
    """Of all outputs and gradients, against the formula on the same inputs in float64."""
    exact_inputs = type(operation.inputs)(**vars(operation.inputs))
    for name, value in tensors(operation.inputs).items():
        if value.is_floating_point():
            setattr(exact_inputs, name, value.detach().double().requires_grad_(value.requires_grad))
    expected = run(operation.exact, exact_inputs, upstream)
    actual = run(forward, operation.inputs, upstream)
    errors = [(a.double() - e).norm() / e.norm().clamp_min(1e-30) for a, e in zip(actual, expected, strict=True)]
    # max() would let a NaN pass.
    return float(torch.stack(errors).nan_to_num(float("inf")).max())


_quiet = QuietTimer(patience=600)


def seconds_of(call: Callable[[], object], device: torch.device, budget: float) -> list[float]:
    """Times of calls after two for warming up, as many as fit the budget in seconds: at least 3, at most 100."""
    for _ in range(2):
        call()
    times: list[float] = []
    if device.type == "cuda":
        torch.cuda.synchronize()
        while len(times) < 3 or (sum(times) < budget and len(times) < 100):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
    else:
        while len(times) < 3 or (sum(times) < budget and len(times) < 100):
            times.append(_quiet.time(call)[0])
    return times


def ceilings(device: torch.device, dtype: torch.dtype, budget: float) -> tuple[float, float]:
    """FLOPs a second of a large product of random matrices, and bytes read and written a second by a large copy."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = min(seconds_of(lambda: a @ b, device, budget))
    source = torch.randn(2**29 if device.type == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    copy = min(seconds_of(lambda: target.copy_(source), device, budget))
    return 2 * size**3 / product, 2 * source.nbytes / copy


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Most bytes allocated during a call beyond those before it; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def implementations(operation: Operation, compile_peers: bool) -> dict[str, Forward]:
    """All that compute the operation, torch.compile of the plain formula among them."""
    found = dict(operation.implementations)
    for name, formula in operation.compiled.items():
        found[f"{name} eager"] = formula
        if compile_peers:
            found[f"{name} compile"] = torch.compile(formula, dynamic=False)
    return found


def main() -> None:
    """Check, measure, print a table, write the result."""
    arguments = parser(__doc__, "")
    arguments.formatter_class = argparse.RawDescriptionHelpFormatter
    arguments.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    arguments.add_argument("--dtype", choices=list(DTYPES), default="bf16", help="of weights and activations")
    arguments.add_argument("--shapes", choices=["solar", "small"], help="default: solar on a GPU, small on a CPU")
    arguments.add_argument("--only", nargs="+", metavar="WORD", help="operations whose name holds one of these")
    arguments.add_argument("--seconds", type=float, default=1.0, help="to time each for (default: %(default)s)")
    arguments.add_argument(
        "--no-compile", action="store_true", help="leave out torch.compile, which takes long to start"
    )
    given = arguments.parse_args()
    gpu = torch.cuda.is_available() if given.device == "auto" else given.device == "cuda"
    device, dtype = torch.device("cuda" if gpu else "cpu"), DTYPES[given.dtype]
    shapes = SOLAR if (given.shapes or ("solar" if gpu else "small")) == "solar" else SMALL
    name = torch.cuda.get_device_name() if gpu else "cpu"
    flops_rate, bytes_rate = ceilings(device, dtype, given.seconds)
    print(f"{name}: {flops_rate / 1e12:.1f} TFLOP/s in products, {bytes_rate / 1e9:.0f} GB/s in copies")

    def chosen(operation: Operation) -> bool:
        return not given.only or any(word in operation.name for word in given.only)

    errors: dict[tuple[str, str], float | str] = {}
    for operation in operations(CHECKED, device, dtype):
        if not chosen(operation):
            continue
        upstream = upstream_gradients(operation, dtype)
        for label, forward in implementations(operation, not given.no_compile).items():
            key = operation.name, label
            # The interpreter multiplies bf16 matrices wrongly.
            if label == "redwhale triton" and not (gpu or (INTERPRETED and dtype != torch.bfloat16)):
                continue
            try:
                errors[key] = largest_relative_error(operation, forward, upstream)
            except Exception as error:  # a peer that fails is a result, too
                errors[key] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            print(f"check {operation.name:36} {label:28} {errors[key]}", flush=True)
    rows: list[dict[str, Any]] = []
    for operation in operations(shapes, device, dtype):
        if not chosen(operation):
            continue
        torch.compiler.reset()
        upstream = upstream_gradients(operation, dtype)
        floor = max(operation.flops / flops_rate, operation.bytes / bytes_rate)
        passes = {**implementations(operation, not given.no_compile), **operation.floors}
        calls = {
            label: functools.partial(run, forward, operation.inputs, upstream, label in operation.floors)
            for label, forward in passes.items()
        }
        for label, call in {**calls, **operation.calls}.items():
            if label == "redwhale triton" and not gpu:
                continue
            row: dict[str, Any] = {"operation": operation.name, "implementation": label}
            if label in passes and label not in operation.floors:
                row["relative_error"] = errors.get((operation.name, label))
            try:
                row.update(measured(call, device, given.seconds, floor))
            except Exception as error:
                row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            rows.append(row)
            print_row(row)
            gc.collect()
            if gpu:
                torch.cuda.empty_cache()
    accelerator = {"gpu": name, "capability": torch.cuda.get_device_capability()} if gpu else {}
    write_result(
        given.result or f"kernels-{name.lower().replace(' ', '-')}",
        __file__,
        {
            **accelerator,
            "dtype": given.dtype,
            "shapes": vars(shapes),
            "checked_shapes": vars(CHECKED),
            "threads": torch.get_num_threads(),
            **({} if gpu else _quiet.described()),
            "product_tflops": round(flops_rate / 1e12, 2),
            "copy_gb_per_second": round(bytes_rate / 1e9, 1),
            "checked_errors": [{"operation": o, "implementation": i, "error": e} for (o, i), e in errors.items()],
            "rows": rows,
        },
    )


def measured(call: Callable[[], object], device: torch.device, budget: float, floor: float) -> dict[str, Any]:
    """Median time, spread, share of the floor, and peak memory of a call."""
    peak = peak_bytes(call, device)
    times = sorted(seconds_of(call, device, budget))
    median = statistics.median(times)
    return {
        "milliseconds": round(median * 1e3, 4),
        "fastest_and_slowest": [round(times[0] * 1e3, 4), round(times[-1] * 1e3, 4)],
        "runs": len(times),
        "share_of_floor": round(floor / median, 3),
        "peak_mb": None if peak is None else round(peak / 1e6, 1),
    }


def print_row(row: dict[str, Any]) -> None:
    """One line of the table."""
    print(f"{row['operation']:36} {row['implementation']:28}", end=" ")
    if "failed" in row:
        print(row["failed"], flush=True)
        return
    error = row.get("relative_error")
    shown = f"{error:.1e}" if isinstance(error, float) else "-"
    memory = "" if row["peak_mb"] is None else f"{row['peak_mb']:9.1f} MB"
    print(
        f"{row['milliseconds']:10.3f} ms  {row['share_of_floor']:6.1%} of the floor  error {shown} {memory}", flush=True
    )


if __name__ == "__main__":
    main()
