"""The training loop of one stage: exact accumulation, checkpoints, resume, metrics."""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import torch
from torch import Tensor

from ..model import Llama, add_lora, merge_lora, save_adapter
from .batches import BatchLoader, SequenceSource
from .errors import Interrupted, TrainingError
from .evaluation import LossResult, evaluate_loss
from .optimizer import MasterAdamW
from .progress import Progress
from .stages import Positive, Stage, learning_rate, select_parameters
from .training_state import load_training_state, save_training_state

Activations = Literal["none", "full"]


class LoopConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the loop runs, the same for every stage."""

    batch_size: Positive = 16
    """Sequences in a global batch."""
    micro_batch_size: Positive = 4
    """Most sequences in one forward pass; changes memory and speed, not what is computed."""
    activations: Activations = "none"
    """"none" keeps what backward needs; "full" keeps each layer's input and recomputes the rest."""
    log_every: Positive = 10
    """Steps between two lines of metrics."""
    checkpoint_every: Positive = 100
    """Steps between two resumable states."""
    validate_every: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Steps between two validations; 0 validates before and after the stage only."""


_DEFAULT_LOOP = LoopConfig()


class StageResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a stage did."""

    name: str
    steps: int
    tokens: int
    """Tokens of all global batches, predicted or not, every sequence counted as full."""
    trained_parameters: int
    seconds: float
    before: LossResult | None
    after: LossResult | None


