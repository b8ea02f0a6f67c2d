"""The work folder of a filter run: input cut into shards, and what was measured of each, whole or not there at all.

A shard is a stretch of the input, small enough for one worker's memory. Its documents have positions, numbers that
ascend in input order whatever the size of the shards. Measured shards survive a crash; a run goes on with the others.
"""

import itertools
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from .decontaminate import Match, load_benchmarks
from .documents import BrokenRecord, RecordBatch, decode_batch, read_batches
from .errors import CorpusError
from .language_model import load_model
from .measure import Measured, MeasureOptions, measure_documents
from .minhash import BANDS, VERSION, band_keys, shingles
from .normalize import content_id
from .rules import RULES
from .storage import InputFile
from .summary import CONTAMINATED, ScoredDocument, snippet

_FORMAT = 1
_BATCH_BYTES = 1 << 20
_UNIT_BITS, _SHARD_BITS, _ROW_BITS = 20, 19, 24
_SIGNED_DOCUMENTS = 64
BAND_COLUMNS = tuple(f"band_{band:02d}" for band in range(BANDS))


@dataclass(frozen=True, slots=True)
class Unit:
    """Consecutive input files that are read by one process: one large file, or several small ones."""

    number: int
    paths: tuple[InputFile, ...]

    @property
    def file_bytes(self) -> int:
        """Size of its files."""
        return sum(path.stat().st_size for path in self.paths)


@dataclass(frozen=True, slots=True)
class Shard:
    """A stretch of a unit; `batches` hold its undecoded records, and the last of a unit may hold none."""

    unit: int
    number: int
    batches: list[RecordBatch]
    last: bool

    @property
    def file_bytes(self) -> int:
        """Bytes of input files that it takes up."""
        return sum(batch.file_bytes for batch in self.batches)


class ShardInfo(msgspec.Struct, kw_only=True):
    """What a measured shard says of itself: bytes of input files, broken records, whether its unit ends with it."""

    file_bytes: int
    last: bool
    broken_records: int
    broken_examples: list[str]
    matches: list[Match]


class WorkFolder:
    """Files of one run: `texts/NAME.arrow` and `measured/NAME.parquet` of every shard, and what is made of them.

    Processes that share it find each other's files by `find`, and say by `keep` that one is whole.
    Raises CorpusError when pyarrow is not installed.
    """

    def __init__(self, path: Path):
        _pyarrow()
        self.path = path
        self.measured = path / "measured"
        self.texts = path / "texts"
        self.language_model = path / "language_model.npz"

    def open(self, fingerprint: dict[str, Any]) -> None:
        """Makes the folder; what another run, with other settings or inputs, left in it goes."""
        wanted = msgspec.json.encode({"format": _FORMAT, "minhash": VERSION, **fingerprint})
        described = self.path / "run.json"
        if not described.exists() or described.read_bytes() != wanted:
            self._delete()
        self.make()
        write_atomically(described, wanted)

    def make(self) -> None:
        """Makes the folder and those in it."""
        for part in ("measured", "texts", "edges", "lines"):
            (self.path / part).mkdir(parents=True, exist_ok=True)

    def find(self, name: str) -> Path | None:
        """Returns the path of a file of the run, or None where there is no such."""
        path = self.path / name
        return path if path.exists() else None

    def need(self, name: str) -> Path:
        """Returns the path of a file of the run that is there."""
        path = self.find(name)
        if path is None:
            raise FileNotFoundError(2, "the filter's work folder was changed while it ran", str(self.path / name))
        return path

    def keep(self, path: Path) -> None:
        """To be called with every file that other processes look for, when it is whole."""

    def gather(self, part: str) -> None:
        """To be called before all files of a sub-folder are read."""

    def remove(self) -> None:
        """Deletes the folder and all in it."""
        self._delete()

    def _delete(self) -> None:
        if self.path.exists():
            shutil.rmtree(self.path)

    def shards(self, unit: int) -> list[str]:
        """Names of the shards of a unit that are measured, in order."""
        return sorted(path.stem for path in self.measured.glob(f"{unit:07d}-*.parquet"))

    def is_complete(self, unit: int) -> bool:
        """Whether all shards of a unit are measured."""
        names = self.shards(unit)
        return bool(names) and len(names) == _number(names[-1]) + 1 and self.info(names[-1]).last

    def info(self, name: str) -> ShardInfo:
        """What a measured shard says of itself."""
        metadata = _parquet().read_metadata(self.need(f"measured/{name}.parquet")).metadata
        return msgspec.json.decode(metadata[b"redwhale"], type=ShardInfo)

    def measurements(self, name: str) -> Any:
        """The measured columns of a shard, as an arrow table."""
        return _parquet().read_table(self.need(f"measured/{name}.parquet"))

    def documents(self, name: str) -> Any:
        """Ids, sources, texts and scores of a shard, as an arrow table in mapped memory."""
        pa = _pyarrow()
        return pa.ipc.open_file(pa.memory_map(str(self.need(f"texts/{name}.arrow")))).read_all()


