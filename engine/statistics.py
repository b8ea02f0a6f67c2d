"""Standard errors, macro F1, and the comparison of two checkpoints on the same items."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np


class PairedComparison(msgspec.Struct, frozen=True, kw_only=True):
    """How much better one checkpoint is than another on the same items."""

    n: int
    difference: float
    """Mean score of the second less that of the first."""
    stderr: float
    """Of the difference, from the differences item by item; nan for a single item."""
    low: float
    """Lower end of the 95 % interval of the paired bootstrap."""
    high: float
    """Its upper end."""
    p_value: float
    """Of McNemar's exact test, two-sided: how often chance alone makes the items that changed so one-sided."""
    only_first: int
    """Items that the first has right and the second wrong."""
    only_second: int
    """Items that the second has right and the first wrong."""


def mean_and_stderr(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean and its standard error, sample deviation / sqrt(n); nan for the latter where n is 1."""
    array = np.asarray(values, dtype=np.float64)
    stderr = float(array.std(ddof=1) / math.sqrt(array.size)) if array.size > 1 else math.nan
    return float(array.mean()), stderr


_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def t_interval(values: Sequence[float]) -> float | None:
    """Half the width of the two-sided 95 % interval of the mean by Student's t; None for a single value.

    From ten degrees of freedom on it is a little too wide.
    """
    if len(values) < 2:
        return None
    return _T95[min(len(values) - 2, len(_T95) - 1)] * mean_and_stderr(values)[1]


def macro_f1(gold: Sequence[int], predicted: Sequence[int]) -> float:
    """Mean of F1 = 2 TP / (2 TP + FP + FN) over the labels in either list, as scikit-learn's `average="macro"`."""
    gold_array, predicted_array = np.asarray(gold), np.asarray(predicted)
    scores = []
    for label in np.union1d(gold_array, predicted_array):
        in_gold, in_predicted = gold_array == label, predicted_array == label
        scores.append(2 * np.sum(in_gold & in_predicted) / (np.sum(in_gold) + np.sum(in_predicted)))
    return float(np.mean(scores))


def compare_paired(
    first: Sequence[bool], second: Sequence[bool], *, resamples: int = 10_000, seed: int = 0
) -> PairedComparison:
    """Compare which items two checkpoints have right.

    Sources: McNemar 1947 in its exact form (the binomial test of the changed items), and the percentile bootstrap
    over items (Efron and Tibshirani 1993, chapter 13).

    Args:
        first, second: whether each item is right, in the same order.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ValueError: if the lists are empty or of different lengths.
    """
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if a.shape != b.shape or a.size == 0:
        raise ValueError(f"{a.size} and {b.size} items cannot be compared: give the same ones, at least one")
    only_first, only_second = int(np.sum(a & ~b)), int(np.sum(b & ~a))
    difference, stderr = mean_and_stderr(b.astype(np.float64) - a)
    # An item adds -1, 0 or 1, so a resample of all items is a draw of how many there are of each.
    counts = np.array([only_first, a.size - only_first - only_second, only_second])
    drawn = np.random.default_rng(seed).multinomial(a.size, counts / a.size, size=resamples)
    low, high = np.quantile((drawn[:, 2] - drawn[:, 0]) / a.size, [0.025, 0.975])
    return PairedComparison(
        n=a.size,
        difference=difference,
        stderr=stderr,
        low=float(low),
        high=float(high),
        p_value=_sign_test(only_first, only_second),
        only_first=only_first,
        only_second=only_second,
    )


def _sign_test(first: int, second: int) -> float:
    """Two-sided probability that a fair coin is at least as one-sided as `first` heads and `second` tails."""
    total = first + second
    tail = sum(math.comb(total, heads) for heads in range(min(first, second) + 1))
    return min(1.0, 2 * tail / 2**total)
