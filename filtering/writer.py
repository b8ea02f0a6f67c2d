"""Writes kept documents as numbered parquet files, each complete under its name or not there at all."""

import contextlib
import re
from pathlib import Path
from types import TracebackType
from typing import Any

from .errors import CorpusError
from .rules import RULES
from .summary import ScoredDocument

# Row groups end where the documents say so, never where a batch ends: files depend on the kept documents alone.
_ROW_GROUP_DOCUMENTS = 8192
_ROW_GROUP_BYTES = 32 << 20
_OUTPUT_NAME = re.compile(r"(train|validation)-\d{5,}\.parquet(\.tmp)?|(summary\.json|report\.html)(\.tmp)?")


def remove_old_outputs(output_dir: Path) -> None:
    """Deletes what an earlier run wrote into the folder, so that files of two runs never mix."""
    for path in output_dir.iterdir():
        if _OUTPUT_NAME.fullmatch(path.name):
            path.unlink()


class SplitWriter:
    """Writes `SPLIT-00000.parquet`, `SPLIT-00001.parquet`, ... (zstd), `documents_per_file` documents each.

    Columns: id, text, source (string), bytes (int64, UTF-8 bytes of the text), and one float32 for each rule's score.
    On an exception inside the `with` block the unfinished file is removed.
    Raises CorpusError when pyarrow is not installed.
    """

    def __init__(self, output_dir: Path, split: str, documents_per_file: int):
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as error:
            raise CorpusError('writing parquet needs pyarrow: pip install "redwhale[filtering]"') from error
        self._pa, self._pq = pa, pq
        columns = [("id", pa.string()), ("text", pa.string()), ("source", pa.string()), ("bytes", pa.int64())]
        self._schema = pa.schema(columns + [(name, pa.float32()) for name in RULES])
        self._output_dir = output_dir
        self._split = split
        self._documents_per_file = documents_per_file
        self._files = 0
        self._in_file = 0
        self._rows: list[ScoredDocument] = []
        self._row_bytes = 0
        self._writer: Any = None

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish_file()
        elif self._writer is not None:
            # On a full disk the close fails too, and must not hide the first error.
            with contextlib.suppress(OSError):
                self._writer.close()
            self._temporary().unlink(missing_ok=True)

    def write(self, document: ScoredDocument) -> None:
        """Adds a document, and writes a row group or ends a file when it is full."""
        self._rows.append(document)
        self._row_bytes += document.bytes_out
        self._in_file += 1
        if self._in_file >= self._documents_per_file:
            self._finish_file()
        elif len(self._rows) >= _ROW_GROUP_DOCUMENTS or self._row_bytes >= _ROW_GROUP_BYTES:
            self._write_rows()

    def _path(self) -> Path:
        return self._output_dir / f"{self._split}-{self._files:05d}.parquet"

    def _temporary(self) -> Path:
        return self._path().with_name(self._path().name + ".tmp")

    def _write_rows(self) -> None:
        if not self._rows:
            return
        rows = self._rows
        columns: list[list[Any]] = [
            [row.id for row in rows],
            [row.text for row in rows],
            [row.source for row in rows],
            [row.bytes_out for row in rows],
            *([row.scores[rule] for row in rows] for rule in range(len(RULES))),
        ]
        arrays = [self._pa.array(column, field.type) for column, field in zip(columns, self._schema, strict=True)]
        if self._writer is None:
            self._writer = self._pq.ParquetWriter(self._temporary(), self._schema, compression="zstd")
        self._writer.write_batch(self._pa.record_batch(arrays, schema=self._schema), row_group_size=len(rows))
        self._rows = []
        self._row_bytes = 0

    def _finish_file(self) -> None:
        self._write_rows()
        if self._writer is None:
            return
        self._writer.close()
        self._writer = None
        self._temporary().replace(self._path())
        self._files += 1
        self._in_file = 0
