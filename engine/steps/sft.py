"""Step `sft`: supervised fine-tuning on instruction data, loss on the answers only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import msgspec

from ...tokenizer import Tokenizer, export_hf_tokenizer, load_model_proto
from ..batches import ExampleSequences
from ..chat_templates import ChatTemplate, template_source
from ..conversations import BadRow, read_conversations
from ..evaluation import ValidationSet
from ..recipe import SFTConfig
from ..run_folder import StepResult
from ..sft import encode_conversations
from ..stages import Stage
from ..trainer import Trainer
from .context import Context, Unit, config_of, model_outputs

BAD_ROWS = "bad_rows.jsonl"
_PROBLEMS_LISTED = 100
"""Most bad rows in the manifest; the file holds all."""


def units(context: Context) -> list[Unit]:
    """One unit where the recipe fine-tunes."""
    config = context.recipe.sft
    if config is None:
        return []
    files = [Path(path) for path in (*config.data, *config.heldout)]
    own_template = [Path(config.template)] if Path(config.template).is_file() else []

    def inputs() -> dict[str, str]:
        return {
            **context.file_hashes([*files, *own_template]),
            **context.trained_hashes(),
            **context.tokenizer_hashes(),
        }

    def check() -> None:
        context.check_init()
        conversations, _ = read_conversations(config.data)
        if context.base_tokenizer.exists():  # where it is not, the base step makes it
            base = Tokenizer(context.base_tokenizer)
            ChatTemplate(template_source(config.template, base), base).training_ids(conversations[0].messages)
        if config.heldout:
            read_conversations(config.heldout)

    described = config_of(config, seed=context.recipe.seed, precision=context.precision)
    return [Unit("sft", "sft", described, inputs, lambda folder: run_sft(context, folder), check, shared=True)]


def run_sft(context: Context, folder: Path) -> StepResult:
    """Fine-tune the trained model into `folder/model`, which carries the chat template."""
    config = context.recipe.sft
    assert config is not None
    tokenizer = context.tokenizer()
    template = ChatTemplate(template_source(config.template, tokenizer), tokenizer)
    tokenizer_files = []
    if context.world.is_first:
        tokenizer_files = export_hf_tokenizer(
            load_model_proto(tokenizer.path), folder / "tokenizer", chat_template=template.source
        )
    conversations, bad = read_conversations(config.data)
    examples, too_long = encode_conversations(conversations, template, config.sequence_length)
    data = ExampleSequences(examples, config.sequence_length, context.recipe.seed)
    validation = {}
    if config.heldout:
        heldout, heldout_bad = read_conversations(config.heldout)
        heldout_examples, heldout_too_long = encode_conversations(heldout, template, config.sequence_length)
        validation["heldout"] = ValidationSet(
            ExampleSequences(heldout_examples, config.sequence_length, context.recipe.seed)
        )
        bad += heldout_bad
        too_long += heldout_too_long
    if context.world.is_first:
        write_bad_rows([*bad, *too_long], folder / BAD_ROWS)
    # Even batches, so that the last one reaches as little as possible into another epoch.
    sequences = config.epochs * len(data)
    steps = math.ceil(sequences / config.batch_size)
    size = context.world.size
    loop = msgspec.structs.replace(config, batch_size=math.ceil(sequences / steps / size) * size)
    model = context.load_shared(context.trained_model, tokenizer)
    stage = sft_stage(config, tokens=steps * loop.batch_size * config.sequence_length)
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
        world=context.world,
    )
    result = trainer.run()
    trainer.save_model(folder / "model", extra_files=tokenizer_files)
    left_out = f", {len(bad) + len(too_long):,} rows left out" if bad or too_long else ""
    return StepResult(
        summary={
            "conversations": len(examples),
            "template": config.template,
            "fill": data.fill,
            "answer_tokens": sum(data.num_targets(index) for index in range(len(data))),
            "too_long": len(too_long),
            "bad_rows": len(bad),
            "problems": [str(row) for row in [*bad, *too_long][:_PROBLEMS_LISTED]],
            **msgspec.to_builtins(result),
        },
        outputs=model_outputs(folder),
        went_in=f"{len(examples):,} conversations{left_out}, {result.steps} steps",
        came_out=f"{' + '.join(stage.train)} trained, loss on answers only",
        scratch=("states", "tokenizer"),
        before=result.loss_before,
        after=result.loss_after,
    )


def sft_stage(config: SFTConfig, tokens: int) -> Stage:
    """The stage that a [sft] section describes, with its token budget."""
    return Stage(
        name="sft",
        train=config.train,
        tokens=tokens,
        lr=config.lr,
        lora=config.lora,
        schedule=config.schedule,
        warmup=config.warmup,
        weight_decay=config.weight_decay,
        optimizer=config.optimizer,
    )


def write_bad_rows(rows: Sequence[BadRow], path: Path) -> None:
    """One JSON object a line, {file, row, reason}; no file where there are none."""
    if rows:
        path.write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
