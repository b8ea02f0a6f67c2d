"""Which settings of a stage fit a GPU, how fast they are estimated to be, and what they cost."""

from __future__ import annotations

from typing import Any

import msgspec
import torch
from torch import nn

from ..model import Llama, ModelConfig
from ..model.activations import Activations
from .allocations import Costs, Kind
from .errors import RecipeError
from .gpus import Gpu, gpu_at_hand, this_machine
from .loop_config import LoopConfig, loop_of
from .memory_plan import Device, stage_memory
from .stages import Frozen, Stage

CONTEXT_BYTES = 1_000_000_000
"""Set aside for what torch's allocator does not hand out: the driver's context, kernels, workspaces of cuBLAS."""
FRAGMENTS = 0.03
"""Share of the peak set aside for memory that lies between blocks in use."""
GEMM_SHARE, FP8_SHARE, ATTENTION_SHARE, BANDWIDTH_SHARE = 0.66, 0.6, 0.5, 0.8
"""Of the data sheet's rates. Products: large bf16 GEMMs on an H100 stay below 0.8 at the power it may take, those of a
training step below that, and FP8 with scales by row, at the same power, a little more so. Attention:
FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608) has 0.67 forward and 0.45 backward, older ones less. None of
the four has been measured with this engine."""
_ORDER: tuple[Activations, ...] = ("none", "recompute-cheap", "full")
"""Policies from what computes least to what takes least memory. Offloading depends on the host, and is not chosen."""


class StagePlan(msgspec.Struct, frozen=True, kw_only=True):
    """One stage on one GPU."""

    stage: str
    optimizer: str
    micro_batch_size: int
    activations: Activations
    frozen: Frozen
    peak: dict[Kind, int]
    """Bytes when their sum is highest."""
    moment: str
    """When that is."""
    working: int
    """Bytes beside weights, optimizer state and gradients, when they are most: what sharding leaves as it is."""
    reserve: int
    """Bytes set aside: CONTEXT_BYTES and FRAGMENTS."""
    host_bytes: int
    """Of the host's memory, for the weights that FP8 stands for."""
    fits: bool
    model_flops_per_token: float
    """What the mathematics asks for, attention included."""
    hardware_flops_per_token: float
    """What is computed, recomputation included."""
    tokens_per_second: float
    """Estimated from every operation's FLOPs and bytes at the shares of the GPU's rates above."""
    tokens: int

    @property
    def bytes(self) -> int:
        """All that the stage needs."""
        return sum(self.peak.values()) + self.reserve

    @property
    def hours(self) -> float:
        """Of the stage's tokens at the estimated speed."""
        return self.tokens / self.tokens_per_second / 3600


def seconds_on(gpu: Gpu) -> Any:
    """Seconds of an operation: the longer of its arithmetic and its memory traffic."""
    rates = {"product": GEMM_SHARE * gpu.flops, "attention": ATTENTION_SHARE * gpu.flops, "pass": gpu.flops}
    rates["fp8 product"] = FP8_SHARE * (gpu.fp8_flops or gpu.flops)
    return lambda kind, flops, nbytes: max(flops / rates[kind], nbytes / (gpu.bandwidth * BANDWIDTH_SHARE))


