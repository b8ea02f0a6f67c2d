"""What a filter run reports: structs that become summary.json, and the tally that fills them."""

import hashlib
import math
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from .decontaminate import Match
from .rules import RULES, Threshold

_MAX_SOURCES = 1000
_MAX_BROKEN_EXAMPLES = 10
_BINS = 40
OTHER_SOURCES = "(other sources)"
CONTAMINATED, PERPLEXITY = "contaminated", "perplexity"
EXACT_DUPLICATE, NEAR_DUPLICATE, FREQUENT_LINES = "exact_duplicate", "near_duplicate", "frequent_lines"
CORPUS_RULES = {
    CONTAMINATED: "documents that hold questions or answers of the benchmarks named",
    PERPLEXITY: "documents that clean text predicts worse, or better, than nearly all that pass the rules",
    EXACT_DUPLICATE: "documents with the same normalised text as an earlier one",
    NEAR_DUPLICATE: "documents that pass the rules and are alike to a better one, by Jaccard similarity",
    FREQUENT_LINES: "documents too short once lines of many other documents are gone",
}
"""What drops a document beside the rules, with descriptions, in the order in which it counts."""

BYTES_PER_TOKEN = 4.5
"""Of Korean text and RedWhale's tokenizer: the paper's 43.9 GB are 9.7 billion tokens (arXiv 2408.11294)."""


class Example(msgspec.Struct, frozen=True, kw_only=True):
    """A document, and its score by the rule that shows it."""

    id: str
    score: float
    snippet: str


class Histogram(msgspec.Struct, frozen=True, kw_only=True):
    """Documents by score: `counts[i]` in [low + i * width, low + (i + 1) * width), the last bin open to the right."""

    low: float
    width: float
    counts: list[int]


class RuleSummary(msgspec.Struct, kw_only=True):
    """What one rule did; bytes are UTF-8 bytes of the texts as read."""

    name: str
    group: str
    description: str
    threshold: Threshold
    dropped_documents: int = 0  # it is the first rule, in order, that the document fails
    dropped_bytes: int = 0
    failing_documents: int = 0  # the document fails it, whatever else it fails
    failing_bytes: int = 0
    unique_documents: int = 0  # the document fails it and nothing else
    unique_bytes: int = 0
    histogram: Histogram | None = None  # of all documents' scores
    examples: list[Example] = []  # a sample of the dropped ones, chosen by content id
    kept_examples: list[Example] = []  # a sample of the kept ones


class SourceSummary(msgspec.Struct, kw_only=True):
    """Documents and UTF-8 bytes of one source, as read and as kept."""

    documents_in: int = 0
    bytes_in: int = 0
    documents_out: int = 0
    bytes_out: int = 0


class FilterSummary(msgspec.Struct, kw_only=True):
    """Counts of a filter run; bytes are UTF-8 bytes of text, "in" as read and "out" as normalised and kept.

    documents_in - documents_out is the sum of the rules' `dropped_documents`, and bytes_in - bytes_out the sum of their
    `dropped_bytes` plus `bytes_normalized` and `bytes_of_lines`.
    """

    documents_in: int = 0
    bytes_in: int = 0
    documents_out: int = 0
    bytes_out: int = 0
    train_documents: int = 0
    train_bytes: int = 0
    validation_documents: int = 0
    validation_bytes: int = 0
    bytes_normalized: int = 0  # what normalisation and masking took from the kept documents
    bytes_of_lines: int = 0  # boilerplate lines taken out of the kept documents
    lines_removed: int = 0
    estimated_tokens: int = 0  # of what is kept, at BYTES_PER_TOKEN
    repaired_encodings: int = 0  # documents whose Korean had been read in the wrong encoding
    masked: dict[str, int] = {}  # placeholders in the kept documents, by kind of personal data
    broken_records: int = 0  # records that hold no readable document; not in documents_in
    broken_examples: list[str] = []  # the first few, as FILE:RECORD: REASON
    matches: list[Match] = []  # of benchmarks, every one that dropped a document
    rules: list[RuleSummary] = []  # in order; those of CORPUS_RULES last
    overlaps: list[list[int]] = []  # documents that fail both of two rules, by their places in `rules`
    sources: dict[str, SourceSummary] = {}  # a thousand at most, the rest under "(other sources)"


