"""How varied a set of texts is: distinct n-grams, and the coverage of the topics of a larger set."""

from collections.abc import Sequence

import numpy as np

from .hashing import MULTIPLIERS, character_hashes
from .minhash import shingles

_FEATURES = 4096
_ROUNDS = 12
_STEM = 2


def distinct_ngrams(texts: Sequence[str], characters: int = 1_000_000) -> float:
    """Returns the share of distinct 8-grams of characters among all, in the first so many characters of the texts.

    Sets of texts can only be compared at an equal number of characters.
    """
    sample: list[str] = []
    left = characters
    for text in texts:
        if left <= 0:
            break
        sample.append(text[:left])
        left -= len(sample[-1])
    hashes = shingles(sample).hashes
    return len(np.unique(hashes)) / max(len(hashes), 1)


class Topics:
    """Clusters of texts by their words' first syllables (tf-idf, k-means on the sphere)."""

    def __init__(self, texts: Sequence[str], topics: int = 64, seed: int = 0):
        """Finds `topics` clusters in the texts; fewer where there are fewer texts."""
        counts = _features(texts)
        self._idf = np.log((1 + len(texts)) / (1 + (counts > 0).sum(axis=0))).astype(np.float32)
        vectors = self._vectors(counts)
        generator = np.random.Generator(np.random.PCG64(seed))
        self._centres = vectors[generator.choice(len(texts), min(topics, len(texts)), replace=False)]
        for _ in range(_ROUNDS):
            nearest = (vectors @ self._centres.T).argmax(axis=1)
            for topic in range(len(self._centres)):
                inside = vectors[nearest == topic]
                if len(inside):
                    centre = inside.sum(axis=0)
                    self._centres[topic] = centre / max(np.linalg.norm(centre), 1e-9)
        self._share = np.bincount(nearest, minlength=len(self._centres)) / len(texts)

    def coverage(self, texts: Sequence[str]) -> float:
        """Returns exp(entropy) of the texts' topics over that of the clustered texts: 1 where they are as even."""
        if not texts:
            return 0.0
        nearest = (self._vectors(_features(texts)) @ self._centres.T).argmax(axis=1)
        share = np.bincount(nearest, minlength=len(self._centres)) / len(texts)
        return float(np.exp(_entropy(share) - _entropy(self._share)))

    def _vectors(self, counts: np.ndarray) -> np.ndarray:
        vectors = np.log1p(counts) * self._idf
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


def _features(texts: Sequence[str]) -> np.ndarray:
    """Counts of hashed beginnings of words, float32 [texts, features]: particles and endings stand at the end."""
    table = np.zeros((len(texts), _FEATURES), dtype=np.float32)
    for row, text in enumerate(texts):
        stems = [word[:_STEM] for word in text[:4000].split() if len(word) >= _STEM]
        if stems:
            first, second = character_hashes("".join(stems)).reshape(-1, _STEM).T
            place = ((first * MULTIPLIERS[0]) ^ second) * MULTIPLIERS[1] >> np.uint64(52)
            np.add.at(table[row], place.astype(np.intp), 1)
    return table


def _entropy(share: np.ndarray) -> float:
    share = share[share > 0]
    return float(-(share * np.log(share)).sum())
