"""Finding input files and reading documents out of them: JSON lines, parquet, plain text, HTML and WARC."""

import contextlib
import glob
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from .compression import damaged, open_decompressed
from .encodings import decode_strictly
from .errors import CorpusError
from .storage import InputFile, RemoteFile, find_remote, is_url, network_errors, unreadable
from .web import WebPage, decode_page, extract_text, read_responses

SUFFIXES = (
    *(".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt", ".txt.gz", ".txt.zst"),
    *(".html", ".htm", ".warc", ".warc.gz", ".warc.zst"),
)

_PARQUET_ROWS_PER_BATCH = 512


@dataclass(slots=True)
class Document:
    """One text with its id and the name of the source it came from."""

    id: str
    text: str
    source: str


@dataclass(slots=True)
class BrokenRecord:
    """A record that holds no readable document; `record` counts lines, rows (parquet) or responses (WARC) from 1."""

    path: InputFile
    record: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.record}: {self.reason}"


@dataclass(slots=True)
class RecordBatch:
    """Consecutive undecoded records of one file, cheap to send to another process.

    `records` holds bytes (a JSON line, or the whole of a text or HTML file), rows (text, id, source) of parquet, or the
    pages of a WARC file;
    `first_record` is the number of the first; `file_bytes` is how much of the file was consumed since the batch before.
    """

    path: InputFile
    first_record: int
    records: list[Any]
    file_bytes: int


class _JsonRecord(msgspec.Struct):
    text: str
    id: Any = None
    source: Any = None


_decode_json = msgspec.json.Decoder(_JsonRecord).decode


def suffix_of(path: InputFile) -> str | None:
    """Returns which of `SUFFIXES` the file name ends in, or None."""
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def find_inputs(patterns: Sequence[str | Path]) -> list[InputFile]:
    """Returns the files behind names, folders (recursive), globs and addresses, each file once, in a stable order.

    An address, such as s3://bucket/corpus/*.jsonl.zst, is a file, a folder or a glob of an object store. Folders and
    globs give only files that end in one of `SUFFIXES`, sorted; hidden files are left out.
    Raises CorpusError for a pattern that gives no file, and for a named file of an unknown kind.
    """
    if isinstance(patterns, (str, Path)):
        patterns = [patterns]
    if not patterns:
        raise CorpusError("no inputs are given: name at least one file, folder or glob")
    known = ", ".join(SUFFIXES)
    found: dict[InputFile, InputFile] = {}
    for pattern in patterns:
        if isinstance(pattern, str) and is_url(pattern):
            found |= {file: file for file in _remote_files(pattern) if file not in found}
            continue
        path = Path(pattern).expanduser()
        if path.is_file():
            if suffix_of(path) is None:
                raise CorpusError(f"cannot read input {str(path)!r}: its name must end in one of {known}")
            files = [path]
        elif path.is_dir():
            files = _files_below(path)
            if not files:
                raise CorpusError(f"input folder {str(path)!r} holds no file that ends in one of {known}")
        else:
            matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
            files = [file for match in matches for file in (_files_below(match) if match.is_dir() else [match])]
            files = [file for file in files if suffix_of(file) is not None]
            if matches and not files:
                raise CorpusError(f"input {str(path)!r} matches no file that ends in one of {known}")
            if not files:
                raise CorpusError(f"input {str(path)!r} does not exist: give a file, a folder or a glob that matches")
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def read_documents(
    path: InputFile, *, html: bool = False, on_broken: Callable[[BrokenRecord], None] | None = None
) -> Iterator[Document]:
    """Yields the documents of one .jsonl, .parquet, .txt, .html (one document) or .warc file as a stream.

    All but parquet and HTML may be compressed (.gz, .zst). Bytes are decoded by `decode_strictly`. A record
    without an id gets `FILE NAME:RECORD NUMBER`, a page its address, and one without a source the file name without its
    suffix. Of pages the main text is taken, and where `html` is true also of the texts of the other formats. Every
    record that holds no text goes to `on_broken`.
    Raises CorpusError when the file is missing or damaged, or a package that reads it is not installed.
    """
    for batch in read_batches(path):
        documents, broken = decode_batch(batch, html=html)
        if on_broken is not None:
            for record in broken:
                on_broken(record)
        yield from documents


def read_batches(path: InputFile, *, batch_bytes: int = 1 << 20) -> Iterator[RecordBatch]:
    """Yields the file's records in batches of about `batch_bytes`, whose `file_bytes` sum to the file's size.

    Raises CorpusError as `read_documents` does.
    """
    path = Path(path) if isinstance(path, str) else path
    suffix = suffix_of(path)
    if suffix is None:
        raise CorpusError(f"cannot read {str(path)!r}: its name must end in one of {', '.join(SUFFIXES)}")
    if suffix == ".parquet":
        yield from _parquet_batches(path)
        return
    whole_file = suffix.startswith((".txt", ".htm"))
    consumed = 0
    first_record = 1
    with open_decompressed(path) as (stream, file):
        if suffix.startswith(".warc"):
            yield from _warc_batches(path, stream, file, batch_bytes)
            return
        if whole_file:
            yield RecordBatch(path, 1, [stream.read()], file.tell())
            return
        while records := stream.readlines(batch_bytes):
            position = file.tell()
            yield RecordBatch(path, first_record, records, position - consumed)
            first_record += len(records)
            consumed = position
        # What follows the last line: the end mark of a compressed stream.
        if file.tell() > consumed:
            yield RecordBatch(path, first_record, [], file.tell() - consumed)


