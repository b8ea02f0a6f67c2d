"""Step `init`: the base checkpoint with rows for the new vocabulary, and what other methods would have given."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import torch

from ...filtering import find_inputs
from ...model import CheckpointReader, NewRows, NewVocabulary, RowFinish, read_config, write_extended
from ...model.checkpoint import EMBEDDING, LM_HEAD
from ...model.init_similarity import cooccurrence_vectors, second_vocabulary_vectors
from ...tokenizer import Tokenizer, decompose_pieces, load_model_proto, piece_surfaces
from ..errors import RecipeError
from ..init_choice import PRIOR, Choice, FitTexts, choose_rows
from ..init_evaluation import evaluate_vocabulary
from ..init_provenance import require_parquet, write_provenance
from ..run_folder import StepResult
from .context import Context, Unit, config_of, first_texts, model_outputs

_FIT_TOKENS = 512
"""Of a document that rows are fitted to."""


def units(context: Context) -> list[Unit]:
    """One unit where the recipe initialises new rows."""
    config = context.recipe.init
    if config is None:
        return []
    if context.recipe.tokenizer is None:
        raise RecipeError("[init] needs a [tokenizer] section: without new pieces there are no rows to initialise")

    def inputs() -> dict[str, str]:
        corpus = {"filter": context.outputs_digest("filter")} if context.recipe.filter is not None else {}
        texts = context.file_hashes(find_inputs(config.base_text)) if config.base_text else {}
        second = Path(config.second_checkpoint) if config.second_checkpoint is not None else None
        donor = context.file_hashes(sorted([*second.glob("*.safetensors"), *second.glob("*.model")])) if second else {}
        hashes = {**context.base_hashes(), **context.tokenizer_hashes(), **context.heldout_hashes()}
        return {**hashes, **corpus, **texts, **donor}

    described = config_of(config, seed=context.recipe.seed, precision=context.precision)

    def check() -> None:
        context.check_base()
        context.check_heldout()
        if config.provenance:
            require_parquet()
        if config.second_checkpoint is not None:
            read_config(Path(config.second_checkpoint))
        fitted = any(choice.needs_model or choice.needs_similarity for choice in _choices(context))
        if fitted and context.recipe.filter is None:
            raise RecipeError('"focus", "omp", "distillation" and "+prior" need the corpus of a [filter] section')

    return [Unit("init", "init", described, inputs, lambda folder: run_init(context, folder), check)]


def _choices(context: Context) -> list[Choice]:
    """The chosen methods, then those to compare; without repetition."""
    config = context.recipe.init
    assert config is not None
    return list(dict.fromkeys([config.choice, *map(Choice.parse, config.compare)]))


def run_init(context: Context, folder: Path) -> StepResult:
    """Extend the base checkpoint into `folder/model` and compare the methods on held-out text."""
    config = context.recipe.init
    assert config is not None
    base_proto = load_model_proto(context.base_tokenizer)
    tokenizer = context.tokenizer()
    first = len(base_proto.pieces)
    pieces = [tokenizer.id_to_piece(i) for i in range(first, tokenizer.vocab_size)]
    base = read_config(context.base_model)
    if base.vocab_size < first:
        raise RecipeError(
            f"{context.base_tokenizer} has {first} pieces but {context.base_model} has "
            f"{base.vocab_size} rows: it is not this checkpoint's tokenizer"
        )
    choices = _choices(context)
    if base.tie_word_embeddings:
        if choices[0].prior:
            raise RecipeError(f'init.head = "{config.head}": {context.base_model} ties its head to the embedding')
        # One matrix has one method: what a choice says of the head does not apply.
        choices = list(dict.fromkeys(Choice(c.embedding, c.embedding) for c in choices if not c.prior))
    texts = _fit_texts(context, tokenizer) if any(c.needs_model or c.needs_similarity for c in choices) else None
    vocabulary = NewVocabulary(
        decompose_pieces(base_proto, pieces),
        piece_surfaces(base_proto),
        _similarity(context, tokenizer, texts) if any(c.needs_similarity for c in choices) else None,
    )
    heldout = context.heldout_texts(config.heldout_documents)
    finish = RowFinish(config.match, config.byte_only, config.break_collisions)

    results: dict[str, dict[str, Any]] = {}
    details: dict[str, Any] = {}
    for choice in choices:
        made = choose_rows(
            context.base_model,
            vocabulary,
            choice,
            model=context.load(context.base_model, Tokenizer(context.base_tokenizer)) if choice.needs_model else None,
            texts=texts,
            finish=finish,
            seed=context.recipe.seed,
            first_new_row=first,
            fit_steps=config.fit_steps,
        )
        target = folder / ("model" if choice == choices[0] else "compared")
        write_extended(
            context.base_model,
            target,
            {name: new.rows for name, new in made.items()},
            first_new_row=first,
            extra_files=context.tokenizer_files(),
        )
        if choice == choices[0] and config.provenance:
            base_pieces = [piece.piece for piece in base_proto.pieces]
            write_provenance(folder / "provenance.parquet", made, vocabulary, pieces, base_pieces, first)
        results[str(choice)] = _measure(context, target, tokenizer, heldout, first)
        details[str(choice)] = {name: _described(new) for name, new in made.items() if name in (EMBEDDING, LM_HEAD)}
    shutil.rmtree(folder / "compared", ignore_errors=True)
    unextended = _measure(context, context.base_model, Tokenizer(context.base_tokenizer), heldout, first)

    domain = "korean" if "korean" in heldout else next(iter(heldout), None)
    shown = [f"{_short(c)} {results[str(c)][domain]['bits_per_byte']:.2f}" for c in choices if domain]
    return StepResult(
        summary={
            "chosen": str(choices[0]),
            "methods": results,
            "base": unextended,
            "new_rows": len(pieces),
            "tied": base.tie_word_embeddings,
            "rows": details,
        },
        outputs=[*model_outputs(folder), *(["provenance.parquet"] if config.provenance else [])],
        went_in=f"{base.vocab_size:,} rows in embedding and head",
        came_out=f"{max(base.vocab_size, tokenizer.vocab_size):,} rows"
        + (f"; bits per byte: {', '.join(shown)}" if shown else ""),
    )


def _short(choice: Choice) -> str:
    return choice.embedding + PRIOR * choice.prior if choice.embedding == choice.head else str(choice)


def _described(new: NewRows) -> dict[str, Any]:
    norms = new.rows.float().norm(dim=1)
    return {
        "method": new.method,
        "byte_only": new.byte_only,
        "collisions": new.collisions,
        "collisions_left": new.collisions_left,
        "median_norm": float(norms.median()) if len(norms) else None,
    }


def _fit_texts(context: Context, tokenizer: Tokenizer) -> FitTexts:
    """Beginnings of documents of the training split, and of the base-language files."""
    config = context.recipe.init
    assert config is not None

    def ids(paths: list[Path]) -> list[torch.Tensor]:
        encoded = tokenizer.encode_batch(list(first_texts(paths, config.fit_documents)))
        return [torch.tensor([tokenizer.bos_id, *one[: _FIT_TOKENS - 1]]) for one in encoded]

    return FitTexts(ids(context.corpus_files("train")), ids(find_inputs(config.base_text)) if config.base_text else [])


def _similarity(context: Context, tokenizer: Tokenizer, texts: FitTexts | None) -> torch.Tensor:
    config = context.recipe.init
    assert config is not None
    assert texts is not None
    if config.second_checkpoint is None:
        return cooccurrence_vectors(texts.target, tokenizer.vocab_size, seed=context.recipe.seed)
    second = Path(config.second_checkpoint)
    proto = load_model_proto(second / "tokenizer.model")
    names = [tokenizer.id_to_piece(i) for i in range(tokenizer.vocab_size)]
    return second_vocabulary_vectors(
        CheckpointReader(second).tensor(EMBEDDING),
        [piece.piece for piece in proto.pieces],
        names,
        decompose_pieces(proto, names[len(load_model_proto(context.base_tokenizer).pieces) :]),
    )


def _measure(
    context: Context, model_folder: Path, tokenizer: Tokenizer, heldout: dict[str, list[str]], first: int
) -> dict[str, Any]:
    model = context.load(model_folder, tokenizer)
    return {
        domain: msgspec.to_builtins(evaluate_vocabulary(model, tokenizer, texts, first))
        for domain, texts in heldout.items()
        if texts
    }
