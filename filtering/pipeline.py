"""From raw files to a normalised, filtered, deduplicated and explained corpus in parquet files."""

from collections.abc import Callable, Iterable
from contextlib import closing
from functools import partial
from pathlib import Path

import msgspec
import numpy as np

from .config import FilterConfig
from .decontaminate import benchmark_files, load_benchmarks
from .documents import find_inputs, suffix_of
from .duplicates import duplicates_of_shard, find_bounds, find_duplicates, improbable_rows
from .errors import CorpusError
from .frequent_lines import FrequentLines, count_lines
from .language_model import train_model
from .ray_workers import RayWorkers
from .report import write_report
from .rules import RULES
from .shared_work import SharedWorkFolder
from .storage import InputFile, version_of
from .summary import (
    CORPUS_RULES,
    EXACT_DUPLICATE,
    FREQUENT_LINES,
    NEAR_DUPLICATE,
    PERPLEXITY,
    FilterSummary,
    ScoredDocument,
    Tally,
    empty_summary,
    snippet,
)
from .work import (
    Unit,
    WorkFolder,
    cut_into_units,
    measure_shard,
    measure_unit,
    missing_shards,
    scored_documents,
    write_atomically,
)
from .workers import Mapper, Workers, available_cores
from .writer import SplitWriter, remove_old_outputs

# Starting a spawned worker takes about as long as filtering a few megabytes of text.
_WORKERS_PAY_FROM_BYTES = 16 << 20
_USUAL_COMPRESSION_RATIO = 4
MEGABYTE = 1 << 20
_PLACES = {name: len(RULES) + place for place, name in enumerate(CORPUS_RULES)}


