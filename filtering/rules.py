"""The quality rules: small pure functions that score a document, each with the range of scores that passes.

Every rule scores every document, so that a report can tell what a rule alone removes from what several rules agree on.
Thresholds were chosen on Korean bills, court decisions, encyclopaedic and book texts, film reviews and a wiki (good)
against HTML, XML and gettext sources, menus and spam (bad), on whitespace-separated words (eojeol). Thresholds
published for morphemes (FineWeb2) or for English (Gopher) drop many good Korean documents and are not used.
"""

import functools
import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from types import MappingProxyType

import msgspec
import numpy as np

from .errors import CorpusError

_OTHER, _SPACE, _HANGUL, _SYMBOL, _BROKEN = range(5)
_TABLE_SIZE = 0x20000
# Punctuation of ordinary Korean prose, beside which other punctuation (markup, code, ornaments) counts as a symbol.
_PROSE_PUNCTUATION = frozenset(".,!?;:'\"()[]%~-–—…·‧∼〜“”‘’「」『』【】《》〈〉、。")
# Last syllables of the particles and verb endings that close most eojeol of prose and few nouns of a menu.
_GRAMMATICAL_ENDINGS = "은는이가을를의에도로와과서만며다고면게요죠네까던한할함음임됨된될려록해여어야데듯든"

_BULLETS = ("- ", "* ", "+ ", "•", "‣", "▪", "▶", "►", "■", "□", "◆", "◇", "○", "●", "◎", "※", "☞")


@dataclass(slots=True)
class PreparedDocument:
    """What several rules need of one normalised text, computed once by `prepare`.

    `lines` are stripped and not empty; `eojeol` are whitespace-separated words; the counts are of characters.
    `endings` and `grammatical_endings` count the maximal runs of Hangul syllables, and those of them that end in a
    particle or a verb ending.
    """

    text: str
    lines: list[str] = field(default_factory=list)
    eojeol: list[str] = field(default_factory=list)
    non_space: int = 0
    hangul: int = 0
    symbols: int = 0
    broken: int = 0
    endings: int = 0
    grammatical_endings: int = 0


