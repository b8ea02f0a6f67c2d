"""From documents to token shards: the work of `redwhale pack`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

from ..tokenizer import Tokenizer
from .shards import ShardManifest, write_shard

_DOCUMENTS_AT_ONCE = 2048


def pack_texts(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    prefix: Path,
    *,
    threads: int = 0,
    on_document: Callable[[int], None] | None = None,
) -> ShardManifest:
    """Tokenise documents into one shard: each becomes BOS, its tokens, EOS.

    Args:
        texts: documents, read once, a few thousand in memory at a time.
        tokenizer: encodes them; its hash goes into the shard's manifest.
        prefix: the shard's path without suffix.
        threads: that tokenise; 0 for all cores. The shard is the same for any number.
        on_document: called with the UTF-8 bytes of each document once it is written.
    """
    threads = threads or os.cpu_count() or 1

    def documents() -> Iterator[tuple[list[int], int]]:
        remaining = iter(texts)
        while batch := list(islice(remaining, _DOCUMENTS_AT_ONCE)):
            for text, ids in zip(batch, tokenizer.encode_batch(batch, threads), strict=True):
                size = len(text.encode("utf-8"))
                yield [tokenizer.bos_id, *ids, tokenizer.eos_id], size
                if on_document is not None:
                    on_document(size)

    return write_shard(prefix, documents(), vocab_size=tokenizer.vocab_size, tokenizer_sha256=tokenizer.sha256)
