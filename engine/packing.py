"""From documents to token shards: the work of `redwhale pack`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import groupby
from pathlib import Path

from ..filtering.documents import read_batches, suffix_of
from ..filtering.workers import available_cores, ordered_map
from ..tokenizer import Tokenizer
from .shards import ShardManifest, ShardWriter
from .token_blocks import Records, encoder_of, tokenize_records

_BATCH_CHARACTERS = 1 << 19
_BATCH_BYTES = 1 << 20
# Starting processes costs more than they save on less text than this.
_WORKERS_PAY_FROM_BYTES = 16 << 20
_USUAL_COMPRESSION_RATIO = 4


def pack_texts(texts: Iterable[str], tokenizer: Tokenizer, prefix: Path, *, workers: int = 1) -> ShardManifest:
    """Tokenise documents into one shard: each becomes BOS, its tokens, EOS.

    Args:
        texts: documents, read once, a few MB in memory at a time.
        tokenizer: encodes them; its hash goes into the shard's manifest.
        prefix: the shard's path without suffix.
        workers: processes that tokenise, 0 for one a core; 1 is this process. The shard is the same for any number.
            Other numbers need a calling script that starts its work behind `if __name__ == "__main__":`.
    """
    prefix = Path(prefix)

    def records() -> Iterator[Records]:
        yield Records(prefix, [])  # a shard without a document is one too
        for batch in _batches(texts):
            yield Records(prefix, batch)

    [manifest] = _write(records(), tokenizer, workers or available_cores())
    return manifest


def pack_files(
    shards: Mapping[Path, Sequence[Path]],
    tokenizer: Tokenizer,
    *,
    workers: int = 0,
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """Tokenise files of documents into shards, going on behind the shards that are already whole.

    Args:
        shards: by the shard's path without suffix, the files that it is made of, as `filtering.find_inputs` gives.
        tokenizer: encodes them; its hash goes into the manifests.
        workers: processes that tokenise, 0 for one a core; little text is tokenised in this one. The shards are the
            same for any number.
        on_bytes: called with the bytes of input that are done since the last call; they sum to the files' sizes.

    Raises:
        CorpusError: for a file that is missing or damaged, or a worker process that died.
    """
    missing: dict[Path, Sequence[Path]] = {}
    for prefix, files in shards.items():
        if not prefix.with_name(prefix.name + ".json").exists():
            missing[prefix] = files
        elif on_bytes is not None:
            on_bytes(sum(path.stat().st_size for path in files))

    def records() -> Iterator[Records]:
        for prefix, files in missing.items():
            yield Records(prefix, [])  # a shard without a document is one too
            for path in files:
                for batch in read_batches(path, batch_bytes=_BATCH_BYTES):
                    yield Records(prefix, batch)

    files = [path for files in missing.values() for path in files]
    enough = sum(map(_usual_text_bytes, files)) >= _WORKERS_PAY_FROM_BYTES
    for _ in _write(records(), tokenizer, (workers or available_cores()) if enough else 1, on_bytes):
        pass


def _write(
    records: Iterable[Records], tokenizer: Tokenizer, workers: int, on_bytes: Callable[[int], None] | None = None
) -> Iterator[ShardManifest]:
    """Tokenise and write one shard after the other."""
    encoder_of.cache_clear()  # another tokenizer may lie at the path since
    blocks = ordered_map(partial(tokenize_records, tokenizer=tokenizer.path), records, workers)
    with closing(blocks):
        for prefix, of_shard in groupby(blocks, lambda block: block.shard):
            writer = ShardWriter(prefix, vocab_size=tokenizer.vocab_size, tokenizer_sha256=tokenizer.sha256)
            with writer:
                for block in of_shard:
                    writer.add(block.tokens, block.lengths, block.text_bytes)
                    if on_bytes is not None:
                        on_bytes(block.file_bytes)
            assert writer.manifest is not None
            yield writer.manifest


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _usual_text_bytes(path: Path) -> int:
    return path.stat().st_size * (1 if suffix_of(path) in (".jsonl", ".txt") else _USUAL_COMPRESSION_RATIO)
