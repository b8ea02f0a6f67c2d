"""Every stage of the plan `redwhale` on a model of SOLAR-10.7B's shape with random weights: does it fit, how fast.

Each stage runs in a process of its own, with the settings that `redwhale plan` finds fastest for the given memory, on
sequences packed with documents: once with its frozen layers as stored, in bf16, and once in FP8, if the GPU multiplies
that. What is written: peak memory beside the plan's, tokens a second, MFU (of the bf16 peak, FP8 too), the share of
time of each kernel, whether the loss stayed finite, and how many times faster FP8 is, and each stage than the fastest
peer. Peers (transformers with peft, with Liger's kernels where they are installed) run the same stage where they can,
and the reason is written where they cannot. A case that the result file already has is not run again, so that a command
that was cut off goes on where it stopped; `--again` starts over.

    python bench/full_size.py                                   # a GPU, 48 layers
    python bench/full_size.py --stages embed+head lora          # FP8 against bf16 where it is meant for
    python bench/full_size.py --memory-limit 80                 # no more than an H100 has, on a larger GPU
    python bench/full_size.py --device cpu --scale tiny         # the same path on any machine, in seconds
"""

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from common import RESULTS, parser, peak_memory_mb, write_result
from train_step_case import ZipfSequences

from redwhale.engine import LoopConfig, Stage
from redwhale.engine.batches import BatchLoader
from redwhale.engine.gpus import GPUS, Gpu, gpu_at_hand
from redwhale.engine.losses import next_token_loss
from redwhale.engine.plans import plan_stages
from redwhale.engine.run_plan import StagePlan, fastest_fit, plan_stage
from redwhale.engine.train_step import TrainStep
from redwhale.model import Llama, ModelConfig, preset

SCALES: dict[str, tuple[ModelConfig, int, int]] = {
    "full": (preset("solar-10.7b", vocab_size=49_152), 4096, 600),
    "tiny": (replace(preset("tiny-solar-10.7b", vocab_size=2048), num_hidden_layers=4), 128, 40),
}
"""Shape, tokens of a sequence, mean tokens of a document."""
ACCUMULATION = 4
"""Micro-batches of a step; training has more, which changes only how often the optimizer runs."""
_WARM = 2


def stages() -> list[Stage]:
    """Those of the plan, with 8-bit moments where half of the layers train."""
    made = []
    for stage in plan_stages("redwhale", 9_700_000_000):
        layers = stage.train[0].startswith("layers")
        made.append(msgspec.structs.replace(stage, optimizer="adamw_8bit" if layers else "adamw"))
    return made


def chosen_settings(options: argparse.Namespace, config: ModelConfig, stage: Stage, length: int, gpu: Gpu) -> StagePlan:
    """What is estimated fastest of what fits, or what the command line insists on."""
    batch = options.micro_batch or 8
    kept = {"activations": options.activations, "frozen": options.frozen}
    loop = LoopConfig(batch_size=batch, micro_batch_size=options.micro_batch or "auto", **kept)
    where = {"sequence_length": length, "device": "gpu" if options.device == "cuda" else "cpu"}
    found = fastest_fit(config, stage, loop, gpu, **where)
    if found is None:
        raise SystemExit(f"{stage.name} does not fit {gpu.bytes / 1e9:.0f} GB")
    loop = LoopConfig(
        batch_size=ACCUMULATION * found.micro_batch_size,
        micro_batch_size=found.micro_batch_size,
        activations=found.activations,
        frozen=options.frozen,
    )
    return plan_stage(config, stage, loop, gpu, **where)


