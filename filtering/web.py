"""Web pages: responses out of WARC files, and the main text out of HTML (FastWARC and Resiliparse)."""

from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from .compression import damaged
from .encodings import decode_strictly
from .errors import CorpusError
from .storage import InputFile

_NEEDS = 'reading {} needs {}: pip install "redwhale[web]"'
_HTML_TYPES = ("text/html", "application/xhtml+xml", None)


class WebPage(NamedTuple):
    """The body of one response; `refused` says why it is no page, and then the body is empty."""

    body: bytes
    url: str
    charset: str | None
    refused: str | None


def read_responses(stream: BinaryIO, path: InputFile) -> Iterator[WebPage]:
    """Yields the HTTP responses of a decompressed WARC stream, in order; other records are no documents.

    Raises CorpusError when fastwarc is not installed or the file is damaged or ends early.
    """
    try:
        from fastwarc.warc import ArchiveIterator, WarcRecordType
    except ImportError as error:
        raise CorpusError(_NEEDS.format("WARC files", "fastwarc")) from error
    try:
        for record in ArchiveIterator(_Forward(stream), record_types=WarcRecordType.response):  # pyright: ignore
            yield _page(record, path)
    except OSError as error:
        # FastWARC reports what it cannot parse as an OSError without a number.
        if error.errno is None:
            raise damaged(path, error) from error
        raise


class _Forward:
    """A stream that is only read on; FastWARC asks for positions by seeking nowhere, which zstd streams refuse."""

    def __init__(self, stream: BinaryIO):
        self._stream = stream
        self._position = 0

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        target = offset + (self._position if whence == 1 else 0)
        if whence == 2 or target < self._position:
            raise ValueError("the stream is read on only")
        self.read(target - self._position)
        return self._position

    def tell(self) -> int:
        return self._position


def _page(record: Any, path: InputFile) -> WebPage:
    url = record.headers.get("WARC-Target-URI") or record.record_id
    expected = record.content_length
    body = record.reader.read()
    if len(body) < expected:
        raise damaged(path, EOFError("it ends inside a record"))
    if record.http_headers is None:
        return WebPage(b"", url, None, "the response has no HTTP headers")
    if not 200 <= (record.http_headers.status_code or 0) < 300:
        return WebPage(b"", url, None, f"the response has status {record.http_headers.status_code}")
    if record.http_content_type not in _HTML_TYPES:
        return WebPage(b"", url, None, f"the response is {record.http_content_type}, not HTML")
    return WebPage(body, url, record.http_charset, None)


def decode_page(data: bytes, charset: str | None = None) -> str:
    """Decodes HTML by `decode_strictly`, else as the page declares, with U+FFFD for what is broken.

    Declared encodings are the last resort, since Korean pages often declare another than they have.
    """
    text = decode_strictly(data)
    if text is not None:
        return text
    declared = (charset or _declared(data) or "utf-8").lower().replace("_", "-")
    # EUC-KR pages use the characters that only its superset CP949 has.
    if declared in ("euc-kr", "ks-c-5601-1987", "ksc5601", "x-windows-949", "ms949"):
        declared = "cp949"
    try:
        return data.decode(declared, "replace")
    except LookupError:
        return data.decode("utf-8", "replace")


def extract_text(html: str) -> str:
    """Returns the main text of an HTML page, without navigation, headers, footers and scripts.

    Raises CorpusError when resiliparse is not installed.
    """
    try:
        from resiliparse.extract.html2text import extract_plain_text
    except ImportError as error:
        raise CorpusError(_NEEDS.format("HTML", "resiliparse")) from error
    return extract_plain_text(html, main_content=True, alt_texts=False)


def _declared(data: bytes) -> str | None:
    """The charset in the first kilobyte's `<meta>`, as browsers look for it."""
    head = data[:1024].lower()
    place = head.find(b"charset=")
    if place < 0:
        return None
    value = head[place + 8 : place + 48].lstrip(b"\"' ")
    name = bytes(byte for byte in value.split(b">")[0].split(b'"')[0].split(b"'")[0].split(b";")[0] if byte > 32)
    return name.decode("ascii", "ignore") or None
