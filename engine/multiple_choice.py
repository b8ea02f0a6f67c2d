"""Multiple choice by log-likelihood: items, and their accuracy and macro F1 as lm-evaluation-harness computes them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np

from .statistics import macro_f1, mean_and_stderr


class EvaluationDataError(ValueError):
    """An evaluation file is missing, malformed or does not fit the scores given for it."""


class MultipleChoiceItem(msgspec.Struct, frozen=True):
    """One question: `context + choices[i]` is the text to encode, and only the tokens after `context` are scored."""

    # Never ends in whitespace: what the prompt had there opens every choice, so that word boundaries are encoded as in
    # running text.
    context: str
    # The exact continuations, delimiter included.
    choices: tuple[str, ...]
    # Index of the right choice.
    gold: int


class TaskResult(msgspec.Struct, frozen=True, kw_only=True):
    """Scores of one task, each a fraction in [0, 1]; standard errors are nan for a single item."""

    task: str
    n: int
    acc: float
    acc_stderr: float
    macro_f1: float
    # Accuracy when each log-likelihood is divided by its choice's characters; None where the harness has none.
    acc_norm: float | None = None
    acc_norm_stderr: float | None = None


def score_choices(
    items: Sequence[MultipleChoiceItem],
    loglikelihoods: Sequence[Sequence[float]],
    *,
    name: str,
    length_normalised: bool = True,
) -> TaskResult:
    """Score summed log-likelihoods (nats), one list per item and one value per choice.

    The answer is the choice of highest log-likelihood, the first one on a tie. acc_norm divides by the characters (not
    bytes) of a choice without its delimiter. Standard errors are those of a mean: sample deviation / sqrt(n).

    Raises EvaluationDataError if there are no items, or values are nan or do not fit the items.
    """
    if not items:
        raise EvaluationDataError(f"there are no {name} items to score; check that its file has lines below the header")
    if len(items) != len(loglikelihoods):
        raise EvaluationDataError(f"{name} has {len(items)} items but {len(loglikelihoods)} lists of log-likelihoods")
    for number, (item, values) in enumerate(zip(items, loglikelihoods, strict=True), start=1):
        if len(values) != len(item.choices):
            raise EvaluationDataError(
                f"{name} item {number} has {len(item.choices)} choices but {len(values)} log-likelihoods"
            )
        if any(math.isnan(value) for value in values):
            raise EvaluationDataError(f"{name} item {number} has a log-likelihood of nan; check the model's weights")
    gold = np.array([item.gold for item in items])
    predictions = choices_of(loglikelihoods)
    acc, acc_stderr = mean_and_stderr(gold == np.array(predictions))
    acc_norm = acc_norm_stderr = None
    if length_normalised:
        lengths = [[len(choice.lstrip()) for choice in item.choices] for item in items]
        divided = [np.asarray(values) / np.asarray(n) for values, n in zip(loglikelihoods, lengths, strict=True)]
        acc_norm, acc_norm_stderr = mean_and_stderr(gold == np.array(choices_of(divided)))
    return TaskResult(
        task=name,
        n=len(items),
        acc=acc,
        acc_stderr=acc_stderr,
        macro_f1=macro_f1(gold.tolist(), predictions),
        acc_norm=acc_norm,
        acc_norm_stderr=acc_norm_stderr,
    )


def choices_of(loglikelihoods: Sequence[Sequence[float] | np.ndarray]) -> list[int]:
    """The choice of highest log-likelihood of every item, the first one on a tie."""
    return [int(np.argmax(values)) for values in loglikelihoods]
