"""Step `base`: pretrain a small base model from scratch, where no checkpoint is at hand."""

from __future__ import annotations

from pathlib import Path

import msgspec
import torch

from ...filtering import find_inputs
from ...model import Llama, ModelConfig, save_model
from ...tokenizer import Tokenizer, export_hf_tokenizer, load_model_proto
from ..batches import PackedSequences
from ..evaluation import ValidationSet
from ..packing import pack_texts
from ..run_folder import StepResult
from ..shards import TokenShards
from ..stages import Stage
from ..trainer import Trainer
from .context import Context, Unit, config_of, first_texts, model_outputs, texts_with_progress


def units(context: Context) -> list[Unit]:
    """One unit where the recipe pretrains its base, none where it names a checkpoint."""
    config = context.recipe.base.pretrain
    if config is None:
        return []

    def inputs() -> dict[str, str]:
        files = [*find_inputs(config.corpus), context.base_tokenizer]
        return {**context.file_hashes(files), **context.heldout_hashes()}

    def check() -> None:
        find_inputs(config.corpus)
        context.check_base()
        context.check_heldout()

    described = config_of(config, seed=context.recipe.seed, precision=context.precision)
    return [Unit("base", "base", described, inputs, lambda folder: pretrain(context, folder), check)]


def pretrain(context: Context, folder: Path) -> StepResult:
    """Train a fresh model on the base corpus and write it to `folder/model`."""
    config = context.recipe.base.pretrain
    assert config is not None
    tokenizer = Tokenizer(context.base_tokenizer)
    shards = folder / "shards"
    shards.mkdir(exist_ok=True)
    packed = {"train": texts_with_progress("tokenise base corpus", find_inputs(config.corpus))}
    if context.recipe.heldout:
        heldout = [path for paths in context.recipe.heldout.values() for path in find_inputs(paths)]
        packed["validation"] = first_texts(heldout)
    for split, texts in packed.items():
        pack_texts(texts, tokenizer, shards / f"{split}-00000")
    train = TokenShards.open(shards, "train")
    validation = TokenShards.open(shards, "validation") if "validation" in packed else None

    sets = {}
    if validation is not None:
        sets["heldout"] = ValidationSet(PackedSequences(validation, config.sequence_length), validation.text_bytes)
    model_config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        max_position_embeddings=config.max_position_embeddings,
        rope_theta=config.rope_theta,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
    )
    model = Llama(model_config)
    model.init_weights(torch.Generator().manual_seed(context.recipe.seed))
    model.to(device=context.device, dtype=context.dtype)
    trainer = Trainer(
        model,
        Stage(name="pretrain", train=("all",), tokens=config.tokens, lr=config.lr, weight_decay=0.1),
        PackedSequences(train, config.sequence_length),
        sequence_length=config.sequence_length,
        folder=folder,
        loop=config,
        seed=context.recipe.seed,
        validation=sets,
    )
    result = trainer.run()
    export_hf_tokenizer(load_model_proto(context.base_tokenizer), folder / "tokenizer")
    save_model(model, folder / "model", extra_files=sorted((folder / "tokenizer").iterdir()))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return StepResult(
        summary={"parameters": parameters, "corpus_tokens": train.tokens, **msgspec.to_builtins(result)},
        outputs=model_outputs(folder),
        went_in=f"{train.tokens:,} tokens, seen {result.tokens / train.tokens:.1f} times",
        came_out=f"{parameters / 1e6:.1f}M-parameter model, vocabulary {tokenizer.vocab_size:,}",
        scratch=("states", "shards", "tokenizer"),
        before=result.loss_before,
        after=result.loss_after,
    )
