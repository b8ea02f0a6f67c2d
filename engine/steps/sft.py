"""Step `sft`: supervised fine-tuning on instruction data, loss on the answers only."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec

from ...model import save_model
from ..batches import ExampleSequences
from ..evaluation import ValidationSet
from ..run_folder import StepResult
from ..sft import encode_conversations, read_conversations
from ..stages import Stage
from ..trainer import Trainer
from .context import Context, Unit, config_of, model_outputs

_PROBLEMS_LISTED = 100


def units(context: Context) -> list[Unit]:
    """One unit where the recipe fine-tunes."""
    config = context.recipe.sft
    if config is None:
        return []
    files = [Path(path) for path in (*config.data, *config.heldout)]

    def inputs() -> dict[str, str]:
        return {**context.file_hashes(files), **context.trained_hashes(), **context.tokenizer_hashes()}

    def check() -> None:
        context.check_init()
        read_conversations(config.data)
        if config.heldout:
            read_conversations(config.heldout)

    described = config_of(config, seed=context.recipe.seed, precision=context.precision)
    return [Unit("sft", "sft", described, inputs, lambda folder: run_sft(context, folder), check)]


def run_sft(context: Context, folder: Path) -> StepResult:
    """Fine-tune the trained model into `folder/model`."""
    config = context.recipe.sft
    assert config is not None
    tokenizer = context.tokenizer()
    conversations, problems = read_conversations(config.data)
    examples, too_long = encode_conversations(conversations, tokenizer, config.sequence_length)
    data = ExampleSequences(examples, config.sequence_length, context.recipe.seed)
    validation = {}
    if config.heldout:
        heldout, heldout_problems = read_conversations(config.heldout)
        heldout_examples, _ = encode_conversations(heldout, tokenizer, config.sequence_length)
        validation["heldout"] = ValidationSet(
            ExampleSequences(heldout_examples, config.sequence_length, context.recipe.seed)
        )
        problems += heldout_problems
    # Even batches, so that the last one reaches as little as possible into another epoch.
    sequences = config.epochs * len(data)
    steps = math.ceil(sequences / config.batch_size)
    loop = msgspec.structs.replace(config, batch_size=math.ceil(sequences / steps))
    model = context.load(context.trained_model, tokenizer)
    stage = Stage(
        name="sft",
        train=config.train,
        tokens=steps * loop.batch_size * config.sequence_length,
        lr=config.lr,
        lora=config.lora,
    )
    trainer = Trainer(
        model,
        stage,
        data,
        sequence_length=config.sequence_length,
        folder=folder,
        loop=loop,
        seed=context.recipe.seed,
        validation=validation,
        base_model_name=str(context.trained_model),
    )
    result = trainer.run()
    save_model(model, folder / "model", extra_files=context.tokenizer_files())
    return StepResult(
        summary={
            "conversations": len(examples),
            "too_long": too_long,
            "bad_rows": len(problems),
            "problems": problems[:_PROBLEMS_LISTED],
            **msgspec.to_builtins(result),
        },
        outputs=model_outputs(folder),
        went_in=f"{len(examples):,} conversations, {result.steps} steps",
        came_out=f"{' + '.join(stage.train)} trained, loss on answers only",
        scratch=("states",),
        before=result.loss_before,
        after=result.loss_after,
    )
