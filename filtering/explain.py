"""Why one document is kept or dropped: every score beside its threshold, and what masking replaced."""

from dataclasses import dataclass
from pathlib import Path

from .documents import BrokenRecord, Document, read_documents
from .errors import CorpusError
from .measure import Measured, MeasureOptions, measure_document
from .rules import RULES


@dataclass(frozen=True, slots=True)
class Verdict:
    """One rule's score of a document, which passes in [minimum, maximum]; a rule that is not enabled drops nothing."""

    rule: str
    group: str
    description: str
    score: float
    minimum: float | None
    maximum: float | None
    enabled: bool
    dropped: bool


@dataclass(frozen=True, slots=True)
class Explanation:
    """All that was measured of one document, with one verdict for each rule in the order of `RULES`."""

    measured: Measured
    verdicts: tuple[Verdict, ...]

    @property
    def kept(self) -> bool:
        """Whether the document passes every rule; duplicates are found between documents, not here."""
        return not self.measured.failed

    def __str__(self) -> str:
        measured = self.measured
        size = len(measured.text.encode("utf-8"))
        lines = [
            f"{measured.id} ({measured.source}): {measured.original_bytes:,} bytes, {size:,} after normalisation",
            "kept" if self.kept else f"dropped by {', '.join(measured.failed)}",
        ]
        if measured.repaired:
            lines.append("its Korean had been read in the wrong encoding and was repaired")
        if measured.masked:
            lines.append("masked: " + ", ".join(f"{kind} {count}" for kind, count in measured.masked.items()))
        width = max(len(verdict.rule) for verdict in self.verdicts)
        lines.append("")
        for verdict in self.verdicts:
            mark = "DROPS" if verdict.dropped else "" if verdict.enabled else "off"
            allowed = f"{_bound(verdict.minimum)} .. {_bound(verdict.maximum)}"
            lines.append(
                f"{verdict.rule:{width}}  {verdict.score:>10.4g}  {allowed:>18}  {mark:5}  {verdict.description}"
            )
        return "\n".join(lines)


def explain_document(document: Document, options: MeasureOptions) -> Explanation:
    """Measures one document and puts every rule's score beside its threshold."""
    measured = measure_document(document, options)
    verdicts = []
    for name, rule in RULES.items():
        threshold = options.resolved[name]
        verdicts.append(
            Verdict(
                rule=name,
                group=rule.group,
                description=rule.description,
                score=measured.scores[name],
                minimum=threshold.minimum,
                maximum=threshold.maximum,
                enabled=threshold.enabled is not False,
                dropped=name in measured.failed,
            )
        )
    return Explanation(measured, tuple(verdicts))


def explain_file(
    path: Path, options: MeasureOptions, *, identifier: str | None = None, html: bool = False
) -> Explanation:
    """Explains the document of a file that has this id, or the first.

    Raises CorpusError for a file that cannot be read, holds no document, or none with this id.
    """
    broken: list[BrokenRecord] = []
    for document in read_documents(Path(path), html=html, on_broken=broken.append):
        if identifier is None or document.id == identifier:
            return explain_document(document, options)
    if identifier is not None:
        raise CorpusError(f"{str(path)!r} holds no document with the id {identifier!r}")
    reason = f": {broken[0].reason}" if broken else ""
    raise CorpusError(f"{str(path)!r} holds no document{reason}")


def _bound(value: float | None) -> str:
    return "" if value is None else f"{value:g}"
