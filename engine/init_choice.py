"""How `[init]` names a choice of methods, and what makes an extended checkpoint of one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from ..model import Llama, NewRows, NewVocabulary, RowFinish, make_rows, read_config
from ..model.checkpoint import EMBEDDING, LM_HEAD
from ..model.init_fit import add_unigram_prior, extend_in_memory, fit_input_rows, hidden_statistics
from ..model.init_methods import SIMILARITY_METHODS, InitMethod
from ..model.row_collisions import coinciding

PRIOR = "+prior"
"""Behind a head's method: rows are shifted to their tokens' frequencies."""
_METHODS: tuple[InitMethod, ...] = get_args(InitMethod)


class Choice(NamedTuple):
    """Methods of embedding and head."""

    embedding: InitMethod
    head: InitMethod
    prior: bool = False

    @classmethod
    def parse(cls, text: str) -> Choice:
        """From "EMBEDDING/HEAD", or one method for both; "+prior" may follow.

        Raises:
            ValueError: naming what is wrong and the methods there are.
        """
        prior = text.endswith(PRIOR)
        names = text.removesuffix(PRIOR).split("/")
        embedding, head = names[0], names[-1]
        if head == "distillation":  # which fits input rows alone
            if len(names) > 1:
                raise ValueError(f'{text!r}: "distillation" fits input rows; choose another method for the head')
            head = "decomposition"
        for name in (embedding, head, *names[2:]):
            if name not in _METHODS or len(names) > 2:
                raise ValueError(
                    f"unknown initialisation {text!r}: write EMBEDDING/HEAD or one method, with {PRIOR} behind it for "
                    f"a unigram prior; the methods are {', '.join(_METHODS)}"
                )
        return cls(embedding, head, prior)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.embedding}/{self.head}{PRIOR if self.prior else ''}"

    @property
    def needs_model(self) -> bool:
        return self.prior or self.embedding == "distillation"

    @property
    def needs_similarity(self) -> bool:
        return bool({self.embedding, self.head} & SIMILARITY_METHODS)


@dataclass(frozen=True)
class FitTexts:
    """Token ids, under the hybrid tokenizer, of texts that rows may be fitted to; never held-out ones."""

    target: Sequence[Tensor]
    """[T] int64 each, of the new language."""
    base: Sequence[Tensor] = ()
    """The same of the base's language."""


def token_frequencies(documents: Iterable[Tensor], vocab_size: int) -> Tensor:
    """[vocab_size] fp64 shares of tokens, half an occurrence added to each."""
    counts = torch.full((vocab_size,), 0.5, dtype=torch.float64)
    for ids in documents:
        counts += torch.bincount(ids, minlength=vocab_size)
    return counts / counts.sum()


def choose_rows(
    base: Path,
    vocabulary: NewVocabulary,
    choice: Choice,
    *,
    model: Llama | None = None,
    texts: FitTexts | None = None,
    finish: RowFinish = RowFinish(),  # noqa: B008 (frozen)
    seed: int = 0,
    first_new_row: int | None = None,
    fit_steps: int = 100,
) -> dict[str, NewRows]:
    """The rows of a choice, by tensor name.

    Args:
        base, vocabulary, finish, seed, first_new_row: see `make_rows`.
        choice: the methods.
        model: the base model, where the choice `needs_model`; it is extended in place.
        texts: what such a choice fits to.
        fit_steps: of distillation.

    Raises:
        CheckpointError: as `make_rows` does.
        ValueError: for a prior on a tied head, or a choice that needs a model without one.
    """
    config = read_config(base)
    first = config.vocab_size if first_new_row is None else first_new_row
    if choice.prior and config.tie_word_embeddings:
        raise ValueError(f'"{choice}": a prior would change the input rows too, {base} ties its head to the embedding')
    start: InitMethod = "decomposition" if choice.embedding == "distillation" else choice.embedding
    made = make_rows(
        base, vocabulary, embedding=start, head=choice.head, finish=finish, seed=seed, first_new_row=first_new_row
    )
    if not choice.needs_model:
        return made
    if model is None or texts is None:
        raise ValueError(f'"{choice}" needs the base model and texts to fit to')
    extend_in_memory(model, {name: new.rows for name, new in made.items()}, first_new_row)
    if choice.embedding == "distillation":
        rows = fit_input_rows(
            model, vocabulary.decompositions, texts.target, first_new_row=first, steps=fit_steps, seed=seed
        )
        # The decomposition that the fit began with is no account of where it ended.
        fitted = replace(made[EMBEDDING], method="distillation", byte_only_method="distillation", weights=None)
        made[EMBEDDING] = _with_rows(fitted, rows, model.model.embed_tokens.weight[:first])
    if choice.prior:
        head = made[LM_HEAD]
        rows = add_unigram_prior(
            head.rows.float(),
            token_frequencies(texts.target, first + len(vocabulary.decompositions))[first:],
            hidden_statistics(model, texts.target, first),
            hidden_statistics(model, texts.base, first) if texts.base else None,
        )
        named = replace(head, method=head.method + PRIOR, byte_only_method=head.byte_only_method + PRIOR)
        made[LM_HEAD] = _with_rows(named, rows, model.lm_head.weight[:first])
    return made


def _with_rows(made: NewRows, rows: Tensor, base_rows: Tensor) -> NewRows:
    """Other rows, rounded to the dtype, and how many of them coincide."""
    rows = rows.to(made.rows.dtype)
    return replace(made, rows=rows, collisions_left=int(coinciding(rows, base_rows.to(rows)).sum()))
