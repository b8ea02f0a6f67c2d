"""How likely a text is in clean Korean: a character n-gram model, and the cheaper spread of character frequencies.

Perplexity as in CCNet (arXiv 1911.00359), of characters, since they need no tokenizer. The alternative is after
prior-based data filtering (arXiv 2509.18577): the mean and the deviation of the characters' log-frequencies.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .documents import find_inputs, read_documents
from .errors import CorpusError
from .hashing import MULTIPLIERS, SpanHashes, character_hashes
from .normalize import normalize_text

METHODS = ("ngram", "prior")
ORDER = 5
"""Characters of the longest n-gram."""

_TABLE_BITS = 22
_SMOOTHING = np.float32(2.0)
_CHARACTERS_PER_BATCH = 1 << 16
_EDGE = "\n" * (ORDER - 1)
_FOLD = MULTIPLIERS[1]


class NgramModel:
    """Counts of the n-grams of characters up to `ORDER`, in tables by hash; float32 [ORDER + 1, 2^22].

    The probability of a character is interpolated with that of the shorter context, the weight of which is that of two
    occurrences (Dirichlet smoothing).
    """

    method = "ngram"
    columns = 1

    def __init__(self, counts: np.ndarray):
        self._counts = counts

    @classmethod
    def train(cls, texts: Iterable[str]) -> "NgramModel":
        """Counts the n-grams of normalised texts."""
        counts = np.zeros((ORDER + 1, 1 << _TABLE_BITS), dtype=np.float32)
        for batch in _batches(texts):
            places, _, offset = _places(batch)
            for order, place in enumerate(places, start=1):
                # No n-gram reaches into the text before.
                whole = place[offset >= order - 1]
                counts[order] += np.bincount(whole, minlength=1 << _TABLE_BITS).astype(np.float32)
            counts[0, 0] += len(places[0])
        return cls(counts)

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """Returns float64 [texts, 1]: the natural logarithm of the perplexity of each normalised text's characters."""
        scores = [self._mean_log_probability(batch) for batch in _batches(texts)]
        return -np.concatenate(scores)[:, None] if scores else np.zeros((0, 1))

    def arrays(self) -> dict[str, np.ndarray]:
        """What `from_arrays` makes the model of."""
        return {"counts": self._counts}

    @classmethod
    def from_arrays(cls, arrays: Any) -> "NgramModel":
        """The model that `arrays` describes."""
        return cls(arrays["counts"])

    def _mean_log_probability(self, texts: Sequence[str]) -> np.ndarray:
        places, owner, offset = _places(texts)
        probability = np.full(len(owner), np.float32(1e-5))
        context = self._counts[0, :1]
        for order, place in enumerate(places, start=1):
            seen = self._counts[order].take(place)
            # The context of a character is the n-gram, one shorter, that ends before it.
            probability = (seen + _SMOOTHING * probability) / (context + _SMOOTHING)
            context = np.concatenate((seen[:1], seen[:-1]))
        inside = offset >= len(_EDGE)
        return _mean(np.log(probability[inside], dtype=np.float64), owner[inside], len(texts))


class PriorModel:
    """Frequencies of characters; float64 [characters of the table]."""

    method = "prior"
    columns = 2

    def __init__(self, log_frequencies: np.ndarray):
        self._log_frequencies = log_frequencies

    @classmethod
    def train(cls, texts: Iterable[str]) -> "PriorModel":
        """Counts the characters of normalised texts."""
        counts = np.zeros(1 << _TABLE_BITS)
        for batch in _batches(texts):
            places, _, offset = _places(batch, orders=1)
            counts += np.bincount(places[0][offset >= len(_EDGE)], minlength=1 << _TABLE_BITS)
        return cls(np.log((counts + 0.5) / (counts.sum() + 1)))

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """Returns float64 [texts, 2]: mean and standard deviation of each normalised text's log-frequencies."""
        scores = []
        for batch in _batches(texts):
            places, owner, offset = _places(batch, orders=1)
            inside = offset >= len(_EDGE)
            owner = owner[inside]
            logs = self._log_frequencies.take(places[0][inside])
            mean = _mean(logs, owner, len(batch))
            scores.append(np.stack((mean, np.sqrt(_mean((logs - mean[owner]) ** 2, owner, len(batch)))), axis=1))
        return np.concatenate(scores) if scores else np.zeros((0, 2))

    def arrays(self) -> dict[str, np.ndarray]:
        """What `from_arrays` makes the model of."""
        return {"log_frequencies": self._log_frequencies}

    @classmethod
    def from_arrays(cls, arrays: Any) -> "PriorModel":
        """The model that `arrays` describes."""
        return cls(arrays["log_frequencies"])


_MODELS = {model.method: model for model in (NgramModel, PriorModel)}


def train_model(method: str, patterns: Sequence[str], path: Path) -> None:
    """Trains a model of a method of `METHODS` on files, folders and globs of clean text, and writes it as .npz.

    Raises CorpusError where there is no text.
    """
    texts = (normalize_text(one.text) for file in find_inputs(patterns) for one in read_documents(file))
    first = next(texts, None)
    if first is None:
        raise CorpusError("perplexity.train holds no documents: name files of clean Korean text")

    def all_texts() -> Iterator[str]:
        yield first
        yield from texts

    model = _MODELS[method].train(all_texts())
    temporary = path.with_suffix(".tmp.npz")
    np.savez(temporary, allow_pickle=False, method=np.array(method), **model.arrays())
    temporary.replace(path)


@functools.lru_cache(maxsize=2)
def load_model(path: Path) -> NgramModel | PriorModel:
    """Reads what `train_model` wrote."""
    with np.load(path) as arrays:
        return _MODELS[str(arrays["method"])].from_arrays(arrays)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _CHARACTERS_PER_BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _places(texts: Sequence[str], orders: int = ORDER) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Where the n-grams that end at each character lie in the tables, by order; the text of each character; its offset.

    Every text begins with line ends, so that no n-gram of its own characters reaches into the text before, and ends
    with one.
    """
    padded = [f"{_EDGE}{text}\n" for text in texts]
    sizes = np.fromiter(map(len, padded), dtype=np.int64, count=len(padded))
    characters = character_hashes("".join(padded))
    span_hashes = SpanHashes(characters)
    end = np.arange(1, len(characters) + 1)
    places = []
    for order in range(1, orders + 1):
        hashes = span_hashes(np.maximum(end - order, 0), end)
        places.append(((hashes ^ (hashes >> np.uint64(29))) * _FOLD >> np.uint64(64 - _TABLE_BITS)).astype(np.intp))
    owner = np.repeat(np.arange(len(texts)), sizes)
    return places, owner, np.arange(len(characters)) - (np.cumsum(sizes) - sizes)[owner]


def _mean(values: np.ndarray, owner: np.ndarray, texts: int) -> np.ndarray:
    return np.bincount(owner, values, minlength=texts) / np.bincount(owner, minlength=texts)
