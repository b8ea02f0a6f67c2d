"""From token streams to training batches. The order is a pure function of (seed, epoch, step)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..model import PackedDocuments
from .errors import ShardError
from .shards import TokenShards

IGNORE_INDEX = -100
"""Target of a token that nothing is to be predicted from."""


@dataclass(frozen=True)
class TokenSequence:
    """One training sequence on the host: token ids, targets (both [T] int64) and its documents' lengths."""

    input_ids: np.ndarray
    targets: np.ndarray
    lengths: list[int]


@dataclass(frozen=True)
class Batch:
    """Sequences laid end to end, ready for the model."""

    input_ids: Tensor
    """[N] int64."""
    targets: Tensor
    """[N] int64, IGNORE_INDEX where nothing is predicted."""
    documents: PackedDocuments
    num_targets: int
    """Tokens that are predicted, counted on the host."""

    @classmethod
    def collate(cls, sequences: Sequence[TokenSequence], device: torch.device | str = "cpu") -> Batch:
        """Concatenate sequences; their documents stay apart."""
        targets = np.concatenate([sequence.targets for sequence in sequences])
        return cls(
            torch.from_numpy(np.concatenate([sequence.input_ids for sequence in sequences])).to(device),
            torch.from_numpy(targets).to(device),
            PackedDocuments.from_lengths([n for sequence in sequences for n in sequence.lengths], device),
            int((targets != IGNORE_INDEX).sum()),
        )


class SequenceSource(Protocol):
    """Anything with numbered training sequences."""

    def __len__(self) -> int: ...

    def sequence(self, index: int) -> TokenSequence: ...


class PackedSequences:
    """Documents of token shards, concatenated and cut into sequences of fixed length; no token is lost.

    A document that spans a cut goes on in the next sequence as a document of its own: it does not see
    its beginning, but its first token is still predicted, from the last token before the cut. The first
    token of a document is never predicted. The last sequence may be shorter.

    Args:
        shards: the tokens.
        sequence_length: T, tokens per sequence.
    """

    def __init__(self, shards: TokenShards, sequence_length: int) -> None:
        if shards.tokens == 0:
            raise ShardError(f"{shards.prefixes[0]}.bin holds no tokens: the corpus is empty")
        self.shards = shards
        self.sequence_length = sequence_length

    def __len__(self) -> int:
        return math.ceil(self.shards.tokens / self.sequence_length)

    def sequence(self, index: int) -> TokenSequence:
        """Sequence `index` of the stream, in stream order."""
        start = index * self.sequence_length
        end = min(start + self.sequence_length, self.shards.tokens)
        window = self.shards.read(start, min(end + 1, self.shards.tokens))
        ends = self.shards.document_ends(start, end)
        targets = np.full(end - start, IGNORE_INDEX, dtype=np.int64)
        following = window[1:]
        targets[: len(following)] = following
        targets[ends - start - 1] = IGNORE_INDEX
        cuts = np.unique(np.concatenate(([start], ends, [end])))
        return TokenSequence(window[: end - start], targets, np.diff(cuts).tolist())


class ExampleSequences:
    """Short examples packed whole into sequences, in the order of a seeded shuffle.

    An example is never cut and never shares attention with its neighbours.

    Args:
        examples: (input ids, targets) pairs of equal length, each at most `sequence_length`; targets are
            aligned with the ids that predict them and hold IGNORE_INDEX on the prompt.
        sequence_length: most tokens of a sequence.
        seed: of the shuffle that decides which examples share a sequence.
    """

    def __init__(self, examples: Sequence[tuple[list[int], list[int]]], sequence_length: int, seed: int) -> None:
        self._sequences: list[list[tuple[list[int], list[int]]]] = []
        room = 0
        for index in np.random.default_rng(seed).permutation(len(examples)):
            example = examples[index]
            if len(example[0]) > room:
                self._sequences.append([])
                room = sequence_length
            self._sequences[-1].append(example)
            room -= len(example[0])

    def __len__(self) -> int:
        return len(self._sequences)

    def sequence(self, index: int) -> TokenSequence:
        """Sequence `index`, in packing order."""
        examples = self._sequences[index]
        return TokenSequence(
            np.asarray([i for ids, _ in examples for i in ids], dtype=np.int64),
            np.asarray([t for _, targets in examples for t in targets], dtype=np.int64),
            [len(ids) for ids, _ in examples],
        )


class BatchLoader:
    """Global batches of a source, shuffled anew in every epoch, addressable by step.

    Step s holds the sequences at places [first + s·B, first + (s+1)·B) of the endless concatenation of
    the epochs' shuffles, so the loader's whole state is one integer.

    Args:
        source: numbered sequences.
        batch_size: B, sequences in a global batch.
        micro_batch_size: most sequences in one forward pass.
        seed: of the shuffles.
        first_sequence: places that earlier stages have used.
        device: where the batches go.
    """

    def __init__(
        self,
        source: SequenceSource,
        *,
        batch_size: int,
        micro_batch_size: int,
        seed: int,
        first_sequence: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.source = source
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.first_sequence = first_sequence
        self.device = device
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def _index(self, place: int) -> int:
        epoch, within = divmod(place, len(self.source))
        if epoch != self._epoch:
            self._order = np.random.default_rng((self.seed, epoch)).permutation(len(self.source))
            self._epoch = epoch
        return int(self._order[within])

    def indices(self, step: int) -> list[int]:
        """Sequence numbers of global batch `step`."""
        begin = self.first_sequence + step * self.batch_size
        return [self._index(place) for place in range(begin, begin + self.batch_size)]

    def micro_batches(self, step: int) -> list[Batch]:
        """Global batch `step` as micro-batches."""
        return list(batched(self.source, self.indices(step), self.micro_batch_size, self.device))


def batched(
    source: SequenceSource, indices: Sequence[int], size: int, device: torch.device | str = "cpu"
) -> Iterator[Batch]:
    """The named sequences, `size` to a batch, in the order given."""
    for begin in range(0, len(indices), size):
        yield Batch.collate([source.sequence(index) for index in indices[begin : begin + size]], device)
