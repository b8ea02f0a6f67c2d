"""Byte streams over plain, gzip and zstd files that notice a truncated file, which `zstandard` itself does not."""

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from .errors import CorpusError
from .storage import InputFile, network_errors, unreadable

_CHUNK_BYTES = 1 << 17


@contextlib.contextmanager
def open_decompressed(path: InputFile) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Opens a file as (decompressed stream, file), the second of which tells how far the first has read.

    Raises CorpusError, also from reads inside the `with` block, when the file is missing, unreadable or damaged.
    """
    try:
        with path.open("rb") as file:
            if path.name.lower().endswith(".gz"):
                yield gzip.GzipFile(fileobj=file), file  # pyright: ignore[reportReturnType]
            elif path.name.lower().endswith(".zst"):
                yield io.BufferedReader(_ZstdReader(file), _CHUNK_BYTES), file
            else:
                yield file, file
    except (EOFError, zlib.error, gzip.BadGzipFile, _DamagedStream) as error:
        raise damaged(path, error) from error
    except (OSError, *network_errors()) as error:
        raise unreadable(path, error) from error


def damaged(path: InputFile, error: Exception) -> CorpusError:
    """Returns the error for a file whose container does not decode."""
    reason = str(error).strip().rstrip(".") or type(error).__name__
    return CorpusError(f"{str(path)!r} is damaged ({reason}): fetch it again, or take it out of the inputs")


class _DamagedStream(Exception):
    pass


class _ZstdReader(io.RawIOBase):
    """Decompresses any number of concatenated zstd frames."""

    def __init__(self, file: BinaryIO):
        try:
            import zstandard
        except ImportError as error:
            raise CorpusError('reading .zst files needs zstandard: pip install "redwhale[filtering]"') from error
        self._file = file
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._error = zstandard.ZstdError
        self._frame: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = b""
            if self._frame is not None and self._frame.eof:
                data = self._frame.unused_data
                self._frame = None
            data = data or self._file.read(_CHUNK_BYTES)
            if not data:
                if self._frame is not None:
                    raise _DamagedStream("the compressed stream ends early")
                return 0
            if self._frame is None:
                self._frame = self._new_frame()
            try:
                self._ready = memoryview(self._frame.decompress(data))
            except self._error as error:
                raise _DamagedStream(str(error)) from error
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size
