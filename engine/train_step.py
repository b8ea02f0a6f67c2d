"""Optimizer steps of a stage: exact accumulation over micro-batches, skipped spikes, blocks of layers in turn."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from ..model import Fp8Base, Llama, add_lora
from ..model.activations import compile_layers
from ..model.fp8_base import check_fp8, input_means
from .batches import Batch
from .checkpoints import Wanted
from .flops import StepFlops, attention_pairs, training_flops
from .loop_config import LoopConfig
from .losses import LossFunction, loss_sums
from .optimizer import StageOptimizer
from .parts import WHOLE, Span
from .selectors import freeze_all_but, select_parameters
from .spike_guard import SpikeGuard
from .stages import Stage
from .world import ALONE, DistributedWorld, World

_WEIGHT, _GUARD, _OPTIMIZER, _SUMS = "weight.", "guard.", "optimizer.", "sums"
"""Names of tensors in a checkpoint, or what they begin with."""


class StepSums(NamedTuple):
    """What the steps since the last look add up to, skipped ones left out."""

    nats: float
    """Cross-entropy."""
    lse: float
    """ln Σ exp(logits)."""
    targets: float
    """Target tokens, the denominator of both."""
    flops: int
    """Model FLOPs, those of skipped steps included; 0 for a model whose shape is not known."""


class TrainStep:
    """Trains the parameters that a stage names, a global batch at a time; nothing in `take` waits for the device.

    Args:
        model: changed in place: adapters are added, and exactly what the stage names requires gradients.
        stage: what trains and how.
        loop: activations, FP8, compilation, spikes.
        steps: of the whole stage, for the learning rate.
        loss: of the model on a batch.
        seed: of adapters, dropout, blocks and stochastic rounding.
        first_new_row: see `select_parameters`.
        world: processes that share the model, each with its part of every global batch.
    """

    def __init__(
        self,
        model: nn.Module,
        stage: Stage,
        loop: LoopConfig,
        *,
        steps: int,
        loss: LossFunction,
        seed: int = 0,
        first_new_row: int | None = None,
        world: World = ALONE,
    ) -> None:
        self.model, self.stage, self.steps, self.loss, self.seed = model, stage, steps, loss, seed
        self.world = world
        self.device = world.device or next(model.parameters()).device
        if stage.uses_lora:
            add_lora(model, **msgspec.structs.asdict(stage.lora), seed=seed)
        self.sharded = None
        if isinstance(world, DistributedWorld):
            from .sharding import ShardedModel  # brings in torch.distributed

            self.sharded = ShardedModel(model, stage, loop, world, first_new_row=first_new_row)
        self.trained = select_parameters(model, stage.train, first_new_row=first_new_row)
        freeze_all_but(model, self.trained)
        if self.sharded is not None:
            self.sharded.settle()
        model.train()
        self._loop = loop
        self._fp8_base: Fp8Base | None = None
        self._input_means: dict[str, Tensor] | None = None
        if isinstance(model, Llama):
            if loop.frozen == "fp8":
                check_fp8(model, self.trained)
            model.model.activations = loop.resolved_activations
            if loop.compile and loop.frozen != "fp8":  # else once the layers are in FP8
                compile_layers(model)
        self.optimizer = StageOptimizer({}, stage, lr=stage.lr, seed=seed, parts=self.sharded or WHOLE)
        self.guard = SpikeGuard(loop.spike_sigma, device=self.device)
        self.norm = torch.zeros((), device=self.device)
        """Global gradient norm of the last step before clipping, on the device."""
        self._skip = torch.zeros((), dtype=torch.bool, device=self.device)
        self._sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        self._flops = 0
        self._flops_of: StepFlops | None = None
        self._active: list[str] | None = None
        self._activate(0)

    def take(self, step: int, micro_batches: list[Batch], num_targets: int) -> None:
        """Take step `step`, counted from 0.

        Args:
            step: decides learning rate, dropout and which blocks train.
            micro_batches: of this process' part of the global batch; as many in every process.
            num_targets: target tokens of the whole global batch, by which its summed loss is divided: every token
                weighs the same, however micro-batches divide them.
        """
        self.measure_inputs(micro_batches[0])
        self.quantise_frozen()
        self._activate(step)
        num_targets = max(1, num_targets)
        self._skip.zero_()
        self.optimizer.start_step(len(micro_batches), self.stage.lr_factor(step, self.steps), skip=self._skip)
        if self.optimizer.needs_norm_pass:
            with self.optimizer.norm_pass():
                self.forward_backward(step, micro_batches, num_targets)
            self._check_norm()
        sums = self.forward_backward(step, micro_batches, num_targets)
        self._check_norm()
        self.norm = self.optimizer.finish_step()
        self.guard.record(step, sums[0] / num_targets, self.norm, self._skip)
        sums = torch.cat([sums, torch.full_like(sums[:1], num_targets)])
        self._sums += sums.masked_fill(self._skip, 0.0)
        self._flops += self._step_flops(micro_batches)

    def measure_inputs(self, batch: Batch) -> None:
        """Take the means of the inputs of what will be put into FP8, once.

        Training that goes on has to call it before `load_state_tensors`, with the first batch of the stage, to have the
        same numbers; in training from the beginning, the first step calls it.
        """
        model = self.model
        if self._loop.frozen == "fp8" and self._input_means is None and isinstance(model, Llama):
            run = functools.partial(model.hidden_states, batch.input_ids, batch.documents)
            self._input_means = input_means(model, self.trained, run)

    def quantise_frozen(self) -> None:
        """Put what does not train into FP8, if asked for: at the latest when a step begins."""
        if self._loop.frozen == "fp8" and self._fp8_base is None and isinstance(self.model, Llama):
            self._fp8_base = Fp8Base(self.model, self.trained, self._input_means)
            if self._loop.compile:
                compile_layers(self.model)

    def restore_frozen(self) -> None:
        """Put the weights back that FP8 stood for, bit for bit: before adapters are merged, and when a stage ends."""
        if self._fp8_base is not None:
            self.optimizer.free_gradients()  # the weights take more than their codes
            self._fp8_base.restore()
            self._fp8_base = None

    @property
    def host_bytes(self) -> int:
        """Of the host's memory that frozen weights of a GPU's model take."""
        return 0 if self._fp8_base is None else self._fp8_base.host_bytes

    def forward_backward(self, step: int, micro_batches: list[Batch], num_targets: int) -> Tensor:
        """Gradients of a global batch; returns the sums of its cross-entropy and its lse, [2] fp64 on the device."""
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        with self._random_numbers_of(step):
            for number, batch in enumerate(micro_batches, 1):
                sums = loss_sums(self.loss(self.model, batch))
                total += torch.stack([sums.nats, sums.lse]).double()
                if number == len(micro_batches):  # known before the first weight can change
                    self.world.sum_(total)
                    self._skip.logical_or_(self.guard.check_loss(total[0] / num_targets))
                (sums.objective / num_targets).backward()
        return total

    def drain(self) -> StepSums:
        """The sums since the last call; waits for the device."""
        nats, lse, targets = self._sums.tolist()
        sums = StepSums(nats, lse, targets, int(self.world.sum_(torch.tensor(self._flops))))
        self._sums.zero_()
        self._flops = 0
        return sums

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything that training has changed, by name: weights, optimizer state, the guard's windows, the sums."""
        resting = [name for name in self.trained if name not in self.optimizer.parameters]
        return {
            **{_WEIGHT + name: self._weight(name) for name in resting},
            **{_OPTIMIZER + name: tensor for name, tensor in self.optimizer.state_tensors().items()},
            **{_GUARD + name: tensor for name, tensor in self.guard.state_tensors().items()},
            _SUMS: self._sums,
        }

    def state_spans(self) -> dict[str, Span | None]:
        """Where the entries of each of `state_tensors` lie in the whole tensor; None where there are no parts."""
        optimizer = {_OPTIMIZER + name: span for name, span in self.optimizer.state_spans().items()}
        parts = self.sharded or WHOLE
        resting = {_WEIGHT + name: parts.span(name, parameter) for name, parameter in self.trained.items()}
        return {name: resting.get(name, optimizer.get(name)) for name in self.state_tensors()}

    def wanted(self, step: int) -> dict[str, Wanted]:
        """What `load_state_tensors` needs of a checkpoint of `step` steps."""
        self._activate(max(0, step - 1))  # what trained at that time
        spans = self.state_spans()
        return {name: Wanted(tensor, spans[name]) for name, tensor in self.state_tensors().items()}

    def load_state_tensors(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Go back to what `state_tensors` gave after `step` steps."""
        self._activate(max(0, step - 1))  # what trained at that time
        for name in self.trained:
            if _WEIGHT + name in tensors:
                self._weight(name).copy_(tensors[_WEIGHT + name])
        self.optimizer.load_state_tensors(_without(_OPTIMIZER, tensors))
        self.guard.load_state_tensors(_without(_GUARD, tensors))
        self._sums.copy_(tensors[_SUMS])

    def _weight(self, name: str) -> Tensor:
        """What this process holds of a parameter that trains."""
        return (self.sharded or WHOLE).local(self.trained[name].detach())

    def _activate(self, step: int) -> None:
        """Let the parameters of this step train, and free what those that come to rest leave behind."""
        names = self.stage.active(list(self.trained), step, self.seed)
        if names == self._active:
            return
        self._active = names
        active = {name: self.trained[name] for name in names}
        for name, parameter in self.trained.items():
            parameter.requires_grad_(name in active)
        self.optimizer.set_parameters(active)
        if isinstance(self.model, Llama):
            buffers = {name.partition("[")[0]: self.optimizer.gradient_buffer(name) for name in names}
            embed, head = (buffers.get(name) for name in ("model.embed_tokens.weight", "lm_head.weight"))
            self.model.set_gradient_buffers(embed, head)
            self._flops_of = training_flops(self.model.config, active)

    def _check_norm(self) -> None:
        """Skip the step if its gradient is out of bounds, where that is known before the first weight changes."""
        norm = self.optimizer.gradient_norm()
        if norm is not None:
            self._skip.logical_or_(self.guard.check_norm(norm))

    @contextlib.contextmanager
    def _random_numbers_of(self, step: int) -> Iterator[None]:
        """Make dropout a pure function of (seed, step), so that a resumed run draws what an unbroken one does."""
        if isinstance(self.model, Llama) and not (self.stage.uses_lora and self.stage.lora.dropout):
            yield
            return
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            # Mixed, because the CPU's generator looks at 32 bits of its seed alone.
            numbers = (self.seed, step, self.world.rank)[: 3 if self.world.rank else 2]
            torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))
            yield

    def _step_flops(self, micro_batches: list[Batch]) -> int:
        if self._flops_of is None or not isinstance(self.model, Llama):
            return 0
        window = self.model.config.sliding_window
        lengths = [batch.documents.lengths for batch in micro_batches]
        pairs = sum(attention_pairs(documents, window) for documents in lengths)
        return self._flops_of.of(sum(map(sum, lengths)), pairs)


def _without(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
