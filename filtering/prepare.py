"""Counts that the rules need, made for a whole batch of documents at once with numpy.

The documents of a batch are laid end to end, so that every array operation serves hundreds of them; no count of a
document depends on its neighbours. Words and n-grams are compared by 64-bit polynomial hashes of code points, which are
the same on every machine.
"""

import functools
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .hashing import MULTIPLIERS, TABLE_SIZE, SpanHashes, character_codes, mixed_table
from .wordlists import find_listed

_KINDS = (*("other", "space", "hangul", "jamo", "latin", "han", "foreign", "digit", "punctuation", "symbol", "broken"),)
_SPACE, _HANGUL = _KINDS.index("space"), _KINDS.index("hangul")
# Punctuation of ordinary Korean prose, beside which other punctuation (markup, code, ornaments) counts as a symbol.
_PROSE_PUNCTUATION = frozenset(".,!?;:'\"()[]%~-–—…·‧∼〜“”‘’「」『』【】《》〈〉、。")
# Last syllables of the particles and verb endings that close most eojeol of prose and few nouns of a menu.
_GRAMMATICAL_ENDINGS = "은는이가을를의에도로와과서만며다고면게요죠네까던한할함음임됨된될려록해여어야데듯든"

_MEASURED_CHARACTERS = 1_000_000
"""Longer texts are scored on their beginning, which bounds memory; their length alone fails the rules."""

LONG_EOJEOL = 30
"""Characters above which an eojeol is no Korean word: URLs, keys, text without spaces."""

_DOCUMENT_BITS = 16
"""Bits of a window's hash that tell its document: no batch holds more documents."""

WINDOW = 24
"""Characters of the windows, white space left out, in which repetition is sought below the level of words."""


@dataclass(slots=True)
class PreparedDocument:
    """What the rules need of one normalised text; all counts are of characters unless they say otherwise.

    `lines` are stripped and not empty. `eojeol` counts whitespace-separated words and `endings` the maximal runs of
    Hangul syllables, of which `grammatical_endings` end in a particle or a verb ending. `top_ngram[n]` is what the most
    frequent n-gram of eojeol covers, `repeated_ngrams[n]` what n-grams that occurred earlier cover, and
    `repeated_windows` counts windows of `WINDOW` characters that occurred earlier, of `windows`. `listed` holds the
    words of `wordlists` found, by list, as (start, end) in the text.
    """

    text: str
    lines: list[str]
    counts: dict[str, int]
    non_space: int
    eojeol: int
    long_eojeol: int
    endings: int
    grammatical_endings: int
    top_ngram: dict[int, int] = field(default_factory=dict)
    repeated_ngrams: dict[int, int] = field(default_factory=dict)
    windows: int = 0
    repeated_windows: int = 0
    listed: dict[str, list[tuple[int, int]]] = field(default_factory=dict)


def prepare(text: str) -> PreparedDocument:
    """Counts one text that `normalize_text` returned; for many texts `prepare_batch` is much faster."""
    return prepare_batch([text])[0]


