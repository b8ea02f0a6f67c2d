"""What runs say: means, intervals over seeds, and when one condition may be called better than another."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from redwhale.engine.statistics import t_interval

Verdict = Literal["below", "above", "undecided"]


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """A number measured from several seeds."""

    mean: float
    interval: float | None
    """Half of the 95% interval over seeds, by Student's t."""
    values: list[float]


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Two conditions that share their seeds, by the difference in each."""

    name: str
    first: str
    second: str
    metric: str
    difference: Spread
    """First less second."""
    verdict: Verdict
    """"below": the first is below the second. "undecided" unless the interval leaves out 0."""


def spread(values: Sequence[float]) -> Spread:
    """Mean and interval of one number from each seed."""
    return Spread(mean=statistics.mean(values), interval=t_interval(values), values=list(values))


def compared(
    name: str, first: tuple[str, Sequence[float]], second: tuple[str, Sequence[float]], metric: str
) -> Comparison:
    """Compare two conditions seed by seed.

    A single value each, of something that has no noise, is compared as it is.

    Args:
        name: of the comparison.
        first, second: names of the conditions, and a number from each seed, in the same order.
        metric: what the numbers are.
    """
    differences = [a - b for a, b in zip(first[1], second[1], strict=True)]
    difference = spread(differences)
    margin = difference.interval or 0.0
    decided = abs(difference.mean) > margin
    verdict: Verdict = "undecided" if not decided else "below" if difference.mean < 0 else "above"
    return Comparison(
        name=name, first=first[0], second=second[0], metric=metric, difference=difference, verdict=verdict
    )


def verdicts(result: Mapping[str, Any]) -> dict[str, Verdict]:
    """By name, the verdicts of an experiment's result."""
    return {one["name"]: one["verdict"] for one in result["comparisons"]}


def changes(before: Mapping[str, Verdict], now: Mapping[str, Verdict]) -> tuple[list[str], list[str]]:
    """Sentences about conclusions that turned round, and about those that only one of the two reached.

    Only a verdict against a verdict is a change: that fewer or noisier runs leave a question open contradicts nothing.
    """
    turned, open_ones = [], []
    for name, verdict in now.items():
        old = before.get(name)
        if old is None or old == verdict:
            continue
        sentence = f"{name}: was {old}, is {verdict}"
        (open_ones if "undecided" in (old, verdict) else turned).append(sentence)
    return turned, open_ones
