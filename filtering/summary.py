"""What a filter run reports: structs that become summary.json, and the tally that fills them."""

import msgspec

from .documents import BrokenRecord
from .rules import Rule, Threshold

_MAX_SOURCES = 1000
_MAX_BROKEN_EXAMPLES = 10
OTHER_SOURCES = "(other sources)"
EXACT_DUPLICATE = "exact_duplicate"


class Example(msgspec.Struct, frozen=True, kw_only=True):
    """A document that a rule dropped."""

    id: str
    score: float
    snippet: str


class RuleSummary(msgspec.Struct, kw_only=True):
    """What one rule did; bytes are UTF-8 bytes of the texts as read."""

    name: str
    description: str
    threshold: Threshold
    dropped_documents: int = 0  # it is the first rule, in order, that the document fails
    dropped_bytes: int = 0
    failing_documents: int = 0  # the document fails it, whatever else it fails
    failing_bytes: int = 0
    unique_documents: int = 0  # the document fails it and nothing else
    unique_bytes: int = 0
    examples: list[Example] = []  # a sample of the dropped ones, chosen by content id


class SourceSummary(msgspec.Struct, kw_only=True):
    """Documents and UTF-8 bytes of one source, as read and as kept."""

    documents_in: int = 0
    bytes_in: int = 0
    documents_out: int = 0
    bytes_out: int = 0


class FilterSummary(msgspec.Struct, kw_only=True):
    """Counts of a filter run; bytes are UTF-8 bytes of text, "in" as read and "out" as normalised and kept.

    documents_in - documents_out is the sum of the rules' `dropped_documents`, and
    bytes_in - bytes_out the sum of their `dropped_bytes` plus `bytes_normalized`.
    """

    documents_in: int = 0
    bytes_in: int = 0
    documents_out: int = 0
    bytes_out: int = 0
    train_documents: int = 0
    train_bytes: int = 0
    validation_documents: int = 0
    validation_bytes: int = 0
    bytes_normalized: int = 0  # what normalisation took from the kept documents
    repaired_encodings: int = 0  # documents whose Korean had been read in the wrong encoding
    masked: dict[str, int] = {}  # placeholders in the kept documents, by kind of personal data
    broken_records: int = 0  # records that hold no readable document; not in documents_in
    broken_examples: list[str] = []  # the first few, as FILE:RECORD: REASON
    rules: list[RuleSummary] = []  # in order; exact_duplicate is the last
    sources: dict[str, SourceSummary] = {}  # a thousand at most, the rest under "(other sources)"


class ScoredDocument(msgspec.Struct, array_like=True):
    """A document after the rules; `text` is normalised, a snippet where `failed` (rule indices) is not empty."""

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


def snippet(text: str, characters: int = 160) -> str:
    """Returns the start of a text on one line."""
    line = " ".join(text[: 2 * characters].split())
    return line if len(line) <= characters else line[: characters - 1] + "…"


class Tally:
    """Counts documents into a FilterSummary, in any order of rules but in input order of documents."""

    def __init__(self, rules: tuple[Rule, ...], thresholds: list[Threshold], examples_per_rule: int):
        self.summary = FilterSummary(
            rules=[
                RuleSummary(name=rule.name, description=rule.description, threshold=threshold)
                for rule, threshold in zip(rules, thresholds, strict=True)
            ]
        )
        self.summary.rules.append(
            RuleSummary(
                name=EXACT_DUPLICATE,
                description="documents with the same normalised text as an earlier one",
                threshold=Threshold(maximum=0),
            )
        )
        self._examples: list[dict[int, Example]] = [{} for _ in self.summary.rules]
        self._examples_per_rule = examples_per_rule

    def add_broken(self, record: BrokenRecord) -> None:
        """Counts a record without a document."""
        self.summary.broken_records += 1
        if len(self.summary.broken_examples) < _MAX_BROKEN_EXAMPLES:
            self.summary.broken_examples.append(str(record))

    def add(self, document: ScoredDocument, *, duplicate: bool, validation: bool) -> bool:
        """Counts a document and returns whether it is kept."""
        summary = self.summary
        failed = [*document.failed, len(summary.rules) - 1] if duplicate else document.failed
        for index in failed:
            summary.rules[index].failing_documents += 1
            summary.rules[index].failing_bytes += document.bytes_in
        if failed:
            first = summary.rules[failed[0]]
            first.dropped_documents += 1
            first.dropped_bytes += document.bytes_in
            if len(failed) == 1:
                first.unique_documents += 1
                first.unique_bytes += document.bytes_in
            self._offer_example(failed[0], document)
        kept = not failed
        source = self._source(document.source)
        for counts in (summary, source):
            counts.documents_in += 1
            counts.bytes_in += document.bytes_in
            counts.documents_out += kept
            counts.bytes_out += kept * document.bytes_out
        summary.repaired_encodings += document.repaired
        for kind, count in document.masked.items() if kept else ():
            summary.masked[kind] = summary.masked.get(kind, 0) + count
        summary.bytes_normalized += kept * (document.bytes_in - document.bytes_out)
        if validation:
            summary.validation_documents += kept
            summary.validation_bytes += kept * document.bytes_out
        else:
            summary.train_documents += kept
            summary.train_bytes += kept * document.bytes_out
        return kept

    def finish(self) -> FilterSummary:
        """Returns the summary with its examples."""
        for rule, examples in zip(self.summary.rules, self._examples, strict=True):
            rule.examples = [examples[content] for content in sorted(examples)]
        return self.summary

    def _source(self, name: str) -> SourceSummary:
        sources = self.summary.sources
        if name not in sources and len(sources) >= _MAX_SOURCES:
            name = OTHER_SOURCES
        return sources.setdefault(name, SourceSummary())

    def _offer_example(self, rule: int, document: ScoredDocument) -> None:
        # The smallest content ids are a random sample of the whole input that needs no random state.
        examples = self._examples[rule]
        if document.content_id in examples:
            return
        if len(examples) >= self._examples_per_rule:
            if not examples or document.content_id > (largest := max(examples)):
                return
            del examples[largest]
        score = document.scores[rule] if rule < len(document.scores) else 1.0
        examples[document.content_id] = Example(id=document.id, score=score, snippet=snippet(document.text))
