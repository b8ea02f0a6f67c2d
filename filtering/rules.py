"""The quality rules: small pure functions that score a document, each with the range of scores that passes.

Every rule scores every document, so that a report can tell what a rule alone removes from what several rules agree on.
Thresholds were chosen on real Korean text, on whitespace-separated words (eojeol); docs/filtering.md tells how. Those
published for morphemes (FineWeb2) or for English (Gopher) drop many good Korean documents and are not used.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import msgspec

from .errors import CorpusError
from .personal_data import PLACEHOLDER
from .prepare import PreparedDocument

_BULLETS = ("- ", "* ", "+ ", "•", "‣", "▪", "▶", "►", "■", "□", "◆", "◇", "○", "●", "◎", "※", "☞", "·", "ㆍ")
_ELLIPSES = ("...", "…", "‥")
_SENTENCE_ENDS = (
    ".",
    "!",
    "?",
    "。",
    "…",
    "다",
    "요",
    "죠",
    "함",
    "음",
    "임",
    '"',
    "”",
    "’",
    "'",
    ")",
    "~",
    ":",
    ";",
    "ㅋ",
    "ㅎ",
    "ㅠ",
    "ㅜ",
)
_SENTENCE_END = re.compile("[다요죠까네음함임됨오라자지][.!?]")
# Bounded, so that a page of opening brackets takes linear time.
_TAG = re.compile(r"</?[A-Za-z!][^<>\n]{0,200}>|&[a-z]{2,6};|&#\d{2,5};")
_CODE_ENDS = ("{", "}", ";", "=>", "->", "\\")
_CODE_STARTS = re.compile(
    r"#include|import |from \w|(?:def|class|public|private|static|return|function|var|let|const|else|try) ?\b"
    r"|(?:if|for|while|elif|with|except|switch) ?(?:\(|[^\n]{1,150}:(?: |$))|print\(|</?[a-z]|\$ |>>> "
    r"|[A-Za-z_][\w.\[\]]{0,60} ?[-+*/:]?= ?\S|[a-z_][\w.]{0,60}\([^()\n]{0,100}\)$"
)


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


def length(document: PreparedDocument) -> float:
    """Characters of the normalised text (as in dps, the corpus tool of polyglot-ko)."""
    return float(len(document.text))


def korean_ratio(document: PreparedDocument) -> float:
    """Hangul syllables among the characters that are not white space.

    Single jamo (ㅋㅋㅋ) are no syllables; digits, Latin letters and hanja stay in the denominator. After dps. Hangul
    writes no other language, so that a language identifier adds nothing to it.
    """
    return document.counts["hangul"] / max(document.non_space, 1)


def foreign_ratio(document: PreparedDocument) -> float:
    """Letters of other scripts (kana, Cyrillic, Thai, ...; not Latin, not hanja) among all letters.

    Korean pages that quote another language pass; the mixed pages of machine translation and mail-order spam do not.
    """
    counts = document.counts
    letters = sum(counts[kind] for kind in ("hangul", "jamo", "latin", "han", "foreign"))
    return counts["foreign"] / max(letters, 1)


def jamo_ratio(document: PreparedDocument) -> float:
    """Single jamo (ㅋㅋ, ㅠㅠ, ㅇㅈ) among Hangul, after runs were shortened: chat logs, keyboard noise."""
    jamo = document.counts["jamo"]
    return jamo / max(jamo + document.counts["hangul"], 1)


def grammar_ratio(document: PreparedDocument) -> float:
    """Runs of Hangul that end in a particle or a verb ending: prose has them, lists of nouns have not.

    A stand-in for morphological analysis, which costs some hundred times as much.
    """
    return document.grammatical_endings / max(document.endings, 1)


def eojeol_length(document: PreparedDocument) -> float:
    """Mean characters of an eojeol, a whitespace-separated word (as in dps)."""
    return document.non_space / max(document.eojeol, 1)


def long_eojeol(document: PreparedDocument) -> float:
    """Characters in eojeol of more than 30 characters: links, keys, base64, text without spaces."""
    return document.long_eojeol / max(document.non_space, 1)


def symbol_ratio(document: PreparedDocument) -> float:
    """Symbols among the characters that are not white space.

    Symbols are Unicode categories S and P without the punctuation of ordinary prose and without those of placeholders
    for personal data. After Gopher (arXiv 2112.11446, table A1) and dps, which count symbols by word.
    """
    placeholders = len(PLACEHOLDER.findall(document.text)) if "<|" in document.text else 0
    return max(document.counts["symbol"] - 4 * placeholders, 0) / max(document.non_space, 1)


def digit_ratio(document: PreparedDocument) -> float:
    """Digits among the characters that are not white space: price lists, tables, logs (after RefinedWeb)."""
    return document.counts["digit"] / max(document.non_space, 1)


def broken_ratio(document: PreparedDocument) -> float:
    """U+FFFD, private-use characters and 占쏙옙 (U+FFFD read as CP949) among the non-space characters."""
    misread = _covered(document, "misread")
    return (document.counts["broken"] + misread) / max(document.non_space, 1)


def bullet_lines(document: PreparedDocument) -> float:
    """Lines that begin with a bullet, among all lines, at least five as in `ellipsis_lines` (Gopher, dps)."""
    return sum(line.startswith(_BULLETS) for line in document.lines) / max(len(document.lines), 5)


def ellipsis_lines(document: PreparedDocument) -> float:
    """Lines that end in `...` or `…`, among all lines: previews of texts that stand elsewhere (Gopher, dps).

    A text of fewer than five lines is judged as if it had five: one line says nothing about its layout.
    """
    return sum(line.endswith(_ELLIPSES) for line in document.lines) / max(len(document.lines), 5)


def sentence_lines(document: PreparedDocument) -> float:
    """Lines that end as a sentence or a clause does, or hold the end of one: lists and tables have few.

    After the terminal punctuation of C4 (arXiv 1910.10683), with the Korean endings that stand without it. A text of
    fewer than five lines is judged as if the missing ones were sentences.
    """
    lines = document.lines
    ending = sum(line.endswith(_SENTENCE_ENDS) or _SENTENCE_END.search(line) is not None for line in lines)
    return (ending + max(5 - len(lines), 0)) / max(len(lines), 5)


def duplicate_lines(document: PreparedDocument) -> float:
    """Characters in lines that repeat an earlier line, among those of all lines (Gopher, arXiv 2112.11446)."""
    total = sum(map(len, document.lines))
    return (total - sum(map(len, set(document.lines)))) / max(total, 1)


def top_bigram(document: PreparedDocument) -> float:
    """Characters of the most frequent pair of neighbouring eojeol, wherever it repeats (Gopher, arXiv 2112.11446).

    Pairs are weighted by length times count; overlapping occurrences count their characters once.
    """
    return document.top_ngram[2] / max(document.non_space, 1)


def top_trigram(document: PreparedDocument) -> float:
    """As `top_bigram`, for three neighbouring eojeol."""
    return document.top_ngram[3] / max(document.non_space, 1)


def duplicate_ngrams(document: PreparedDocument) -> float:
    """Characters in runs of five eojeol that occurred earlier in the text, among those that are not white space.

    After Gopher (arXiv 2112.11446), whose n is 5 to 10; longer repeats are covered by their runs of five. First
    occurrences do not count, since court decisions lawfully say many things twice.
    """
    return document.repeated_ngrams[5] / max(document.non_space, 1)


def duplicate_windows(document: PreparedDocument) -> float:
    """Windows of 24 characters, white space left out, that occurred earlier: repetition whatever its spacing."""
    return document.repeated_windows / max(document.windows, 1)


def boilerplate_lines(document: PreparedDocument) -> float:
    """Characters in lines of which boilerplate phrases (menus, buttons, footers) make two fifths or more."""
    return _lines_with(document, "boilerplate", 0.4)


def template_lines(document: PreparedDocument) -> float:
    """Characters in lines of which phrases of pages without content (errors, empty boards, templates) make a tenth."""
    return _lines_with(document, "template", 0.1)


def markup_ratio(document: PreparedDocument) -> float:
    """Characters in HTML tags and entities: pages that no extractor has seen."""
    text = document.text
    if "<" not in text and "&" not in text:
        return 0.0
    return sum(len(match) for match in _TAG.findall(text)) / max(document.non_space, 1)


def gambling_words(document: PreparedDocument) -> float:
    """Characters in phrases of gambling advertisements, and a quarter of those in words that news uses (dps)."""
    covered = _covered(document, "gambling")
    return (covered + (_covered(document, "gambling_weak") / 4 if covered else 0)) / max(document.non_space, 1)


def adult_words(document: PreparedDocument) -> float:
    """Characters in phrases of adult advertisements, and a quarter of those in words of other texts as well (dps)."""
    return (_covered(document, "adult") + _covered(document, "adult_weak") / 4) / max(document.non_space, 1)


def advertising_words(document: PreparedDocument) -> float:
    """Characters in phrases of loan, sale and investment advertisements."""
    return _covered(document, "advertising") / max(document.non_space, 1)


def hate_words(document: PreparedDocument) -> float:
    """Characters in slurs against groups of people. Off by default: what quotes them to speak of them fails as well."""
    return _covered(document, "hate") / max(document.non_space, 1)


def code_lines(document: PreparedDocument) -> float:
    """Characters in lines that look like program code. Off by default: explanations with code are worth keeping."""
    code = sum(len(line) for line in document.lines if line.endswith(_CODE_ENDS) or _CODE_STARTS.match(line))
    return code / max(sum(map(len, document.lines)), 1)


def _covered(document: PreparedDocument, name: str) -> int:
    return sum(end - start for start, end in document.listed.get(name, ()))


def _lines_with(document: PreparedDocument, name: str, share: float) -> float:
    """Share of the text in lines that hold listed words, and of whose characters these make at least `share`."""
    places = document.listed.get(name)
    if not places:
        return 0.0
    text = document.text
    characters = line_end = covered = 0
    line = ""

    def size() -> int:
        return len(line) if covered >= share * len(line.replace(" ", "")) else 0

    for start, end in places:
        if start >= line_end:
            characters += size()
            line_start = text.rfind("\n", 0, start) + 1
            line_end = text.find("\n", end)
            line_end = len(text) if line_end < 0 else line_end
            line, covered = text[line_start:line_end].strip(), 0
        covered += end - start
    return (characters + size()) / max(sum(map(len, document.lines)), 1)


_RULES = (
    Rule("length", "length", "characters of the text", length, minimum=50, maximum=500_000),
    Rule("korean_ratio", "language", "Hangul syllables among non-space characters", korean_ratio, minimum=0.25),
    Rule("foreign_ratio", "language", "letters of other scripts among letters", foreign_ratio, maximum=0.15),
    Rule("jamo_ratio", "language", "single jamo among Hangul", jamo_ratio, maximum=0.2),
    Rule("grammar_ratio", "grammar", "Hangul words that end in a particle or verb ending", grammar_ratio, minimum=0.2),
    Rule(
        "sentence_lines",
        "grammar",
        "lines that end as sentences do or hold the end of one",
        sentence_lines,
        minimum=0.05,
    ),
    Rule("eojeol_length", "eojeol", "mean characters of a whitespace-separated word", eojeol_length, 2.0, 10.0),
    Rule("long_eojeol", "eojeol", "characters in words of more than 30 characters", long_eojeol, maximum=0.4),
    Rule("symbol_ratio", "symbols", "symbols among non-space characters", symbol_ratio, maximum=0.1),
    Rule("digit_ratio", "symbols", "digits among non-space characters", digit_ratio, maximum=0.25),
    Rule("broken_ratio", "symbols", "undecodable characters among non-space characters", broken_ratio, maximum=0.001),
    Rule("markup_ratio", "symbols", "characters in HTML tags and entities", markup_ratio, maximum=0.1),
    Rule("bullet_lines", "lines", "lines that begin with a bullet", bullet_lines, maximum=0.9),
    Rule("ellipsis_lines", "lines", "lines that end in an ellipsis", ellipsis_lines, maximum=0.5),
    Rule(
        "duplicate_lines", "repetition", "characters in lines that repeat an earlier one", duplicate_lines, maximum=0.3
    ),
    Rule("top_bigram", "repetition", "characters covered by the most frequent pair of words", top_bigram, maximum=0.2),
    Rule("top_trigram", "repetition", "characters covered by the most frequent three words", top_trigram, maximum=0.2),
    Rule(
        *("duplicate_ngrams", "repetition", "characters in runs of five words that occurred earlier", duplicate_ngrams),
        maximum=0.4,
    ),
    Rule(
        "duplicate_windows",
        "repetition",
        "repeated 24-character windows without spaces",
        duplicate_windows,
        maximum=0.32,
    ),
    Rule(
        "boilerplate_lines", "boilerplate", "characters in lines of menus and footers", boilerplate_lines, maximum=0.3
    ),
    Rule("template_lines", "boilerplate", "characters in lines of pages without content", template_lines, maximum=0.3),
    Rule("gambling_words", "spam", "characters in phrases of gambling advertisements", gambling_words, maximum=0.03),
    Rule("adult_words", "spam", "characters in phrases of adult advertisements", adult_words, maximum=0.03),
    Rule("advertising_words", "spam", "characters in phrases of sales pitches", advertising_words, maximum=0.05),
    Rule("hate_words", "hate", "characters in slurs against groups", hate_words, maximum=0.005, enabled=False),
    Rule("code_lines", "code", "characters in lines of program code", code_lines, maximum=0.5, enabled=False),
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
