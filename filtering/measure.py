"""What happens to one document: repaired, normalised, personal data masked, and scored by every rule."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .documents import Document
from .errors import CorpusError
from .normalize import normalize_text, repair_mojibake
from .personal_data import DEFAULT_KINDS, KINDS, mask_personal_data
from .prepare import prepare_batch
from .rules import RULES, Threshold, passes, resolve_thresholds

# The arrays of so many characters stay in the cache of a core.
_BATCH_CHARACTERS = 1 << 15


@dataclass(frozen=True, slots=True)
class MeasureOptions:
    """How a document is measured: changes to the rules' thresholds by rule name, and the personal data to mask.

    `mask` names kinds of `personal_data.KINDS`. Raises CorpusError for an unknown rule or kind, and for a threshold
    that lets nothing pass.
    """

    thresholds: Mapping[str, Threshold] = field(default_factory=dict)
    mask: tuple[str, ...] = DEFAULT_KINDS
    resolved: Mapping[str, Threshold] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "resolved", resolve_thresholds(self.thresholds))
        for kind in self.mask:
            if kind not in KINDS:
                raise CorpusError(f"mask names an unknown kind {kind!r}: the kinds are {', '.join(KINDS)}")


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
    """Normalises, masks and scores one document by every rule, whatever it fails; for many see `measure_documents`."""
    return measure_documents([document], options)[0]


def measure_documents(documents: Sequence[Document], options: MeasureOptions) -> list[Measured]:
    """As `measure_document` for each, several times faster: the counts of many documents are made together."""
    measured: list[Measured] = []
    first = characters = 0
    for end, document in enumerate(documents, start=1):
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS or end == len(documents):
            measured += _measure_batch(documents[first:end], options)
            first, characters = end, 0
    return measured


def _measure_batch(documents: Sequence[Document], options: MeasureOptions) -> list[Measured]:
    repaired = [repair_mojibake(document.text) for document in documents]
    masked = [mask_personal_data(normalize_text(text), options.mask) for text in repaired]
    results = []
    for document, raw, (text, counts), prepared in zip(
        documents, repaired, masked, prepare_batch([text for text, _ in masked]), strict=True
    ):
        scores = {name: rule.score(prepared) for name, rule in RULES.items()}
        results.append(
            Measured(
                id=normalize_text(document.id),
                source=normalize_text(document.source),
                text=text,
                scores=scores,
                failed=tuple(name for name, score in scores.items() if not passes(score, options.resolved[name])),
                masked=counts,
                original_bytes=len(document.text.encode("utf-8", "surrogatepass")),
                repaired=raw is not document.text,
            )
        )
    return results
