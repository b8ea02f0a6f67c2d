"""Count the words of a Korean corpus by source: all that BPE training and the choice of pieces need to know of it."""

import heapq
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Literal, get_args

from .errors import TokenizerError
from .spm import SPACE, nfc

Script = Literal["hangul", "jamo", "hanja", "latin", "emoji"]
"""Kinds of characters that added pieces may consist of."""
SCRIPTS: tuple[Script, ...] = get_args(Script)

_CHARACTERS: dict[str, str] = {
    "hangul": "가-힣",
    "jamo": "ㄱ-ㅣ",  # compatibility jamo, as in ㅋㅋ and ㅠㅠ
    "hanja": "㐀-䶿一-鿿豈-\ufaff",
    "latin": "A-Za-zÀ-ÖØ-öø-ɏ",
    "emoji": "\u2600-\u27bf\u200d\ufe0f\U0001f000-\U0001faff",
}
# SentencePiece holds syllables and compatibility jamo to be one script, so they share words.
_RUNS = (("hangul", "jamo"), ("hanja",), ("latin",), ("emoji",))

# Longer runs are no words, and a trainer's time grows with the square of a word's length.
_LONGEST_WORD = 64


def script_runs(scripts: Sequence[Script]) -> str:
    """Return a pattern of runs of characters of one script, without ▁ in front.

    Raises TokenizerError for a script that is not known, and for none.
    """
    unknown = [script for script in scripts if script not in SCRIPTS]
    if unknown or not scripts:
        raise TokenizerError(f"scripts are {list(scripts)}; choose from {', '.join(SCRIPTS)}")
    runs = ("".join(_CHARACTERS[name] for name in names if name in scripts) for names in _RUNS)
    return "(?:" + "|".join(f"[{characters}]+" for characters in runs if characters) + ")"


def count_words(documents: Iterable[tuple[str, str]], scripts: Sequence[Script] = ("hangul",)) -> dict[str, Counter]:
    """Count the runs of the scripts in NFC texts, with ▁ in front where a space is, by source.

    Text behind anything but a space, a line end included, counts without ▁, as an encoder of whole documents sees it.

    Args:
        documents: pairs of source and text.
        scripts: of the words that are counted; everything else is left out.
    """
    pattern = re.compile(f" ?{script_runs(scripts)}")
    counts: dict[str, Counter] = {}
    for source, text in documents:
        # The space in front is the dummy prefix.
        counts.setdefault(source, Counter()).update(pattern.findall(" " + nfc(text).replace(SPACE, " ")))
    return {source: Counter(_escaped(words)) for source, words in counts.items()}


def _escaped(words: Mapping[str, int]) -> dict[str, int]:
    escaped: Counter = Counter()
    for word, count in words.items():
        word = word.replace(" ", SPACE)
        for begin in range(0, len(word), _LONGEST_WORD):
            escaped[word[begin : begin + _LONGEST_WORD]] += count
    return escaped


def mix_words(
    counts: Mapping[str, Mapping[str, int]], *, balance: float = 1.0, weights: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Return word frequencies of all sources together, on the scale of the whole corpus.

    Args:
        counts: words by source.
        balance: a source's share is its characters to this power; 1 takes the corpus as it is, 0 gives every source the
            same share (temperature sampling, Conneau et al. 2019, arXiv 1911.02116, section 3.1).
        weights: factors on the shares of single sources, by name.

    Raises:
        TokenizerError: for a weight of a source that is not there, or below 0.
    """
    weights = weights or {}
    for name, weight in weights.items():
        if name not in counts:
            raise TokenizerError(f"weights name the source {name!r}; the corpus has {', '.join(sorted(counts))}")
        if weight < 0:
            raise TokenizerError(f"the weight of {name!r} is {weight}; give 0 or more")
    sizes = {source: sum(len(word) * count for word, count in words.items()) for source, words in counts.items()}
    shares = {source: size**balance * weights.get(source, 1.0) for source, size in sizes.items() if size}
    total, scale = sum(sizes.values()), sum(shares.values())
    mixed: dict[str, float] = {}
    for source in sorted(counts):  # an order of its own, so that sums do not depend on the corpus' order
        if not shares.get(source):
            continue
        factor = shares[source] / scale * total / sizes[source]
        for word, count in counts[source].items():
            mixed[word] = mixed.get(word, 0.0) + factor * count
    return mixed


def sample_documents(documents: Iterable[tuple[str, str]], max_bytes: int, seed: int) -> list[tuple[str, str]]:
    """Return a uniform sample of `max_bytes` UTF-8 bytes of text, or all of a smaller corpus, in whatever order it is.

    The documents with the smallest keyed hashes are kept (a bottom-k sketch weighed in bytes; the last one is cut),
    so one pass with memory for max_bytes and one document suffices. The result is sorted by hash.
    """
    if max_bytes < 1:
        raise TokenizerError(
            f"max_bytes is {max_bytes}; give a positive number of bytes, or none for all of the corpus"
        )
    key = str(seed).encode()
    kept: list[tuple[int, bytes, str]] = []  # a heap whose head has the largest hash
    size = 0
    for source, text in documents:
        data = text.encode(errors="replace")
        rank = -int.from_bytes(blake2b(data, digest_size=8, key=key).digest(), "big")
        heapq.heappush(kept, (rank, data, source))
        size += len(data)
        # The document that crosses the limit stays until the end: evicting it early would make the order matter.
        while size - len(kept[0][1]) >= max_bytes:
            size -= len(heapq.heappop(kept)[1])
    sample = [(source, data) for _, data, source in sorted(kept, reverse=True)]
    if size > max_bytes:
        source, data = sample[-1]
        sample[-1] = source, data[: len(data) - (size - max_bytes)]
    return [(source, data.decode(errors="ignore")) for source, data in sample]


def unsourced(texts: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Return pairs as `count_words` takes them, of one source without a name.

    Raises TokenizerError when `texts` is a single string.
    """
    if isinstance(texts, str):
        raise TokenizerError("texts is one string, not a collection of documents; pass [text]")
    return (("", text) for text in texts)
