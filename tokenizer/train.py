"""Train a Korean SentencePiece BPE whose pieces can be merged into a base tokenizer."""

import heapq
import io
import os
import re
from collections.abc import Iterable, Iterator
from hashlib import blake2b

import sentencepiece

from .errors import TokenizerError
from .spm import ModelProto, nfc

# SentencePiece silently drops longer sentences, and its BPE trainer aborts on words of 65,536 characters.
MAX_SENTENCE_BYTES = 4096


def train_korean_bpe(
    texts: Iterable[str],
    base: ModelProto,
    *,
    vocab_size: int,
    character_coverage: float = 0.9999,
    num_threads: int = 0,
    max_bytes: int | None = None,
    seed: int = 0,
) -> ModelProto:
    """Train a BPE on NFC(texts) with the segmentation rules of `base` (digits, scripts, whitespace, byte fallback).

    vocab_size counts the control pieces and the 256 bytes too. character_coverage is the share of the corpus whose
    characters become pieces; the rest is left to byte fallback. num_threads 0 means every core; the result does not
    depend on it. max_bytes limits the corpus to a uniform sample that `seed` chooses (see `sample_texts`).
    Raises TokenizerError when the corpus is empty or vocab_size does not suit it.
    """
    if isinstance(texts, str):
        raise TokenizerError("texts is one string, not a collection of documents; pass [text]")
    if max_bytes is not None:
        texts = sample_texts(texts, max_bytes, seed)
    spec = base.trainer_spec
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            normalization_rule_name="identity",
            add_dummy_prefix=base.normalizer_spec.add_dummy_prefix,
            remove_extra_whitespaces=False,
            byte_fallback=spec.byte_fallback,
            split_digits=spec.split_digits,
            split_by_number=spec.split_by_number,
            split_by_whitespace=spec.split_by_whitespace,
            split_by_unicode_script=spec.split_by_unicode_script,
            max_sentencepiece_length=spec.max_sentencepiece_length,
            max_sentence_length=2 * MAX_SENTENCE_BYTES,
            num_threads=num_threads or core_count(),
            shuffle_input_sentence=False,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise TokenizerError(_explain(str(error), vocab_size)) from error
    return ModelProto.FromString(model.getvalue())


def core_count() -> int:
    """Return the number of cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def sample_texts(texts: Iterable[str], max_bytes: int, seed: int) -> list[str]:
    """Return a uniform sample of `max_bytes` UTF-8 bytes, or all of a smaller corpus, whatever the order of `texts`.

    The documents with the smallest keyed hashes are kept (a bottom-k sketch weighed in bytes; the last one is cut),
    so one pass with memory for max_bytes and one document suffices. The result is sorted by hash.
    """
    if max_bytes < 1:
        raise TokenizerError(
            f"max_bytes is {max_bytes}; give a positive number of bytes, or none for all of the corpus"
        )
    key = str(seed).encode()
    kept: list[tuple[int, bytes]] = []  # a heap whose head has the largest hash
    size = 0
    for text in texts:
        data = text.encode(errors="replace")
        rank = -int.from_bytes(blake2b(data, digest_size=8, key=key).digest(), "big")
        heapq.heappush(kept, (rank, data))
        size += len(data)
        # The document that crosses the limit stays until the end: evicting it early would make the order matter.
        while size - len(kept[0][1]) >= max_bytes:
            size -= len(heapq.heappop(kept)[1])
    sample = [data for _, data in sorted(kept, reverse=True)]
    if size > max_bytes:
        sample[-1] = sample[-1][: len(sample[-1]) - (size - max_bytes)]
    return [data.decode(errors="ignore") for data in sample]


def _sentences(texts: Iterable[str]) -> Iterator[bytes]:
    """Cut texts into lines, and long lines at spaces, which leaves the words that BPE counts unchanged."""
    for text in texts:
        for line in nfc(text).splitlines():
            # A lone surrogate has no UTF-8 form and NUL makes the trainer drop the line.
            data = line.replace("\0", " ").encode(errors="replace")
            while len(data) > MAX_SENTENCE_BYTES:
                cut = data.rfind(b" ", 0, MAX_SENTENCE_BYTES)
                if cut > 0:
                    yield data[:cut]
                    data = data[cut + 1 :]
                    continue
                cut = MAX_SENTENCE_BYTES
                while data[cut] & 0xC0 == 0x80:  # never inside a character
                    cut -= 1
                yield data[:cut]
                data = data[cut:]
            if data.strip():
                yield data


def _explain(message: str, vocab_size: int) -> str:
    if found := re.search(r"too high \(\d+\).*<= (\d+)", message):
        return f"vocab_size {vocab_size} is too large for this corpus; use at most {found[1]}, or more text"
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"vocab_size {vocab_size} cannot hold the characters of this corpus; "
            f"use at least {found[1]}, or a smaller character_coverage"
        )
    if "sentences_.empty()" in message:
        return "the tokenizer's training corpus holds no text; check the files that feed it and their filters"
    return f"SentencePiece could not train on this corpus: {' '.join(message.split())}"
