"""From raw files to a normalised, filtered, deduplicated and explained corpus in parquet files."""

from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import msgspec

from .documents import BrokenRecord, RecordBatch, decode_batch, find_inputs, read_batches, suffix_of
from .errors import CorpusError
from .measure import MeasureOptions, measure_documents
from .normalize import content_id
from .personal_data import DEFAULT_KINDS
from .rules import RULES, Threshold
from .summary import FilterSummary, ScoredDocument, Tally, snippet
from .workers import available_cores, ordered_map
from .writer import SplitWriter, remove_old_outputs

# Starting a spawned worker takes about as long as filtering a few megabytes of text.
_WORKERS_PAY_FROM_BYTES = 16 << 20
_USUAL_COMPRESSION_RATIO = 4
_BATCH_BYTES = 1 << 20


class FilterConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to filter and how; raises CorpusError for a value out of range and for an unknown rule."""

    inputs: list[str]  # files, folders and globs, see docs/filtering.md for their formats
    workers: int = 0  # processes that filter; 0 takes every core; the result is the same for any number
    validation_fraction: float = 0.01  # share of the kept documents that is held out, chosen by their content
    html: bool = False  # the texts of JSON lines, parquet and text files are HTML too
    mask: tuple[str, ...] = DEFAULT_KINDS  # kinds of personal data that placeholders replace
    thresholds: dict[str, Threshold] = {}  # changes to the rules, by rule name
    documents_per_file: int = 100_000  # documents in each parquet file
    examples_per_rule: int = 3  # dropped documents that the summary shows for each rule

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise CorpusError(f"workers must be 0 (every core) or more, not {self.workers}")
        if not 0 <= self.validation_fraction < 1:
            raise CorpusError(f"validation_fraction must be at least 0 and below 1, not {self.validation_fraction}")
        if self.documents_per_file < 1:
            raise CorpusError(f"documents_per_file must be at least 1, not {self.documents_per_file}")
        if self.examples_per_rule < 0:
            raise CorpusError(f"examples_per_rule must be at least 0, not {self.examples_per_rule}")
        self.measure_options()

    def measure_options(self) -> MeasureOptions:
        """How every document is measured."""
        return MeasureOptions(thresholds=self.thresholds, mask=self.mask)


def filter_corpus(
    config: FilterConfig, output_dir: Path, *, progress: Callable[[int], None] | None = None
) -> FilterSummary:
    """Filters `config.inputs` into `train-00000.parquet`, `validation-00000.parquet`, ... and `summary.json`.

    Every document is normalised and scored by every rule; those that pass all rules and repeat no earlier text are
    kept, in input order. A text goes to validation when its content id lies below that fraction of 2^64, so that the
    choice depends on nothing else. All files are byte-identical for any number of workers; each is renamed into place
    when complete, summary.json last. Outputs of an earlier run in the folder are removed first.

    The set of content ids is held in memory: about 100 bytes a distinct document.

    Args:
        output_dir: made when missing; must not hold the inputs.
        progress: called with the bytes of input files consumed since the last call; they sum to the files' sizes.

    Raises:
        CorpusError: no input, an unreadable or damaged file, a missing package, or nothing left after filtering.
    """
    output_dir = Path(output_dir)
    paths = find_inputs(config.inputs)
    for path in paths:
        if path.resolve().is_relative_to(output_dir.resolve()):
            raise CorpusError(f"input {str(path)!r} lies in the output folder {str(output_dir)!r}: write elsewhere")
    output_dir.mkdir(parents=True, exist_ok=True)
    remove_old_outputs(output_dir)

    options = config.measure_options()
    tally = Tally(tuple(RULES.values()), list(options.resolved.values()), config.examples_per_rule)
    validation_below = int(config.validation_fraction * 2**64)
    seen: set[int] = set()
    score = partial(score_batch, options=options, html=config.html)
    results = ordered_map(score, _batches(paths), _worker_count(config, paths))
    with (
        closing(results),
        SplitWriter(output_dir, "train", config.documents_per_file) as train,
        SplitWriter(output_dir, "validation", config.documents_per_file) as validation,
    ):
        for documents, broken, file_bytes in results:
            for record in broken:
                tally.add_broken(record)
            for document in documents:
                duplicate = document.content_id in seen
                seen.add(document.content_id)
                held_out = document.content_id < validation_below
                if tally.add(document, duplicate=duplicate, validation=held_out):
                    (validation if held_out else train).write(document)
            if progress is not None:
                progress(file_bytes)
        summary = tally.finish()
        _check_something_is_left(summary)
    temporary = output_dir / "summary.json.tmp"
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(summary), indent=2) + b"\n")
    temporary.replace(output_dir / "summary.json")
    return summary


def score_batch(
    batch: RecordBatch, *, options: MeasureOptions, html: bool = False
) -> tuple[list[ScoredDocument], list[BrokenRecord], int]:
    """Returns the batch's documents with their scores, its broken records, and its file bytes."""
    documents, broken = decode_batch(batch, html=html)
    places = {name: index for index, name in enumerate(RULES)}
    scored = [
        ScoredDocument(
            id=measured.id,
            source=measured.source,
            text=snippet(measured.text) if measured.failed else measured.text,
            bytes_in=measured.original_bytes,
            bytes_out=len(measured.text.encode("utf-8")),
            content_id=content_id(measured.text),
            scores=list(measured.scores.values()),
            failed=[places[name] for name in measured.failed],
            repaired=measured.repaired,
            masked=measured.masked,
        )
        for measured in measure_documents(documents, options)
    ]
    return scored, broken, batch.file_bytes


def _batches(paths: list[Path]) -> Iterator[RecordBatch]:
    for path in paths:
        yield from read_batches(path, batch_bytes=_BATCH_BYTES)


def _worker_count(config: FilterConfig, paths: list[Path]) -> int:
    workers = config.workers or available_cores()
    text_bytes = sum(
        path.stat().st_size * (1 if suffix_of(path) in (".jsonl", ".txt") else _USUAL_COMPRESSION_RATIO)
        for path in paths
    )
    return workers if text_bytes >= _WORKERS_PAY_FROM_BYTES else 1


def _check_something_is_left(summary: FilterSummary) -> None:
    if summary.documents_out:
        return
    if not summary.documents_in:
        first = f"; the first of {summary.broken_records} broken records is {summary.broken_examples[0]}"
        raise CorpusError("the inputs hold no documents" + (first if summary.broken_records else ""))
    worst = max(summary.rules, key=lambda rule: rule.dropped_documents)
    raise CorpusError(
        f"no document is left of {summary.documents_in}: rule {worst.name!r} ({worst.description}) dropped most, "
        f"{worst.dropped_documents}; widen thresholds.{worst.name}, or look at the inputs"
    )
