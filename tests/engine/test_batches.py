import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model

from redwhale.engine.batches import IGNORE_INDEX, Batch, BatchLoader, ExampleSequences, PackedSequences
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


def test_examples_are_packed_whole_and_each_once():
    rng = np.random.default_rng(0)
    examples = [([i] * int(n), [i] * int(n)) for i, n in enumerate(rng.integers(1, 20, 50))]
    packed = ExampleSequences(examples, 32, seed=0)
    seen = []
    for index in range(len(packed)):
        sequence = packed.sequence(index)
        assert len(sequence.input_ids) <= 32
        cuts = np.cumsum([0, *sequence.lengths])
        for begin, end in itertools.pairwise(cuts):
            example = int(sequence.input_ids[begin])
            assert sequence.input_ids[begin:end].tolist() == examples[example][0]
            seen.append(example)
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
    expected = model.loss(alone.input_ids, alone.targets, alone.documents).token_losses
    actual = model.loss(together.input_ids, together.targets, together.documents).token_losses[begin : begin + 4]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