def prepare_batch(texts: Sequence[str]) -> list[PreparedDocument]:
    """Counts texts that `normalize_text` returned, in time linear in their sum but for sorting."""
    most = 1 << _DOCUMENT_BITS
    if len(texts) > most:
        return prepare_batch(texts[:most]) + prepare_batch(texts[most:])
    if not texts:
        return []
    measured = [text[:_MEASURED_CHARACTERS] for text in texts]
    codes = character_codes("".join(text + "\n" for text in measured))
    tables = _character_tables()
    sizes = np.fromiter(map(len, measured), dtype=np.int64, count=len(measured)) + 1
    document_of = np.repeat(np.arange(len(texts)), sizes)
    kinds = tables.kinds.take(codes)
    table = np.bincount(document_of * len(_KINDS) + kinds, minlength=len(texts) * len(_KINDS))
    counts = table.reshape(len(texts), len(_KINDS)).tolist()

    spaced = np.ones(len(codes) + 2, dtype=bool)
    spaced[1:-1] = kinds == _SPACE
    edges = np.flatnonzero(spaced[1:] != spaced[:-1])
    starts, ends = edges[::2], edges[1::2]
    words = _Words(ends - starts, document_of[starts], mixed_table().take(codes[~spaced[1:-1]]), len(texts))
    top, repeated = words.ngrams()

    hangul = kinds == _HANGUL
    last = hangul.copy()
    last[:-1] &= ~hangul[1:]
    last = np.flatnonzero(last)
    endings = np.bincount(document_of[last], minlength=len(texts)).tolist()
    grammatical = np.bincount(document_of[last[tables.grammatical[codes[last]]]], minlength=len(texts)).tolist()
    windows, repeated_windows = words.windows()

    prepared = []
    for index, text in enumerate(texts):
        by_kind = dict(zip(_KINDS, counts[index], strict=True))
        by_kind["space"] -= 1  # the line end after each
        prepared.append(
            PreparedDocument(
                text=text,
                lines=[stripped for line in measured[index].split("\n") if (stripped := line.strip())],
                counts=by_kind,
                non_space=len(measured[index]) - by_kind["space"],
                eojeol=words.per_document[index],
                long_eojeol=words.long[index],
                endings=endings[index],
                grammatical_endings=grammatical[index],
                top_ngram={n: covered[index] for n, covered in top.items()},
                repeated_ngrams={n: covered[index] for n, covered in repeated.items()},
                windows=windows[index],
                repeated_windows=repeated_windows[index],
                listed=find_listed(measured[index]),
            )
        )
    return prepared


class _Words:
    """The eojeol of a batch, in order: which n-grams of them, and which stretches of characters, repeat in a document.

    `lengths` and `document` are of each eojeol, `characters` the well-mixed bits of all their characters.
    """

    def __init__(self, lengths: np.ndarray, document: np.ndarray, characters: np.ndarray, documents: int):
        self._lengths = lengths
        self._document = document
        self._documents = documents
        self._first = np.cumsum(lengths) - lengths
        self._character_count = len(characters)
        self._hash = SpanHashes(characters)
        self._hashes = self._hash(self._first, self._first + lengths)
        self.per_document: list[int] = np.bincount(document, minlength=documents).tolist()
        self.long: list[int] = self._characters(lengths > LONG_EOJEOL)

    def ngrams(self) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
        """Characters under the top bigram and trigram, and under 5-grams that occurred earlier, by n and document."""
        pairs = self._groups(2, np.ones(max(len(self._lengths) - 1, 0), dtype=bool))
        # An n-gram can repeat only where all shorter ones in it do, which few do.
        repeating = self._repeating(pairs)
        triples = self._groups(3, repeating[:-1] & repeating[1:])
        repeating = self._repeating(triples)
        fives = self._groups(5, repeating[:-2] & repeating[1:-1] & repeating[2:])
        later = np.ones(len(fives.where), dtype=bool)
        later[fives.first] = False
        return {2: self._top(pairs), 3: self._top(triples)}, {5: self._covered(fives.where[later], 5)}

    def windows(self) -> tuple[list[int], list[int]]:
        """Windows of `WINDOW` characters without white space in each document, and those that occurred earlier in it.

        They begin at the first character of an eojeol, and at every one of a long eojeol from the tenth on.
        """
        inside = np.maximum(self._lengths - 9, 0)
        inner = np.repeat(self._first + 9 - (np.cumsum(inside) - inside), inside) + np.arange(inside.sum())
        where = np.concatenate((self._first, inner))
        document = np.concatenate((self._document, np.repeat(self._document, inside)))
        sizes = np.bincount(self._document, self._lengths, minlength=self._documents)
        fits = where + WINDOW <= np.cumsum(sizes).astype(np.int64)[document]
        where, document = where[fits], document[fits]
        # The document in the high bits and the hash below: one sort finds the repeats of all documents.
        hashes = self._hash(where, where + WINDOW) >> np.uint64(_DOCUMENT_BITS)
        hashes |= document.astype(np.uint64) << np.uint64(64 - _DOCUMENT_BITS)
        hashes.sort()
        repeated = hashes[1:][hashes[1:] == hashes[:-1]] >> np.uint64(64 - _DOCUMENT_BITS)
        total = np.bincount(document, minlength=self._documents)
        return total.tolist(), np.bincount(repeated.astype(np.intp), minlength=self._documents).tolist()

    def _groups(self, n: int, candidates: np.ndarray) -> "_Groups":
        """Groups equal n-grams of one document among those that begin at a candidate (bool of each n-gram)."""
        length = max(len(self._lengths) - n + 1, 0)
        same = self._document[:length] == self._document[len(self._lengths) - length :]
        where = np.flatnonzero(candidates[:length] & same)
        hashes = self._document[where].astype(np.uint64) * MULTIPLIERS[0]
        for offset in range(n):
            hashes = (hashes + self._hashes[where + offset]) * MULTIPLIERS[1]
        if not len(where):
            return _Groups(n, where, where, where, where)
        order = np.argsort(hashes)
        ordered = hashes[order]
        starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
        count = np.diff(starts, append=len(order))
        group = np.empty(len(order), dtype=np.int64)
        group[order] = np.repeat(np.arange(len(starts)), count)
        return _Groups(n, where, group, np.minimum.reduceat(order, starts), count)

    def _repeating(self, grams: "_Groups") -> np.ndarray:
        """Whether the n-gram that begins at each eojeol occurs twice in its document; as long as there are n-grams."""
        repeating = np.zeros(max(len(self._lengths) - grams.n + 1, 0), dtype=bool)
        repeating[grams.where[grams.count[grams.group] > 1]] = True
        return repeating

    def _top(self, grams: "_Groups") -> list[int]:
        """Characters under the n-gram with the most characters in all, where it occurs twice; the first wins a tie."""
        several = np.flatnonzero(grams.count > 1)
        starts = grams.where[grams.first[several]]
        length_sums = np.concatenate((self._first, [self._character_count]))
        weight = grams.count[several] * (length_sums[starts + grams.n] - length_sums[starts])
        document = self._document[starts]
        order = np.lexsort((starts, -weight, document))
        best = order[np.unique(document[order], return_index=True)[1]]
        chosen = np.zeros(len(grams.count), dtype=bool)
        chosen[several[best]] = True
        return self._covered(grams.where[chosen[grams.group]], grams.n)

    def _covered(self, positions: np.ndarray, n: int) -> list[int]:
        steps = np.zeros(len(self._lengths) + 1, dtype=np.int64)
        steps[positions] += 1
        steps[positions + n] -= 1
        return self._characters(np.cumsum(steps[:-1]) > 0)

    def _characters(self, chosen: np.ndarray) -> list[int]:
        weights = self._lengths[chosen]
        return np.bincount(self._document[chosen], weights, minlength=self._documents).astype(np.int64).tolist()


