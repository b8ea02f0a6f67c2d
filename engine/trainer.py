"""The training loop of one stage: exact accumulation, checkpoints, resume, validation, metrics."""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
from torch import Tensor, nn

from ..model import Llama, merge_lora, save_adapter, save_model
from .batches import BatchLoader, SequenceSource
from .checkpoints import CheckpointStore
from .errors import Interrupted, RecipeError, TrainingError
from .evaluation import LossResult, ValidationSet, evaluate_loss
from .flops import device_peak_flops
from .loop_config import LoopConfig, loop_of
from .losses import LossFunction, next_token_loss
from .prefetch import prefetched
from .profiling import profiled
from .progress import Progress
from .stages import Stage
from .stop_signal import stop_signal
from .telemetry import Silence, Telemetry, Throughput, memory
from .train_step import TrainStep
from .world import ALONE, DistributedWorld, World

_DEFAULT_LOOP = LoopConfig()


class StageResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a stage did."""

    name: str
    steps: int
    tokens: int
    """Tokens of all global batches, predicted or not, every sequence counted as full."""
    corpora: dict[str, int]
    """Those tokens by corpus."""
    trained_parameters: int
    skipped_steps: int
    """Steps whose loss or gradient was out of bounds."""
    best_step: int | None
    """Step of the best validation, with `keep_best` the one whose weights the stage ends with."""
    seconds: float
    before: dict[str, LossResult]
    """By validation set."""
    after: dict[str, LossResult]

    @property
    def loss_before(self) -> float | None:
        """Loss before the stage on the first validation set, if there is one."""
        return next((result.loss for result in self.before.values()), None)

    @property
    def loss_after(self) -> float | None:
        """The same after the stage."""
        return next((result.loss for result in self.after.values()), None)


class _Running(msgspec.Struct, kw_only=True):
    """What a resumed run needs to know beside tensors; it goes into every checkpoint."""

    step: int = 0
    before: dict[str, LossResult] = {}
    seconds: float = 0.0
    metrics_bytes: int = 0
    best_loss: float = math.inf
    best_step: int | None = None
    worse_validations: int = 0


class Trainer:
    """Trains the parameters that a stage names, on a source of sequences.

    Args:
        model: changed in place; its dtype (fp32 or bf16) is the precision of the forward pass.
        stage: what trains, for how long and at which learning rate.
        data: training sequences, such as `PackedSequences`, or a mix of corpora.
        sequence_length: tokens of a full sequence, which turns the token budget into steps.
        folder: receives `metrics.jsonl`, the resumable states and, if the stage trains adapters alone, `adapter`,
            a copy of them that peft can put on the model that the stage began with.
        loop: batch sizes, memory, intervals; what the stage itself says of these goes first.
        seed: of the data order, adapters, dropout, blocks and stochastic rounding.
        first_sequence: sequences that earlier stages have used up.
        first_new_row: first row of the extended vocabulary, for the selectors "embed.new" and "head.new".
        validation: held-out sets by name; the first one decides which step is best.
        loss: of the model on a batch, in training and validation; by default the model's own `loss` with the loop's
            z-loss.
        inherited: optimizer state of the stage before, of `optimizer.state_tensors()`, for a stage with `inherit`.
        base_model_name: where the model came from, for whoever takes the adapters to peft.
        world: processes that train together, each with the same arguments and the same model, which they share from
            then on: its parameters are no longer whole tensors, adapters stay in it, and `save_model` writes it.
        on_step: called with the trainer and the number of steps done, after each; must not change the model.
        on_log: called with every line of metrics.

    Raises:
        RecipeError: if the stage names what this model does not have, a value of it or of the loop is out of bounds, or
            "auto" finds nothing that fits.
        TrainingError: if something that the loop asks for is not installed.

    Example:
        shards = TokenShards.open(folder, "train")
        Trainer(model, stage, PackedSequences(shards, 2048), sequence_length=2048, folder=out).run()
    """

    def __init__(
        self,
        model: nn.Module,
        stage: Stage,
        data: SequenceSource,
        *,
        sequence_length: int,
        folder: Path,
        loop: LoopConfig = _DEFAULT_LOOP,
        seed: int = 0,
        first_sequence: int = 0,
        first_new_row: int | None = None,
        validation: Mapping[str, ValidationSet] | None = None,
        loss: LossFunction | None = None,
        inherited: Mapping[str, Tensor] | None = None,
        base_model_name: str | None = None,
        world: World = ALONE,
        on_step: Callable[[Trainer, int], None] | None = None,
        on_log: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        self.model, self.stage, self.world = model, _checked(stage), world
        self.loop = _checked(loop_of(stage, loop))
        if self.loop.is_auto:
            if world.size > 1:
                raise RecipeError(
                    'micro_batch_size and activations are for one process alone to be found by "auto": give them'
                )
            from .run_plan import resolve_auto  # brings in a part of torch that takes a second to load

            self.loop = resolve_auto(
                model, stage, self.loop, sequence_length=sequence_length, first_new_row=first_new_row
            )
        self.folder = Path(folder)
        self.sequence_length = sequence_length
        self.steps = stage.steps(self.loop.batch_size, sequence_length)
        self.validation = dict(validation or {})
        self.validation_loss = loss or next_token_loss
        self.base_model_name = base_model_name
        self.on_step, self.on_log = on_step, on_log
        self.train_step = TrainStep(
            model,
            stage,
            self.loop,
            steps=self.steps,
            loss=loss or functools.partial(next_token_loss, z_loss=self.loop.z_loss),
            seed=seed,
            first_new_row=first_new_row,
            world=world,
        )
        self.device = self.train_step.device
        self.loader = BatchLoader(
            data,
            batch_size=self.loop.batch_size,
            micro_batch_size=self.loop.resolved_micro_batch_size,
            seed=seed,
            first_sequence=first_sequence,
            device=self.device,
            rank=world.rank,
            world_size=world.size,
        )
        if stage.inherit and inherited is not None:
            self.train_step.optimizer.inherit(inherited)
        self._running = _Running()

    def run(self) -> StageResult:
        """Train to the end of the stage, going on from the latest saved state in the folder.

        Adapters are merged into the weights at the end.

        Raises:
            Interrupted: after SIGINT or SIGTERM, once the state is saved.
            TrainingError: when too many steps in a row have a loss or a gradient out of bounds, or the GPU's memory is
                too small.
        """
        try:
            with _no_garbage_collection():
                return self._run()
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"stage {self.stage.name!r} does not fit the GPU's memory ({str(error).partition('. GPU')[0]}): lower "
                f'micro_batch_size (now {self.loop.micro_batch_size}), set activations = "full", or train less at once'
            ) from error

    def _run(self) -> StageResult:
        self.folder.mkdir(parents=True, exist_ok=True)
        loop = self.loop
        with contextlib.ExitStack() as stack:
            stack.callback(self.train_step.restore_frozen)
            first = self.world.is_first
            self._telemetry = stack.enter_context(
                Telemetry(self.folder, trackers=loop.trackers, run_name=self.stage.name) if first else Silence()
            )
            self._store = stack.enter_context(self._new_store())
            stop = stack.enter_context(stop_signal())
            if loop.frozen == "fp8":
                # Of the weights that the stage begins with, whatever is loaded in their place below.
                self.train_step.measure_inputs(self.loader.micro_batches(0)[0])
            running = self._running = self._resume()
            done = running.step
            self._began = time.monotonic() - running.seconds
            peak = device_peak_flops(self.device, next(self.model.parameters()).dtype)
            peak = None if peak is None else peak * self.world.size
            total, before = self._tokens(self.steps), self._tokens(done)
            self._throughput = Throughput(total, done_tokens=before, peak_flops=peak)
            if not running.before and self.validation:
                running.before = self._validate(0)
            # Behind that: before and after are told of the weights that are handed on, in between of those that train.
            self.train_step.quantise_frozen()
            self._bar = stack.enter_context(
                Progress(f"train {self.stage.name}", self._tokens(self.steps), "tok", self._tokens(done), shown=first)
            )
            profiler = stack.enter_context(profiled(self.folder, loop.profile if first else 0))
            last = done if self._stopped_early else self.steps
            batches = stack.enter_context(contextlib.closing(prefetched(self.loader, range(done, last))))
            for step, micro_batches in batches:
                asked = self.world.agree(lambda: stop.number or 0)
                self.train_step.take(step, micro_batches, self.loader.num_targets(step))
                profiler.step()
                done = step + 1
                if self.on_step is not None:
                    self.on_step(self, done)
                if done % loop.log_every == 0 or done == self.steps:
                    self._log_training(done)
                if loop.validate_every and done % loop.validate_every == 0 and done < self.steps:
                    self._compare(done, self._validate(done))
                number = asked()
                if number or (done % loop.checkpoint_every == 0 and done < self.steps):
                    self._save(done, wait=bool(number))
                if number:
                    raise Interrupted(number, f"stage {self.stage.name!r} is saved at step {done}")
                if self._stopped_early:
                    break

            if loop.keep_best:
                self._restore_best(done)
            self.train_step.restore_frozen()
            if self.stage.trains_adapters_alone:
                self._save_adapter()
            trained_parameters = sum(parameter.numel() for parameter in self.train_step.trained.values())
            if self.stage.uses_lora:
                self._merge_lora()
            after = self._validate(done) if self.validation else {}
            if number := self.world.agree(lambda: stop.number or 0)():
                # Trained but not yet written: a resumed run has no step left to do.
                self._save(done, wait=True)
                raise Interrupted(number, f"stage {self.stage.name!r} is saved at step {done}")
        return StageResult(
            name=self.stage.name,
            steps=done,
            tokens=self._tokens(done),
            corpora=self._corpora(done),
            trained_parameters=trained_parameters,
            skipped_steps=self.train_step.guard.report().skipped,
            best_step=running.best_step,
            seconds=time.monotonic() - self._began,
            before=running.before,
            after=after,
        )

    # Validation.

    def _validate(self, step: int) -> dict[str, LossResult]:
        """Loss on every validation set, written to the metrics."""
        self.model.eval()
        results = {
            name: evaluate_loss(
                self.model,
                held_out.source,
                batch_size=self.loop.resolved_micro_batch_size,
                text_bytes=held_out.text_bytes,
                loss=self.validation_loss,
                world=self.world,
            )
            for name, held_out in self.validation.items()
        }
        if self.train_step.sharded is not None:
            self.train_step.sharded.rest()
        self.model.train()
        self._throughput.restart()
        self._log(step, {"validation": msgspec.to_builtins(results)})
        return results

    def _compare(self, step: int, results: Mapping[str, LossResult]) -> None:
        """Remember the best validation, and keep its weights if they are asked for."""
        loss = next((result.loss for result in results.values()), math.inf)
        running = self._running
        if loss < running.best_loss:
            running.best_loss, running.best_step, running.worse_validations = loss, step, 0
            if self.loop.keep_best:
                self._save(step, score=loss)
        else:
            running.worse_validations += 1

    @property
    def _stopped_early(self) -> bool:
        return 0 < self.loop.patience <= self._running.worse_validations

    def _restore_best(self, step: int) -> None:
        """Go back to the weights of the best validation, unless those of now are better."""
        best = self._running.best_step
        if best is None or best == step:
            return
        self._compare(step, self._validate(step))
        if self._running.best_step != step and (loaded := self._load(best)) is not None:
            self.train_step.load_state_tensors(loaded[0], best)

    # Checkpoints.

    def inheritance(self) -> dict[str, Tensor]:
        """Optimizer state for a next stage with `inherit`: of all but adapters, which end with their stage.

        It is that of whole parameters; of several processes only the first gets it, for all to call.
        """
        optimizer, sharded = self.train_step.optimizer, self.train_step.sharded
        state = optimizer.state_tensors()
        if sharded is not None:
            state = sharded.state_tensors(state, optimizer.state_spans())
        return {name: tensor for name, tensor in state.items() if not name.endswith((".lora_A", ".lora_B"))}

    def _resume(self) -> _Running:
        """Load the latest state, if there is one."""
        loaded = self._load()
        if loaded is None:
            self._telemetry.resume(0, 0)
            return _Running()
        tensors, state = loaded
        running = msgspec.convert(state, _Running)
        self.train_step.load_state_tensors(tensors, running.step)
        self._telemetry.resume(running.metrics_bytes, running.step)
        return running

    def _load(self, step: int | None = None) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        return self._store.load(step, self.train_step.wanted)

    def _new_store(self) -> CheckpointStore:
        kept: dict[str, Any] = {"keep_last": self.loop.keep_last, "keep_best": self.loop.keep_best}
        folder = self.folder / "states"
        if not isinstance(self.world, DistributedWorld):
            return CheckpointStore(folder, **kept)
        from .sharded_checkpoints import ShardedCheckpointStore  # brings in torch.distributed

        return ShardedCheckpointStore(folder, self.world, self.train_step, **kept)

    def load_saved(self) -> int | None:
        """Take on the weights of the latest saved state in the folder, adapters merged, for `save_model`.

        Returns:
            Steps after which it was saved; None if there is none.
        """
        with self._new_store() as self._store:
            loaded = self._load()
        if loaded is None:
            return None
        step = loaded[1]["step"]
        self.train_step.load_state_tensors(loaded[0], step)
        if self.stage.uses_lora:
            self._merge_lora()
        return step

    def save_model(self, folder: Path, *, extra_files: Iterable[Path] = ()) -> None:
        """Write the trained model as `redwhale.model.save_model` does; for all processes to call."""
        if self.train_step.sharded is not None:
            self.train_step.sharded.save(folder, extra_files=extra_files)
        else:
            assert isinstance(self.model, Llama), "other models are for their own code to save"
            save_model(self.model, folder, extra_files=extra_files)

    def _save_adapter(self) -> None:
        folder, sharded = self.folder / "adapter", self.train_step.sharded
        whole = None if sharded is None else sharded.adapters()
        if self.world.is_first:
            save_adapter(self.model, folder, base_model_name=self.base_model_name, tensors=whole)

    def _merge_lora(self) -> None:
        if self.train_step.sharded is not None:
            self.train_step.sharded.fold_lora()
        else:
            merge_lora(self.model)

    def _save(self, step: int, *, score: float | None = None, wait: bool = False) -> None:
        running = self._running
        running.step, running.seconds = step, time.monotonic() - self._began
        running.metrics_bytes = self._telemetry.position()
        state = msgspec.to_builtins(running)
        self._store.save(step, self.train_step.state_tensors(), state, score=score, wait=wait)
        gc.collect()

    # Metrics.

    def _tokens(self, steps: int) -> int:
        return steps * self.loop.batch_size * self.sequence_length

    def _sequences(self, step: int) -> dict[str, int]:
        """By corpus, sequences that this stage and those before it have used before `step`."""
        return {name: place.sequences for name, place in self.loader.position(step).items()}

    def _corpora(self, steps: int) -> dict[str, int]:
        begin, end = self._sequences(0), self._sequences(steps)
        return {name: (end[name] - begin[name]) * self.sequence_length for name in end}

    def _log_training(self, step: int) -> None:
        stage, sums, guard = self.stage, self.train_step.drain(), self.train_step.guard.report()
        if guard.first_step is not None and guard.consecutive >= self.loop.most_skipped:
            begin, end = (self._sequences(at) for at in (guard.first_step, step))
            raise TrainingError(guard.sentence(stage.name, lr=stage.lr, begin=begin, end=end))
        tokens = self._tokens(step) - self._throughput.done_tokens
        fields: dict[str, Any] = {}
        if sums.targets:  # not all steps were skipped
            fields = {"loss": sums.nats / sums.targets, "lse": sums.lse / sums.targets}
        fields |= {"lr": stage.lr * stage.lr_factor(step - 1, self.steps), "grad_norm": float(self.train_step.norm)}
        fields |= self._throughput.update(tokens, sums.flops)
        position = {name: place._asdict() for name, place in self.loader.position(step).items()}
        fields |= {"skipped_steps": guard.skipped, "position": position}
        self._log(step, {**fields, "seconds": time.monotonic() - self._began})
        self._bar.update(tokens, **({"loss": f"{fields['loss']:.4f}"} if sums.targets else {}))

    def _log(self, step: int, fields: Mapping[str, Any]) -> None:
        line = {"stage": self.stage.name, "step": step, "tokens": self._tokens(step), **fields, **memory(self.device)}
        self._telemetry.log(step, line)
        if self.on_log is not None:
            self.on_log(line)


_Config = TypeVar("_Config", Stage, LoopConfig)


def _checked(config: _Config) -> _Config:
    """The same; msgspec checks bounds when it decodes a recipe, but not what a program constructs."""
    try:
        msgspec.convert(msgspec.to_builtins(config), type(config))
    except msgspec.ValidationError as error:
        raise RecipeError(f"{type(config).__name__}: {error}") from None
    return config


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Keep Python's collector out of the steps, where it stops the launches of kernels; checkpoints call it."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
