"""What 256 ranks read: together the whole global batch, each its own part, and no more work than that."""

from collections import Counter

import numpy as np
import pytest

from redwhale.engine.batches import IGNORE_INDEX, Batch, BatchLoader, PackedSequences, SequenceSource
from redwhale.engine.mixture import MixedSequences
from redwhale.engine.shards import TokenShards, write_shard

RANKS, BATCH, LENGTH, SEED = 256, 512, 8, 3


def packed(folder, name: str, tokens: int, first: int) -> PackedSequences:
    """Shards whose tokens are all different, so that a token tells its place: first, first + 1, …"""
    rng = np.random.default_rng(first)
    place, number = 0, 0
    while place < tokens:
        documents = []
        while place < tokens and len(documents) < 100:
            size = int(min(rng.integers(1, 40), tokens - place))
            documents.append((list(range(first + place, first + place + size)), size))
            place += size
        write_shard(folder / f"{name}-{number:05d}", documents, vocab_size=2**20, tokenizer_sha256="x")
        number += 1
    return PackedSequences(TokenShards.open(folder, name, verify=True), LENGTH)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> PackedSequences:
    return packed(tmp_path_factory.mktemp("corpus"), "train", 20_003, 0)


@pytest.fixture(scope="module")
def mixed(corpus, tmp_path_factory) -> MixedSequences:
    english = packed(tmp_path_factory.mktemp("english"), "english", 1_500, 500_000)
    return MixedSequences({"corpus": corpus, "english": english}, {"corpus": 0.9, "english": 0.1}, SEED)


def loaders(source: SequenceSource, ranks: int, micro_batch_size: int = 2) -> list[BatchLoader]:
    return [
        BatchLoader(source, batch_size=BATCH, micro_batch_size=micro_batch_size, seed=SEED, rank=rank, world_size=ranks)
        for rank in range(ranks)
    ]


def tokens_of(batches: list[Batch]) -> list[int]:
    return [token for batch in batches for token in batch.input_ids.tolist()]


def test_an_epoch_of_256_ranks_holds_every_token_once(corpus):
    sequences = len(corpus)
    assert sequences % BATCH  # the epoch ends inside of a batch
    ranks = loaders(corpus, RANKS)
    seen: Counter[int] = Counter()
    left = sequences
    for step in range(-(-sequences // BATCH)):
        parts = [tokens_of(rank.micro_batches(step)) for rank in ranks]
        # Ranks take their parts in order; of the last batch the first `left` sequences belong to the epoch.
        if left < BATCH:
            places = corpus_places(ranks[0], step, left)
            parts = [
                [token for token in part if token // LENGTH in places] for part in parts[: -(-left * RANKS // BATCH)]
            ]
        seen.update(token for part in parts for token in part)
        left -= BATCH
    assert seen == Counter(range(corpus.shards.tokens))


def corpus_places(loader: BatchLoader, step: int, count: int) -> set[int]:
    return set(loader.indices(step)[:count])


@pytest.mark.parametrize("name", ["corpus", "mixed"])
def test_ranks_are_disjoint_and_complete_for_any_number_of_them_across_the_epochs_border(name, request):
    source = request.getfixturevalue(name)
    one, few, many = (loaders(source, ranks, size) for ranks, size in ((1, 7), (8, 4), (RANKS, 1)))
    border = 20_003 // LENGTH // BATCH
    for step in (0, border - 1, border, border + 1, 3 * border):
        expected = tokens_of(one[0].micro_batches(step))
        parts = [tokens_of(rank.micro_batches(step)) for rank in many]
        assert [token for part in parts for token in part] == expected
        assert [token for rank in few for token in tokens_of(rank.micro_batches(step))] == expected
        assert {len(part) for part in parts} <= set(range(LENGTH + 1, 2 * LENGTH + 1))


@pytest.mark.parametrize("name", ["corpus", "mixed"])
def test_a_rank_that_begins_anywhere_reads_the_same(name, request):
    source = request.getfixturevalue(name)
    through = loaders(source, RANKS)[77]
    expected = [tokens_of(through.micro_batches(step)) for step in range(10)]
    for step in (9, 4, 0):
        assert tokens_of(loaders(source, RANKS)[77].micro_batches(step)) == expected[step]


def test_targets_that_ranks_count_for_themselves_sum_to_the_batchs(corpus):
    ranks = loaders(corpus, RANKS)
    for step in (0, 4, 5):
        own = [rank.local_num_targets(step) for rank in ranks]
        batches = [rank.micro_batches(step) for rank in ranks]
        assert own == [sum(int((b.targets != IGNORE_INDEX).sum()) for b in part) for part in batches]
        assert sum(own) == ranks[0].num_targets(step)


class Counted:
    """A source that counts what is asked of it."""

    def __init__(self, source: PackedSequences) -> None:
        self.source, self.read, self.counted = source, 0, 0

    def __len__(self) -> int:
        return len(self.source)

    def sequence(self, index: int):
        self.read += 1
        return self.source.sequence(index)

    def num_targets(self, index: int) -> int:
        self.counted += 1
        return self.source.num_targets(index)


def test_a_step_of_a_rank_looks_at_its_own_part_alone(corpus):
    source = Counted(corpus)
    loader = loaders(source, RANKS)[9]
    for step in range(6):
        loader.micro_batches(step)
        loader.local_num_targets(step)
    assert source.read == source.counted == 6 * BATCH // RANKS
    # What stays in memory is one epoch's permutation.
    assert loader.order._latest[1].nbytes == 8 * len(corpus)