class Threshold(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Changes the range of scores that passes a rule; `-inf` and `inf` open a side."""

    minimum: float | None = None  # lowest score that passes; unset keeps the rule's own
    maximum: float | None = None  # highest score that passes; unset keeps the rule's own
    enabled: bool | None = (
        None  # false: the rule still scores every document and drops none; unset keeps the rule's own
    )


@dataclass(frozen=True, slots=True)
class Rule:
    """A score function and the closed range [minimum, maximum] of scores that passes; None leaves a side open.

    `group` is what an ablation switches together; a rule that is not `enabled` scores and drops nothing by default.
    """

    name: str
    group: str
    description: str
    score: Callable[[PreparedDocument], float]
    minimum: float | None = None
    maximum: float | None = None
    enabled: bool = True

    @property
    def direction(self) -> str:
        """Which side drops: "below" the minimum, "above" the maximum, or "outside" of both."""
        if self.minimum is not None and self.maximum is not None:
            return "outside"
        return "above" if self.minimum is None else "below"


def prepare(text: str) -> PreparedDocument:
    """Splits and counts a text that `normalize_text` returned, in linear time."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    # Beyond the table lie rare CJK ideographs and nothing that a rule counts.
    codes = np.minimum(codes, _TABLE_SIZE - 1)
    classes, grammatical = _character_tables()
    kinds = classes[codes]
    counts = np.bincount(kinds, minlength=5)
    hangul = kinds == _HANGUL
    last = hangul.copy()
    last[:-1] &= ~hangul[1:]
    return PreparedDocument(
        text=text,
        lines=[stripped for line in text.split("\n") if (stripped := line.strip())],
        eojeol=text.split(),
        non_space=len(text) - int(counts[_SPACE]),
        hangul=int(counts[_HANGUL]),
        symbols=int(counts[_SYMBOL]),
        broken=int(counts[_BROKEN]),
        endings=int(np.count_nonzero(last)),
        grammatical_endings=int(np.count_nonzero(grammatical[codes[last]])),
    )


@functools.cache
def _character_tables() -> tuple[np.ndarray, np.ndarray]:
    """Returns the class (uint8) of every character below `_TABLE_SIZE`, and whether it is a grammatical ending."""
    classes = np.full(_TABLE_SIZE, _OTHER, dtype=np.uint8)
    for code in range(_TABLE_SIZE):
        character = chr(code)
        category = unicodedata.category(character)
        if character.isspace():
            classes[code] = _SPACE
        elif category == "Co" or character == "\ufffd":
            classes[code] = _BROKEN
        elif category[0] in "SP" and character not in _PROSE_PUNCTUATION:
            classes[code] = _SYMBOL
    classes[0xAC00:0xD7A4] = _HANGUL
    grammatical = np.zeros(_TABLE_SIZE, dtype=bool)
    grammatical[[ord(syllable) for syllable in _GRAMMATICAL_ENDINGS]] = True
    return classes, grammatical


def length(document: PreparedDocument) -> float:
    """Characters of the normalised text (as in dps, the corpus tool of polyglot-ko)."""
    return float(len(document.text))


def korean_ratio(document: PreparedDocument) -> float:
    """Hangul syllables among the characters that are not white space.

    Single jamo (ㅋㅋㅋ) are no syllables; digits, Latin letters and hanja stay in the denominator. After dps.
    """
    return document.hangul / max(document.non_space, 1)


def grammar_ratio(document: PreparedDocument) -> float:
    """Runs of Hangul that end in a particle or a verb ending: prose has them, lists of nouns have not.

    A stand-in for morphological analysis, which costs some hundred times as much.
    """
    return document.grammatical_endings / max(document.endings, 1)


def eojeol_length(document: PreparedDocument) -> float:
    """Mean characters of an eojeol, a whitespace-separated word (as in dps)."""
    return document.non_space / max(len(document.eojeol), 1)


def symbol_ratio(document: PreparedDocument) -> float:
    """Symbols among the characters that are not white space.

    Symbols are Unicode categories S and P without the punctuation of ordinary prose. After Gopher (arXiv 2112.11446,
    table A1) and dps, which count symbols by word.
    """
    return document.symbols / max(document.non_space, 1)


def broken_ratio(document: PreparedDocument) -> float:
    """U+FFFD, private-use characters and 占쏙옙 (U+FFFD read as CP949) among the non-space characters."""
    return (document.broken + 3 * document.text.count("占쏙옙")) / max(document.non_space, 1)


def duplicate_lines(document: PreparedDocument) -> float:
    """Characters in lines that repeat an earlier line, among those of all lines (Gopher, arXiv 2112.11446)."""
    seen: set[str] = set()
    total = repeated = 0
    for line in document.lines:
        total += len(line)
        if line in seen:
            repeated += len(line)
        seen.add(line)
    return repeated / max(total, 1)


def top_bigram(document: PreparedDocument) -> float:
    """Characters of the most frequent pair of neighbouring eojeol, wherever it repeats (Gopher, arXiv 2112.11446).

    Pairs are weighted by length times count; overlapping occurrences count their characters once.
    """
    words = document.eojeol
    pairs = list(pairwise(words))
    counts = Counter(pairs)
    if len(counts) == len(pairs):
        return 0.0
    top = max(counts, key=lambda pair: (counts[pair] > 1) * counts[pair] * (len(pair[0]) + len(pair[1])))
    characters = covered_until = 0
    for start, pair in enumerate(pairs):
        if pair == top:
            characters += sum(map(len, words[max(start, covered_until) : start + 2]))
            covered_until = start + 2
    return characters / max(document.non_space, 1)


def duplicate_ngrams(document: PreparedDocument) -> float:
    """Characters in runs of five eojeol that occurred earlier in the text, among those that are not white space.

    After Gopher (arXiv 2112.11446), whose n is 5 to 10; longer repeats are covered by their runs of five. First
    occurrences do not count, since court decisions lawfully say many things twice.
    """
    words = document.eojeol
    seen: set[tuple[str, ...]] = set()
    covered_until = repeated = 0
    for start, gram in enumerate(zip(*(words[offset:] for offset in range(5)), strict=False)):
        if gram in seen:
            repeated += sum(map(len, words[max(start, covered_until) : start + 5]))
            covered_until = start + 5
        else:
            seen.add(gram)
    return repeated / max(document.non_space, 1)


def ellipsis_lines(document: PreparedDocument) -> float:
    """Lines that end in `...` or `…`, among all lines: previews of texts that stand elsewhere (Gopher, dps).

    A text of fewer than five lines is judged as if it had five: one line says nothing about its layout.
    """
    return sum(line.endswith(("...", "…", "‥")) for line in document.lines) / max(len(document.lines), 5)


def bullet_lines(document: PreparedDocument) -> float:
    """Lines that begin with a bullet, among all lines, at least five as in `ellipsis_lines` (Gopher, dps)."""
    return sum(line.startswith(_BULLETS) for line in document.lines) / max(len(document.lines), 5)


_RULES = (
    Rule("length", "length", "characters of the text", length, minimum=50, maximum=500_000),
    Rule("korean_ratio", "language", "Hangul syllables among non-space characters", korean_ratio, minimum=0.25),
    Rule("grammar_ratio", "grammar", "Hangul words that end in a particle or verb ending", grammar_ratio, minimum=0.25),
    Rule(
        "eojeol_length",
        "eojeol",
        "mean characters of a whitespace-separated word",
        eojeol_length,
        minimum=2.0,
        maximum=10.0,
    ),
    Rule("symbol_ratio", "symbols", "symbols among non-space characters", symbol_ratio, maximum=0.1),
    Rule("broken_ratio", "symbols", "undecodable characters among non-space characters", broken_ratio, maximum=0.001),
    Rule(
        "duplicate_lines", "repetition", "characters in lines that repeat an earlier one", duplicate_lines, maximum=0.3
    ),
    Rule("top_bigram", "repetition", "characters covered by the most frequent pair of words", top_bigram, maximum=0.2),
    Rule(
        "duplicate_ngrams",
        "repetition",
        "characters in runs of five words that occurred earlier",
        duplicate_ngrams,
        maximum=0.4,
    ),
    Rule("ellipsis_lines", "lines", "lines that end in an ellipsis", ellipsis_lines, maximum=0.5),
    Rule("bullet_lines", "lines", "lines that begin with a bullet", bullet_lines, maximum=0.9),
)

RULES: Mapping[str, Rule] = MappingProxyType({rule.name: rule for rule in _RULES})
"""Every rule by its name, in the order in which reports list them."""


def resolve_thresholds(changes: Mapping[str, Threshold]) -> dict[str, Threshold]:
    """Returns the threshold of every rule, in the order of `RULES`, with the changes made.

    Raises CorpusError for an unknown rule and for a range that lets nothing pass.
    """
    for name in changes:
        if name not in RULES:
            raise CorpusError(f"thresholds names an unknown rule {name!r}: the rules are {', '.join(RULES)}")
    resolved = {}
    for name, rule in RULES.items():
        change = changes.get(name, Threshold())
        minimum = rule.minimum if change.minimum is None else change.minimum
        maximum = rule.maximum if change.maximum is None else change.maximum
        bounds = [bound for bound in (minimum, maximum) if bound is not None]
        if any(map(math.isnan, bounds)) or bounds != sorted(bounds):
            raise CorpusError(f"thresholds.{name} lets nothing pass: minimum {minimum}, maximum {maximum}")
        enabled = rule.enabled if change.enabled is None else change.enabled
        resolved[name] = Threshold(minimum=minimum, maximum=maximum, enabled=enabled)
    return resolved


def passes(score: float, threshold: Threshold) -> bool:
    """Returns whether a score lies in the closed range, which a disabled threshold leaves open."""
    if threshold.enabled is False:
        return True
    above = threshold.minimum is None or score >= threshold.minimum
    return above and (threshold.maximum is None or score <= threshold.maximum)
