"""Step `train`: the stages of continued pretraining, each a unit with a folder and a manifest of its own."""

from __future__ import annotations

from pathlib import Path

import msgspec

from ...model import save_model
from ..batches import PackedSequences
from ..progress import scaled
from ..run_folder import StepResult
from ..shards import TokenShards
from ..trainer import Trainer
from .context import Context, Unit, config_of, model_outputs


def units(context: Context) -> list[Unit]:
    """One unit a stage, in order; a stage is out of date when it, or any stage before it, has changed."""
    config = context.recipe.train
    return [] if config is None else [_stage_unit(context, index) for index in range(len(config.stages))]


def _stage_unit(context: Context, index: int) -> Unit:
    config = context.recipe.train
    assert config is not None
    previous = context.stage_name(index - 1) if index else None

    def inputs() -> dict[str, str]:
        model = {previous: context.outputs_digest(previous)} if previous else context.initial_hashes()
        return {"pack": context.outputs_digest("pack"), **model}

    described = config_of(
        config,
        stages=msgspec.to_builtins(config.stages[index]),
        first_sequence=_first_sequence(context, index),
        seed=context.recipe.seed,
        precision=context.precision,
    )

    def check() -> None:
        context.check_source("pack")
        context.check_init()

    name = context.stage_name(index)
    return Unit("train", name, described, inputs, lambda folder: run_stage(context, index, folder), check)


def _first_sequence(context: Context, index: int) -> int:
    """Sequences that the stages before `index` use up: every stage goes on in the data where the last one ended."""
    config = context.recipe.train
    assert config is not None
    steps = (stage.steps(config.batch_size, config.sequence_length) for stage in config.stages[:index])
    return sum(steps) * config.batch_size


def run_stage(context: Context, index: int, folder: Path) -> StepResult:
    """Train one stage from the model before it and write the result to `folder/model`."""
    config = context.recipe.train
    assert config is not None
    stage = config.stages[index]
    start = context.run.path / context.stage_name(index - 1) / "model" if index else context.initial_model
    tokenizer = context.tokenizer()
    pack = context.run.path / "pack"
    shards = TokenShards.open(pack, "train", tokenizer_sha256=tokenizer.sha256)
    validation = _validation(pack, tokenizer.sha256)
    model = context.load(start, tokenizer)
    trainer = Trainer(
        model,
        stage,
        PackedSequences(shards, config.sequence_length),
        sequence_length=config.sequence_length,
        folder=folder,
        loop=config,
        seed=context.recipe.seed,
        first_sequence=_first_sequence(context, index),
        validation=PackedSequences(validation, config.sequence_length) if validation else None,
        validation_bytes=validation.text_bytes if validation else None,
        base_model_name=str(start),
    )
    result = trainer.run()
    save_model(model, folder / "model", extra_files=context.tokenizer_files())
    return StepResult(
        summary=msgspec.to_builtins(result),
        outputs=model_outputs(folder),
        went_in=f"{scaled(result.tokens)} tokens, {result.steps} steps",
        came_out=f"{scaled(result.trained_parameters)} parameters trained ({' + '.join(stage.train)})",
        scratch=("states",),  # optimizer state ends with its stage: the next one trains other parameters
        before=result.before.loss if result.before else None,
        after=result.after.loss if result.after else None,
    )


def _validation(pack: Path, tokenizer_sha256: str) -> TokenShards | None:
    if not any(pack.glob("validation-*.json")):
        return None
    return TokenShards.open(pack, "validation", tokenizer_sha256=tokenizer_sha256)