def decode_batch(batch: RecordBatch, *, html: bool = False) -> tuple[list[Document], list[BrokenRecord]]:
    """Returns the documents of a batch and its broken records; a blank line is neither.

    With `html` the texts of JSON lines, parquet and text files are taken for HTML too.
    """
    suffix = suffix_of(batch.path) or ""
    stem = batch.path.name[: len(batch.path.name) - len(suffix)]
    documents: list[Document] = []
    broken: list[BrokenRecord] = []
    for number, record in enumerate(batch.records, start=batch.first_record):
        try:
            if suffix == ".parquet":
                text, identifier, source = record
                text = _decoded(text) if isinstance(text, bytes) else text
            elif suffix.startswith(".jsonl"):
                if not record.strip():
                    continue
                text, identifier, source = _parse_json(record)
            elif suffix.startswith(".warc"):
                text, identifier, source = _page_text(record), record.url, None
            elif suffix.startswith(".htm"):
                text, identifier, source = extract_text(decode_page(record)), None, None
            else:
                text, identifier, source = _decoded(record), None, None
            if html and text and not suffix.startswith((".warc", ".htm")):
                text = extract_text(text)
            if not text or text.isspace():
                raise _Unreadable("the text is empty")
        except _Unreadable as error:
            broken.append(BrokenRecord(batch.path, number, str(error)))
            continue
        documents.append(
            Document(
                id=f"{batch.path.name}:{number}" if identifier is None else str(identifier),
                text=text,
                source=stem if source is None else str(source),
            )
        )
    return documents, broken


class _Unreadable(Exception):
    pass


def _decoded(data: bytes) -> str:
    text = decode_strictly(data)
    if text is None:
        raise _Unreadable("the bytes are neither UTF-8 nor CP949")
    return text


def _parse_json(line: bytes) -> tuple[str, Any, Any]:
    text = _decoded(line)
    try:
        record = _decode_json(text)
    except msgspec.ValidationError as error:
        raise _Unreadable(f"no usable text: {error}") from error
    except msgspec.DecodeError as error:
        # msgspec refuses unpaired surrogates, which crawlers write and normalisation replaces.
        record = _parse_surrogates(text) if "\\ud" in text.lower() else None
        if record is None:
            raise _Unreadable(f"bad JSON: {error}") from error
    except RecursionError as error:
        raise _Unreadable("bad JSON: it is nested too deeply") from error
    return record.text, record.id, record.source


def _parse_surrogates(text: str) -> _JsonRecord | None:
    try:
        return msgspec.convert(json.loads(text), _JsonRecord)
    except (ValueError, RecursionError):
        return None


def _page_text(page: WebPage) -> str:
    if page.refused is not None:
        raise _Unreadable(page.refused)
    return extract_text(decode_page(page.body, page.charset))


def _remote_files(pattern: str) -> list[RemoteFile]:
    files = find_remote(pattern)
    if not files:
        raise CorpusError(f"input {pattern!r} does not exist: give a file, a folder or a glob that matches")
    known = [file for file in files if suffix_of(file) is not None]
    if not known:
        raise CorpusError(f"input {pattern!r} holds no file that ends in one of {', '.join(SUFFIXES)}")
    return known


def _files_below(folder: Path) -> list[Path]:
    files = (path for path in folder.rglob("*") if suffix_of(path) is not None and path.is_file())
    visible = (path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts))
    return sorted(visible)


def _warc_batches(path: InputFile, stream: BinaryIO, file: BinaryIO, batch_bytes: int) -> Iterator[RecordBatch]:
    pages: list[WebPage] = []
    consumed = size = 0
    first_record = 1
    for page in read_responses(stream, path):
        pages.append(page)
        size += len(page.body)
        if size >= batch_bytes:
            position = file.tell()
            yield RecordBatch(path, first_record, list(pages), position - consumed)
            first_record += len(pages)
            consumed, size, pages = position, 0, []
    if pages or file.tell() > consumed:
        yield RecordBatch(path, first_record, list(pages), file.tell() - consumed)


def _parquet_batches(path: InputFile) -> Iterator[RecordBatch]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise CorpusError('reading parquet needs pyarrow: pip install "redwhale[filtering]"') from error
    if isinstance(path, Path) and not path.is_file():
        raise CorpusError(f"cannot read {str(path)!r}: no such file")
    file_bytes = path.stat().st_size
    consumed = 0
    rows_done = 0
    try:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(
                pq.ParquetFile(path if isinstance(path, Path) else stack.enter_context(path.open()))
            )
            names = file.schema_arrow.names
            if "text" not in names:
                raise CorpusError(f"{str(path)!r} has no column 'text': its columns are {', '.join(names)}")
            columns = [name for name in ("text", "id", "source") if name in names]
            for rows in file.iter_batches(_PARQUET_ROWS_PER_BATCH, columns=columns):
                values = {name: rows.column(name).to_pylist() for name in columns}
                empty = [None] * rows.num_rows
                records = list(zip(values["text"], values.get("id", empty), values.get("source", empty), strict=True))
                rows_done += rows.num_rows
                position = file_bytes * rows_done // file.metadata.num_rows
                yield RecordBatch(path, rows_done - rows.num_rows + 1, records, position - consumed)
                consumed = position
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise damaged(path, error) from error
    except (OSError, *network_errors()) as error:
        raise (damaged if isinstance(path, Path) else unreadable)(path, error) from error
    if consumed < file_bytes:
        yield RecordBatch(path, 1, [], file_bytes - consumed)
