"""Step `init`: the base checkpoint with rows for the new vocabulary."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec

from ...model import extend_checkpoint, read_config
from ...model.embedding_init import InitMethod
from ...tokenizer import Tokenizer, decompose_pieces, load_model_proto
from ..errors import RecipeError
from ..evaluation import evaluate_text
from ..run_folder import StepResult
from .context import Context, Unit, config_of, model_outputs


def units(context: Context) -> list[Unit]:
    """One unit where the recipe initialises new rows."""
    config = context.recipe.init
    if config is None:
        return []
    if context.recipe.tokenizer is None:
        raise RecipeError("[init] needs a [tokenizer] section: without new pieces there are no rows to initialise")

    def inputs() -> dict[str, str]:
        corpus = {"filter": context.outputs_digest("filter")} if context.recipe.filter is not None else {}
        return {**context.base_hashes(), **context.tokenizer_hashes(), **context.heldout_hashes(), **corpus}

    described = config_of(config, seed=context.recipe.seed, precision=context.precision)

    def check() -> None:
        context.check_base()
        context.check_heldout()

    return [Unit("init", "init", described, inputs, lambda folder: run_init(context, folder), check)]


def run_init(context: Context, folder: Path) -> StepResult:
    """Extend the base checkpoint into `folder/model` and compare the methods on held-out text."""
    config = context.recipe.init
    assert config is not None
    base_proto = load_model_proto(context.base_tokenizer)
    hybrid_proto = load_model_proto(context.tokenizer_folder / "tokenizer.model")
    pieces = [piece.piece for piece in list(hybrid_proto.pieces)[len(base_proto.pieces) :]]
    base_rows = read_config(context.base_model).vocab_size
    if base_rows != len(base_proto.pieces):
        raise RecipeError(
            f"{context.base_tokenizer} has {len(base_proto.pieces)} pieces but {context.base_model} has "
            f"{base_rows} rows: it is not this checkpoint's tokenizer"
        )
    decompositions = decompose_pieces(base_proto, pieces)
    heldout = context.heldout_texts(config.heldout_documents)
    tokenizer = context.tokenizer()

    chosen = f"{config.embedding}/{config.head}"
    methods: dict[str, tuple[InitMethod, InitMethod]] = {chosen: (config.embedding, config.head)}
    methods.update({f"{method}/{method}": (method, method) for method in config.compare})
    results: dict[str, dict[str, Any]] = {}
    for label, (embedding, head) in methods.items():
        target = folder / ("model" if label == chosen else "compared")
        extend_checkpoint(
            context.base_model,
            target,
            decompositions,
            embedding=embedding,
            head=head,
            seed=context.recipe.seed,
            extra_files=context.tokenizer_files(),
        )
        results[label] = _measure(context, target, tokenizer, heldout)
    shutil.rmtree(folder / "compared", ignore_errors=True)
    base = _measure(context, context.base_model, Tokenizer(context.base_tokenizer), heldout)

    domain = "korean" if "korean" in heldout else next(iter(heldout), None)
    shown = [f"{label.split('/')[0]} {results[label][domain]['bits_per_byte']:.2f}" for label in methods if domain]
    return StepResult(
        summary={"chosen": chosen, "methods": results, "base": base, "new_rows": len(pieces)},
        outputs=model_outputs(folder),
        went_in=f"{base_rows:,} rows in embedding and head",
        came_out=f"{base_rows + len(pieces):,} rows" + (f"; bits per byte: {', '.join(shown)}" if shown else ""),
    )


def _measure(context: Context, model_folder: Path, tokenizer: Tokenizer, heldout: dict[str, list[str]]) -> dict:
    model = context.load(model_folder, tokenizer)
    return {
        domain: msgspec.to_builtins(evaluate_text(model, tokenizer, texts))
        for domain, texts in heldout.items()
        if texts
    }
