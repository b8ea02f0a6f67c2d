"""Train Korean pieces with SentencePiece that can be merged into a base tokenizer."""

import io
import os
import re
from collections.abc import Iterable, Mapping
from typing import Literal

import sentencepiece

from .errors import TokenizerError
from .spm import SPACE, ModelProto
from .words import Script, count_words, mix_words, unsourced

Algorithm = Literal["bpe", "unigram"]


def train_korean_bpe(
    texts: Iterable[str],
    base: ModelProto,
    *,
    vocab_size: int,
    character_coverage: float = 0.9999,
    num_threads: int = 0,
    scripts: tuple[Script, ...] = ("hangul",),
) -> ModelProto:
    """Train a BPE on the words of NFC(texts) with the segmentation rules of `base`; see `train_pieces`.

    Raises TokenizerError when the corpus is empty or vocab_size does not suit it.
    """
    words = mix_words(count_words(unsourced(texts), scripts))
    return train_pieces(
        words, base, vocab_size=vocab_size, character_coverage=character_coverage, num_threads=num_threads
    )


def train_pieces(
    words: Mapping[str, float],
    base: ModelProto,
    *,
    vocab_size: int,
    algorithm: Algorithm = "bpe",
    character_coverage: float = 0.9999,
    required_characters: str = "",
    num_threads: int = 0,
) -> ModelProto:
    """Train on word frequencies with the segmentation rules of `base` (digits, scripts, byte fallback).

    A trainer that is given words with their frequencies makes the pieces that it would make of the text, in the time
    that distinct words take.

    Args:
        words: frequencies of words, with ▁ in front where a space is; rounded to whole numbers, those below 1 to 0.
        base: whose rules are taken.
        vocab_size: pieces to train, the control pieces and the 256 bytes included.
        algorithm: "bpe", or "unigram" (Kudo 2018, arXiv 1804.10959).
        character_coverage: share of the words' characters that become pieces; the rest is left to byte fallback.
        required_characters: become pieces whether or not the words have them.
        num_threads: 0 means every core; the result does not depend on it.

    Raises:
        TokenizerError: when there are no words or vocab_size does not suit them.
    """
    spec = base.trainer_spec
    model = io.BytesIO()
    # An order of its own, so that the corpus' order does not matter.
    rows = [f"{word}\t{round(count)}" for word, count in sorted(words.items()) if round(count) >= 1]
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(rows),
            input_format="tsv",
            model_writer=model,
            model_type=algorithm,
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            required_chars=required_characters,
            normalization_rule_name="identity",
            add_dummy_prefix=False,  # the words have their ▁ already
            remove_extra_whitespaces=False,
            byte_fallback=spec.byte_fallback,
            split_digits=spec.split_digits,
            split_by_number=spec.split_by_number,
            split_by_whitespace=spec.split_by_whitespace,
            split_by_unicode_script=spec.split_by_unicode_script,
            max_sentencepiece_length=spec.max_sentencepiece_length,
            num_threads=num_threads or core_count(),
            shuffle_input_sentence=False,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise TokenizerError(_explain(str(error), vocab_size)) from error
    return ModelProto.FromString(model.getvalue())


def ksx1001_syllables() -> str:
    """Return the 2,350 Hangul syllables of KS X 1001, which everyday Korean is written with."""
    syllables = (chr(code) for code in range(ord("가"), ord("힣") + 1))
    # Others get an eight-byte sequence of jamo in EUC-KR.
    return "".join(syllable for syllable in syllables if len(syllable.encode("euc_kr", errors="replace")) == 2)


def split_morphemes(words: Mapping[str, float]) -> dict[str, float]:
    """Cut words where one morpheme ends and the next begins, so that training merges nothing across.

    Only training sees the cuts: encoding needs no analyser. Contracted morphemes share a syllable and stay together.
    Raises TokenizerError where kiwipiepy is not installed.
    """
    try:
        from kiwipiepy import Kiwi  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise TokenizerError(
            'morpheme boundaries need kiwipiepy; pip install "redwhale[morphemes]", or leave the option out'
        ) from None
    kiwi = Kiwi()
    cut: dict[str, float] = {}
    bare = [word.removeprefix(SPACE) for word in words]
    for (word, count), tokens in zip(words.items(), kiwi.tokenize(bare), strict=True):
        text = word.removeprefix(SPACE)
        inside = {i for token in tokens for i in range(token.start + 1, token.start + token.len)}
        borders = sorted({token.start for token in tokens} - inside - {0, len(text)})
        for begin, end in zip([0, *borders], [*borders, len(text)], strict=True):
            part = text[begin:end] if begin else word[: len(word) - len(text) + end]
            cut[part] = cut.get(part, 0.0) + count
    return cut


def core_count() -> int:
    """Return the number of cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _explain(message: str, vocab_size: int) -> str:
    if found := re.search(r"too high \(\d+\).*<= (\d+)", message):
        return f"vocab_size {vocab_size} is too large for this corpus; use at most {found[1]}, or more text"
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"vocab_size {vocab_size} cannot hold the characters of this corpus; "
            f"use at least {found[1]}, or a smaller character_coverage"
        )
    if "sentences_.empty()" in message:
        return "the tokenizer's training corpus holds no Korean text; check the files that feed it and their filters"
    return f"SentencePiece could not train on this corpus: {' '.join(message.split())}"
