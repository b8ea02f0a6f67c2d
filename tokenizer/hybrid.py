"""From a Korean corpus and a base tokenizer to an exported hybrid tokenizer, with its measurements."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from .errors import TokenizerError
from .export import export_hf_tokenizer, require_exportable
from .merge import hangul_pieces, merge_reachable, select_hangul_pieces
from .report import DomainTokens, token_ratio
from .spm import Tokenizer, load_model_proto
from .train import core_count, train_korean_bpe


class TokenizerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to train the Korean BPE and how much of it to add; the `[tokenizer]` section of a recipe."""

    # Size of the Korean BPE, its control pieces, bytes and non-Hangul pieces included.
    vocab_size: int = 24_000
    # Most Hangul pieces to add to the base; 0 adds all of them.
    max_added: int = 20_000
    # Share of the corpus whose characters become pieces; byte fallback spells the rest.
    character_coverage: float = 0.9999
    # Train on a uniform sample of at most this many UTF-8 bytes; 0 trains on the whole corpus, held in memory.
    max_training_bytes: int = 1_000_000_000
    # Threads for training and encoding; 0 means every core.
    threads: int = 0
    # Chooses the sample.
    seed: int = 0
    # Also add pieces with compatibility jamo such as ㅋㅋ, which informal text is full of.
    keep_jamo: bool = False

    def __post_init__(self) -> None:
        if self.vocab_size < 1:
            raise TokenizerError(f"vocab_size is {self.vocab_size}; it must be positive")
        for name in ("max_added", "max_training_bytes"):
            if getattr(self, name) < 0:
                raise TokenizerError(f"{name} is {getattr(self, name)}; give a positive number, or 0 for no limit")
        if not 0.9 <= self.character_coverage <= 1:
            raise TokenizerError(f"character_coverage is {self.character_coverage}; it must lie between 0.9 and 1")
        if self.threads < 0:
            raise TokenizerError(f"threads is {self.threads}; give a number of threads, or 0 for every core")


class TokenizerSummary(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a hybrid tokenizer consists of and what was measured on it."""

    base_pieces: int
    trained_hangul_pieces: int  # Hangul pieces of the Korean BPE
    overlap: int  # of these, already in the base
    added: int
    dropped_unreachable: list[str]  # not added, since no text would ever produce them
    vocab_size: int  # base_pieces + added
    sha256: str  # of tokenizer.model
    domains: list[DomainTokens]
    english_lines: int
    english_lines_changed: int  # lines of the English sample whose ids differ from the base's
    # Domain and English texts compared under `tokenizers`, those that write a special such as <s> left out; none
    # where that package is not installed.
    parity_texts: int | None
    parity_mismatches: int | None  # of these, texts whose ids differ between .model and tokenizer.json


def build_hybrid_tokenizer(
    texts: Iterable[str],
    base_path: Path,
    output_dir: Path,
    config: TokenizerConfig,
    *,
    domains: Mapping[str, Sequence[str]],
    english_sample: Sequence[str] = (),
) -> TokenizerSummary:
    """Train on `texts`, append the Hangul pieces to the base, write the files to `output_dir` and measure them.

    The base at `base_path` keeps its ids. `domains` maps names to held-out documents for the token ratios,
    `english_sample` holds lines whose ids should not change.
    Raises TokenizerError when the base, the corpus, a domain or a setting cannot be used.
    """
    base_proto = load_model_proto(base_path)
    require_exportable(base_proto)
    threads = config.threads or core_count()
    trained = train_korean_bpe(
        texts,
        base_proto,
        vocab_size=config.vocab_size,
        character_coverage=config.character_coverage,
        num_threads=threads,
        max_bytes=config.max_training_bytes or None,
        seed=config.seed,
    )
    candidates = select_hangul_pieces(
        trained, base_proto, max_pieces=config.max_added or None, keep_jamo=config.keep_jamo
    )
    if not candidates:
        raise TokenizerError("the corpus yields no new Hangul piece; check that it is Korean, or raise vocab_size")
    merged, dropped = merge_reachable(base_proto, candidates)
    export_hf_tokenizer(merged, output_dir)

    base, hybrid = Tokenizer(base_path), Tokenizer(Path(output_dir) / "tokenizer.model")
    english = list(english_sample)
    changed = sum(
        before != after
        for before, after in zip(
            base.encode_batch(english, threads), hybrid.encode_batch(english, threads), strict=True
        )
    )
    trained_hangul = hangul_pieces(trained, keep_jamo=config.keep_jamo)
    base_names = {piece.piece for piece in base_proto.pieces}
    parity = count_parity(hybrid, Path(output_dir), [*english, *(text for texts in domains.values() for text in texts)])
    return TokenizerSummary(
        base_pieces=base.vocab_size,
        trained_hangul_pieces=len(trained_hangul),
        overlap=sum(piece in base_names for piece in trained_hangul),
        added=hybrid.vocab_size - base.vocab_size,
        dropped_unreachable=dropped,
        vocab_size=hybrid.vocab_size,
        sha256=hybrid.sha256,
        domains=token_ratio(base, hybrid, domains, threads=threads),
        english_lines=len(english),
        english_lines_changed=changed,
        parity_texts=parity[0] if parity else None,
        parity_mismatches=parity[1] if parity else None,
    )


def count_parity(tokenizer: Tokenizer, folder: Path, texts: Sequence[str]) -> tuple[int, int] | None:
    """Return how many texts were compared and how many got other ids from tokenizer.json than from the `.model`.

    Texts that write out a special such as `<s>` are left out: there the two differ by design. None where the
    `tokenizers` package is not installed.
    """
    try:
        from tokenizers import Tokenizer as HFTokenizer
    except ImportError:
        return None
    exported = HFTokenizer.from_file(str(folder / "tokenizer.json"))
    specials = [token.content for token in exported.get_added_tokens_decoder().values()]
    compared = [text for text in texts if not any(special in text for special in specials)]
    pairs = zip(exported.encode_batch(compared), tokenizer.encode_batch(compared), strict=True)
    return len(compared), sum(theirs.ids != [tokenizer.bos_id, *ours] for theirs, ours in pairs)
