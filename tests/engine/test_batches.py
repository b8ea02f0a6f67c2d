import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model

from redwhale.engine.batches import (
    IGNORE_INDEX,
    Batch,
    BatchLoader,
    ExampleSequences,
    PackedSequences,
    ShuffledEpochs,
    num_targets,
)
from redwhale.engine.best_fit import best_fit_decreasing
from redwhale.engine.errors import DataError, RecipeError
from redwhale.engine.shards import TokenShards, write_shard


def shards_of(folder, documents, per_shard=3):
    for number in range(0, len(documents), per_shard):
        part = documents[number : number + per_shard]
        write_shard(folder / f"t-{number:05d}", ((d, len(d)) for d in part), vocab_size=97, tokenizer_sha256="x")
    return TokenShards.open(folder, "t")


def random_documents(seed=0, count=11):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 97, rng.integers(1, 40)).tolist() for _ in range(count)]


@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 96), min_size=1, max_size=9), min_size=1, max_size=9),
    sequence_length=st.integers(1, 12),
)
def test_packing_loses_no_token_and_predicts_every_one_but_the_first_of_a_document(
    tmp_path_factory, documents, sequence_length
):
    packed = PackedSequences(shards_of(tmp_path_factory.mktemp("s"), documents), sequence_length)
    sequences = [packed.sequence(i) for i in range(len(packed))]
    assert np.concatenate([s.input_ids for s in sequences]).tolist() == [t for d in documents for t in d]
    # Written independently: walk the documents, predicting inside each.
    expected = [t for d in documents for t in [*d[1:], IGNORE_INDEX]]
    assert np.concatenate([s.targets for s in sequences]).tolist() == expected
    for sequence in sequences[:-1]:
        assert len(sequence.input_ids) == sequence_length
    for sequence in sequences:
        assert sum(sequence.lengths) == len(sequence.input_ids)
    assert [packed.num_targets(i) for i in range(len(packed))] == [
        int((s.targets != IGNORE_INDEX).sum()) for s in sequences
    ]
    boundaries = set(np.cumsum([len(d) for d in documents]).tolist())
    cuts = set(np.cumsum([n for s in sequences for n in s.lengths]).tolist())
    assert boundaries <= cuts
    assert cuts - boundaries <= {(i + 1) * sequence_length for i in range(len(packed))}


def test_every_epoch_visits_every_sequence_once_in_an_order_of_its_own(tmp_path):
    packed = PackedSequences(shards_of(tmp_path, random_documents()), 8)
    n = len(packed)
    loader = BatchLoader(packed, batch_size=1, micro_batch_size=1, seed=3)
    epochs = [[loader.indices(step)[0] for step in range(e * n, (e + 1) * n)] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(n))
    assert epochs[0] != epochs[1] != epochs[2]


def test_order_is_a_function_of_seed_and_step_alone(tmp_path):
    packed = PackedSequences(shards_of(tmp_path, random_documents()), 8)
    options = {"batch_size": 4, "micro_batch_size": 2}
    forward = [BatchLoader(packed, seed=1, **options).indices(step) for step in range(12)]
    loader = BatchLoader(packed, seed=1, **options)
    assert [loader.indices(step) for step in reversed(range(12))] == forward[::-1]
    assert [BatchLoader(packed, seed=2, **options).indices(step) for step in range(12)] != forward


def test_a_later_stage_goes_on_where_the_earlier_one_stopped(tmp_path):
    packed = PackedSequences(shards_of(tmp_path, random_documents()), 8)
    whole = BatchLoader(packed, batch_size=4, micro_batch_size=4, seed=0)
    later = BatchLoader(packed, batch_size=4, micro_batch_size=4, seed=0, first_sequence=5 * 4)
    assert [later.indices(step) for step in range(6)] == [whole.indices(step + 5) for step in range(6)]


def test_micro_batches_hold_the_same_sequences_for_any_size(tmp_path):
    packed = PackedSequences(shards_of(tmp_path, random_documents()), 8)
    tokens = []
    for size in (1, 2, 3, 8):
        loader = BatchLoader(packed, batch_size=8, micro_batch_size=size, seed=0)
        batches = loader.micro_batches(2)
        tokens.append(torch.cat([batch.input_ids for batch in batches]).tolist())
        assert sum(batch.num_targets for batch in batches) == sum(
            int((batch.targets != IGNORE_INDEX).sum()) for batch in batches
        )
    assert tokens[0] == tokens[1] == tokens[2] == tokens[3]


def test_empty_documents_take_no_part(tmp_path):
    packed = PackedSequences(shards_of(tmp_path, [[], [5, 6], [], [], [7, 8, 9], []]), 4)
    sequences = [packed.sequence(i) for i in range(len(packed))]
    assert [s.lengths for s in sequences] == [[2, 2], [1]]
    assert [s.targets.tolist() for s in sequences] == [[6, IGNORE_INDEX, 8, 9], [IGNORE_INDEX]]
    assert [packed.num_targets(i) for i in range(2)] == [3, 0]


