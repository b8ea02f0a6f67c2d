"""Solved examples before each question, drawn as lm-evaluation-harness draws them."""

from __future__ import annotations

import random
from collections.abc import Sequence

from .multiple_choice import EvaluationDataError, MultipleChoiceItem

_SEPARATOR = "\n\n"


def with_examples(
    items: Sequence[MultipleChoiceItem], pool: Sequence[MultipleChoiceItem], shots: int, *, seed: int = 1234
) -> list[MultipleChoiceItem]:
    """Items with `shots` solved examples of `pool` before each context, another draw for every item.

    Draws, their order, the blank line between examples and the seed are those of lm-evaluation-harness 0.4.13
    (`ContextSampler`: one `random.Random(seed)` for a task, a sample without replacement for each item in turn).

    Raises EvaluationDataError if the pool is smaller than `shots`.
    """
    if shots == 0:
        return list(items)
    if shots > len(pool):
        raise EvaluationDataError(f"{shots} examples were asked for, but there are only {len(pool)} to draw from")
    rng, examples = random.Random(seed), list(pool)
    shown = []
    for item in items:
        drawn = rng.sample(examples, shots)
        context = "".join(f"{example.context}{example.choices[example.gold]}{_SEPARATOR}" for example in drawn)
        shown.append(MultipleChoiceItem(context + item.context, item.choices, item.gold))
    return shown
