"""What a stage takes of a device's memory, found by taking its steps with shapes alone.

The model, the stage's optimizer and two optimizer steps are run as in training, on tensors without content: the same
code decides what is kept for backward, which gradients there are and what is recomputed. So the plan follows from the
model and the trainer and is no table of constants.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor, nn

from ..kernels import kernel_backend
from ..kernels.launch import launches_sent_to
from ..model import Llama, ModelConfig, PackedDocuments
from .allocations import Allocations, Costs, Kind
from .batches import Batch
from .loop_config import LoopConfig, loop_of
from .losses import next_token_loss
from .stages import Stage
from .train_step import TrainStep

Device = Literal["gpu", "cpu"]
_CUDA_BLOCK = 512
"""Bytes that torch's allocator on GPUs rounds sizes up to."""


class StageMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes on the device, by what they are for."""

    peak: dict[Kind, int]
    """When their sum is highest."""
    moment: str
    """When that is: "setup", "forward", "backward", "update" or, with the weights back that FP8 stood for, "end"."""
    working: int
    """Beside weights, optimizer state and gradients, when that is most."""
    host_bytes: int
    """Of the host's memory that frozen weights of a GPU's model take meanwhile."""
    micro_batches: int
    """Of a step that was taken."""
    tokens: int
    """Of all micro-batches of such a step."""
    model_flops: int
    """Of such a step, as `training_flops` counts."""

    @property
    def peak_bytes(self) -> int:
        """Highest sum."""
        return sum(self.peak.values())


class _WatchedStep(TrainStep):
    """A step that says where it is."""

    allocations: Allocations

    @property
    def flops(self) -> int:
        """Model FLOPs of all steps so far."""
        return self._flops

    def forward_backward(self, step: int, micro_batches: list[Batch], num_targets: int) -> Tensor:
        sums = super().forward_backward(step, micro_batches, num_targets)
        self.allocations.moment, self.allocations.kind = "update", "workspace"
        return sums


def stage_memory(
    config: ModelConfig,
    stage: Stage,
    loop: LoopConfig,
    *,
    sequence_length: int,
    dtype: torch.dtype,
    device: Device = "gpu",
    first_new_row: int | None = None,
    costs: Costs | None = None,
) -> StageMemory:
    """What training a stage allocates, two optimizer steps long, without weights, data or the device itself.

    Args:
        config: of the model, with the final vocabulary.
        stage: what trains and how; its own batch sizes and activations go before the loop's.
        loop: of the trainer.
        sequence_length: tokens of a sequence, which is taken to be one document.
        dtype: of weights and forward pass.
        device: "gpu" plans Triton's kernels, flash attention and FP8 tensor cores, "cpu" PyTorch's operations.
        first_new_row: see `Trainer`.
        costs: told of every operation of the second step.

    Returns:
        Bytes as torch's allocator hands them out. What it keeps beside them (fragments, the context of the driver, the
        workspaces of libraries) is not in it.
    """
    loop = msgspec.structs.replace(loop_of(stage, loop), compile=False)
    sequences = min(loop.resolved_micro_batch_size, loop.batch_size)
    count = min(2, -(-loop.batch_size // sequences))
    tokens = count * sequences * sequence_length
    place = "meta" if device == "gpu" else "cpu"
    allocations = Allocations(place, granularity=_CUDA_BLOCK if device == "gpu" else 1)
    allocations.logit_columns = config.vocab_size

    def loss(model: nn.Module, batch: Batch) -> Any:
        allocations.moment, allocations.kind = "forward", "activations"
        output = next_token_loss(model, batch, z_loss=loop.z_loss)
        allocations.moment, allocations.kind = "backward", "workspace"
        return output

    with _shapes_alone(allocations, device):
        allocations.kind = "weights"
        model = _empty_model(config, dtype, place)
        allocations.kind = "moments"
        step = _WatchedStep(model, stage, loop, steps=10, loss=loss, first_new_row=first_new_row)
        step.allocations = allocations
        for parameter in model.parameters():
            allocations.label(parameter, "weights")
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(functools.partial(_label_gradient, allocations))
        _label_state(step, allocations)
        for number in range(2):
            if number == 1:
                allocations.costs = costs
            allocations.kind = "other"
            batches = [_batch(sequences, sequence_length, place) for _ in range(count)]
            step.take(number, batches, tokens)
            del batches
            allocations.moment = "resting"
            _label_state(step, allocations)
            if number == 0:
                # What the first step makes and keeps is there in all others, and has its label now.
                allocations.start_over()
        host_bytes = step.host_bytes
        allocations.moment, allocations.kind, allocations.costs = "end", "weights", None
        step.restore_frozen()
        return StageMemory(
            peak=dict(allocations.peak),
            moment=allocations.peak_moment,
            working=allocations.most_working,
            host_bytes=host_bytes,
            micro_batches=count,
            tokens=tokens,
            model_flops=step.flops // 2,
        )


@contextlib.contextmanager
def _shapes_alone(allocations: Allocations, device: Device) -> Iterator[None]:
    if device == "gpu":
        with allocations, kernel_backend("auto"), launches_sent_to(allocations):
            yield
    else:
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode(allow_non_fake_inputs=True), allocations:
            yield


def _empty_model(config: ModelConfig, dtype: torch.dtype, place: str) -> Llama:
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(place):
            return Llama(config)
    finally:
        torch.set_default_dtype(default)


def _batch(sequences: int, length: int, place: str) -> Batch:
    tokens = sequences * length
    ids, targets = (torch.empty(tokens, dtype=torch.int64, device=place) for _ in range(2))
    return Batch(ids, targets, PackedDocuments.from_lengths([length] * sequences, place), tokens)


def _label_gradient(allocations: Allocations, parameter: Tensor) -> None:
    if parameter.grad is not None:
        allocations.label(parameter.grad, "gradients")


def _label_state(step: TrainStep, allocations: Allocations) -> None:
    for name, tensor in step.optimizer.state_tensors().items():
        allocations.label(tensor, "masters" if name.startswith("master") else "moments")
    for tensor in step.optimizer.gradient_tensors():
        allocations.label(tensor, "gradients")
    for tensor in (*step.model.parameters(), *step.model.buffers()):  # scales of FP8 weights are buffers
        allocations.label(tensor, "weights")
