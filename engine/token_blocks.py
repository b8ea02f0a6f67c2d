"""Documents to blocks of token ids, in worker processes; nothing here waits for torch."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from ..filtering import InputFile
from ..filtering.documents import RecordBatch, decode_batch, read_batches
from ..tokenizer import Tokenizer
from ..tokenizer.chunked_encoder import ChunkedEncoder

BATCH_BYTES = 1 << 20
"""Of the records that become a block."""


@dataclass(frozen=True, slots=True)
class ShardFiles:
    """The files that a shard is made of."""

    shard: Path
    """Its path without suffix."""
    files: tuple[InputFile, ...]

    def records(self) -> Iterator[Records]:
        """Its documents in order; a shard without any has one empty block."""
        yield Records(self.shard, [])
        for path in self.files:
            for batch in read_batches(path, batch_bytes=BATCH_BYTES):
                yield Records(self.shard, batch)


@dataclass(frozen=True, slots=True)
class Records:
    """Consecutive documents on their way to a shard."""

    shard: Path
    """Its path without suffix."""
    content: RecordBatch | list[str]
    """Undecoded records of a file, or texts."""


@dataclass(frozen=True, slots=True)
class TokenBlock:
    """Consecutive documents of a shard, tokenised."""

    shard: Path
    """Its path without suffix."""
    tokens: np.ndarray
    """[tokens] uint16 or uint32, of all documents, each BOS, its tokens, EOS."""
    lengths: np.ndarray
    """[documents] int64, tokens of each."""
    text_bytes: int
    """UTF-8 bytes of the documents' text."""
    file_bytes: int
    """Of the input file, read for this block."""


def tokenize_records(records: Records, *, tokenizer: Path) -> TokenBlock:
    """Tokenise documents with the `tokenizer.model` at a path, which this process keeps.

    Unpaired surrogates, which crawlers write, become U+FFFD.

    Raises:
        TokenizerError: if there is no tokenizer at that path.
    """
    return _tokenized(records, encoder_of(tokenizer))


def tokenize_files(shard: ShardFiles, *, model: bytes) -> Iterator[TokenBlock]:
    """Read and tokenise the files of a shard, on a machine that need not see the tokenizer's file.

    Args:
        shard: the files; they must be there for this machine.
        model: contents of `tokenizer.model`.

    Raises:
        CorpusError: for a file that is missing or damaged.
    """
    encoder = _encoder_of_model(model)
    for records in shard.records():
        yield _tokenized(records, encoder)


@lru_cache(maxsize=1)
def encoder_of(path: Path) -> ChunkedEncoder:
    """The encoder of the tokenizer at a path, made once in a process."""
    return ChunkedEncoder(Tokenizer(path))


@lru_cache(maxsize=1)
def _encoder_of_model(model: bytes) -> ChunkedEncoder:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.model"
        path.write_bytes(model)
        return ChunkedEncoder(Tokenizer(path))


def _tokenized(records: Records, encoder: ChunkedEncoder) -> TokenBlock:
    content = records.content
    if isinstance(content, list):
        texts, file_bytes = content, 0
    else:
        texts, file_bytes = [document.text for document in decode_batch(content)[0]], content.file_bytes
    return TokenBlock(records.shard, *_tokenize(texts, encoder), file_bytes)


def _tokenize(texts: Iterable[str], encoder: ChunkedEncoder) -> tuple[np.ndarray, np.ndarray, int]:
    """Tokens, lengths and text bytes of a block."""
    tokenizer = encoder.tokenizer
    begin, end = (np.array([token], encoder.dtype).tobytes() for token in (tokenizer.bos_id, tokenizer.eos_id))
    parts, lengths, text_bytes = [], [], 0
    for text in texts:
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
            size = len(text.encode())
        ids = encoder.encode_bytes(text)
        parts += (begin, ids, end)
        lengths.append(len(ids) // encoder.dtype.itemsize + 2)
        text_bytes += size
    return np.frombuffer(b"".join(parts), encoder.dtype), np.array(lengths, dtype=np.int64), text_bytes
