"""From token streams to training batches. The order is a pure function of (seed, epoch, step)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ..model import PackedDocuments
from .best_fit import best_fit_decreasing
from .errors import DataError, RecipeError, ShardError
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
        batch = cls(
            torch.from_numpy(np.concatenate([sequence.input_ids for sequence in sequences])),
            torch.from_numpy(targets),
            PackedDocuments.from_lengths([n for sequence in sequences for n in sequence.lengths]),
            int(np.count_nonzero(targets != IGNORE_INDEX)),
        )
        return batch.to(device)

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device; from pinned memory, without waiting for the copy."""
        device = torch.device(device)
        if device == self.input_ids.device:
            return self
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=tensor.is_pinned()))

    def pin_memory(self) -> Batch:
        """The batch in page-locked host memory, from which a GPU copies while the host goes on."""
        return self._mapped(Tensor.pin_memory)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Batch:
        documents = replace(
            self.documents,
            cu_seqlens=change(self.documents.cu_seqlens),
            position_ids=change(self.documents.position_ids),
        )
        return replace(self, input_ids=change(self.input_ids), targets=change(self.targets), documents=documents)


class SequenceSource(Protocol):
    """Anything with numbered training sequences.

    A source that also has `num_targets(index)`, the targets of a sequence that are not IGNORE_INDEX, spares the loader
    the reading of sequences just to count them.
    """

    def __len__(self) -> int: ...

    def sequence(self, index: int) -> TokenSequence: ...


def num_targets(source: SequenceSource, index: int) -> int:
    """Tokens that sequence `index` predicts, without reading it where the source can tell."""
    counted = getattr(source, "num_targets", None)
    if counted is not None:
        return counted(index)
    return int(np.count_nonzero(source.sequence(index).targets != IGNORE_INDEX))


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
        start, end = self._span(index)
        length = end - start
        window = self.shards.read(start, min(end + 1, self.shards.tokens))
        ends = self.shards.document_ends(start, end) - start
        targets = np.empty(length, dtype=np.int64)
        targets[-1] = IGNORE_INDEX
        targets[: len(window) - 1] = window[1:]
        targets[ends - 1] = IGNORE_INDEX
        cuts = [0, *ends.tolist()]
        if cuts[-1] != length:
            cuts.append(length)
        return TokenSequence(window[:length], targets, [b - a for a, b in itertools.pairwise(cuts)])

    def num_targets(self, index: int) -> int:
        """Targets of sequence `index`: its tokens but the last of each document."""
        start, end = self._span(index)
        return end - start - self.shards.count_document_ends(start, end)

    def _span(self, index: int) -> tuple[int, int]:
        start = index * self.sequence_length
        return start, min(start + self.sequence_length, self.shards.tokens)


class ExampleSequences:
    """Short examples packed whole into as few sequences as best-fit decreasing finds, in a seeded order.

    An example is never cut and never shares attention with its neighbours.

    Args:
        examples: (input ids, targets) pairs of equal length, each at most `sequence_length`; targets are
            aligned with the ids that predict them and hold IGNORE_INDEX on the prompt.
        sequence_length: most tokens of a sequence.
        seed: decides which of equally long examples comes first, and the order of the sequences.

    Raises:
        DataError: for an example that is longer than a sequence.
    """

    def __init__(self, examples: Sequence[tuple[list[int], list[int]]], sequence_length: int, seed: int) -> None:
        lengths = [len(ids) for ids, _ in examples]
        self._sequences = best_fit_decreasing(lengths, sequence_length, seed)
        self._offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
        self._ids = np.fromiter((i for ids, _ in examples for i in ids), dtype=np.int32)
        self._targets = np.fromiter((t for _, targets in examples for t in targets), dtype=np.int32)
        if len(self._targets) != len(self._ids):
            raise DataError("an example has more targets than input ids, or fewer: give one target for each id")
        self._sequence_length = sequence_length

    def __len__(self) -> int:
        return len(self._sequences)

    @property
    def fill(self) -> float:
        """Share of the sequences' capacity that holds tokens."""
        return len(self._ids) / max(1, len(self) * self._sequence_length)

    def sequence(self, index: int) -> TokenSequence:
        """Sequence `index`, in packing order."""
        spans = self._spans(index)
        return TokenSequence(
            np.concatenate([self._ids[span] for span in spans]).astype(np.int64),
            np.concatenate([self._targets[span] for span in spans]).astype(np.int64),
            [span.stop - span.start for span in spans],
        )

    def num_targets(self, index: int) -> int:
        """Targets of sequence `index` that are not IGNORE_INDEX."""
        return sum(int(np.count_nonzero(self._targets[span] != IGNORE_INDEX)) for span in self._spans(index))

    def _spans(self, index: int) -> list[slice]:
        return [slice(*self._offsets[example : example + 2].tolist()) for example in self._sequences[index]]


class SourcePosition(NamedTuple):
    """How far training has come in a source."""

    sequences: int
    """Sequences used, counted again in every epoch."""
    epochs: float
    """The same as times that the source was seen."""


