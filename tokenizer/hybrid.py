"""From a Korean corpus and a base tokenizer to an exported hybrid tokenizer, with its measurements."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from .byte_level import is_byte_level, learn_extension
from .encoder import Encoder, open_encoder
from .errors import TokenizerError
from .export import export_hf_tokenizer, require_exportable
from .merge import merge_pieces
from .proofs import count_parity
from .report import DomainTokens, token_ratio
from .reserved import reserve_pieces
from .selection import Selection, choose_pieces, script_pieces, with_merge_steps
from .spm import ModelProto, load_model_proto
from .train import Algorithm, core_count, ksx1001_syllables, split_morphemes, train_pieces
from .words import Script, count_words, mix_words, sample_documents, script_runs


class TokenizerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to train the Korean pieces and which of them to add; the `[tokenizer]` section of a recipe."""

    # Pieces to train, control pieces and bytes included: twice as many as are added leaves a choice.
    vocab_size: int = 40_000
    # Most pieces to add to the base; 0 adds all that were trained.
    max_added: int = 20_000
    # "bpe" or "unigram".
    algorithm: Algorithm = "bpe"
    # Characters that added pieces may consist of: hangul, jamo (ㅋㅋ), hanja, latin, emoji.
    scripts: tuple[Script, ...] = ("hangul",)
    # Power of a source's size that its share of the training text is proportional to: 1 as it is, 0 all sources alike.
    balance: float = 1.0
    # Factors on the shares of single sources.
    weights: dict[str, float] = {}
    # Pieces that the training text uses less often as tokens are dropped, until none is left.
    min_frequency: int = 0
    # Share of the words' characters that become pieces; byte fallback spells the rest.
    character_coverage: float = 0.9999
    # Add the 2,350 syllables of KS X 1001, whether or not the corpus has them.
    ksx1001: bool = False
    # Train on words cut at morpheme boundaries (needs the extra `morphemes`).
    morphemes: bool = False
    # Fill the vocabulary up to a multiple of this with reserved control pieces.
    pad_to_multiple: int = 1
    # Train on a uniform sample of at most this many UTF-8 bytes; 0 trains on the whole corpus, held in memory.
    max_training_bytes: int = 1_000_000_000
    # Threads for training and encoding; 0 means every core.
    threads: int = 0
    # Chooses the sample.
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "pad_to_multiple"):
            if getattr(self, name) < 1:
                raise TokenizerError(f"{name} is {getattr(self, name)}; it must be positive")
        for name in ("max_added", "max_training_bytes"):
            if getattr(self, name) < 0:
                raise TokenizerError(f"{name} is {getattr(self, name)}; give a positive number, or 0 for no limit")
        if not 0.9 <= self.character_coverage <= 1:
            raise TokenizerError(f"character_coverage is {self.character_coverage}; it must lie between 0.9 and 1")
        if not 0 <= self.balance <= 1:
            raise TokenizerError(f"balance is {self.balance}; it must lie between 0 and 1")
        if self.min_frequency < 0:
            raise TokenizerError(f"min_frequency is {self.min_frequency}; give 0 or more")
        if self.threads < 0:
            raise TokenizerError(f"threads is {self.threads}; give a number of threads, or 0 for every core")
        script_runs(self.scripts)


