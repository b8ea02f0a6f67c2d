"""Measure how many tokens a hybrid tokenizer saves, domain by domain."""

from collections.abc import Mapping, Sequence

import msgspec

from .errors import TokenizerError
from .spm import Tokenizer, nfc


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


def token_ratio(
    base: Tokenizer, hybrid: Tokenizer, domains: Mapping[str, Sequence[str]], *, threads: int = 1
) -> list[DomainTokens]:
    """Return the token counts of every domain under both tokenizers (token ratio of RedWhale, arXiv 2408.11294).

    Raises TokenizerError when a domain holds no words to count.
    """
    return [_count(name, texts, base, hybrid, threads) for name, texts in domains.items()]


def _count(name: str, texts: Sequence[str], base: Tokenizer, hybrid: Tokenizer, threads: int) -> DomainTokens:
    if isinstance(texts, str):
        raise TokenizerError(f"the domain {name!r} is one string, not a collection of documents; pass [text]")
    texts = [nfc(text) for text in texts]
    eojeols = sum(len(text.split()) for text in texts)
    if not eojeols:
        raise TokenizerError(f"the domain {name!r} holds no words; give it text or leave it out")
    characters = sum(map(len, texts))
    base_tokens = sum(map(len, base.encode_batch(texts, threads)))
    hybrid_tokens = sum(map(len, hybrid.encode_batch(texts, threads)))
    return DomainTokens(
        domain=name,
        documents=len(texts),
        characters=characters,
        bytes=sum(len(text.encode()) for text in texts),
        base_tokens=base_tokens,
        hybrid_tokens=hybrid_tokens,
        ratio=hybrid_tokens / base_tokens,
        base_chars_per_token=characters / base_tokens,
        hybrid_chars_per_token=characters / hybrid_tokens,
        base_tokens_per_eojeol=base_tokens / eojeols,
        hybrid_tokens_per_eojeol=hybrid_tokens / eojeols,
    )