def plan_stage(
    config: ModelConfig,
    stage: Stage,
    loop: LoopConfig,
    gpu: Gpu,
    *,
    sequence_length: int,
    dtype: torch.dtype = torch.bfloat16,
    first_new_row: int | None = None,
    device: Device = "gpu",
) -> StagePlan:
    """What a stage takes with the settings it has.

    Args:
        config: of the model, with the final vocabulary.
        stage: what trains; its own batch sizes and activations go before the loop's.
        loop: of the trainer, nothing in it "auto".
        gpu: to plan for.
        sequence_length: tokens of a sequence, which is taken to be one document: the most attention can cost.
        dtype: of the weights.
        first_new_row: see `Trainer`.
        device: see `stage_memory`.

    Raises:
        RecipeError: for FP8 on a GPU that does not multiply it.
    """
    loop = loop_of(stage, loop)
    if loop.frozen == "fp8" and gpu.fp8_flops is None and device == "gpu":
        raise RecipeError(f'frozen = "fp8" needs FP8 tensor cores, and {gpu.name} has none')
    costs = Costs(seconds_on(gpu))
    memory = stage_memory(
        config, stage, loop, sequence_length=sequence_length, dtype=dtype, first_new_row=first_new_row, costs=costs,
        device=device,
    )  # fmt: skip
    micro_batches = -(-loop.batch_size // min(loop.resolved_micro_batch_size, loop.batch_size))
    update = costs.seconds.get("update", 0.0)
    passes = (sum(costs.seconds.values()) - update) * micro_batches / memory.micro_batches
    return StagePlan(
        stage=stage.name,
        optimizer=stage.optimizer,
        micro_batch_size=loop.resolved_micro_batch_size,
        activations=loop.resolved_activations,
        frozen=loop.frozen,
        peak={kind: size for kind, size in memory.peak.items() if size},
        moment=memory.moment,
        working=memory.working,
        reserve=CONTEXT_BYTES + int(FRAGMENTS * memory.peak_bytes),
        host_bytes=memory.host_bytes,
        fits=CONTEXT_BYTES + (1 + FRAGMENTS) * memory.peak_bytes <= gpu.bytes,
        model_flops_per_token=memory.model_flops / memory.tokens,
        hardware_flops_per_token=sum(costs.flops.values()) / memory.tokens,
        tokens_per_second=loop.batch_size * sequence_length / (passes + update),
        tokens=stage.tokens,
    )


def fastest_fit(config: ModelConfig, stage: Stage, loop: LoopConfig, gpu: Gpu, **options: Any) -> StagePlan | None:
    """The plan that is estimated fastest of those that fit, over whatever is "auto".

    Args:
        config, stage, loop, gpu: see `plan_stage`; "auto" may be in the stage and in the loop.
        options: of `plan_stage`.

    Returns:
        None if nothing fits. Of policies that are estimated within 1% of each other, the one that computes less wins.
    """
    loop = loop_of(stage, loop)
    stage = msgspec.structs.replace(stage, micro_batch_size=None, activations=None)
    best: StagePlan | None = None
    for policy in _ORDER if loop.activations == "auto" else (loop.activations,):
        with_policy = msgspec.structs.replace(loop, activations=policy)
        sizes = _sizes(loop.batch_size) if loop.micro_batch_size == "auto" else [loop.micro_batch_size]
        largest = _largest_fit(config, stage, with_policy, gpu, sizes, options)
        if largest is not None and (best is None or largest.tokens_per_second > 1.01 * best.tokens_per_second):
            best = largest
    return best


def _sizes(batch_size: int) -> list[int]:
    """Micro-batch sizes to try: those that divide the batch evenly, up to 64."""
    return [size for size in range(1, min(64, batch_size) + 1) if batch_size % size == 0]


def _largest_fit(
    config: ModelConfig, stage: Stage, loop: LoopConfig, gpu: Gpu, sizes: list[int], options: dict[str, Any]
) -> StagePlan | None:
    def plan(size: int) -> StagePlan:
        return plan_stage(config, stage, msgspec.structs.replace(loop, micro_batch_size=size), gpu, **options)

    found = plan(sizes[0])
    if not found.fits or len(sizes) == 1:
        return found if found.fits else None
    second = plan(sizes[1])
    if not second.fits:
        return found
    # Memory grows by the sequence, beside what does not depend on them: one more look finds how far.
    found, slope = second, (second.bytes - found.bytes) / (sizes[1] - sizes[0])
    possible = [size for size in sizes[2:] if second.bytes + slope * (size - sizes[1]) <= gpu.bytes]
    for size in reversed(possible):
        larger = plan(size)
        if larger.fits:
            return larger
    return found


def least_of(loop: LoopConfig) -> LoopConfig:
    """The loop with what takes least memory in place of "auto"."""
    size = 1 if loop.micro_batch_size == "auto" else loop.micro_batch_size
    policy = "full" if loop.activations == "auto" else loop.activations
    return msgspec.structs.replace(loop, micro_batch_size=size, activations=policy)


def remedy(config: ModelConfig, stage: Stage, loop: LoopConfig, gpu: Gpu, **options: Any) -> str:
    """What would make a stage fit, in one line: changes one after the other, the cheapest first, until it does.

    Args:
        config, stage, loop, gpu, options: see `plan_stage`.
    """
    changes: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("micro_batch_size = 1", {}, {"micro_batch_size": 1}),
        ('activations = "recompute-cheap"', {}, {"activations": "recompute-cheap"}),
        ('activations = "full"', {}, {"activations": "full"}),
        ('optimizer = "adamw_8bit"', {"optimizer": "adamw_8bit", "masters": "auto"}, {}),
        ("in_backward = true", {"in_backward": True}, {}),
        ('masters = "stochastic"', {"masters": "stochastic"}, {}),
    ]
    loop = least_of(loop_of(stage, loop))
    stage = msgspec.structs.replace(stage, micro_batch_size=None, activations=None)
    made: dict[str, str] = {}
    plan = None
    for text, of_stage, of_loop in changes:
        changed_stage, changed_loop = (
            msgspec.structs.replace(stage, **of_stage),
            msgspec.structs.replace(loop, **of_loop),
        )
        if (changed_stage, changed_loop) == (stage, loop) or _computes_less(changed_loop, loop):
            continue
        stage, loop = changed_stage, changed_loop
        made[text.partition(" ")[0]] = text
        plan = plan_stage(config, stage, loop, gpu, **options)
        if plan.fits:
            return f"fits with {', '.join(made.values())}: {plan.bytes / 1e9:.1f} GB"
    size = f": {plan.bytes / 1e9:.1f} GB" if plan is not None else ""
    tried = f"does not fit even with {', '.join(made.values())}{size}; " if made else ""
    return f"{tried}take a larger GPU, or train fewer layers at a time"