@dataclass(frozen=True, slots=True)
class _Groups:
    """Equal n-grams: where each begins, its group; of each group the index in `where` of the first, and the count."""

    n: int
    where: np.ndarray
    group: np.ndarray
    first: np.ndarray
    count: np.ndarray


@dataclass(frozen=True, slots=True)
class _Tables:
    kinds: np.ndarray
    grammatical: np.ndarray


@functools.cache
def _character_tables() -> _Tables:
    """For every character below `TABLE_SIZE` its kind, and whether it is a grammatical ending."""
    kinds = np.array([_KINDS.index(_kind(chr(code))) for code in range(TABLE_SIZE)], dtype=np.uint8)
    grammatical = np.zeros(TABLE_SIZE, dtype=bool)
    grammatical[[ord(syllable) for syllable in _GRAMMATICAL_ENDINGS]] = True
    return _Tables(kinds, grammatical)


def _kind(character: str) -> str:
    category = unicodedata.category(character)
    code = ord(character)
    if character.isspace():
        return "space"
    if 0xAC00 <= code <= 0xD7A3:
        return "hangul"
    if 0x3131 <= code <= 0x3163 or 0x1100 <= code <= 0x11FF:
        return "jamo"
    if character == "ㆍ":  # a letter of old Korean, written as a middle dot
        return "punctuation"
    if category == "Co" or character == "\ufffd":
        return "broken"
    if 0x4E00 <= code <= 0x9FFF or 0x3400 <= code <= 0x4DBF or 0xF900 <= code <= 0xFAFF:
        return "han"
    if category[0] == "L":
        return "latin" if unicodedata.name(character, "").startswith(("LATIN", "FULLWIDTH LATIN")) else "foreign"
    if category[0] == "N":
        return "digit" if category == "Nd" else "other"
    if category[0] in "SP":
        return "punctuation" if character in _PROSE_PUNCTUATION else "symbol"
    return "other"
