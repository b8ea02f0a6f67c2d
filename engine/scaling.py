"""A model of a training step on many GPUs: bytes moved over the links against the arithmetic that hides them.

Collectives are rings: each of n GPUs sends (n - 1)/n of the bytes in n - 1 hops. Of a ring through several nodes the
links between nodes are the narrow part; every GPU has its own way out of the node, or they share one, so what counts is
a node's bandwidth. Arithmetic is that of `redwhale plan`. Nothing here has been measured on a cluster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec
import torch

from ..model import Llama, ModelConfig, add_lora
from .allocations import STATE
from .flops import attention_pairs, training_flops
from .gpus import Gpu
from .loop_config import LoopConfig, loop_of
from .run_plan import CONTEXT_BYTES, FRAGMENTS, GEMM_SHARE, plan_stage
from .selectors import layer_index, select_parameters
from .stages import Stage

Strategy = Literal["replicated", "fsdp", "hsdp"]
"""Whole weights on every GPU; sharded over all of them (FSDP2); sharded inside of a node, replicated between nodes."""

LINK_SHARE = 0.8
"""Of a link's rate that a large collective reaches: an assumption."""


class Fabric(msgspec.Struct, frozen=True):
    """What GPUs are joined by."""

    name: str
    gpus_per_node: int
    inside: float
    """Bytes a second and direction from a GPU to the others of its node."""
    between: float
    """Bytes a second and direction out of a node, all its GPUs together."""
    inside_latency: float = 3e-6
    """Seconds of a hop inside of a node; this and the next are assumptions."""
    between_latency: float = 10e-6

    def bandwidth(self, gpus: int) -> float:
        """Bytes a second of a ring over so many GPUs, at LINK_SHARE of the narrowest link's rate."""
        return LINK_SHARE * (self.inside if self.nodes(gpus) == 1 else min(self.inside, self.between))

    def nodes(self, gpus: int) -> int:
        """Nodes that hold so many GPUs."""
        return -(-gpus // self.gpus_per_node)

    def ring(self, nbytes: float, gpus: int) -> float:
        """Seconds of an all-gather of `nbytes` in all, or of a reduce-scatter of as many, over GPUs of whole nodes."""
        if gpus == 1:
            return 0.0
        nodes = self.nodes(gpus)
        hops = (gpus - nodes) * self.inside_latency + (nodes - 1) * self.between_latency
        return (gpus - 1) / gpus * nbytes / self.bandwidth(gpus) + hops

    def ring_between(self, nbytes: float, gpus: int) -> float:
        """Seconds of all-reduces of each GPU's part of `nbytes` with its peers in the other nodes, all at once."""
        nodes = self.nodes(gpus)
        return 2 * (nodes - 1) * (nbytes / (nodes * LINK_SHARE * self.between) + self.between_latency)


FABRICS = {
    "infiniband-400": Fabric("infiniband-400", 8, 450e9, 8 * 50e9),
    "ethernet-100": Fabric("ethernet-100", 8, 450e9, 12.5e9),
}
"""Nodes of 8 GPUs on NVLink 4; 400 Gb/s of InfiniBand a GPU, or 100 Gb/s of Ethernet a node."""


class UnitWork(msgspec.Struct, frozen=True, kw_only=True):
    """What is gathered at once, such as a decoder layer, and one micro-batch's work with it."""

    weight_bytes: int
    gradient_bytes: int
    """As they are reduced, of what trains in it."""
    forward: float
    """Seconds."""
    backward: float
    kept: bool = False
    """Gathered once, before the forward pass, and kept until the end of the backward pass."""


class StageWork(msgspec.Struct, frozen=True, kw_only=True):
    """A stage on one GPU: units in forward order, the optimizer, and bytes of memory by what they are for."""

    units: tuple[UnitWork, ...]
    update: float
    """Seconds to update all that trains."""
    tokens: int
    """Of a micro-batch."""
    state_bytes: int
    """Of weights, masters and moments."""
    working_bytes: int
    """Of activations, logits and the rest, which sharding leaves as they are."""

    @property
    def weight_bytes(self) -> int:
        """Of all units."""
        return sum(unit.weight_bytes for unit in self.units)

    @property
    def gradient_bytes(self) -> int:
        """Of all units."""
        return sum(unit.gradient_bytes for unit in self.units)


class StepTime(msgspec.Struct, frozen=True, kw_only=True):
    """A simulated optimizer step; seconds, and bytes that each GPU receives."""

    seconds: float
    compute: float
    """Of arithmetic, the update included."""
    exposed: float
    """In which arithmetic waits for links."""
    gathered_bytes: float
    """All-gathers of weights."""
    reduced_bytes: float
    """Reduce-scatters and all-reduces of gradients."""
    memory_bytes: int
    """On each GPU, estimated: see `memory_bytes`."""


def step_time(
    work: StageWork, fabric: Fabric, gpus: int, strategy: Strategy, micro_batches: int, *, reduce_each: bool = True
) -> StepTime:
    """Simulate an optimizer step, arithmetic and links side by side.

    FSDP gathers each unit's weights before its forward and, unless they are kept, again before its backward, in every
    micro-batch, one unit ahead of the arithmetic; gradients are reduced behind the unit's backward. A frozen unit is
    gathered, not reduced.

    Args:
        work: of the stage on one GPU.
        fabric: of the cluster.
        gpus: in whole nodes, or less than one.
        strategy: what is sharded over what.
        micro_batches: of a step on each GPU.
        reduce_each: reduce gradients in every micro-batch, as the engine does, which keeps them sharded; or only in the
            last.

    Raises:
        ValueError: for GPUs that do not fill their nodes.
    """
    if gpus > fabric.gpus_per_node and gpus % fabric.gpus_per_node:
        raise ValueError(f"{gpus} GPUs do not fill nodes of {fabric.gpus_per_node}")
    shards = _shards(fabric, gpus, strategy)
    last = _micro_batch(work.units, fabric, gpus, strategy, reduce=True)
    others = last if reduce_each else _micro_batch(work.units, fabric, gpus, strategy, reduce=False)
    passes = sum(unit.forward + unit.backward for unit in work.units) * micro_batches
    update = work.update / shards
    seconds = others * (micro_batches - 1) + last + update
    reductions = micro_batches if reduce_each else 1
    gathers = sum(unit.weight_bytes * (1 if unit.kept else 2) for unit in work.units) * micro_batches
    if strategy == "replicated":
        reduced = 2 * (gpus - 1) / gpus * work.gradient_bytes
    else:
        reduced = work.gradient_bytes * (shards - 1) / shards
        if strategy == "hsdp":
            nodes = fabric.nodes(gpus)
            reduced += 2 * (nodes - 1) / nodes * work.gradient_bytes / shards
    return StepTime(
        seconds=seconds,
        compute=passes + update,
        exposed=max(0.0, seconds - passes - update),
        gathered_bytes=gathers * (shards - 1) / shards,
        reduced_bytes=reduced * reductions,
        memory_bytes=memory_bytes(work, shards, whole_gradients=micro_batches > 1 and not reduce_each),
    )


def hiding_tokens(gpu: Gpu, fabric: Fabric, gpus: int) -> float:
    """Tokens of a micro-batch on each GPU from which on its arithmetic hides the gathers of FSDP.

    P bf16 parameters take 2·P·(n - 1)/n bytes over the link, and 2·P FLOPs a token in forward and at least as many in
    backward: P cancels, so that the answer does not depend on the model. Latency and attention are left out.
    """
    return (gpus - 1) / gpus * gpu.flops * GEMM_SHARE / fabric.bandwidth(gpus)


def memory_bytes(work: StageWork, shards: int, *, whole_gradients: bool) -> int:
    """Bytes on each GPU: its shard of the state and gradients, what is gathered, and the working memory.

    Gathered are the kept units, two others at a time, and the gradients of one that are not yet reduced.

    Args:
        work: of the stage.
        shards: GPUs that a weight is spread over; 1 for replication.
        whole_gradients: micro-batches add up before they are reduced, so that gradients are not sharded.
    """
    gradients = work.gradient_bytes // (1 if whole_gradients else shards)
    peak = work.state_bytes // shards + gradients + work.working_bytes
    if shards > 1:
        passing = sorted((unit.weight_bytes for unit in work.units if not unit.kept), reverse=True)
        peak += sum(unit.weight_bytes for unit in work.units if unit.kept) + sum(passing[:2])
        peak += max(unit.gradient_bytes for unit in work.units)
    return int(peak * (1 + FRAGMENTS)) + CONTEXT_BYTES


def _shards(fabric: Fabric, gpus: int, strategy: Strategy) -> int:
    return {"replicated": 1, "fsdp": gpus, "hsdp": min(gpus, fabric.gpus_per_node)}[strategy]


def _micro_batch(units: Sequence[UnitWork], fabric: Fabric, gpus: int, strategy: Strategy, *, reduce: bool) -> float:
    """Seconds of a forward and a backward pass until the last gradient is computed, or reduced.

    Three things take turns by themselves: the arithmetic; gathers and reductions among shards, which share a link; and
    all-reduces between nodes. A unit is gathered while the one before it computes, not earlier, so that two are in
    memory at most.
    """
    shards = _shards(fabric, gpus, strategy)

    def gather(unit: UnitWork, backward: bool) -> float:
        there = shards == 1 or (unit.kept and backward)
        return fabric.ring(unit.weight_bytes, shards) if unit.weight_bytes and not there else 0.0

    compute = link = between = 0.0
    forward = list(range(len(units)))
    for order, backward in ((forward, False), (forward[::-1], True)):
        ready = 0.0
        if gathers := gather(units[order[0]], backward):
            ready = link = max(link, compute) + gathers
        for place, following in zip(order, [*order[1:], None], strict=True):
            unit = units[place]
            begin = max(compute, ready)
            compute = begin + (unit.backward if backward else unit.forward)
            if following is not None and (gathers := gather(units[following], backward)):
                ready = link = max(link, begin) + gathers
            if not (backward and reduce and unit.gradient_bytes):
                continue
            if strategy == "replicated":
                link = max(link, compute) + 2 * fabric.ring(unit.gradient_bytes, gpus)
                continue
            link = max(link, compute) + fabric.ring(unit.gradient_bytes, shards)
            if strategy == "hsdp":
                between = max(between, link) + fabric.ring_between(unit.gradient_bytes, gpus)
    return max(compute, link, between)


def stage_work(
    config: ModelConfig,
    stage: Stage,
    loop: LoopConfig,
    gpu: Gpu,
    *,
    sequence_length: int,
    first_new_row: int | None = None,
    reduce_bytes: int = 4,
) -> StageWork:
    """A stage's work on one GPU by its plan.

    Units are the embedding with the LM head and the last norm, which stay gathered, each decoder layer, and the LM
    head's arithmetic, which needs no gather of its own. The plan's time is split into forward and backward by their
    FLOPs, recomputation being backward, and each among the layers evenly and the LM head by its share of the forward's.

    Args:
        config: of the model, with the final vocabulary.
        stage, loop, gpu, sequence_length, first_new_row: see `plan_stage`; nothing may be "auto".
        reduce_bytes: of a gradient's entry as it is reduced; 4 for fp32.
    """
    loop = loop_of(stage, loop)
    stage = msgspec.structs.replace(stage, batch_size=None)
    size = loop.resolved_micro_batch_size
    options: dict[str, Any] = {"sequence_length": sequence_length, "first_new_row": first_new_row}
    plan, longer = (
        plan_stage(config, stage, msgspec.structs.replace(loop, batch_size=count * size), gpu, **options)
        for count in (2, 4)
    )
    tokens = size * sequence_length
    seconds, longer_seconds = 2 * tokens / plan.tokens_per_second, 4 * tokens / longer.tokens_per_second
    passes = (longer_seconds - seconds) / 2
    flops = training_flops(config, {})
    forward = flops.of(tokens, size * attention_pairs([sequence_length], config.sliding_window))
    head = 2 * config.vocab_size * config.hidden_size * tokens / forward
    forward_seconds = passes * forward / (plan.hardware_flops_per_token * tokens)
    backward_seconds = passes - forward_seconds
    layers = config.num_hidden_layers
    shares = [0.0, *[(1 - head) / layers] * layers, head]
    weights, gradients = _unit_sizes(config, stage, first_new_row)
    units = tuple(
        UnitWork(
            weight_bytes=2 * weight,
            gradient_bytes=reduce_bytes * gradient,
            forward=forward_seconds * share,
            backward=backward_seconds * share,
            kept=place == 0,
        )
        for place, (weight, gradient, share) in enumerate(zip(weights, gradients, shares, strict=True))
    )
    return StageWork(
        units=units,
        update=max(0.0, seconds - 2 * passes),
        tokens=tokens,
        state_bytes=sum(plan.peak.get(kind, 0) for kind in STATE if kind != "gradients"),
        working_bytes=plan.working,
    )


def _unit_sizes(config: ModelConfig, stage: Stage, first_new_row: int | None) -> tuple[list[int], list[int]]:
    """Parameters and trained parameters of what is in no layer, of each layer, and of nothing more."""
    with torch.device("meta"):
        model = Llama(config)
        if stage.uses_lora:
            add_lora(model, **msgspec.structs.asdict(stage.lora))
    trained = select_parameters(model, stage.train, first_new_row=first_new_row)
    weights, gradients = ([0] * (config.num_hidden_layers + 2) for _ in range(2))
    for counts, parameters in ((weights, dict(model.named_parameters())), (gradients, trained)):
        for name, parameter in parameters.items():
            layer = layer_index(name)
            counts[0 if layer is None else layer + 1] += parameter.numel()
    return weights, gradients
