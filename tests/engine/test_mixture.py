import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redwhale.engine.batches import IGNORE_INDEX, BatchLoader, SequenceSource, TokenSequence
from redwhale.engine.errors import RecipeError
from redwhale.engine.mixture import MixedSequences


class Numbered:
    """Sequences of four tokens that say which source and which sequence they are."""

    def __init__(self, source: int, length: int) -> None:
        self.source, self.length = source, length

    def __len__(self) -> int:
        return self.length

    def sequence(self, index: int) -> TokenSequence:
        ids = np.array([self.source, index, 0, 0])
        return TokenSequence(ids, np.array([index, 0, IGNORE_INDEX, IGNORE_INDEX]), [3, 1])


LENGTHS = {"english": 700, "korean": 12_000, "math": 3}


def mixture(weights: dict[str, float], seed: int = 0, lengths: dict[str, int] = LENGTHS) -> MixedSequences:
    sources: dict[str, SequenceSource] = {name: Numbered(i, lengths[name]) for i, name in enumerate(weights)}
    return MixedSequences(sources, weights, seed)


def names(mixed: MixedSequences, first: int, last: int) -> list[str]:
    return [mixed.name_of(index) for index in mixed.indices(first, last).tolist()]


def test_every_cycle_meets_the_weights_to_the_place():
    mixed = mixture({"korean": 9, "english": 1})
    for cycle in (0, 1, 57):
        found = Counter(names(mixed, cycle * 10_000, (cycle + 1) * 10_000))
        assert found == {"korean": 9_000, "english": 1_000}


@settings(max_examples=50, deadline=None)
@given(weights=st.lists(st.floats(0.001, 1000), min_size=1, max_size=6))
def test_shares_are_met_to_within_a_ten_thousandth(weights):
    total = sum(weights)
    if min(weights) / total < 0.001:
        return
    named = {f"c{i}": weight for i, weight in enumerate(weights)}
    counts = mixture(named, lengths=dict.fromkeys(named, 10)).counts(0, 10_000)
    assert sum(counts.values()) == 10_000
    for name, weight in named.items():
        assert abs(counts[name] / 10_000 - weight / total) < 1e-4


def test_short_stretches_hold_the_shares_too():
    mixed = mixture({"korean": 0.9, "english": 0.1})
    for first in range(0, 30_000, 701):
        assert abs(mixed.counts(first, first + 500)["english"] - 50) <= 4


def test_counts_are_those_of_the_places_one_by_one():
    mixed = mixture({"korean": 5, "english": 2, "math": 0.01})
    for first, last in ((0, 0), (0, 1), (3, 777), (9_990, 10_020), (5, 31_234), (40_000, 50_000)):
        found = Counter(names(mixed, first, last))
        assert mixed.counts(first, last) == {name: found[name] for name in mixed.names}


def test_each_source_is_walked_through_its_own_shuffled_epochs():
    mixed = mixture({"korean": 0.7, "english": 0.3})
    used = [i for i in mixed.indices(0, 10_000).tolist() if mixed.name_of(i) == "english"]
    epochs = [tuple(used[begin : begin + 700]) for begin in range(0, len(used), 700)]
    assert [len(epoch) for epoch in epochs] == [700, 700, 700, 700, 200]
    for epoch in epochs[:4]:
        assert sorted(epoch) == list(range(700))
    assert len(set(epochs)) == 5


def test_a_sources_order_depends_on_no_other_source():
    def english(mixed):
        return [i for i in mixed.indices(0, 10_000).tolist() if mixed.name_of(i) == "english"]

    alone, beside = english(mixture({"english": 0.5, "korean": 0.5})), english(mixture({"english": 0.5, "math": 0.5}))
    assert alone == beside
    assert alone != english(mixture({"english": 0.5, "math": 0.5}, seed=1))


def test_the_order_is_a_function_of_seed_and_place_alone():
    weights = {"korean": 0.8, "english": 0.15, "math": 0.05}
    forward = mixture(weights).indices(0, 25_000)
    mixed = mixture(dict(reversed(weights.items())))
    for first in range(24_000, -1, -1_500):
        assert mixed.indices(first, first + 1_000).tolist() == forward[first : first + 1_000].tolist()
    assert mixture(weights, seed=1).indices(0, 1_000).tolist() != forward[:1_000].tolist()
    assert forward[:10_000].tolist() != forward[10_000:20_000].tolist()


def test_numbers_name_the_sequences_of_all_sources_behind_each_other():
    mixed = mixture({"math": 1, "korean": 1, "english": 1})
    assert mixed.names == ["english", "korean", "math"]
    assert len(mixed) == 700 + 12_000 + 3
    for index, (source, within) in {0: (2, 0), 699: (2, 699), 700: (1, 0), 12_699: (1, 11_999), 12_702: (0, 2)}.items():
        assert mixed.sequence(index).input_ids[:2].tolist() == [source, within]
        assert mixed.num_targets(index) == 2


def test_the_loader_takes_its_batches_from_the_mix():
    mixed = mixture({"korean": 0.75, "english": 0.25})
    options = {"batch_size": 40, "micro_batch_size": 16, "first_sequence": 120}
    loader = BatchLoader(mixed, seed=99, **options)
    assert loader.indices(3) == mixed.indices(240, 280).tolist()
    found = [batch.input_ids.reshape(-1, 4)[:, 0].tolist() for batch in loader.micro_batches(3)]
    assert [len(part) for part in found] == [16, 16, 8]
    assert abs(sum(itertools.chain(*found)) - 10) <= 2  # source 1 is English
    assert loader.num_targets(3) == 80
    position = loader.position(3)
    assert {name: used for name, (used, _) in position.items()} == mixed.counts(0, 240)
    assert position["english"].epochs == position["english"].sequences / 700


def test_a_long_run_is_counted_without_walking_through_it():
    counts = mixture({"korean": 0.9, "english": 0.1}).counts(0, 10**13 + 5)
    assert sum(counts.values()) == 10**13 + 5
    assert counts["english"] == pytest.approx(10**12, abs=5)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"korean": 1.0, "english": 0.0}, "weight of 'english' in a mix is 0.0"),
        ({"korean": 1.0, "english": -1}, "weight of 'english' in a mix is -1"),
        ({"korean": 1.0, "english": float("inf")}, "it must be above 0 and finite"),
        ({"korean": 1.0, "english": 1e-6}, "the weight of 'english' is 1.0e-06 of the mix"),
    ],
)
def test_weights_that_cannot_be_met_are_refused(weights, message):
    with pytest.raises(RecipeError, match=message):
        mixture(weights)


def test_sources_and_weights_must_have_the_same_names():
    with pytest.raises(RecipeError, match=r"the sources \(a\) and the weights \(b\)"):
        MixedSequences({"a": Numbered(0, 3)}, {"b": 1.0}, 0)
    with pytest.raises(RecipeError, match="at least one"):
        MixedSequences({}, {}, 0)
