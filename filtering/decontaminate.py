"""Documents that hold the questions or answers of a benchmark which the trained model will be tested on.

A question, an answer or a sentence of a benchmark counts as found when most of its stretches of 16 letters and digits,
white space and punctuation left out, stand in the document. Passages do not count: they come from encyclopaedias and
news, which a corpus may hold. What is shorter than a stretch does not count either.
"""

import csv
import functools
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from .encodings import decode_strictly
from .errors import CorpusError
from .hashing import MULTIPLIERS, SpanHashes, character_hashes
from .normalize import normalize_text

STRETCH = 16
"""Letters and digits that are compared at a time."""

FOUND = 0.8
"""Share of a probe's stretches that a document must hold."""

SUFFIXES = (".tsv", ".csv", ".jsonl", ".json", ".txt")

_QUESTION = re.compile(r"(?i)question|query|질문")
_PASSAGE = re.compile(r"(?i)paragraph|passage|context|article|document|text|본문|지문")
_NO_TEXT = re.compile(r"(?i)(^|[_ ])(id|guid|label|url|link ?\d?|source|date|split|category)$")
_NOT_WORD = re.compile(r"[\W_]+")
_FILTER_BITS = 24


class Match(msgspec.Struct, frozen=True):
    """A probe found in a document: the benchmark file, the number of the record in it, and the share found."""

    document: str
    benchmark: str
    record: int
    share: float
    text: str


@dataclass(frozen=True, slots=True)
class Probe:
    """One text of a benchmark that must not be in the corpus."""

    benchmark: str
    record: int
    text: str


class Benchmarks:
    """The probes of benchmark files, ready to be looked for."""

    def __init__(self, probes: Sequence[Probe]):
        self.probes = list(probes)
        hashes, owner = _stretches([probe.text for probe in probes])
        order = np.argsort(hashes, kind="stable")
        self._hashes, self._owner = hashes[order], owner[order]
        self._sizes = np.bincount(owner, minlength=len(self.probes))
        # Most stretches of a corpus are in no benchmark, which a table of bits tells at once.
        self._maybe = np.zeros(1 << _FILTER_BITS, dtype=bool)
        self._maybe[hashes >> np.uint64(64 - _FILTER_BITS)] = True

    def find(self, texts: Sequence[str]) -> list[list[tuple[int, float]]]:
        """Returns for each normalised text the numbers of the probes in it, and the share of each that is."""
        found: list[list[tuple[int, float]]] = [[] for _ in texts]
        hashes, text = _stretches(texts)
        maybe = self._maybe[hashes >> np.uint64(64 - _FILTER_BITS)]
        hashes, text = hashes[maybe], text[maybe]
        if not len(hashes):
            return found
        low = np.searchsorted(self._hashes, hashes, side="left")
        many = np.searchsorted(self._hashes, hashes, side="right") - low
        place = np.repeat(low - (np.cumsum(many) - many), many) + np.arange(many.sum())
        # A stretch counts once for each place where the probe has it.
        seen = np.unique(np.stack((np.repeat(text, many), place)), axis=1)
        pairs, counts = np.unique(np.stack((seen[0], self._owner[seen[1]])), axis=1, return_counts=True)
        for place, probe, count in zip(*pairs.tolist(), counts.tolist(), strict=True):
            share = count / self._sizes[probe]
            if share >= FOUND:
                found[place].append((probe, round(float(share), 4)))
        return found


@functools.lru_cache(maxsize=4)
def load_benchmarks(files: tuple[str, ...]) -> Benchmarks:
    """Reads the probes of .tsv, .csv, .json, .jsonl and .txt files, and of those in folders.

    Raises CorpusError for a file that is missing, unreadable or holds no probe.
    """
    probes: dict[str, Probe] = {}
    for file in benchmark_files(files):
        label = f"{file.parent.name}/{file.name}"
        for number, record in enumerate(_records(file), start=1):
            for text in _texts(record):
                normal = normalize_text(text)
                if len(_NOT_WORD.sub("", normal)) >= STRETCH:
                    probes.setdefault(normal, Probe(label, number, normal))
    if files and not probes:
        raise CorpusError(f"decontaminate: {', '.join(files)} hold no text of {STRETCH} or more letters")
    return Benchmarks(list(probes.values()))


def benchmark_files(names: Sequence[str]) -> list[Path]:
    """Returns the benchmark files behind file names and folders, in a stable order.

    Raises CorpusError for a name that gives no file, and for a named file of an unknown kind.
    """
    files = []
    for name in names:
        path = Path(name).expanduser()
        inside = sorted(one for one in path.rglob("*") if one.suffix in SUFFIXES) if path.is_dir() else [path]
        if not inside or inside[0].suffix not in SUFFIXES:
            known = ", ".join(SUFFIXES)
            raise CorpusError(f"decontaminate: {name!r} must be a file, or hold one, that ends in one of {known}")
        if not inside[0].exists():
            raise CorpusError(f"decontaminate: cannot read {name!r}: no such file")
        files += inside
    return files


def _records(file: Path) -> Iterator[Any]:
    try:
        text = decode_strictly(file.read_bytes())
    except OSError as error:
        raise CorpusError(f"decontaminate: cannot read {str(file)!r}: {error.strerror or error}") from error
    if text is None:
        raise CorpusError(f"decontaminate: {str(file)!r} is neither UTF-8 nor CP949")
    try:
        if file.suffix == ".json":
            value = json.loads(text)
            yield from value if isinstance(value, list) else [value]
        elif file.suffix == ".jsonl":
            yield from (json.loads(line) for line in text.splitlines() if line.strip())
        elif file.suffix == ".txt":
            yield from text.splitlines()
        else:
            # Quotation marks of KoBEST's TSV files are only quotation marks.
            tabs = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if file.suffix == ".tsv" else {}
            yield from csv.DictReader(io.StringIO(text, newline=""), **tabs)
    except (ValueError, csv.Error) as error:
        raise CorpusError(f"decontaminate: {str(file)!r} is damaged ({error})") from error


def _texts(record: Any, passages: bool | None = None) -> Iterator[str]:
    """Strings of a record; where one of its fields is a question, passages are left out."""
    if isinstance(record, str):
        yield record
    elif isinstance(record, list):
        for one in record:
            yield from _texts(one, passages)
    elif isinstance(record, dict):
        if passages is None:
            passages = not _has_question(record)
        for key, value in record.items():
            if not _NO_TEXT.search(str(key)) and (
                passages or not (isinstance(value, str) and _PASSAGE.search(str(key)))
            ):
                yield from _texts(value, passages)


def _has_question(record: Any) -> bool:
    if isinstance(record, list):
        return any(map(_has_question, record))
    if isinstance(record, dict):
        return any(_QUESTION.search(str(key)) for key in record) or any(map(_has_question, record.values()))
    return False


def _stretches(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of every stretch of letters and digits of each text (uint64), and the text of each."""
    squeezed = [_NOT_WORD.sub("", text) for text in texts]
    sizes = np.fromiter(map(len, squeezed), dtype=np.int64, count=len(squeezed))
    span_hashes = SpanHashes(character_hashes("".join(squeezed)))
    counts = np.maximum(sizes - STRETCH + 1, 0)
    text = np.repeat(np.arange(len(texts)), counts)
    start = np.arange(len(text)) - (np.cumsum(counts) - counts)[text] + (np.cumsum(sizes) - sizes)[text]
    return span_hashes(start, start + STRETCH) * MULTIPLIERS[1], text
