"""Step `train`: the stages of continued pretraining, each a unit with a folder and a manifest of its own."""

from __future__ import annotations

from pathlib import Path

import msgspec
from safetensors.torch import load_file, save_file

from ...model import read_config
from ...model.atomic_folder import fsync
from ..batches import PackedSequences, SequenceSource
from ..device import resolve_precision
from ..errors import RecipeError, RunError
from ..evaluation import ValidationSet
from ..loop_config import loop_of
from ..mixture import MixedSequences
from ..progress import scaled
from ..recipe import CORPUS, TrainConfig
from ..run_folder import StepResult
from ..shards import TokenShards
from ..stages import Stage
from ..trainer import Trainer
from .context import Context, Unit, config_of, model_outputs

_OPTIMIZER_STATE = "optimizer.safetensors"


def units(context: Context) -> list[Unit]:
    """One unit a stage, in order; a stage is out of date when it, or any stage before it, has changed."""
    config = context.recipe.train
    if config is None:
        return []
    stages = config.all_stages
    _check(context, config, stages)
    return [_stage_unit(context, config, stages, index) for index in range(len(stages))]


def _check(context: Context, config: TrainConfig, stages: tuple[Stage, ...]) -> None:
    extra = context.recipe.pack.extra if context.recipe.pack is not None else None
    if extra is not None and (unknown := sorted(config.mix.keys() - {CORPUS, *extra})):
        known = ", ".join((CORPUS, *extra))
        raise RecipeError(f"train.mix names {unknown[0]!r}, which [pack] does not make; known: {known}")
    for index, stage in enumerate(stages):
        if index == 0 and stage.inherit:
            raise RecipeError(f"stage {stage.name!r} is the first: there is no optimizer state to inherit")
        if context.recipe.tokenizer is None and any(selector.endswith(".new") for selector in stage.train):
            raise RecipeError(f"stage {stage.name!r} trains new rows, but the recipe has no [tokenizer] to add any")


def _stage_unit(context: Context, config: TrainConfig, stages: tuple[Stage, ...], index: int) -> Unit:
    previous = context.stage_name(index - 1) if index else None

    def inputs() -> dict[str, str]:
        model = {previous: context.outputs_digest(previous)} if previous else context.initial_hashes()
        return {"pack": context.outputs_digest("pack"), **model}

    described = config_of(
        config,
        stages={key: value for key, value in msgspec.to_builtins(stages[index]).items() if value is not None},
        first_sequence=_first_sequence(config, stages, index),
        hands_over=_hands_over(stages, index),
        seed=context.recipe.seed,
        precision=context.precision,
    )
    for key in ("plan", "tokens", "lr_scale"):  # the stage tells what came of them
        described.pop(key)

    def check() -> None:
        context.check_source("pack")
        context.check_init()

    name = context.stage_name(index)
    return Unit("train", name, described, inputs, lambda folder: run_stage(context, index, folder), check, shared=True)


def _first_sequence(config: TrainConfig, stages: tuple[Stage, ...], index: int) -> int:
    """Sequences that the stages before `index` use up: every stage goes on in the data where the last one ended."""
    sizes = [(stage, loop_of(stage, config).batch_size) for stage in stages[:index]]
    return sum(stage.steps(size, config.sequence_length) * size for stage, size in sizes)


def _hands_over(stages: tuple[Stage, ...], index: int) -> bool:
    """Whether the next stage goes on with this one's optimizer state."""
    return index + 1 < len(stages) and stages[index + 1].inherit


