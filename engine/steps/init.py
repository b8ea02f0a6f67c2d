"""Step `init`: the base checkpoint with rows for the new vocabulary, and what other methods would have given."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from ...filtering import InputFile, find_inputs
from ...model import CheckpointReader, NewRows, NewVocabulary, RowFinish, read_config, write_extended
from ...model.checkpoint import EMBEDDING, LM_HEAD
from ...model.init_methods import SIMILARITY_METHODS
from ...model.init_similarity import cooccurrence_vectors, second_vocabulary_vectors
from ...tokenizer import find_vocabulary, open_vocabulary
from ..errors import RecipeError
from ..evaluation import TextEncoder
from ..init_choice import PRIOR, Choice, FitTexts, choose_rows
from ..init_evaluation import evaluate_vocabulary
from ..init_provenance import require_parquet, write_provenance
from ..init_vocabulary import HybridVocabulary, text_encoder
from ..recipe import InitConfig
from ..run_folder import StepResult
from .context import Context, Unit, config_of, first_texts, model_outputs

_MOST_PADDING = 1024
"""Rows without a token that a base may have; more are those of pieces that its tokenizer lacks."""
_FIT_TOKENS = 512
"""Of a document that rows are fitted to."""


def units(context: Context) -> list[Unit]:
    """One unit where the recipe initialises new rows."""
    config = context.recipe.init
    if config is None:
        return []
    if context.recipe.tokenizer is None:
        raise RecipeError("[init] needs a [tokenizer] section: without new pieces there are no rows to initialise")

    second = Path(config.second_checkpoint) if config.second_checkpoint is not None else None

    def inputs() -> dict[str, str]:
        corpus = {"filter": context.outputs_digest("filter")} if context.recipe.filter is not None else {}
        texts = context.file_hashes(find_inputs(config.base_text)) if config.base_text else {}
        donor = context.file_hashes([*sorted(second.glob("*.safetensors")), find_vocabulary(second)]) if second else {}
        hashes = {**context.base_hashes(), **context.tokenizer_hashes(), **context.heldout_hashes()}
        return {**hashes, **corpus, **texts, **donor}

    described = config_of(config, seed=context.recipe.seed, precision=context.precision)

    def check() -> None:
        context.check_base(byte_level=True)
        context.check_heldout()
        if config.provenance:
            require_parquet()
        if second is not None:
            read_config(second)
            open_vocabulary(find_vocabulary(second))
        if _reads_corpus(config) and context.recipe.filter is None:
            raise RecipeError('"focus", "omp", "distillation" and "+prior" need the corpus of a [filter] section')

    return [Unit("init", "init", described, inputs, lambda folder: run_init(context, folder), check)]


def _choices(config: InitConfig) -> list[Choice]:
    """The chosen methods, then those to compare; without repetition."""
    return list(dict.fromkeys([config.choice, *map(Choice.parse, config.compare)]))


def _needs_similarity(config: InitConfig) -> bool:
    return config.byte_only in SIMILARITY_METHODS or any(choice.needs_similarity for choice in _choices(config))


def _reads_corpus(config: InitConfig) -> bool:
    needs_model = any(choice.needs_model for choice in _choices(config))
    return needs_model or (_needs_similarity(config) and config.second_checkpoint is None)


def run_init(context: Context, folder: Path) -> StepResult:
    """Extend the base checkpoint into `folder/model` and compare the methods on held-out text."""
    config = context.recipe.init
    assert config is not None
    hybrid_path = find_vocabulary(context.tokenizer_folder)
    pair = HybridVocabulary.open(context.base_tokenizer, hybrid_path)
    base, first = read_config(context.base_model), pair.first_new_row
    beside = find_vocabulary(context.base_model)
    own = len(open_vocabulary(beside).names) if beside.exists() else first
    if own != first or not 0 <= base.vocab_size - first < _MOST_PADDING:
        raise RecipeError(
            f"{context.base_tokenizer} has {first} pieces but {context.base_model} has "
            f"{base.vocab_size} rows: it is not this checkpoint's tokenizer"
        )
    choices = _choices(config)
    if base.tie_word_embeddings:
        if any(choice.prior for choice in choices):
            raise RecipeError(
                f"a {PRIOR} would change the input rows: {context.base_model} ties its head to the embedding; "
                "leave it out of init.head and init.compare"
            )
        # One matrix has one method: what a choice says of the head does not apply.
        choices = list(dict.fromkeys(Choice(choice.embedding, choice.embedding) for choice in choices))
    plain, tokenizer = text_encoder(context.base_tokenizer, base), text_encoder(hybrid_path, base)
    texts = _fit_texts(context, tokenizer) if _reads_corpus(config) else None
    similarity = _similarity(context, pair, texts) if _needs_similarity(config) else None
    vocabulary = NewVocabulary(pair.decompositions, pair.base.surfaces, similarity)
    heldout = context.heldout_texts(config.heldout_documents)
    finish = RowFinish(config.match, config.byte_only, config.break_collisions)

    results: dict[str, dict[str, Any]] = {}
    details: dict[str, Any] = {}
    for choice in choices:
        made = choose_rows(
            context.base_model,
            vocabulary,
            choice,
            model=context.load(context.base_model, plain) if choice.needs_model else None,
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
            write_provenance(folder / "provenance.parquet", made, vocabulary, pair.pieces, pair.base.names, first)
        results[str(choice)] = _measure(context, target, tokenizer, heldout, first)
        details[str(choice)] = {name: _described(new) for name, new in made.items() if name in (EMBEDDING, LM_HEAD)}
    shutil.rmtree(folder / "compared", ignore_errors=True)

    domain = "korean" if "korean" in heldout else next(iter(heldout), None)
    shown = [f"{_short(c)} {results[str(c)][domain]['bits_per_byte']:.2f}" for c in choices if domain]
    return StepResult(
        summary={
            "chosen": str(choices[0]),
            "methods": results,
            "base": _measure(context, context.base_model, plain, heldout, first),
            "new_rows": len(pair.pieces),
            "byte_only": sum(vocabulary.byte_only()),
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
        "collisions": new.collisions,
        "collisions_left": new.collisions_left,
        "median_norm": float(norms.median()) if len(norms) else None,
    }


def _fit_texts(context: Context, tokenizer: TextEncoder) -> FitTexts:
    """Beginnings of documents of the training split, and of the base-language files."""
    config = context.recipe.init
    assert config is not None
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]

    def ids(paths: Sequence[InputFile]) -> list[torch.Tensor]:
        encoded = tokenizer.encode_batch(list(first_texts(paths, config.fit_documents)))
        return [torch.tensor([*begin, *one][:_FIT_TOKENS]) for one in encoded if one]

    return FitTexts(ids(context.corpus_files("train")), ids(find_inputs(config.base_text)) if config.base_text else [])


def _similarity(context: Context, pair: HybridVocabulary, texts: FitTexts | None) -> torch.Tensor:
    """Vectors of all tokens, from a second model that knows the language or from the corpus."""
    config = context.recipe.init
    assert config is not None
    if config.second_checkpoint is None:
        assert texts is not None
        return cooccurrence_vectors(texts.target, len(pair.hybrid.names), seed=context.recipe.seed)
    second = Path(config.second_checkpoint)
    donor = open_vocabulary(find_vocabulary(second))
    rows = CheckpointReader(second).tensor(EMBEDDING)
    if len(rows) < len(donor.names):
        raise RecipeError(f"{donor.path} has {len(donor.names)} pieces but {second} has {len(rows)} rows: not a pair")
    surfaces = pair.surfaces
    return second_vocabulary_vectors(rows, donor.surfaces, surfaces, donor.spell(surfaces[pair.first_new_row :]))


def _measure(
    context: Context, model_folder: Path, tokenizer: TextEncoder, heldout: dict[str, list[str]], first: int
) -> dict[str, Any]:
    model = context.load(model_folder, tokenizer)
    return {
        domain: msgspec.to_builtins(evaluate_vocabulary(model, tokenizer, texts, first))
        for domain, texts in heldout.items()
        if texts
    }