class TokenizerSummary(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a hybrid tokenizer consists of and what was measured on it."""

    base_pieces: int
    candidates: int  # trained pieces of the scripts that the base lacks
    added: int
    reserved: int  # control pieces that fill the vocabulary up
    dropped_unreachable: list[str]  # not added, since no text would ever produce them
    vocab_size: int  # base_pieces + added + reserved
    sha256: str  # of tokenizer.model, or of tokenizer.json where the base is byte-level
    training_characters: dict[str, int]  # in words of the scripts, by source
    domains: list[DomainTokens]
    english_lines: int
    english_changes: list[str]  # lines of the English sample whose ids differ from the base's
    # Domain and English texts compared under `tokenizers`, those that write a special such as <s> left out; none
    # where that package is not installed, or where there is no `.model` to compare with.
    parity_texts: int | None
    parity_mismatches: int | None  # of these, texts whose ids differ between .model and tokenizer.json


def corpus_words(
    documents: Iterable[tuple[str, str]], config: TokenizerConfig
) -> tuple[dict[str, float], dict[str, int]]:
    """Return the word frequencies to train on, sampled and balanced as configured, and the characters by source.

    Raises TokenizerError when no document has a word of the scripts.
    """
    if config.max_training_bytes:
        documents = sample_documents(documents, config.max_training_bytes, config.seed)
    counts = count_words(documents, config.scripts)
    characters = {source: sum(len(word) * n for word, n in words.items()) for source, words in counts.items()}
    if not any(characters.values()):
        raise TokenizerError(
            "the tokenizer's training corpus holds no Korean text; check the files that feed it and their filters"
        )
    return mix_words(counts, balance=config.balance, weights=config.weights), characters


def trained_candidates(base: ModelProto, words: Mapping[str, float], config: TokenizerConfig) -> list[str]:
    """Return the trained pieces that may be added to `base`, in an order for merging.

    Raises TokenizerError when vocab_size does not suit the words, or nothing new comes of it.
    """
    trained = train_pieces(
        split_morphemes(words) if config.morphemes else words,
        base,
        vocab_size=config.vocab_size,
        algorithm=config.algorithm,
        character_coverage=config.character_coverage,
        required_characters=ksx1001_syllables() if config.ksx1001 else "",
        num_threads=config.threads,
    )
    candidates = script_pieces(trained, base, config.scripts)
    if not candidates:
        raise TokenizerError("the corpus yields no new piece; check that it is Korean, or raise vocab_size")
    return with_merge_steps(base, candidates) if config.algorithm == "unigram" else candidates


def select(
    base: ModelProto, candidates: Sequence[str], words: Mapping[str, float], config: TokenizerConfig
) -> Selection:
    """Return the pieces to add, as configured."""
    return choose_pieces(
        base,
        candidates,
        words,
        max_pieces=config.max_added or None,
        min_frequency=config.min_frequency,
        protected=ksx1001_syllables() if config.ksx1001 else "",
        threads=config.threads or core_count(),
    )


def build_hybrid_tokenizer(
    documents: Iterable[tuple[str, str]],
    base_path: Path,
    output_dir: Path,
    config: TokenizerConfig,
    *,
    domains: Mapping[str, Sequence[str]],
    english_sample: Sequence[str] = (),
) -> TokenizerSummary:
    """Train on documents, append the chosen pieces to the base, write the files to `output_dir` and measure them.

    Args:
        documents: pairs of source and text; the source is what `balance` and `weights` go by.
        base_path: a SentencePiece `.model` of the Llama kind, or a byte-level `tokenizer.json`; it keeps its ids.
        output_dir: folder for the files.
        config: what to train and add.
        domains: held-out documents by name, for the token ratios.
        english_sample: lines whose ids should not change.

    Raises:
        TokenizerError: when the base, the corpus, a domain or a setting cannot be used.
    """
    base = open_encoder(base_path)
    output_dir = Path(output_dir)
    if is_byte_level(base_path):
        words, characters = corpus_words(documents, config)
        extension = learn_extension(base_path, words, config)
        tokens = extension.select(extension.candidates, config)
        reserved = -(extension.base.size + len(tokens)) % config.pad_to_multiple
        extension.extended(tokens, reserved).write(output_dir, files_of=base_path)
        added, candidates, dropped = len(tokens), len(extension.candidates), []
        hybrid = open_encoder(output_dir / "tokenizer.json")
    else:
        proto = load_model_proto(base_path)
        require_exportable(proto)
        words, characters = corpus_words(documents, config)
        trained = trained_candidates(proto, words, config)
        selection = select(proto, trained, words, config)
        merged = merge_pieces(proto, selection.pieces)
        reserved = reserve_pieces(merged, config.pad_to_multiple)
        export_hf_tokenizer(merged, output_dir)
        added, candidates, dropped = len(selection.pieces), len(trained), selection.unreachable
        hybrid = open_encoder(output_dir / "tokenizer.model")

    threads = config.threads or core_count()
    english = list(english_sample)
    pairs = zip(english, base.encode_batch(english, threads), hybrid.encode_batch(english, threads), strict=True)
    parity = _parity(hybrid, [*english, *(text for texts in domains.values() for text in texts)])
    return TokenizerSummary(
        base_pieces=base.vocab_size,
        candidates=candidates,
        added=added,
        reserved=reserved,
        dropped_unreachable=dropped,
        vocab_size=hybrid.vocab_size,
        sha256=hybrid.sha256,
        training_characters=characters,
        domains=token_ratio(base, hybrid, domains, threads=threads),
        english_lines=len(english),
        english_changes=[line for line, before, after in pairs if before != after],
        parity_texts=parity[0] if parity else None,
        parity_mismatches=parity[1] if parity else None,
    )


def _parity(hybrid: Encoder, texts: Sequence[str]) -> tuple[int, int] | None:
    exported = hybrid.path.with_name("tokenizer.json")
    return count_parity(hybrid, exported, texts) if exported != hybrid.path else None
