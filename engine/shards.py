"""Token shards: memory-mapped tokenised documents. The format is specified in docs/token-shards.md.

A shard is three files: `NAME.bin` with all tokens back to back (uint16, or uint32 where the vocabulary
needs it), `NAME.idx` with the offset of every document (int64), and `NAME.json`, written last, with
counts, checksums and the hash of the tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from .errors import ShardError

FORMAT_VERSION = 1


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
    """
    prefix = Path(prefix)
    dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
    bin_path, idx_path, json_path = (prefix.with_name(prefix.name + suffix) for suffix in (".bin", ".idx", ".json"))
    offsets, total_bytes = [0], 0
    bin_hash = hashlib.sha256()
    with open(_writing(bin_path), "wb") as file:
        for ids, size in documents:
            tokens = np.asarray(ids, dtype=np.int64)
            if tokens.size and not (tokens.min() >= 0 and tokens.max() < vocab_size):
                raise ShardError(f"document {len(offsets) - 1} holds a token outside the vocabulary of {vocab_size}")
            data = tokens.astype(dtype).tobytes()
            file.write(data)
            bin_hash.update(data)
            offsets.append(offsets[-1] + len(tokens))
            total_bytes += size
        _sync(file)
    index = np.asarray(offsets, dtype="<i8").tobytes()
    with open(_writing(idx_path), "wb") as file:
        file.write(index)
        _sync(file)
    manifest = ShardManifest(
        dtype=dtype.name,
        vocab_size=vocab_size,
        tokens=offsets[-1],
        documents=len(offsets) - 1,
        text_bytes=total_bytes,
        tokenizer_sha256=tokenizer_sha256,
        bin_sha256=bin_hash.hexdigest(),
        idx_sha256=hashlib.sha256(index).hexdigest(),
    )
    with open(_writing(json_path), "wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")
        _sync(file)
    for path in (bin_path, idx_path, json_path):
        _writing(path).rename(path)
    return manifest


def _writing(path: Path) -> Path:
    return path.with_name(path.name + ".writing")


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())


class TokenShards:
    """One or more shards read as a single stream of tokens, without loading them.

    Args:
        prefixes: shard paths without suffix, in stream order.
        tokenizer_sha256: if given, every shard must have been made by this tokenizer.
        verify: also read every byte and compare the checksums.

    Raises:
        ShardError: for a shard that is missing, truncated, damaged, or of another tokenizer.
    """

    def __init__(self, prefixes: Sequence[Path], *, tokenizer_sha256: str | None = None, verify: bool = False) -> None:
        if not prefixes:
            raise ShardError("no token shards were given")
        self.prefixes = [Path(prefix) for prefix in prefixes]
        self.manifests = [_read_manifest(prefix) for prefix in self.prefixes]
        self._tokens: list[np.memmap | np.ndarray] = []
        document_offsets = [np.zeros(1, dtype=np.int64)]
        starts = [0]
        for prefix, manifest in zip(self.prefixes, self.manifests, strict=True):
            if tokenizer_sha256 is not None and manifest.tokenizer_sha256 != tokenizer_sha256:
                raise ShardError(
                    f"{prefix}.bin was made with another tokenizer (sha256 {manifest.tokenizer_sha256[:12]}…, "
                    f"this one is {tokenizer_sha256[:12]}…): pack the corpus again"
                )
            self._tokens.append(_map(prefix, ".bin", manifest.dtype, manifest.tokens))
            offsets = _map(prefix, ".idx", "<i8", manifest.documents + 1)
            if verify:
                _verify(prefix, ".bin", manifest.bin_sha256)
                _verify(prefix, ".idx", manifest.idx_sha256)
            document_offsets.append(np.asarray(offsets[1:]) + starts[-1])
            starts.append(starts[-1] + manifest.tokens)
        self._starts = np.asarray(starts)
        self._document_offsets = np.concatenate(document_offsets)

    @classmethod
    def open(cls, folder: Path, split: str, **options) -> TokenShards:
        """All shards `folder/SPLIT-*.json`, in name order; options as for the class."""
        prefixes = sorted(path.with_suffix("") for path in Path(folder).glob(f"{split}-*.json"))
        if not prefixes:
            raise ShardError(f"{folder} holds no token shard named {split}-*.json")
        return cls(prefixes, **options)

    @property
    def tokens(self) -> int:
        """Tokens of all shards."""
        return int(self._starts[-1])

    @property
    def documents(self) -> int:
        """Documents of all shards."""
        return len(self._document_offsets) - 1

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the text behind all tokens."""
        return sum(manifest.text_bytes for manifest in self.manifests)

    def read(self, start: int, end: int) -> np.ndarray:
        """Tokens [start, end) of the stream as int64."""
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        parts = []
        while start < end:
            base = int(self._starts[first])
            stop = min(end, int(self._starts[first + 1]))
            parts.append(self._tokens[first][start - base : stop - base])
            start, first = stop, first + 1
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, dtype=np.int64)

    def document_ends(self, start: int, end: int) -> np.ndarray:
        """Offsets in (start, end] at which a document ends, ascending, int64."""
        first = np.searchsorted(self._document_offsets, start, side="right")
        last = np.searchsorted(self._document_offsets, end, side="right")
        return self._document_offsets[first:last]


def _read_manifest(prefix: Path) -> ShardManifest:
    path = prefix.with_name(prefix.name + ".json")
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=ShardManifest)
    except FileNotFoundError:
        raise ShardError(f"{path} is missing: the shard was not written to its end, pack the corpus again") from None
    except (msgspec.MsgspecError, json.JSONDecodeError) as error:
        raise ShardError(f"{path} is not a shard manifest: {error}") from None
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
    # An empty file cannot be mapped.
    return np.memmap(path, dtype=dtype, mode="r") if size else np.empty(0, dtype=dtype)


def _verify(prefix: Path, suffix: str, expected: str) -> None:
    path = prefix.with_name(prefix.name + suffix)
    with open(path, "rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected:
        raise ShardError(f"{path} does not match its checksum: it is damaged, pack the corpus again")