class ScoredDocument(msgspec.Struct):
    """A document after the rules; `text` is normalised, a snippet where `failed` (places in the rules) is not empty."""

    id: str
    source: str
    text: str
    bytes_in: int
    bytes_out: int
    content_id: int
    scores: list[float]
    failed: list[int]
    repaired: bool
    masked: dict[str, int]
    bytes_of_lines: int = 0
    lines_removed: int = 0


def snippet(text: str, characters: int = 160) -> str:
    """Returns the start of a text on one line."""
    line = " ".join(text[: 2 * characters].split())
    return line if len(line) <= characters else line[: characters - 1] + "…"


def empty_summary(thresholds: Sequence[Threshold], jaccard: float) -> FilterSummary:
    """Returns a summary of nothing, with the rules in their order and thresholds as `resolve_thresholds` gives them."""
    rules = [
        RuleSummary(
            name=rule.name,
            group=rule.group,
            description=rule.description,
            threshold=threshold,
            histogram=_empty_histogram(threshold),
        )
        for rule, threshold in zip(RULES.values(), thresholds, strict=True)
    ]
    of_corpus = {EXACT_DUPLICATE: Threshold(maximum=0), NEAR_DUPLICATE: Threshold(maximum=jaccard)}
    groups = {CONTAMINATED: "benchmarks", PERPLEXITY: "perplexity"}
    rules += [
        RuleSummary(
            name=name,
            group=groups.get(name, "duplicates"),
            description=text,
            threshold=of_corpus.get(name, Threshold()),
        )
        for name, text in CORPUS_RULES.items()
    ]
    return FilterSummary(rules=rules, overlaps=[[0] * len(rules) for _ in rules])