def cut_into_units(paths: Sequence[InputFile], shard_bytes: int) -> list[Unit]:
    """Groups files, in order, into units of at least `shard_bytes` where single files are smaller."""
    units: list[Unit] = []
    group: list[InputFile] = []
    size = 0
    for place, path in enumerate(paths, start=1):
        group.append(path)
        size += path.stat().st_size
        if size >= shard_bytes or place == len(paths):
            units.append(Unit(len(units), tuple(group)))
            group, size = [], 0
    if len(units) >= 1 << _UNIT_BITS:
        raise CorpusError(f"the inputs are {len(units)} large files: join some, the most is {(1 << _UNIT_BITS) - 1}")
    return units


def cut_into_shards(unit: Unit, shard_bytes: int) -> Iterator[Shard]:
    """Yields the shards of a unit, each of about `shard_bytes` of records; without records there is one empty shard."""
    waiting: list[RecordBatch] = []
    size = number = 0
    for batch in itertools.chain.from_iterable(read_batches(path, batch_bytes=_BATCH_BYTES) for path in unit.paths):
        if size >= shard_bytes:
            yield Shard(unit.number, number, waiting, last=False)
            waiting, size, number = [], 0, number + 1
        waiting.append(batch)
        size += sum(map(_record_bytes, batch.records))
    yield Shard(unit.number, number, waiting, last=True)


def measure_shard(
    shard: Shard, *, folder: WorkFolder, options: MeasureOptions, html: bool, benchmarks: tuple[str, ...] = ()
) -> int:
    """Measures the documents of a shard and writes its two files; returns the bytes of input files it took up.

    The language model, where the work folder has one, scores them too.
    """
    pa, pq = _pyarrow(), _parquet()
    broken: list[BrokenRecord] = []
    measured: list[Measured] = []
    for batch in shard.batches:
        documents, bad = decode_batch(batch, html=html)
        broken += bad
        measured += measure_documents(documents, options)
    matches = _matches(measured, benchmarks)
    info = ShardInfo(
        file_bytes=shard.file_bytes,
        last=shard.last,
        broken_records=len(broken),
        broken_examples=[str(record) for record in broken[:10]],
        matches=[match for found in matches for match in found],
    )
    places = {name: place for place, name in enumerate([*RULES, CONTAMINATED])}
    failed = [
        sum(1 << places[name] for name in [*one.failed, *[CONTAMINATED][: len(found)]])
        for one, found in zip(measured, matches, strict=True)
    ]
    columns = {
        "position": pa.array(first_position(shard.unit, shard.number) + np.arange(len(measured))),
        "content_id": pa.array([content_id(one.text) for one in measured], pa.uint64()),
        "bytes_in": pa.array([one.original_bytes for one in measured], pa.int64()),
        "bytes_out": pa.array([len(one.text.encode("utf-8")) for one in measured], pa.int64()),
        "quality": pa.array([quality(one.scores) for one in measured], pa.int32()),
        "failed": pa.array(failed, pa.uint64()),
        **_band_columns(measured),
        **_model_columns(measured, folder),
    }
    texts = pa.table(
        {
            "id": pa.array([one.id for one in measured], pa.large_string()),
            "source": pa.array([one.source for one in measured], pa.large_string()),
            "text": pa.array(
                [snippet(one.text) if bits else one.text for one, bits in zip(measured, failed, strict=True)],
                pa.large_string(),
            ),
            "repaired": pa.array([one.repaired for one in measured], pa.bool_()),
            "masked": pa.array([list(one.masked.items()) for one in measured], pa.map_(pa.string(), pa.int32())),
            "scores": pa.array([list(one.scores.values()) for one in measured], pa.list_(pa.float32(), len(RULES))),
        }
    )
    name = shard_name(shard.unit, shard.number)
    path = folder.texts / f"{name}.arrow"
    temporary = temporary_name(path)
    with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, texts.schema) as writer:
        writer.write_table(texts.combine_chunks())
    temporary.replace(path)
    folder.keep(path)
    # The measurements last: the shard is done when they are there.
    path = folder.measured / f"{name}.parquet"
    temporary = temporary_name(path)
    table = pa.table(columns).replace_schema_metadata({"redwhale": msgspec.json.encode(info)})
    pq.write_table(table, temporary, compression="zstd")
    temporary.replace(path)
    folder.keep(path)
    return shard.file_bytes