def test_the_order_is_numpys_permutation_of_each_epoch():
    order = ShuffledEpochs(5, (3,))
    expected = [int(np.random.default_rng((3, place // 5)).permutation(5)[place % 5]) for place in range(23)]
    assert order.indices(0, 23).tolist() == expected
    assert order.at(np.array([22, 0, 11])).tolist() == [expected[22], expected[0], expected[11]]


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_same_global_batch_in_the_same_order(tmp_path, world_size, micro_batch_size):
    packed = PackedSequences(shards_of(tmp_path, random_documents()), 8)
    expected = [packed.sequence(i) for i in BatchLoader(packed, batch_size=8, micro_batch_size=8, seed=0).indices(2)]
    loaders = [
        BatchLoader(packed, batch_size=8, micro_batch_size=micro_batch_size, seed=0, rank=r, world_size=world_size)
        for r in range(world_size)
    ]
    batches = [batch for loader in loaders for batch in loader.micro_batches(2)]
    assert torch.cat([b.input_ids for b in batches]).tolist() == [t for s in expected for t in s.input_ids.tolist()]
    assert torch.cat([b.targets for b in batches]).tolist() == [t for s in expected for t in s.targets.tolist()]
    assert [n for b in batches for n in b.documents.lengths] == [n for s in expected for n in s.lengths]
    assert {loader.num_targets(2) for loader in loaders} == {sum(batch.num_targets for batch in batches)}
    assert all(loader.indices(2) == loaders[0].indices(2) for loader in loaders)


def test_ranks_that_cannot_share_evenly_are_refused(tmp_path):
    packed = PackedSequences(shards_of(tmp_path, random_documents()), 8)
    with pytest.raises(RecipeError, match="batch_size = 8 must be a multiple of the 3 ranks"):
        BatchLoader(packed, batch_size=8, micro_batch_size=1, seed=0, world_size=3)
    with pytest.raises(RecipeError, match=r"rank = 2 must lie in \[0, 2\)"):
        BatchLoader(packed, batch_size=8, micro_batch_size=1, seed=0, rank=2, world_size=2)


def test_the_position_counts_sequences_and_epochs_of_all_stages(tmp_path):
    packed = PackedSequences(shards_of(tmp_path, random_documents()), 8)
    loader = BatchLoader(packed, batch_size=4, micro_batch_size=1, seed=0, first_sequence=12)
    assert loader.position(5) == {"corpus": (32, 32 / len(packed))}


def test_targets_of_a_source_that_cannot_tell_are_counted():
    class Source:
        def __len__(self):
            return 1

        def sequence(self, index):
            return ExampleSequences([([1, 2, 3], [IGNORE_INDEX, 3, 4])], 4, 0).sequence(index)

    assert num_targets(Source(), 0) == 2


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(0, 20), max_size=60), capacity=st.integers(20, 40), seed=st.integers(0, 9))
def test_best_fit_packs_every_item_once_where_no_item_fits_an_earlier_fuller_bin(lengths, capacity, seed):
    bins = best_fit_decreasing(lengths, capacity, seed)
    assert sorted(item for items in bins for item in items) == list(range(len(lengths)))
    # Independently: best fit by search through all bins, over sizes alone.
    rooms: list[int] = []
    for size in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= size]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= size
        else:
            rooms.append(capacity - size)
    assert sorted(capacity - sum(lengths[i] for i in items) for items in bins) == sorted(rooms)


def test_the_seed_decides_ties_and_order_and_nothing_else():
    lengths = np.random.default_rng(0).integers(1, 64, 500).tolist()
    packings = [best_fit_decreasing(lengths, 64, seed) for seed in (0, 0, 1)]
    assert packings[0] == packings[1] != packings[2]
    assert sorted(sorted(lengths[i] for i in b) for b in packings[0]) == sorted(
        sorted(lengths[i] for i in b) for b in packings[2]
    )


def test_best_fit_fills_sequences_that_taking_examples_as_they_come_does_not():
    lengths = np.random.default_rng(0).integers(10, 700, 2000).tolist()
    examples = ExampleSequences([([1] * n, [1] * n) for n in lengths], 1024, seed=0)
    next_fit, room = 0, 0
    for length in lengths:
        if length > room:
            next_fit, room = next_fit + 1, 1024
        room -= length
    assert examples.fill == sum(lengths) / (1024 * len(examples))
    assert examples.fill > 0.985
    assert sum(lengths) / (1024 * next_fit) < 0.8


def test_an_example_longer_than_a_sequence_is_refused():
    with pytest.raises(DataError, match="example 1 has 5 tokens, more than the 4 of a sequence"):
        ExampleSequences([([1], [1]), ([1] * 5, [1] * 5)], 4, 0)


def test_examples_are_packed_whole_and_each_once():
    rng = np.random.default_rng(0)
    examples = [([i] * int(n), [IGNORE_INDEX] + [i] * int(n - 1)) for i, n in enumerate(rng.integers(1, 20, 50))]
    packed = ExampleSequences(examples, 32, seed=0)
    seen = []
    for index in range(len(packed)):
        sequence = packed.sequence(index)
        assert len(sequence.input_ids) <= 32
        cuts = np.cumsum([0, *sequence.lengths])
        for begin, end in itertools.pairwise(cuts):
            example = int(sequence.input_ids[begin])
            assert sequence.input_ids[begin:end].tolist() == examples[example][0]
            assert sequence.targets[begin:end].tolist() == examples[example][1]
            seen.append(example)
        assert packed.num_targets(index) == int((sequence.targets != IGNORE_INDEX).sum())
    assert sorted(seen) == list(range(50))


@pytest.mark.parametrize("neighbour", [5, 60])
def test_packed_examples_do_not_see_each_other(neighbour):
    model = tiny_model()
    first = ([1, 20, 21, 22], [IGNORE_INDEX, 21, 22, 2])
    other = ([1, neighbour, 7], [neighbour, 7, 2])
    alone = Batch.collate([ExampleSequences([first], 16, 0).sequence(0)])
    packed_sequence = ExampleSequences([first, other], 16, 0).sequence(0)
    together = Batch.collate([packed_sequence])
    begin = packed_sequence.input_ids.tolist().index(20) - 1
    assert len(packed_sequence.lengths) == 2
    expected = model.loss(alone.input_ids, alone.targets, alone.documents).token_losses
    actual = model.loss(together.input_ids, together.targets, together.documents).token_losses[begin : begin + 4]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