class Tally:
    """Counts documents into a summary that `empty_summary` made; those of several stretches of input can be merged."""

    def __init__(self, summary: FilterSummary, examples_per_rule: int):
        self.summary = summary
        self._most = examples_per_rule
        self._dropped: list[dict[int, Example]] = [{} for _ in summary.rules]
        self._kept: list[dict[int, Example]] = [{} for _ in summary.rules]
        self._bounds = [2**64 if examples_per_rule else 0 for _ in RULES]  # keys of kept examples lie below
        self._salts = [_salt(rule.name) for rule in list(summary.rules)[: len(RULES)]]

    def add_broken(self, records: int, examples: Sequence[str]) -> None:
        """Counts records without a document."""
        self.summary.broken_records += records
        room = _MAX_BROKEN_EXAMPLES - len(self.summary.broken_examples)
        self.summary.broken_examples += examples[:room]

    def add(self, document: ScoredDocument, *, validation: bool) -> bool:
        """Counts a document and returns whether it is kept."""
        summary = self.summary
        failed = document.failed
        for index in failed:
            summary.rules[index].failing_documents += 1
            summary.rules[index].failing_bytes += document.bytes_in
            for other in failed:
                summary.overlaps[index][other] += 1
        if failed:
            first = summary.rules[failed[0]]
            first.dropped_documents += 1
            first.dropped_bytes += document.bytes_in
            if len(failed) == 1:
                first.unique_documents += 1
                first.unique_bytes += document.bytes_in
            self._offer(self._dropped[failed[0]], failed[0], document.content_id, document)
        kept = not failed
        source = summary.sources.setdefault(document.source, SourceSummary())
        for counts in (summary, source):
            counts.documents_in += 1
            counts.bytes_in += document.bytes_in
            counts.documents_out += kept
            counts.bytes_out += kept * document.bytes_out
        summary.repaired_encodings += document.repaired
        if not kept:
            return False
        for kind, count in document.masked.items():
            summary.masked[kind] = summary.masked.get(kind, 0) + count
        summary.bytes_of_lines += document.bytes_of_lines
        summary.lines_removed += document.lines_removed
        summary.bytes_normalized += document.bytes_in - document.bytes_out - document.bytes_of_lines
        if validation:
            summary.validation_documents += 1
            summary.validation_bytes += document.bytes_out
        else:
            summary.train_documents += 1
            summary.train_bytes += document.bytes_out
        for index, salt in enumerate(self._salts):
            key = document.content_id ^ salt
            if key < self._bounds[index] and self._offer(self._kept[index], index, key, document):
                self._bounds[index] = max(self._kept[index])
        return True

    def add_scores(self, scores: np.ndarray) -> None:
        """Counts scores, float [documents, rules], into the histograms."""
        for column, rule in enumerate(self.summary.rules[: scores.shape[1]]):
            histogram = rule.histogram
            assert histogram is not None
            place = np.clip((scores[:, column] - histogram.low) / histogram.width, 0, len(histogram.counts) - 1)
            counts = np.bincount(place.astype(np.intp), minlength=len(histogram.counts))
            histogram.counts[:] = [had + int(more) for had, more in zip(histogram.counts, counts, strict=True)]

    def merge(self, other: "Tally") -> None:
        """Adds what a later stretch of the input counted."""
        mine, theirs = self.summary, other.summary
        self.add_broken(theirs.broken_records, theirs.broken_examples)
        mine.matches += theirs.matches
        _add_numbers(mine, theirs, but=("broken_records",))
        for kind, count in theirs.masked.items():
            mine.masked[kind] = mine.masked.get(kind, 0) + count
        for row, more in zip(mine.overlaps, theirs.overlaps, strict=True):
            row[:] = [a + b for a, b in zip(row, more, strict=True)]
        for index, (rule, more) in enumerate(zip(mine.rules, theirs.rules, strict=True)):
            _add_numbers(rule, more)
            if rule.histogram is not None and more.histogram is not None:
                pairs = zip(rule.histogram.counts, more.histogram.counts, strict=True)
                rule.histogram.counts[:] = [a + b for a, b in pairs]
            for examples, others in ((self._dropped, other._dropped), (self._kept, other._kept)):
                examples[index] = self._smallest({**others[index], **examples[index]})
        for name, counts in theirs.sources.items():
            if name not in mine.sources and len(mine.sources) >= _MAX_SOURCES:
                name = OTHER_SOURCES
            _add_numbers(mine.sources.setdefault(name, SourceSummary()), counts)

    def finish(self) -> FilterSummary:
        """Returns the summary with its examples and the estimate of tokens."""
        for rule, dropped, kept in zip(self.summary.rules, self._dropped, self._kept, strict=True):
            rule.examples = [dropped[key] for key in sorted(dropped)]
            rule.kept_examples = [kept[key] for key in sorted(kept)]
        self.summary.estimated_tokens = round(self.summary.bytes_out / BYTES_PER_TOKEN)
        return self.summary

    def _offer(self, examples: dict[int, Example], index: int, key: int, document: ScoredDocument) -> bool:
        """Takes a document among the examples with the smallest keys; whether there are as many as wanted now."""
        # The smallest content ids are a random sample of the whole input that needs no random state.
        if key in examples or (len(examples) >= self._most and (not examples or key > max(examples))):
            return False
        score = float(f"{document.scores[index]:.6g}") if index < len(document.scores) else 1.0
        examples[key] = Example(id=document.id, score=score, snippet=snippet(document.text))
        if len(examples) > self._most:
            del examples[max(examples)]
        return len(examples) == self._most

    def _smallest(self, examples: dict[int, Example]) -> dict[int, Example]:
        return {key: examples[key] for key in sorted(examples)[: self._most]}


def _add_numbers(mine: msgspec.Struct, theirs: msgspec.Struct, but: Iterable[str] = ()) -> None:
    for name in mine.__struct_fields__:
        value = getattr(theirs, name)
        if isinstance(value, int) and name not in but:
            setattr(mine, name, getattr(mine, name) + value)


def _empty_histogram(threshold: Threshold) -> Histogram:
    """Bins from 0 to thrice the highest threshold, which then is a bin's edge, or to 1 where that is less."""
    bounds = [bound for bound in (threshold.minimum, threshold.maximum) if bound and math.isfinite(bound)]
    top = 3 * max(bounds, default=1 / 3)
    if threshold.maximum is None and top < 1:
        top = 1.0
    return Histogram(low=0.0, width=top / _BINS, counts=[0] * _BINS)


def _salt(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
