"""Token shards: memory-mapped tokenised documents. The format is specified in docs/token-shards.md.

A shard is three files: `NAME.bin` with all tokens back to back (uint16, or uint32 where the vocabulary
needs it), `NAME.idx` with the offset of every document (int64), and `NAME.json`, written last, with
counts, checksums and the hash of the tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np

from .errors import ShardError

FORMAT_VERSION = 1
_SUFFIXES = (".bin", ".idx", ".json")
_TOKENS_AT_ONCE = 1 << 24


class ShardManifest(msgspec.Struct, frozen=True, kw_only=True):
    """Contents of `NAME.json`."""

    version: int = FORMAT_VERSION
    dtype: str
    vocab_size: int
    tokens: int
    documents: int
    text_bytes: int
    """UTF-8 bytes of the text behind the tokens: the denominator of bits per byte."""
    tokenizer_sha256: str
    bin_sha256: str
    idx_sha256: str


class ShardWriter:
    """Writes one shard; its three files appear under their names only when it is complete. A context manager.

    Args:
        prefix: path without suffix; `prefix.bin`, `prefix.idx` and `prefix.json` are written when the context ends
            without an exception.
        vocab_size: decides between uint16 and uint32.
        tokenizer_sha256: of the tokenizer that made the ids.
    """

    def __init__(self, prefix: Path, *, vocab_size: int, tokenizer_sha256: str) -> None:
        self.dtype = token_dtype(vocab_size)
        self.manifest: ShardManifest | None = None
        """Of the shard, once it is complete."""
        self._vocab_size, self._tokenizer_sha256 = vocab_size, tokenizer_sha256
        self._bin_path, self._idx_path, self._json_path = (
            Path(prefix).with_name(Path(prefix).name + suffix) for suffix in _SUFFIXES
        )
        self._lengths: list[np.ndarray] = []
        self._documents = self._tokens = self._text_bytes = 0
        self._bin_hash = hashlib.sha256()
        self._file = open(_writing(self._bin_path), "wb")  # noqa: SIM115 - closed by __exit__

    def add(self, tokens: np.ndarray, lengths: Sequence[int] | np.ndarray, text_bytes: int) -> None:
        """Append documents.

        Args:
            tokens: [tokens] integers in [0, vocab_size), of all the documents, back to back.
            lengths: [documents] tokens of each; they add up to the number of tokens.
            text_bytes: UTF-8 bytes of the documents' text.

        Raises:
            ShardError: for a token outside the vocabulary.
        """
        lengths = np.asarray(lengths, dtype=np.int64)
        if tokens.size and not (tokens.min() >= 0 and tokens.max() < self._vocab_size):
            position = int(np.argmax((tokens < 0) | (tokens >= self._vocab_size)))
            document = self._documents + int(np.searchsorted(np.cumsum(lengths), position, side="right"))
            raise ShardError(f"document {document} holds a token outside the vocabulary of {self._vocab_size}")
        data = np.ascontiguousarray(tokens, dtype=self.dtype).data
        self._file.write(data)
        self._bin_hash.update(data)
        self._lengths.append(lengths)
        self._documents += len(lengths)
        self._tokens += len(tokens)
        self._text_bytes += text_bytes

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        with self._file:
            if kind is not None:
                return
            _sync(self._file)
        index = np.cumsum(np.concatenate([np.zeros(1, np.int64), *self._lengths]), dtype="<i8").tobytes()
        manifest = ShardManifest(
            dtype=self.dtype.name,
            vocab_size=self._vocab_size,
            tokens=self._tokens,
            documents=self._documents,
            text_bytes=self._text_bytes,
            tokenizer_sha256=self._tokenizer_sha256,
            bin_sha256=self._bin_hash.hexdigest(),
            idx_sha256=hashlib.sha256(index).hexdigest(),
        )
        described = msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"
        for path, data in ((self._idx_path, index), (self._json_path, described)):
            with open(_writing(path), "wb") as file:
                file.write(data)
                _sync(file)
        for path in (self._bin_path, self._idx_path, self._json_path):
            _writing(path).rename(path)
        _sync_folder(self._bin_path.parent)
        self.manifest = manifest


def write_shard(
    prefix: Path,
    documents: Iterable[tuple[Sequence[int], int]],
    *,
    vocab_size: int,
    tokenizer_sha256: str,
) -> ShardManifest:
    """Write one shard; its three files appear under their names only when complete.

    Args:
        prefix: path without suffix; `prefix.bin`, `prefix.idx` and `prefix.json` are written.
        documents: for each document, its token ids in [0, vocab_size) and the UTF-8 bytes of its text.
        vocab_size: decides between uint16 and uint32.
        tokenizer_sha256: of the tokenizer that made the ids.

    Raises:
        ShardError: for a token outside the vocabulary.
    """
    writer = ShardWriter(prefix, vocab_size=vocab_size, tokenizer_sha256=tokenizer_sha256)
    with writer:
        for ids, size in documents:
            writer.add(np.asarray(ids, dtype=np.int64), [len(ids)], size)
    assert writer.manifest is not None
    return writer.manifest


def token_dtype(vocab_size: int) -> np.dtype:
    """The little-endian dtype of a shard's tokens: uint16, or uint32 where the vocabulary needs it."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def _writing(path: Path) -> Path:
    return path.with_name(path.name + ".writing")


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make renames in a folder last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class TokenShards:
    """One or more shards read as a single stream of tokens, without loading them.

    Args:
        prefixes: shard paths without suffix, in stream order.
        tokenizer_sha256: if given, every shard must have been made by this tokenizer.
        verify: also call `verify`.

    Raises:
        ShardError: for a shard that is missing, truncated, damaged, or of another tokenizer.
    """

    def __init__(self, prefixes: Sequence[Path], *, tokenizer_sha256: str | None = None, verify: bool = False) -> None:
        if not prefixes:
            raise ShardError("no token shards were given")
        self.prefixes = [Path(prefix) for prefix in prefixes]
        self.manifests = [_read_manifest(prefix) for prefix in self.prefixes]
        # Mapped, like the tokens: ranks of one machine share the memory, however many documents there are.
        self._tokens: list[np.ndarray] = []
        self._offsets: list[np.ndarray] = []
        self._has_empty: list[bool] = []
        self._starts = [0]
        for prefix, manifest in zip(self.prefixes, self.manifests, strict=True):
            if tokenizer_sha256 is not None and manifest.tokenizer_sha256 != tokenizer_sha256:
                raise ShardError(
                    f"{prefix}.bin was made with another tokenizer (sha256 {manifest.tokenizer_sha256[:12]}…, "
                    f"this one is {tokenizer_sha256[:12]}…): pack the corpus again"
                )
            self._tokens.append(_map(prefix, ".bin", manifest.dtype, manifest.tokens))
            offsets = _map(prefix, ".idx", "<i8", manifest.documents + 1)
            lengths = np.diff(offsets)
            if offsets[0] != 0 or offsets[-1] != manifest.tokens or (lengths < 0).any():
                raise ShardError(
                    f"{prefix}.idx does not count from 0 up to the {manifest.tokens} tokens of its manifest: "
                    "it is damaged, pack the corpus again"
                )
            self._offsets.append(offsets[1:])
            self._has_empty.append(bool((lengths == 0).any()))
            self._starts.append(self._starts[-1] + manifest.tokens)
        if verify:
            self.verify()

    @classmethod
    def open(cls, folder: Path, split: str, **options) -> TokenShards:
        """All shards `folder/SPLIT-NUMBER.json`, in name order; options as for the class."""
        is_shard = re.compile(re.escape(split) + r"-\d+\.json").fullmatch
        folder = Path(folder)
        prefixes = sorted(path.with_suffix("") for path in folder.glob("*.json") if is_shard(path.name))
        if not prefixes:
            raise ShardError(f"{folder} holds no token shard named {split}-*.json")
        return cls(prefixes, **options)

    @property
    def tokens(self) -> int:
        """Tokens of all shards."""
        return self._starts[-1]

    @property
    def documents(self) -> int:
        """Documents of all shards."""
        return sum(manifest.documents for manifest in self.manifests)

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the text behind all tokens."""
        return sum(manifest.text_bytes for manifest in self.manifests)

    def read(self, start: int, end: int) -> np.ndarray:
        """Tokens [start, end) of the stream as int64."""
        first = bisect_right(self._starts, start) - 1
        parts = []
        while start < end:
            base = self._starts[first]
            stop = min(end, self._starts[first + 1])
            parts.append(self._tokens[first][start - base : stop - base])
            start, first = stop, first + 1
        if len(parts) == 1:
            return parts[0].astype(np.int64)
        return np.concatenate(parts, dtype=np.int64) if parts else np.empty(0, dtype=np.int64)

    def document_ends(self, start: int, end: int) -> np.ndarray:
        """Offsets in (start, end] at which a document ends, each once, ascending, int64."""
        parts = [
            np.unique(found + base) if has_empty else found + base for base, found, has_empty in self._found(start, end)
        ]
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def count_document_ends(self, start: int, end: int) -> int:
        """Number of the offsets in (start, end] at which a document ends."""
        return sum(
            len(np.unique(found)) if has_empty else len(found) for _, found, has_empty in self._found(start, end)
        )

    def _found(self, start: int, end: int) -> Iterator[tuple[int, np.ndarray, bool]]:
        """By shard: its first token's offset, offsets from there in (start, end] at which documents end, and whether
        some may stand there twice."""
        first = min(bisect_right(self._starts, start), len(self._offsets)) - 1
        for shard in range(first, len(self._offsets)):
            base, offsets = self._starts[shard], self._offsets[shard]
            # An empty document at the beginning of a shard ends where the shard before did.
            low, high = offsets.searchsorted((max(start - base, 0), end - base), side="right")
            yield base, offsets[low:high], self._has_empty[shard]
            if self._starts[shard + 1] >= end:
                break

    def verify(self) -> None:
        """Read every byte: compare the checksums, and look for tokens outside the vocabulary.

        Raises:
            ShardError: naming the file that is damaged.
        """
        for prefix, manifest, tokens in zip(self.prefixes, self.manifests, self._tokens, strict=True):
            _verify(prefix, ".bin", manifest.bin_sha256)
            _verify(prefix, ".idx", manifest.idx_sha256)
            for begin in range(0, len(tokens), _TOKENS_AT_ONCE):
                if (highest := int(tokens[begin : begin + _TOKENS_AT_ONCE].max())) >= manifest.vocab_size:
                    raise ShardError(
                        f"{prefix}.bin holds token {highest}, outside the vocabulary of {manifest.vocab_size} that its "
                        "manifest names: pack the corpus again"
                    )


def _read_manifest(prefix: Path) -> ShardManifest:
    path = prefix.with_name(prefix.name + ".json")
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=ShardManifest)
    except FileNotFoundError:
        raise ShardError(f"{path} is missing: the shard was not written to its end, pack the corpus again") from None
    except (msgspec.MsgspecError, json.JSONDecodeError) as error:
        raise ShardError(f"{path} is not a shard manifest: {error}") from None
    if manifest.dtype != token_dtype(manifest.vocab_size).name:
        raise ShardError(
            f"{path} says dtype {manifest.dtype!r}, which is not that of {manifest.vocab_size} pieces: it is damaged, "
            "pack the corpus again"
        )
    if manifest.version != FORMAT_VERSION:
        raise ShardError(f"{path} has format version {manifest.version}, this program reads {FORMAT_VERSION}")
    return manifest


def _map(prefix: Path, suffix: str, dtype: str, items: int) -> np.ndarray:
    path = prefix.with_name(prefix.name + suffix)
    expected = items * np.dtype(dtype).itemsize
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise ShardError(f"{path} is missing: pack the corpus again") from None
    if size != expected:
        raise ShardError(
            f"{path} has {size} bytes but its manifest says {expected}: it is "
            f"{'truncated' if size < expected else 'damaged'}, pack the corpus again"
        )
    # An empty file cannot be mapped; slices of a plain view of the mapping cost less than those of a memmap.
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray) if size else np.empty(0, dtype=dtype)


def _verify(prefix: Path, suffix: str, expected: str) -> None:
    path = prefix.with_name(prefix.name + suffix)
    with open(path, "rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected:
        raise ShardError(f"{path} does not match its checksum: it is damaged, pack the corpus again")