class Trainer:
    """Trains the parameters that a stage names, on a source of sequences.

    Args:
        model: changed in place; its dtype (fp32 or bf16) is the precision of the forward pass.
        stage: what trains, for how long and at which learning rate.
        data: training sequences, such as `PackedSequences`.
        sequence_length: tokens of a full sequence, which turns the token budget into steps.
        folder: receives `metrics.jsonl`, the resumable states and, if the stage trains adapters alone, `adapter`,
            a copy of them that peft can put on the model that the stage began with.
        loop: batch sizes and intervals.
        seed: of the data order and of the adapters.
        first_sequence: sequences that earlier stages have used up.
        validation: sequences for the loss before and after, or None.
        validation_bytes: UTF-8 bytes of the validation text, for bits per byte.
        base_model_name: where the model came from, for whoever takes the adapters to peft.
        on_log: called with every line of metrics.

    Example:
        shards = TokenShards.open(folder, "train")
        Trainer(model, stage, PackedSequences(shards, 2048), sequence_length=2048, folder=out).run()
    """

    def __init__(
        self,
        model: Llama,
        stage: Stage,
        data: SequenceSource,
        *,
        sequence_length: int,
        folder: Path,
        loop: LoopConfig = _DEFAULT_LOOP,
        seed: int = 0,
        first_sequence: int = 0,
        validation: SequenceSource | None = None,
        validation_bytes: int | None = None,
        base_model_name: str | None = None,
        on_log: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        self.model, self.stage, self.loop, self.seed = model, stage, loop, seed
        self.folder = Path(folder)
        self.sequence_length = sequence_length
        self.steps = stage.steps(loop.batch_size, sequence_length)
        self.validation, self.validation_bytes = validation, validation_bytes
        self.base_model_name = base_model_name
        self.on_log = on_log
        self.device = model.lm_head.weight.device
        self.loader = BatchLoader(
            data,
            batch_size=loop.batch_size,
            micro_batch_size=loop.micro_batch_size,
            seed=seed,
            first_sequence=first_sequence,
            device=self.device,
        )
        if stage.uses_lora:
            add_lora(model, **msgspec.structs.asdict(stage.lora), seed=seed)
        trained = select_parameters(model, stage.train)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        model.train().model.recompute_layers = loop.activations == "full"
        self.optimizer = MasterAdamW(trained, stage)

    def run(self) -> StageResult:
        """Train to the end of the stage, going on from the latest saved state in the folder.

        Adapters are merged into the weights at the end.

        Raises:
            Interrupted: after SIGINT or SIGTERM, once the state is saved.
            TrainingError: when the loss or the gradient stops being finite, or the GPU's memory is too small.
        """
        try:
            return self._run()
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"stage {self.stage.name!r} does not fit the GPU's memory ({str(error).partition('. GPU')[0]}): lower "
                f'micro_batch_size (now {self.loop.micro_batch_size}), set activations = "full", or train less at once'
            ) from error

    def _run(self) -> StageResult:
        self.folder.mkdir(parents=True, exist_ok=True)
        first_step, state = self._resume()
        before = state["before"]
        began = time.monotonic() - state["seconds"]
        loss_sum = torch.tensor(state["loss_sum"], dtype=torch.float64, device=self.device)
        targets_seen, norm = state["targets_seen"], None
        last_log, last_log_tokens = time.monotonic(), first_step * self._tokens_per_step

        with (
            _stop_signal() as stop,
            open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as metrics,
            Progress(f"train {self.stage.name}", self._total_tokens, "tok", first_step * self._tokens_per_step) as bar,
        ):
            if before is None and self.validation is not None:
                before = self._validate()
                self._log(metrics, step=0, **_validation_fields(before))
            for step in range(first_step, self.steps):
                step_loss, num_targets = self._forward_backward(step)
                lr = learning_rate(self.stage, step, self.steps)
                norm = self.optimizer.step(lr)
                loss_sum += step_loss
                targets_seen += num_targets
                done = step + 1
                if done % self.loop.log_every == 0 or done == self.steps:
                    loss = float(loss_sum) / max(1, targets_seen)
                    self._check_finite("loss", loss, done)
                    self._check_finite("gradient norm", float(norm), done)
                    now = time.monotonic()
                    rate = (done * self._tokens_per_step - last_log_tokens) / max(1e-9, now - last_log)
                    fields = {"loss": loss, "lr": lr, "grad_norm": float(norm), "tokens_per_second": round(rate, 1)}
                    self._log(metrics, step=done, **fields, seconds=round(now - began, 3))
                    bar.update(done * self._tokens_per_step - last_log_tokens, loss=f"{loss:.4f}")
                    last_log, last_log_tokens = now, done * self._tokens_per_step
                    loss_sum.zero_()
                    targets_seen = 0
                if self.loop.validate_every and done % self.loop.validate_every == 0 and done < self.steps:
                    self._log(metrics, step=done, **_validation_fields(self._validate()))
                if stop.signal is not None or (done % self.loop.checkpoint_every == 0 and done < self.steps):
                    # A state that is not finite must not take the place of one that is.
                    self._check_finite("loss", float(loss_sum), done)
                    self._check_finite("gradient norm", float(norm), done)
                    self._save(metrics, done, before, time.monotonic() - began, float(loss_sum), targets_seen)
                if stop.signal is not None:
                    raise Interrupted(stop.signal, f"stage {self.stage.name!r} is saved at step {done}")

            trained_parameters = sum(parameter.numel() for parameter in self.optimizer.parameters.values())
            if self.stage.trains_adapters_alone:
                save_adapter(self.model, self.folder / "adapter", base_model_name=self.base_model_name)
            if self.stage.uses_lora:
                merge_lora(self.model)
            after = self._validate() if self.validation is not None else None
            if stop.signal is not None:  # trained but not yet written: a resumed run has no step left to do
                self._save(metrics, self.steps, before, time.monotonic() - began, 0.0, 0)
                raise Interrupted(stop.signal, f"stage {self.stage.name!r} is saved at step {self.steps}")
            if after is not None:
                self._check_finite("validation loss", after.loss, self.steps)
                self._log(metrics, step=self.steps, **_validation_fields(after))
        return StageResult(
            name=self.stage.name,
            steps=self.steps,
            tokens=self._total_tokens,
            trained_parameters=trained_parameters,
            seconds=time.monotonic() - began,
            before=before,
            after=after,
        )

    @property
    def _tokens_per_step(self) -> int:
        return self.loop.batch_size * self.sequence_length

    @property
    def _total_tokens(self) -> int:
        return self.steps * self._tokens_per_step

    def _forward_backward(self, step: int) -> tuple[Tensor, int]:
        """Gradients of one global batch; returns its summed loss, on the device, and its target count."""
        micro_batches = self.loader.micro_batches(step)
        # Every token of the global batch weighs the same, however the micro-batches divide them.
        num_targets = sum(batch.num_targets for batch in micro_batches)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        with self._random_numbers_of(step):
            for batch in micro_batches:
                output = self.model.loss(batch.input_ids, batch.targets, batch.documents)
                (output.loss_sum / max(1, num_targets)).backward()
                self.optimizer.accumulate()
                loss_sum += output.loss_sum.detach()
        return loss_sum, num_targets

    @contextlib.contextmanager
    def _random_numbers_of(self, step: int) -> Iterator[None]:
        """Make dropout a pure function of (seed, step), so that a resumed run draws what an unbroken one does."""
        if not (self.stage.uses_lora and self.stage.lora.dropout):
            yield
            return
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            # Mixed, because the CPU's generator looks at 32 bits of its seed alone.
            torch.manual_seed(int(np.random.SeedSequence((self.seed, step)).generate_state(1)[0]))
            yield

    def _validate(self) -> LossResult:
        assert self.validation is not None
        size = self.loop.micro_batch_size
        self.model.eval()
        result = evaluate_loss(self.model, self.validation, batch_size=size, text_bytes=self.validation_bytes)
        self.model.train()
        return result

    def _check_finite(self, what: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            raise TrainingError(
                f"the {what} of stage {self.stage.name!r} is {value} at step {step}: lower its learning rate "
                f"(lr = {self.stage.lr:g}) or look at the data of the last {self.loop.log_every} steps"
            )

    def _log(self, metrics, *, step: int, **fields: Any) -> None:
        line = {"stage": self.stage.name, "step": step, "tokens": step * self._tokens_per_step, **fields}
        line["peak_memory_bytes"] = _peak_memory_bytes(self.device)
        metrics.write(json.dumps(line) + "\n")
        metrics.flush()
        if self.on_log is not None:
            self.on_log(line)

    def _save(
        self, metrics, step: int, before: LossResult | None, seconds: float, loss_sum: float, targets: int
    ) -> None:
        # The metrics reach the disk before the state that says they were written.
        os.fsync(metrics.fileno())
        state = {
            "before": msgspec.to_builtins(before),
            "seconds": seconds,
            "loss_sum": loss_sum,
            "targets_seen": targets,
            "metrics_bytes": metrics.tell(),
        }
        save_training_state(self._states, step, self.optimizer.state_tensors(), state)

    @property
    def _states(self) -> Path:
        return self.folder / "states"

    def _resume(self) -> tuple[int, dict[str, Any]]:
        """Load the latest state; returns the step to go on with and the running values."""
        metrics = self.folder / "metrics.jsonl"
        loaded = load_training_state(self._states)
        if loaded is None:
            metrics.unlink(missing_ok=True)
            return 0, {"before": None, "seconds": 0.0, "loss_sum": 0.0, "targets_seen": 0}
        tensors, state = loaded
        self.optimizer.load_state_tensors(tensors)
        # Lines behind the saved state belong to steps that are about to be repeated.
        os.truncate(metrics, state["metrics_bytes"])
        if state["before"] is not None:
            state["before"] = msgspec.convert(state["before"], LossResult)
        return state["step"], state


def _validation_fields(result: LossResult) -> dict[str, Any]:
    return {
        "validation_loss": result.loss,
        "validation_accuracy": result.accuracy,
        "validation_bits_per_byte": result.bits_per_byte,
    }


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _Stop:
    signal: int | None = None


@contextlib.contextmanager
def _stop_signal() -> Iterator[_Stop]:
    """Turn SIGINT and SIGTERM into a flag, so that a step and its checkpoint end whole.

    Signals can only be caught in the main thread; elsewhere the flag is never set.
    """
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: object) -> None:
        if stop.signal is not None:  # asked twice: do not wait for the step
            raise KeyboardInterrupt
        stop.signal = number

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