def _computes_less(loop: LoopConfig, than: LoopConfig) -> bool:
    """Whether a change of policy would keep more for backward, not less."""
    order = (*_ORDER, "offload")
    return order.index(loop.resolved_activations) < order.index(than.resolved_activations)


def resolve_auto(
    model: nn.Module, stage: Stage, loop: LoopConfig, *, sequence_length: int, first_new_row: int | None = None
) -> LoopConfig:
    """The loop with numbers and policies in place of "auto": what is estimated fastest of what fits the model's device.

    On a GPU what counts is its whole memory, on a CPU half of the machine's: the same machine decides the same when a
    run goes on.

    Args:
        model: on its device.
        stage, loop: with "auto" in either.
        sequence_length: tokens of a sequence.
        first_new_row: see `Trainer`.

    Raises:
        RecipeError: if the model is none of ours, or nothing fits.
    """
    if not isinstance(model, Llama):
        raise RecipeError(f'"auto" knows the memory of Llama models alone, not of {type(model).__name__}: give numbers')
    parameter = next(model.parameters())
    on_gpu = parameter.is_cuda
    device: Device = "gpu" if on_gpu else "cpu"
    gpu = gpu_at_hand(parameter.device) if on_gpu else this_machine()
    options: dict[str, Any] = {"sequence_length": sequence_length, "dtype": parameter.dtype, "device": device}
    options["first_new_row"] = first_new_row
    best = fastest_fit(model.config, stage, loop, gpu, **options)
    if best is None:
        raise RecipeError(f"stage {stage.name!r} {remedy(model.config, stage, loop, gpu, **options)}")
    return msgspec.structs.replace(
        loop_of(stage, loop), micro_batch_size=best.micro_batch_size, activations=best.activations
    )
