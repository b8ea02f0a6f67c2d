"""Several corpora as one, mixed by weight: for example English replay against forgetting."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np

from .batches import SequenceSource, ShuffledEpochs, SourcePosition, TokenSequence, num_targets
from .errors import RecipeError

_PLACES = 10_000
"""Places of a cycle: every share is met to within 1/10,000 of all sequences."""


class MixedSequences:
    """Sequences of several sources in one endless order that holds each source's share at every scale.

    The order goes in cycles of 10,000 places. A source with weight w has q of them, w / Σw · 10,000 rounded by largest
    remainder. Its k-th use in a cycle lies at (k + u) / q of the cycle, u uniform in [0, 1) and drawn by (seed, cycle),
    so that a stretch much shorter than a cycle is mixed as the whole is. Each source is walked through its own epoch
    shuffles, however often it comes to its end. All sequences of a source but the last are equally long, so shares of
    sequences are shares of tokens.

    As a `SequenceSource` it numbers the sequences of all sources behind each other, in the order of their names.

    Args:
        sources: by name, with sequences of one length.
        weights: of each source, above 0, in any unit.
        seed: of the mix and of the shuffles; a source's own order does not depend on which others there are.

    Raises:
        RecipeError: for names that do not agree, or a weight too small to matter.
    """

    def __init__(self, sources: Mapping[str, SequenceSource], weights: Mapping[str, float], seed: int) -> None:
        if not sources or sources.keys() != weights.keys():
            raise RecipeError(
                f"the sources ({', '.join(sorted(sources)) or 'none'}) and the weights "
                f"({', '.join(sorted(weights)) or 'none'}) of a mix must have the same names, at least one"
            )
        self.names = sorted(sources)
        self._sources = [sources[name] for name in self.names]
        self._quotas = np.array(_quotas({name: weights[name] for name in self.names}))
        self._first_use = np.cumsum([0, *self._quotas[:-1]])
        self._source_of_use = np.repeat(np.arange(len(self.names)), self._quotas)
        self._starts = np.cumsum([0, *(len(source) for source in self._sources)])
        self._orders = [
            ShuffledEpochs(len(source), (seed, zlib.crc32(name.encode())), name)
            for name, source in zip(self.names, self._sources, strict=True)
        ]
        self._seed = seed
        self._latest: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def sequence(self, index: int) -> TokenSequence:
        """Sequence `index` of all sources behind each other."""
        source, within = self._locate(index)
        return source.sequence(within)

    def num_targets(self, index: int) -> int:
        """Targets of sequence `index` that are not IGNORE_INDEX."""
        return num_targets(*self._locate(index))

    def name_of(self, index: int) -> str:
        """Name of the source that sequence `index` is from."""
        return self.names[int(np.searchsorted(self._starts, index, side="right")) - 1]

    def indices(self, first: int, last: int) -> np.ndarray:
        """Numbers of the sequences at places [first, last), int64."""
        found = np.empty(last - first, dtype=np.int64)
        for cycle in range(first // _PLACES, -(-last // _PLACES)):
            begin, end = max(first, cycle * _PLACES), min(last, (cycle + 1) * _PLACES)
            uses = self._cycle(cycle)[begin - cycle * _PLACES : end - cycle * _PLACES]
            sources = self._source_of_use[uses]
            places = cycle * self._quotas[sources] + uses - self._first_use[sources]
            part = found[begin - first : end - first]
            for number in np.unique(sources).tolist():
                chosen = sources == number
                part[chosen] = self._starts[number] + self._orders[number].at(places[chosen])
        return found

    def counts(self, first: int, last: int) -> dict[str, int]:
        """Sequences of each source at places [first, last)."""
        return dict(zip(self.names, (self._uses(last) - self._uses(first)).tolist(), strict=True))

    def position(self, place: int) -> dict[str, SourcePosition]:
        """By name of the source, what the places before `place` hold."""
        uses = zip(self.names, self._sources, self._uses(place).tolist(), strict=True)
        return {name: SourcePosition(used, used / len(source)) for name, source, used in uses}

    def _uses(self, place: int) -> np.ndarray:
        """How often the places before `place` use each source; takes the time of one cycle at most."""
        cycle, within = divmod(place, _PLACES)
        uses = cycle * self._quotas
        if within:
            sources = self._source_of_use[self._cycle(cycle)[:within]]
            uses = uses + np.bincount(sources, minlength=len(self.names))
        return uses

    def _cycle(self, cycle: int) -> np.ndarray:
        """The uses of a cycle, numbered source after source, in the order of their places."""
        latest, order = self._latest
        if latest != cycle:
            within = np.arange(_PLACES) - self._first_use[self._source_of_use]
            jitter = np.random.default_rng((self._seed, cycle)).random(_PLACES)
            order = np.argsort((within + jitter) / self._quotas[self._source_of_use], kind="stable")
            self._latest = (cycle, order)
        return order

    def _locate(self, index: int) -> tuple[SequenceSource, int]:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._sources[number], index - int(self._starts[number])


def _quotas(weights: Mapping[str, float]) -> list[int]:
    """Places of a cycle by source, rounded by largest remainder."""
    for name, weight in weights.items():
        if not 0 < weight < float("inf"):
            raise RecipeError(f"the weight of {name!r} in a mix is {weight}: it must be above 0 and finite")
    total = sum(weights.values())
    exact = [weight / total * _PLACES for weight in weights.values()]
    quotas = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (quotas[i] - exact[i], i))
    for i in by_remainder[: _PLACES - sum(quotas)]:
        quotas[i] += 1
    for name, quota in zip(weights, quotas, strict=True):
        if quota == 0:
            raise RecipeError(
                f"the weight of {name!r} is {weights[name] / total:.1e} of the mix, which {_PLACES:,} places cannot "
                "tell from nothing: raise it or leave the corpus out"
            )
    return quotas