def measure_unit(unit: Unit, *, folder: WorkFolder, measure: Callable[[Shard], int], shard_bytes: int) -> int:
    """Applies `measure` to the shards of a unit that are not measured yet; returns the bytes of its files."""
    for shard in missing_shards([unit], folder, shard_bytes):
        measure(shard)
    return unit.file_bytes


def missing_shards(
    units: Iterable[Unit], folder: WorkFolder, shard_bytes: int, skipped: Callable[[int], None] = lambda _: None
) -> Iterator[Shard]:
    """Yields the shards that are not measured yet; `skipped` is called with the bytes of input files of the others.

    Files all of whose shards are measured are not read again.
    """
    for unit in units:
        if folder.is_complete(unit.number):
            skipped(unit.file_bytes)
            continue
        done = set(folder.shards(unit.number))
        for shard in cut_into_shards(unit, shard_bytes):
            if shard_name(shard.unit, shard.number) in done:
                skipped(shard.file_bytes)
            else:
                yield shard


def scored_documents(folder: WorkFolder, name: str) -> list[ScoredDocument]:
    """Returns the documents of a measured shard, in order."""
    texts = folder.documents(name)
    measured = folder.measurements(name).select(["content_id", "bytes_in", "bytes_out", "failed"])
    columns = [texts.column(column).to_pylist() for column in ("id", "source", "text", "repaired", "masked", "scores")]
    return [
        ScoredDocument(
            id=identifier,
            source=source,
            text=text,
            bytes_in=bytes_in,
            bytes_out=bytes_out,
            content_id=content,
            scores=scores,
            failed=[place for place in range(failed.bit_length()) if failed >> place & 1],
            repaired=repaired,
            masked=dict(masked),
        )
        for identifier, source, text, repaired, masked, scores, content, bytes_in, bytes_out, failed in zip(
            *columns, *(column.to_pylist() for column in measured.columns), strict=True
        )
    ]


def quality(scores: dict[str, float]) -> int:
    """Returns what decides which of two near-duplicates stays, higher is better: prose less what is not, in hundredths.

    Ties go to the longer text.
    """
    prose = scores["grammar_ratio"] + scores["sentence_lines"]
    other = ("boilerplate_lines", "markup_ratio", "symbol_ratio", "duplicate_lines", "jamo_ratio")
    return round(100 * (prose - sum(scores[name] for name in other)))


def shard_name(unit: int, number: int) -> str:
    """Returns the name of a shard's files; names sort as shards do."""
    return f"{unit:07d}-{number:06d}"