def filter_corpus(
    config: FilterConfig,
    output_dir: Path,
    *,
    progress: Callable[[int], None] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> FilterSummary:
    """Filters `config.inputs` into `train-00000.parquet`, `validation-00000.parquet`, ..., summary.json, report.html.

    Every document is normalised and scored by every rule; those that pass all rules and repeat no other are kept, in
    input order, without their boilerplate lines. A text goes to validation when its content id lies below that fraction
    of 2^64, so that the choice depends on nothing else. All files are byte-identical for any number of workers, shard
    size and engine; each is renamed into place when complete, summary.json last. Outputs of an earlier run in the
    folder are removed first.

    What is in memory does not grow with the input: three shards a worker and the `memory_gb` of the joins, and a byte
    for each document that passes the rules. The folder `work`, deleted at the end, takes the text that passes the
    rules and some 200 bytes a document. A run that was stopped goes on with the shards that it had not measured yet.

    Args:
        output_dir: made when missing; must not hold the inputs.
        progress: called with the bytes of input files measured since the last call; they sum to the files' sizes.
        say: called with a sentence when one of the parts begins that follow the measuring.

    Raises:
        CorpusError: no input, an unreadable or damaged file, a missing package, or nothing left after filtering.
    """
    output_dir = Path(output_dir)
    paths = find_inputs(config.inputs)
    for path in paths:
        if isinstance(path, Path) and path.resolve().is_relative_to(output_dir.resolve()):
            raise CorpusError(f"input {str(path)!r} lies in the output folder {str(output_dir)!r}: write elsewhere")
    work = output_dir.resolve() / "work"
    exchange = config.exchange if config.engine == "ray" else None
    folder = WorkFolder(work) if exchange is None else SharedWorkFolder(work, exchange)
    if config.decontaminate:
        load_benchmarks(config.decontaminate)  # what cannot be read is said before any work
    output_dir.mkdir(parents=True, exist_ok=True)
    remove_old_outputs(output_dir)
    folder.open(_fingerprint(config, paths))
    workers = _worker_count(config, paths)
    units = cut_into_units(paths, config.shard_mb * MEGABYTE)
    if config.perplexity is not None and not folder.language_model.exists():
        say("training the language model")
        train_model(config.perplexity.method, config.perplexity.train, folder.language_model)
    if folder.language_model.exists():
        folder.keep(folder.language_model)
    settings = {"memory_gb": config.memory_gb, "threads": workers}
    with RayWorkers(workers) if config.engine == "ray" else Workers(workers) as pool:
        _measure(config, folder, units, pool, progress or (lambda _: None))
        folder.gather("measured")
        names = [name for unit in units for name in folder.shards(unit.number)]
        if config.perplexity is not None:
            find_bounds(folder, config.perplexity.low, config.perplexity.high, **settings)
        say("looking for documents that repeat others")
        find_duplicates(folder, config.duplicates.jaccard, map_=pool.map, **settings)
        if config.duplicates.line_documents:
            say("counting lines of many documents")
            count_lines(folder, names, config.duplicates.block_documents, settings=settings, map_=pool.map)
        say("writing what is kept")
        summary = _write(config, folder, names, output_dir, pool.map)
        if isinstance(folder, SharedWorkFolder) and isinstance(pool, RayWorkers):
            pool.everywhere(SharedWorkFolder.forget, folder)
    if not summary.documents_out:
        folder.remove()
        raise _nothing_left(summary)
    write_atomically(output_dir / "report.html", write_report(summary).encode("utf-8"))
    write_atomically(output_dir / "summary.json", msgspec.json.format(msgspec.json.encode(summary), indent=2) + b"\n")
    folder.remove()
    return summary


def finish_shard(name: str, *, folder: WorkFolder, config: FilterConfig) -> tuple[Tally, list[ScoredDocument]]:
    """Returns the counts of a measured shard, and its kept documents in order."""
    tally = _empty_tally(config)
    info = folder.info(name)
    tally.add_broken(info.broken_records, info.broken_examples)
    tally.summary.matches += info.matches
    duplicates = duplicates_of_shard(folder, name)
    documents = scored_documents(folder, name)
    for row in improbable_rows(folder, name):
        documents[row].failed.append(_PLACES[PERPLEXITY])
    for row, of in duplicates.items():
        documents[row].failed.append(_PLACES[EXACT_DUPLICATE if of is None else NEAR_DUPLICATE])
    if config.duplicates.line_documents:
        _take_lines([document for document in documents if not document.failed], folder, config)
    validation_below = _validation_below(config)
    kept = [one for one in documents if tally.add(one, validation=one.content_id < validation_below)]
    if documents:
        tally.add_scores(np.array([document.scores for document in documents]))
    return tally, kept


def _measure(
    config: FilterConfig,
    folder: WorkFolder,
    units: list[Unit],
    pool: Workers | RayWorkers,
    progress: Callable[[int], None],
) -> None:
    measure = partial(
        measure_shard,
        folder=folder,
        options=config.measure_options(),
        html=config.html,
        benchmarks=config.decontaminate,
    )
    shard_bytes = config.shard_mb * MEGABYTE
    if isinstance(pool, RayWorkers):
        # Its processes read the inputs themselves, so that no text goes through this one.
        done = pool.map(partial(measure_unit, folder=folder, measure=measure, shard_bytes=shard_bytes), units)
    else:
        done = pool.map(measure, missing_shards(units, folder, shard_bytes, progress))
    with closing(done):
        for file_bytes in done:
            progress(file_bytes)


def _write(config: FilterConfig, folder: WorkFolder, names: list[str], output_dir: Path, map_: Mapper) -> FilterSummary:
    tally = _empty_tally(config)
    validation_below = _validation_below(config)
    with (
        closing(map_(partial(finish_shard, folder=folder, config=config), names)) as results,
        SplitWriter(output_dir, "train", config.documents_per_file) as train,
        SplitWriter(output_dir, "validation", config.documents_per_file) as validation,
    ):
        for part, documents in results:
            tally.merge(part)
            for document in documents:
                (validation if document.content_id < validation_below else train).write(document)
    return tally.finish()


def _empty_tally(config: FilterConfig) -> Tally:
    resolved = config.measure_options().resolved
    return Tally(empty_summary(list(resolved.values()), config.duplicates.jaccard), config.examples_per_rule)


def _validation_below(config: FilterConfig) -> int:
    """The content id from which on a document is for training."""
    return int(config.validation_fraction * 2**64)


def _take_lines(documents: list[ScoredDocument], folder: WorkFolder, config: FilterConfig) -> None:
    """Takes boilerplate lines out of documents, which fail when too little is left."""
    settings = config.duplicates
    frequent = FrequentLines.load(
        folder, line_documents=settings.line_documents, block_documents=settings.block_documents
    )
    texts = frequent.without([document.text for document in documents], [document.content_id for document in documents])
    shortest = max(config.measure_options().resolved["length"].minimum or 0, 1)
    for document, text in zip(documents, texts, strict=True):
        if text == document.text:
            continue
        if len(text) < shortest:
            document.failed.append(_PLACES[FREQUENT_LINES])
            document.text = snippet(document.text)
            continue
        lines = [sum(map(bool, map(str.strip, one.split("\n")))) for one in (document.text, text)]
        document.lines_removed = lines[0] - lines[1]
        size = len(text.encode("utf-8"))
        document.bytes_of_lines = document.bytes_out - size
        document.text, document.bytes_out = text, size


def _fingerprint(config: FilterConfig, paths: list[InputFile]) -> dict[str, object]:
    """What decides the contents of the work folder."""

    def stats(files: Iterable[InputFile]) -> list[tuple[str, int, str]]:
        return [(str(path.resolve()), path.stat().st_size, version_of(path)) for path in files]

    return {
        "thresholds": config.measure_options().resolved,
        "mask": sorted(config.mask),
        "html": config.html,
        "shard_mb": config.shard_mb,
        "duplicates": config.duplicates,
        "inputs": stats(paths),
        "benchmarks": stats(benchmark_files(config.decontaminate)),
        "perplexity": config.perplexity,
        "clean": stats(find_inputs(config.perplexity.train)) if config.perplexity is not None else [],
    }


def _worker_count(config: FilterConfig, paths: list[InputFile]) -> int:
    workers = config.workers or available_cores()
    text_bytes = sum(
        path.stat().st_size * (1 if suffix_of(path) in (".jsonl", ".txt") else _USUAL_COMPRESSION_RATIO)
        for path in paths
    )
    return workers if text_bytes >= _WORKERS_PAY_FROM_BYTES else 1


def _nothing_left(summary: FilterSummary) -> CorpusError:
    if not summary.documents_in:
        first = f"; the first of {summary.broken_records} broken records is " + "".join(summary.broken_examples[:1])
        return CorpusError("the inputs hold no documents" + (first if summary.broken_records else ""))
    worst = max(summary.rules, key=lambda rule: rule.dropped_documents)
    return CorpusError(
        f"no document is left of {summary.documents_in}: rule {worst.name!r} ({worst.description}) dropped most, "
        f"{worst.dropped_documents}; widen thresholds.{worst.name}, or look at the inputs"
    )