def _trainer(context: Context, index: int, folder: Path) -> Trainer:
    """What trains one stage from the model before it, in `folder`."""
    config = context.recipe.train
    assert config is not None
    stages = config.all_stages
    stage = stages[index]
    before = context.run.path / context.stage_name(index - 1) if index else None
    start = before / "model" if before else context.initial_model
    tokenizer = context.tokenizer()
    pack = context.run.path / "pack"
    precision = None if stage.precision is None else resolve_precision(stage.precision, context.device)
    data = _training_data(pack, config, tokenizer.sha256, context.recipe.seed)
    validation = _validation_sets(pack, config, tokenizer.sha256)
    model = context.load_shared(start, tokenizer, precision)
    return Trainer(
        model,
        stage,
        data,
        sequence_length=config.sequence_length,
        folder=folder,
        loop=config,
        seed=context.recipe.seed,
        first_sequence=_first_sequence(config, stages, index),
        first_new_row=read_config(context.base_model).vocab_size,
        validation=validation,
        inherited=load_file(before / _OPTIMIZER_STATE) if before is not None and stage.inherit else None,
        base_model_name=str(start),
        world=context.world,
    )


def run_stage(context: Context, index: int, folder: Path) -> StepResult:
    """Train one stage from the model before it and write the result to `folder/model`."""
    config = context.recipe.train
    assert config is not None
    stages = config.all_stages
    stage = stages[index]
    trainer = _trainer(context, index, folder)
    result = trainer.run()
    trainer.save_model(folder / "model", extra_files=context.tokenizer_files())
    outputs = model_outputs(folder)
    if _hands_over(stages, index):
        state = trainer.inheritance()
        if context.world.is_first:
            save_file(state, folder / _OPTIMIZER_STATE)
            fsync(folder / _OPTIMIZER_STATE)
        outputs.append(_OPTIMIZER_STATE)
    return StepResult(
        summary=msgspec.to_builtins(result),
        outputs=outputs,
        went_in=f"{scaled(result.tokens)} tokens, {result.steps} steps",
        came_out=f"{scaled(result.trained_parameters)} parameters trained ({' + '.join(stage.train)})",
        scratch=("states",),
        before=result.loss_before,
        after=result.loss_after,
    )


def snapshot(context: Context, target: Path) -> str:
    """Write the model of the stage that is being trained, as it was last saved, for Hugging Face tools.

    Args:
        context: of the run; any number of processes may be training it meanwhile.
        target: folder to write.

    Returns:
        What was written, in one line.

    Raises:
        RunError: if no stage has a saved state.
    """
    stages = context.recipe.train.all_stages if context.recipe.train is not None else ()
    for index, stage in enumerate(stages):
        folder = context.run.step(context.stage_name(index)).partial
        if not (folder / "states").exists():
            continue
        trainer = _trainer(context, index, folder)
        step = trainer.load_saved()
        if step is not None:
            trainer.save_model(target, extra_files=context.tokenizer_files())
            return f"{target}: stage {stage.name!r} after {step} of {trainer.steps} steps"
    raise RunError(
        f"no stage in {context.run.path} has a saved state: finished stages have their model in train/*/model, and one "
        "that trains saves its first state after checkpoint_every steps"
    )


def _training_data(pack: Path, config: TrainConfig, tokenizer_sha256: str, seed: int) -> SequenceSource:
    def source(name: str) -> PackedSequences:
        split = "train" if name == CORPUS else name
        shards = TokenShards.open(pack, split, tokenizer_sha256=tokenizer_sha256, verify=config.verify)
        return PackedSequences(shards, config.sequence_length)

    if not config.mix:
        return source(CORPUS)
    return MixedSequences({name: source(name) for name in config.mix}, config.mix, seed)


def _validation_sets(pack: Path, config: TrainConfig, tokenizer_sha256: str) -> dict[str, ValidationSet]:
    """The corpus' own validation split, as "korean", and the recipe's held-out domains."""
    prefixes = {path.name.rpartition("-")[0] for path in pack.glob("*.json")}
    splits = {"korean": "validation"} if "validation" in prefixes else {}
    splits |= {name.removeprefix("heldout-"): name for name in sorted(prefixes) if name.startswith("heldout-")}
    sets = {}
    for name, split in splits.items():
        shards = TokenShards.open(pack, split, tokenizer_sha256=tokenizer_sha256, verify=config.verify)
        if shards.tokens:
            sets[name] = ValidationSet(PackedSequences(shards, config.sequence_length), shards.text_bytes)
    return sets