def first_position(unit: int, number: int) -> int:
    """Returns the position of a shard's first document."""
    if number >= 1 << _SHARD_BITS:
        raise CorpusError("an input file is too large for its shards: raise shard_mb")
    return (unit << (_SHARD_BITS + _ROW_BITS)) | (number << _ROW_BITS)


def locate(position: int) -> tuple[str, int]:
    """Returns the name of the shard that holds a position, and the row in it."""
    shard, row = position >> _ROW_BITS, position & ((1 << _ROW_BITS) - 1)
    return shard_name(shard >> _SHARD_BITS, shard & ((1 << _SHARD_BITS) - 1)), row


def positions_of(name: str) -> tuple[int, int]:
    """Returns the first position of a shard, and the first beyond it."""
    first = first_position(int(name.partition("-")[0]), _number(name))
    return first, first + (1 << _ROW_BITS)


def temporary_name(path: Path) -> Path:
    """Returns a name to write a file under, before it is renamed, that no other process has.

    On a cluster a machine that is thought dead may still be writing what another has begun anew.
    """
    return path.with_name(f"{path.stem}-{socket.gethostname()}-{os.getpid()}.tmp")


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file under a temporary name and renames it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def _band_columns(measured: Sequence[Measured]) -> dict[str, Any]:
    """One uint64 column a band, null for documents that a rule drops: they are neither kept nor compared."""
    pa = _pyarrow()
    passed = [place for place, one in enumerate(measured) if not one.failed]
    keys = np.zeros((len(measured), BANDS), dtype=np.uint64)
    for start in range(0, len(passed), _SIGNED_DOCUMENTS):
        places = passed[start : start + _SIGNED_DOCUMENTS]
        keys[places] = band_keys(shingles([measured[place].text for place in places]))
    absent = np.ones(len(measured), dtype=bool)
    absent[passed] = False
    return {name: pa.array(keys[:, band], mask=absent) for band, name in enumerate(BAND_COLUMNS)}


def _matches(measured: Sequence[Measured], benchmarks: tuple[str, ...]) -> list[list[Match]]:
    """The probes of benchmarks in each document."""
    if not benchmarks:
        return [[] for _ in measured]
    loaded = load_benchmarks(benchmarks)
    found = []
    for start in range(0, len(measured), _SIGNED_DOCUMENTS):
        found += loaded.find([one.text for one in measured[start : start + _SIGNED_DOCUMENTS]])
    return [
        [
            Match(one.id, loaded.probes[probe].benchmark, loaded.probes[probe].record, share, loaded.probes[probe].text)
            for probe, share in probes
        ]
        for one, probes in zip(measured, found, strict=True)
    ]


def _model_columns(measured: Sequence[Measured], folder: WorkFolder) -> dict[str, Any]:
    """The scores of the language model, null for documents that a rule drops."""
    path = folder.find(folder.language_model.name)
    if path is None:
        return {}
    model = load_model(path)
    passed = [place for place, one in enumerate(measured) if not one.failed]
    scores = np.zeros((len(measured), model.columns))
    if passed:
        scores[passed] = model.score([measured[place].text for place in passed])
    absent = np.ones(len(measured), dtype=bool)
    absent[passed] = False
    pa = _pyarrow()
    return {f"model_{column}": pa.array(scores[:, column], mask=absent) for column in range(model.columns)}


def _number(name: str) -> int:
    return int(name.partition("-")[2])


def _record_bytes(record: Any) -> int:
    """Size of a JSON line or text file, of the text of a parquet row, or of the body of a page."""
    return len(record if isinstance(record, bytes) else record[0] or "")


def _pyarrow() -> Any:
    try:
        import pyarrow as pa
    except ImportError as error:
        raise CorpusError('filtering needs pyarrow: pip install "redwhale[filtering]"') from error
    return pa


def _parquet() -> Any:
    _pyarrow()
    import pyarrow.parquet as pq

    return pq
