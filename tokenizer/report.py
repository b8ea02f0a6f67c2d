"""Measure how many tokens a tokenizer saves, domain by domain."""

from collections import Counter
from collections.abc import Mapping, Sequence

import msgspec

from .encoder import Encoder
from .errors import TokenizerError
from .spm import nfc


class DomainTokens(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Token counts of one domain; characters and bytes are those of the NFC text, no BOS is counted."""

    domain: str
    documents: int
    characters: int
    bytes: int  # UTF-8
    base_tokens: int
    hybrid_tokens: int
    ratio: float  # hybrid tokens per base token; lower is better
    base_chars_per_token: float
    hybrid_chars_per_token: float
    base_tokens_per_eojeol: float  # an eojeol is a whitespace-separated word
    hybrid_tokens_per_eojeol: float
    base_byte_share: float  # of tokens that are bytes, or parts of characters
    hybrid_byte_share: float


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """One tokenizer beside the base, on every domain."""

    name: str
    vocab_size: int
    domains: list[DomainTokens]
    mean_ratio: float  # of the domains, each counted once
    never_used: int  # ids behind the base's that no domain's text uses
    new_pieces: int  # ids behind the base's


def token_ratio(
    base: Encoder, hybrid: Encoder, domains: Mapping[str, Sequence[str]], *, threads: int = 1
) -> list[DomainTokens]:
    """Return the token counts of every domain under both tokenizers (token ratio of RedWhale, arXiv 2408.11294).

    Raises TokenizerError when a domain holds no words to count.
    """
    return compare("", base, hybrid, domains, threads=threads).domains if domains else []


def compare(
    name: str, base: Encoder, other: Encoder, domains: Mapping[str, Sequence[str]], *, threads: int = 1
) -> Comparison:
    """Return the token counts of `other` beside those of `base`.

    Raises TokenizerError when there is no domain, or one holds no words to count.
    """
    if not domains:
        raise TokenizerError("there is no text to compare tokenizers on; give at least one domain")
    bytes_of = (base.byte_ids(), other.byte_ids())
    used: Counter = Counter()
    rows = [_count(domain, texts, base, other, threads, bytes_of, used) for domain, texts in domains.items()]
    new = range(base.vocab_size, other.vocab_size)
    return Comparison(
        name=name,
        vocab_size=other.vocab_size,
        domains=rows,
        mean_ratio=sum(row.ratio for row in rows) / len(rows),
        never_used=sum(i not in used for i in new),
        new_pieces=len(new),
    )


def _count(
    name: str,
    texts: Sequence[str],
    base: Encoder,
    hybrid: Encoder,
    threads: int,
    bytes_of: tuple[frozenset[int], frozenset[int]],
    used: Counter,
) -> DomainTokens:
    if isinstance(texts, str):
        raise TokenizerError(f"the domain {name!r} is one string, not a collection of documents; pass [text]")
    texts = [nfc(text) for text in texts]
    eojeols = sum(len(text.split()) for text in texts)
    if not eojeols:
        raise TokenizerError(f"the domain {name!r} holds no words; give it text or leave it out")
    characters = sum(map(len, texts))
    tokens, fallback = [], []
    for tokenizer, byte_ids in zip((base, hybrid), bytes_of, strict=True):
        counts = Counter(i for ids in tokenizer.encode_batch(texts, threads) for i in ids)
        tokens.append(counts.total())
        fallback.append(sum(counts[i] for i in byte_ids) / counts.total())
    used.update(counts)
    return DomainTokens(
        domain=name,
        documents=len(texts),
        characters=characters,
        bytes=sum(len(text.encode()) for text in texts),
        base_tokens=tokens[0],
        hybrid_tokens=tokens[1],
        ratio=tokens[1] / tokens[0],
        base_chars_per_token=characters / tokens[0],
        hybrid_chars_per_token=characters / tokens[1],
        base_tokens_per_eojeol=tokens[0] / eojeols,
        hybrid_tokens_per_eojeol=tokens[1] / eojeols,
        base_byte_share=fallback[0],
        hybrid_byte_share=fallback[1],
    )