def random_model(config: ModelConfig, device: str) -> Llama:
    """Random weights, made where they stay."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = Llama(config)
    torch.set_default_dtype(torch.float32)
    model.init_weights(torch.Generator(device).manual_seed(0))
    return model


def run_stage(options: argparse.Namespace) -> dict[str, Any]:
    """Train a stage for some steps and measure; in a process of its own."""
    config, length, document_tokens = SCALES[options.scale]
    stage = next(stage for stage in stages() if stage.name == options.stage)
    on_gpu = options.device == "cuda"
    gpu = gpu_at_hand(torch.device("cuda")) if on_gpu else GPUS["h100-80gb"]
    if options.memory_limit:
        if on_gpu:
            torch.cuda.set_per_process_memory_fraction(options.memory_limit * 1e9 / gpu.bytes)
        gpu = msgspec.structs.replace(gpu, bytes=int(options.memory_limit * 1e9))
    if options.frozen == "fp8" and gpu.fp8_flops is None:
        return {"skipped": f"{gpu.name} has no FP8 tensor cores"}
    plan = chosen_settings(options, config, stage, length, gpu)
    loop = LoopConfig(
        batch_size=ACCUMULATION * plan.micro_batch_size,
        micro_batch_size=plan.micro_batch_size,
        activations=plan.activations,
        frozen=plan.frozen,
        compile=options.compile,
    )
    step = TrainStep(random_model(config, options.device), stage, loop, steps=1000, loss=next_token_loss)
    data = ZipfSequences(config.vocab_size, length, 4096, document_tokens)
    loader = BatchLoader(
        data, batch_size=loop.batch_size, micro_batch_size=plan.micro_batch_size, seed=0, device=options.device
    )
    seconds: list[float] = []
    losses: list[float] = []
    flops = 0

    def take(number: int) -> None:
        nonlocal flops
        micro_batches, targets = loader.micro_batches(number), loader.num_targets(number)
        began = time.perf_counter()
        step.take(number, micro_batches, targets)
        sums = step.drain()  # waits for the device
        seconds.append(time.perf_counter() - began)
        losses.append(sums.nats / max(1.0, sums.targets))
        flops = sums.flops

    for number in range(_WARM + options.steps):
        take(number)
    median = statistics.median(seconds[_WARM:])
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    kernels = kernel_shares(lambda: take(_WARM + options.steps), on_gpu)
    planned = sum(plan.peak.values())
    return {
        "plan": msgspec.to_builtins(plan),
        "tokens_per_second": round(loop.batch_size * length / median, 1),
        "step_seconds": [round(value, 4) for value in seconds],
        "mfu": round(flops / median / gpu.flops, 4) if on_gpu else None,
        "peak_bytes": peak,
        "planned_bytes": planned,
        "plan_error": round(planned / peak - 1, 4) if peak else None,
        "reserved_bytes": torch.cuda.max_memory_reserved() if on_gpu else None,
        "process_peak_mb": peak_memory_mb(),
        "finite": all(map(math.isfinite, losses)),
        "losses": [round(loss, 4) for loss in losses],
        "kernels": kernels,
    }


def kernel_shares(run: Callable[[], None], on_gpu: bool) -> dict[str, float]:
    """Share of time of the dozen kernels, or operations of a CPU, that take most."""
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        run()
    times = {
        event.key[:80]: event.self_device_time_total if on_gpu else event.self_cpu_time_total
        for event in profiler.key_averages()
    }
    total = sum(times.values()) or 1.0
    largest = sorted(times.items(), key=lambda item: -item[1])[:12]
    return {name: round(value / total, 4) for name, value in largest}


def run_peer(options: argparse.Namespace, config: ModelConfig, length: int, document_tokens: int) -> dict[str, Any]:
    """One peer on one stage, or why it cannot."""
    if options.peer == "transformers-liger":
        try:
            from liger_kernel.transformers import apply_liger_kernel_to_llama  # type: ignore[import-not-found]
        except ImportError:
            return {"skipped": "liger-kernel is not installed"}
        apply_liger_kernel_to_llama()
    from train_step_case import StepClock, run_transformers

    from redwhale.model import create_checkpoint

    folder = RESULTS.parent / "work" / f"full_size-{options.scale}"
    if not (folder / "config.json").exists():
        create_checkpoint(config, folder, seed=0, dtype=torch.bfloat16)
    case = argparse.Namespace(
        **vars(options),
        **{"checkpoint": str(folder), "vocab_size": config.vocab_size, "sequence_length": length},
        **{"accumulation": ACCUMULATION, "document_tokens": document_tokens, "checkpointing": options.checkpointed},
    )
    case.micro_batch = options.micro_batch or 1
    case.stage = "half" if options.stage in ("odd-layers", "even-layers") else options.stage
    case.peer = "transformers-masters"
    data = ZipfSequences(config.vocab_size, length, 4096, document_tokens)
    try:
        clock = run_transformers(case, data, lambda: StepClock(options.steps, 60))["clock"]
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    seconds = statistics.median(clock.seconds)
    return {
        "micro_batch_size": case.micro_batch,
        "tokens_per_second": round(ACCUMULATION * case.micro_batch * length / seconds, 1),
        "peak_bytes": torch.cuda.max_memory_allocated() if options.device == "cuda" else None,
        "process_peak_mb": peak_memory_mb(),
        "losses": [round(loss, 4) for loss in clock.losses],
    }


def times_faster(cases: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """By stage: FP8's speed over ours as stored, and that over the fastest peer's; None where one is missing."""
    speeds: dict[str, dict[str, float]] = {}
    for name, case in cases.items():
        stage, _, who = name.rpartition("/")
        speeds.setdefault(stage, {})[who] = case.get("tokens_per_second") or 0.0
    ratios = {}
    for stage, by_name in speeds.items():
        fp8, ours = by_name.pop("redwhale-fp8", 0.0), by_name.pop("redwhale", 0.0)
        peer = max(by_name.values(), default=0.0)
        ratios[stage] = {
            "fp8_than_stored": round(fp8 / ours, 3) if fp8 and ours else None,
            "stored_than_fastest_peer": round(ours / peer, 3) if ours and peer else None,
        }
    return ratios


def child(options: argparse.Namespace, **changes: Any) -> dict[str, Any]:
    """Run one case in a process of its own."""
    case = {**vars(options), **changes}
    command = [sys.executable, "-c", "import full_size; full_size.run_case()", json.dumps(case)]
    ran = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    if ran.returncode:
        last = (ran.stderr.strip().splitlines() or ["no output"])[-1]
        return {"failed": last, "out_of_memory": "OutOfMemoryError" in ran.stderr}
    return json.loads(ran.stdout.splitlines()[-1])


def run_case() -> None:
    """What a process of its own does, described by its argument in JSON."""
    options = argparse.Namespace(**json.loads(sys.argv[1]))
    config, length, document_tokens = SCALES[options.scale]
    result = run_stage(options) if options.peer is None else run_peer(options, config, length, document_tokens)
    print(json.dumps(result))


def main() -> None:
    """Measure what is not measured yet and write after every case."""
    arguments = parser(__doc__, "full_size-DEVICE")
    arguments.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments.add_argument("--scale", choices=tuple(SCALES), default="full")
    arguments.add_argument("--stages", nargs="+", default=[stage.name for stage in stages()], metavar="STAGE")
    arguments.add_argument("--steps", type=int, default=8, help="that are timed (default: %(default)s)")
    arguments.add_argument("--micro-batch", type=int, help="sequences; by default what is estimated fastest")
    arguments.add_argument("--activations", default="auto", help="policy; by default what is estimated fastest")
    arguments.add_argument("--frozen", nargs="+", choices=("stored", "fp8"), default=["stored", "fp8"], metavar="HOW")
    arguments.add_argument("--memory-limit", type=float, metavar="GB", help="take no more of the GPU than this")
    arguments.add_argument("--compile", action="store_true")
    arguments.add_argument("--peers", nargs="*", default=[], metavar="PEER", help="transformers, transformers-liger")
    arguments.add_argument("--again", action="store_true", help="measure what is measured already once more")
    given = arguments.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU is at hand: --device cpu --scale tiny runs the same path")
    device = torch.cuda.get_device_name() if given.device == "cuda" else f"cpu-{given.scale}"
    name = given.result.replace("DEVICE", re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-").lower())
    given.checkpointed, given.peer, given.stage = False, None, None
    file = RESULTS / f"{name}.json"
    cases: dict[str, Any] = json.loads(file.read_text())["cases"] if file.exists() and not given.again else {}
    for stage in given.stages:
        wanted = [(f"{stage}/redwhale{'-fp8' * (how == 'fp8')}", {"peer": None, "frozen": how}) for how in given.frozen]
        for peer in given.peers:
            wanted += [
                (f"{stage}/{peer}{'-checkpointed' * c}", {"peer": peer, "checkpointed": c}) for c in (False, True)
            ]
        for case, changes in wanted:
            if case in cases and "failed" not in cases[case]:
                continue
            cases[case] = child(given, stage=stage, **changes)
            shown = ("tokens_per_second", "mfu", "plan_error", "failed", "skipped", "out_of_memory")
            print(case, {key: cases[case][key] for key in shown if cases[case].get(key) is not None}, flush=True)
            found = {
                "device": device,
                "accumulation": ACCUMULATION,
                "times_faster": times_faster(cases),
                "cases": cases,
            }
            write_result(name, __file__, found)


if __name__ == "__main__":
    main()