@runtime_checkable
class SequenceOrder(Protocol):
    """An endless order of a source's sequences, by place."""

    def indices(self, first: int, last: int) -> np.ndarray:
        """Numbers of the sequences at places [first, last), int64."""
        ...

    def position(self, place: int) -> dict[str, SourcePosition]:
        """By name of the source, what the places before `place` hold."""
        ...


class ShuffledEpochs:
    """The order that visits every sequence once in an epoch, each epoch shuffled by itself.

    Args:
        length: S, sequences of the source.
        seed: numbers that, with the epoch behind them, seed its shuffle.
        name: of the source.
    """

    def __init__(self, length: int, seed: tuple[int, ...], name: str = "corpus") -> None:
        self.length, self._seed, self.name = length, seed, name
        # One attribute, read and written whole: a prefetching thread shares it.
        self._latest: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def at(self, places: np.ndarray) -> np.ndarray:
        """Numbers of the sequences at some places, int64."""
        epochs, within = np.divmod(places, self.length)
        found = np.empty(len(places), dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            found[chosen] = self._permutation(epoch)[within[chosen]]
        return found

    def indices(self, first: int, last: int) -> np.ndarray:
        """Numbers of the sequences at places [first, last), int64."""
        return self.at(np.arange(first, last))

    def position(self, place: int) -> dict[str, SourcePosition]:
        """What the places before `place` hold, under the source's name."""
        return {self.name: SourcePosition(place, place / self.length)}

    def _permutation(self, epoch: int) -> np.ndarray:
        latest, permutation = self._latest
        if latest != epoch:
            permutation = np.random.default_rng((*self._seed, epoch)).permutation(self.length)
            self._latest = (epoch, permutation)
        return permutation


class BatchLoader:
    """Global batches of a source, addressable by step: the loader's whole state is one integer.

    Step s holds the sequences at places [first + s·B, first + (s+1)·B) of the source's order: its own where it has one
    (`MixedSequences`), or else the endless concatenation of the epochs' shuffles. Each rank takes a contiguous part of
    them, so that neither the number of ranks nor the micro-batch size changes what a step trains on.

    Args:
        source: numbered sequences.
        batch_size: B, sequences in a global batch, over all ranks.
        micro_batch_size: most sequences in one forward pass of one rank.
        seed: of the shuffles; a source with an order of its own has its own seed.
        first_sequence: places that earlier stages have used.
        device: where the batches go.
        rank, world_size: which part of the global batch is this process's.

    Raises:
        RecipeError: if the ranks cannot share the global batch evenly.
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
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size % world_size:
            raise RecipeError(f"batch_size = {batch_size} must be a multiple of the {world_size} ranks that share it")
        if not 0 <= rank < world_size:
            raise RecipeError(f"rank = {rank} must lie in [0, {world_size}), the ranks that share the batch")
        self.source = source
        self.order = source if isinstance(source, SequenceOrder) else ShuffledEpochs(len(source), (seed,))
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.first_sequence = first_sequence
        self.device = torch.device(device)
        self.rank, self.world_size = rank, world_size

    def indices(self, step: int) -> list[int]:
        """Sequence numbers of global batch `step`, those of all ranks."""
        begin = self._place(step)
        return self.order.indices(begin, begin + self.batch_size).tolist()

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's part of global batch `step`, as micro-batches on the device."""
        return [batch.to(self.device) for batch in self.host_micro_batches(step)]

    def host_micro_batches(self, step: int) -> list[Batch]:
        """The same in the host's memory."""
        return list(batched(self.source, self._own_indices(step), self.micro_batch_size))

    def num_targets(self, step: int) -> int:
        """Target tokens of the whole global batch `step`, over all ranks."""
        return sum(num_targets(self.source, index) for index in self.indices(step))

    def local_num_targets(self, step: int) -> int:
        """Target tokens of this rank's part of global batch `step`; summed over all ranks they are `num_targets`.

        It looks at batch_size / world_size sequences where `num_targets` looks at all of the batch, on every rank.
        """
        return sum(num_targets(self.source, index) for index in self._own_indices(step))

    def position(self, step: int) -> dict[str, SourcePosition]:
        """By name of the source, how far it is used when global batch `step` is next."""
        return self.order.position(self._place(step))

    def _own_indices(self, step: int) -> list[int]:
        size = self.batch_size // self.world_size
        begin = self._place(step) + self.rank * size
        return self.order.indices(begin, begin + size).tolist()

    def _place(self, step: int) -> int:
        return self.first_sequence + step * self.batch_size


def batched(
    source: SequenceSource, indices: Sequence[int], size: int, device: torch.device | str = "cpu"
) -> Iterator[Batch]:
    """The named sequences, `size` to a batch, in the order given."""
    for begin in range(0, len(indices), size):
        yield Batch.collate([source.sequence(index) for index in indices[begin : begin + size]], device)
