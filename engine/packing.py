"""From documents to token shards: the work of `redwhale pack`."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Literal

from ..filtering import InputFile
from ..filtering.documents import suffix_of
from ..filtering.ray_workers import RayWorkers
from ..filtering.workers import available_cores, ordered_map
from ..tokenizer import Tokenizer
from .shards import ShardManifest, ShardWriter
from .token_blocks import Records, ShardFiles, TokenBlock, encoder_of, tokenize_files, tokenize_records

_BATCH_CHARACTERS = 1 << 19
Engine = Literal["local", "ray"]
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

    [manifest] = _write(_tokenized(records(), tokenizer, workers or available_cores()), tokenizer)
    return manifest


def pack_files(
    shards: Mapping[Path, Sequence[InputFile]],
    tokenizer: Tokenizer,
    *,
    engine: Engine = "local",
    workers: int = 0,
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """Tokenise files of documents into shards, going on behind the shards that are already whole.

    Args:
        shards: by the shard's path without suffix, the files that it is made of, as `filtering.find_inputs` gives.
        tokenizer: encodes them; its hash goes into the manifests.
        engine: "local", or "ray": the machines of a Ray cluster read and tokenise a shard's files each, and this
            process writes. They must reach the files, not the tokenizer nor the shards.
        workers: processes that tokenise, 0 for one a core; little text is tokenised in this one. A cluster that runs
            already decides for itself. The shards are the same for any number and either engine.
        on_bytes: called with the bytes of input that are done since the last call; they sum to the files' sizes.

    Raises:
        CorpusError: for a file that is missing or damaged, or a worker process that died.
    """
    missing: list[ShardFiles] = []
    for prefix, files in shards.items():
        if not prefix.with_name(prefix.name + ".json").exists():
            missing.append(ShardFiles(prefix, tuple(files)))
        elif on_bytes is not None:
            on_bytes(sum(path.stat().st_size for path in files))

    count = workers or available_cores()
    with ExitStack() as stack:
        if engine == "ray":
            pool = stack.enter_context(RayWorkers(count))
            blocks = pool.flat_map(partial(tokenize_files, model=tokenizer.path.read_bytes()), missing)
        else:
            text_bytes = sum(_usual_text_bytes(path) for shard in missing for path in shard.files)
            records = chain.from_iterable(shard.records() for shard in missing)
            blocks = _tokenized(records, tokenizer, count if text_bytes >= _WORKERS_PAY_FROM_BYTES else 1)
        for _ in _write(blocks, tokenizer, on_bytes):
            pass


def _tokenized(records: Iterable[Records], tokenizer: Tokenizer, workers: int) -> Generator[TokenBlock, None, None]:
    """Tokenise in processes of this machine."""
    encoder_of.cache_clear()  # another tokenizer may lie at the path since
    return ordered_map(partial(tokenize_records, tokenizer=tokenizer.path), records, workers)


def _write(
    blocks: Generator[TokenBlock, None, None], tokenizer: Tokenizer, on_bytes: Callable[[int], None] | None = None
) -> Iterator[ShardManifest]:
    """Write one shard after the other."""
    with closing(blocks):
        for prefix, of_shard in groupby(blocks, lambda block: block.shard):
            writer = ShardWriter(prefix, vocab_size=tokenizer.vocab_size, tokenizer_sha256=tokenizer.sha256)
            with writer:
                for block in of_shard:
                    writer.add(block.tokens, block.lengths, block.text_bytes)
                    if on_bytes is not None and block.file_bytes:
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


def _usual_text_bytes(path: InputFile) -> int:
    return path.stat().st_size * (1 if suffix_of(path) in (".jsonl", ".txt") else _USUAL_COMPRESSION_RATIO)
