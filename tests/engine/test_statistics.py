"""Comparisons of two checkpoints agree with scipy-free sums done by hand, few-shot draws with the harness's rule."""

import math
import random

import pytest

from redwhale.engine.few_shot import with_examples
from redwhale.engine.multiple_choice import EvaluationDataError, MultipleChoiceItem
from redwhale.engine.statistics import compare_paired, t_interval

ITEMS = [MultipleChoiceItem(f"물음 {i}:", (" 예", " 아니오"), i % 2) for i in range(9)]


def test_an_interval_over_seeds_is_students():
    # Standard error of 1, 2, 3: 1 / √3; the 97.5% quantile of two degrees of freedom is 4.303.
    assert t_interval([1.0, 2.0, 3.0]) == pytest.approx(4.303 / math.sqrt(3))
    assert t_interval([1.0]) is None


def test_mcnemar_counts_the_items_that_changed():
    first = [True] * 2 + [False] * 8 + [True] * 10
    second = [False] * 2 + [True] * 8 + [True] * 10
    found = compare_paired(first, second)
    assert (found.only_first, found.only_second, found.n) == (2, 8, 20)
    # 2 · (C(10,0) + C(10,1) + C(10,2)) / 2^10
    assert found.p_value == pytest.approx(2 * 56 / 1024)
    assert found.difference == pytest.approx(0.3)
    variance = (2 * (-1 - 0.3) ** 2 + 8 * (1 - 0.3) ** 2 + 10 * 0.3**2) / 19
    assert found.stderr == pytest.approx(math.sqrt(variance / 20))
    # The bootstrap's interval is about that of a normal distribution.
    assert found.low == pytest.approx(0.3 - 1.96 * found.stderr, abs=0.06)
    assert found.high == pytest.approx(0.3 + 1.96 * found.stderr, abs=0.06)


def test_equal_checkpoints_differ_in_nothing():
    found = compare_paired([True, False, True], [True, False, True])
    assert (found.difference, found.low, found.high, found.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_every_item_has_its_own_draw_in_the_order_of_one_generator():
    rng = random.Random(1234)
    shown = with_examples(ITEMS[:3], ITEMS, 2)
    for item, found in zip(ITEMS[:3], shown, strict=True):
        drawn = rng.sample(ITEMS, 2)
        assert found.context == "".join(f"{e.context}{e.choices[e.gold]}\n\n" for e in drawn) + item.context
        assert (found.choices, found.gold) == (item.choices, item.gold)


def test_more_examples_than_there_are_is_an_error():
    with pytest.raises(EvaluationDataError, match="10 examples were asked for, but there are only 9"):
        with_examples(ITEMS[:1], ITEMS, 10)
