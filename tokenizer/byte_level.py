"""Extend byte-level BPE tokenizers (Llama 3, Qwen, SmolLM2, Mistral-Nemo): merges behind the base's own."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .byte_merges import learn_merges
from .errors import TokenizerError
from .export import write_file
from .reserved import reserved_name
from .selection import choose
from .spm import SPACE
from .train import ksx1001_syllables, split_morphemes

if TYPE_CHECKING:
    from .hybrid import TokenizerConfig


def _byte_alphabet() -> dict[int, str]:
    """The printable character that GPT-2's byte-level BPE writes for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


_TO_CHARACTER = _byte_alphabet()
_TO_BYTE = {character: byte for byte, character in _TO_CHARACTER.items()}


def to_alphabet(text: str | bytes) -> str:
    """Return UTF-8 bytes in the characters that a byte-level vocabulary writes them with."""
    data = text.encode() if isinstance(text, str) else text
    return "".join(_TO_CHARACTER[byte] for byte in data)


def from_alphabet(token: str) -> bytes:
    """Return the bytes that a token of a byte-level vocabulary stands for."""
    return bytes(_TO_BYTE[character] for character in token)


def is_byte_level(path: str | Path) -> bool:
    """Return whether a path names a `tokenizer.json`, the only form that byte-level tokenizers come in."""
    return Path(path).suffix == ".json"


class ByteLevelBPE:
    """A `tokenizer.json` of the byte-level kind, and what can be appended to it.

    Args:
        raw: content of the file.
        name: what error messages call it.

    Raises:
        TokenizerError: when it is of another kind.
    """

    def __init__(self, raw: dict[str, Any], name: str | Path = "tokenizer.json") -> None:
        self.raw = raw
        problem = _why_unusable(raw)
        if problem:
            raise TokenizerError(f"{str(name)!r} cannot be extended with merges: {problem}")
        self.vocab: dict[str, int] = raw["model"]["vocab"]
        pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in raw["model"]["merges"])
        self.merges: list[tuple[str, str]] = [(a, b) for a, b in pairs]
        self.specials: dict[str, int] = {token["content"]: token["id"] for token in raw.get("added_tokens", [])}
        self.size = max([*self.vocab.values(), *self.specials.values()]) + 1

    @classmethod
    def load(cls, path: Path) -> "ByteLevelBPE":
        """Read a file; raises TokenizerError when there is none, or it is of another kind."""
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise TokenizerError(f"cannot read {str(path)!r} ({error.strerror}); give a tokenizer.json") from None
        except ValueError:
            raise TokenizerError(f"{str(path)!r} is no JSON; give the tokenizer.json of a checkpoint") from None
        return cls(raw, path)

    def encoder(self, *, whole_words: bool = False) -> Any:
        """Return a `tokenizers.Tokenizer` of the merges alone, whose texts are written in the byte alphabet.

        Args:
            whole_words: take a text that is a token as it is, where the file asks for that (`ignore_merges`).
        """
        from tokenizers import Tokenizer, models

        model = models.BPE(
            vocab=dict(self.vocab), merges=self.merges, ignore_merges=whole_words and self._ignores_merges()
        )
        return Tokenizer(model)

    def _ignores_merges(self) -> bool:
        return bool(self.raw["model"].get("ignore_merges"))

    def tokens(self) -> dict[str, int]:
        """Return the tokens that texts consist of, by their spelling in the byte alphabet: no special ones."""
        return {token: i for token, i in self.vocab.items() if token not in self.specials}

    def unreachable(self) -> list[int]:
        """Return the ids of tokens that no text is ever encoded to.

        Merges inside a token happen in the same order in every context, so a token is reachable exactly when it is its
        own encoding, or wherever words that are tokens are taken whole and it can be a word.
        """
        tokens = list(self.tokens().items())
        encoded = self.encoder(whole_words=True).encode_batch_fast([token for token, _ in tokens])
        return [i for (_, i), own in zip(tokens, encoded, strict=True) if own.ids != [i]]

    def extended(self, pairs: Sequence[tuple[str, str]], reserved: int = 0) -> "ByteLevelBPE":
        """Return a copy with merges behind those of the base, and new ids behind all of its own.

        Args:
            pairs: tokens to join, in the byte alphabet and in order.
            reserved: special tokens to append.
        """
        raw = json.loads(json.dumps(self.raw))
        model = raw["model"]
        # The library would number special tokens outside the vocabulary anew, behind the new pieces.
        model["vocab"] |= self.specials
        as_text = bool(model["merges"]) and isinstance(model["merges"][0], str)
        size = self.size
        for a, b in pairs:
            model["vocab"][a + b] = size
            model["merges"].append(f"{a} {b}" if as_text else [a, b])
            size += 1
        for number in range(reserved):
            name = reserved_name(number)
            model["vocab"][name] = size
            flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
            raw["added_tokens"] = [*raw.get("added_tokens", []), {"id": size, "content": name, **flags}]
            size += 1
        if raw.get("normalizer") is None:
            raw["normalizer"] = {"type": "NFC"}
        return ByteLevelBPE(raw)

    def write(self, folder: Path, *, files_of: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, the latter after the one beside `files_of`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        beside = Path(files_of).with_name("tokenizer_config.json")
        config = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config.pop("added_tokens_decoder", None)  # tokenizer.json has them
        for name, value in (("tokenizer.json", self.raw), ("tokenizer_config.json", config)):
            write_file(folder / name, (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode())


class ByteLevelExtension:
    """Merges learned behind those of a base, out of which some are chosen.

    Args:
        base: which the merges are appended to.
        words: frequencies, with ▁ for a space in front.
        config: how many merges to learn (`vocab_size`), and on what.

    Raises:
        TokenizerError: when the words support fewer merges than are to be learned.
    """

    def __init__(self, base: ByteLevelBPE, words: Mapping[str, float], config: "TokenizerConfig") -> None:
        if config.algorithm != "bpe":
            raise TokenizerError(f"a byte-level base takes merges, which {config.algorithm} has none of; use bpe")
        self.base = base
        self.texts = {to_alphabet(word.replace(SPACE, " ")): count for word, count in words.items()}
        cut = split_morphemes(words) if config.morphemes else words
        learning = {to_alphabet(word.replace(SPACE, " ")): count for word, count in cut.items()}
        self.protected = {to_alphabet(syllable) for syllable in ksx1001_syllables()} if config.ksx1001 else set()
        pairs = learn_merges(
            base.encoder(), base.tokens(), learning, config.vocab_size, from_alphabet, required=self.protected
        )
        self.splits = {a + b: (a, b) for a, b in pairs}
        self.candidates = list(self.splits)

    def select(self, candidates: Sequence[str], config: "TokenizerConfig") -> list[str]:
        """Return the candidates that save the most tokens, as `choose_pieces` does."""
        return choose(
            candidates,
            self.splits,
            dict.fromkeys(candidates, 1.0),
            lambda kept: (list(kept), _usage(self.extended(kept), self.texts), []),
            max_pieces=config.max_added or None,
            min_frequency=config.min_frequency,
            protected=self.protected,
        ).pieces

    def extended(self, tokens: Sequence[str], reserved: int = 0) -> ByteLevelBPE:
        """Return the base with the merges that make these tokens."""
        return self.base.extended([self.splits[token] for token in tokens], reserved)


def learn_extension(base_path: Path, words: Mapping[str, float], config: "TokenizerConfig") -> ByteLevelExtension:
    """Return the merges learned behind those of the file at `base_path`."""
    return ByteLevelExtension(ByteLevelBPE.load(base_path), words, config)


def _usage(bpe: ByteLevelBPE, texts: Mapping[str, float]) -> dict[str, float]:
    use = dict.fromkeys(bpe.vocab, 0.0)
    names = {i: token for token, i in bpe.vocab.items()}
    by_id = [0.0] * bpe.size
    encoded = bpe.encoder().encode_batch_fast(list(texts))
    for encoding, count in zip(encoded, texts.values(), strict=True):
        for i in encoding.ids:
            by_id[i] += count
    return use | {names[i]: count for i, count in enumerate(by_id) if i in names}


def decompose_tokens(base: ByteLevelBPE, tokens: Iterable[str]) -> list[list[int]]:
    """Split new tokens, in the byte alphabet, into base ids whose bytes concatenate to exactly theirs."""
    return [encoding.ids for encoding in base.encoder().encode_batch_fast(list(tokens))]


def _why_unusable(raw: dict[str, Any]) -> str:
    model = raw.get("model")
    if not isinstance(model, dict) or "vocab" not in model:
        return "it is no tokenizer.json"
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        return f"its model is {model.get('type', 'not BPE')}, not BPE; there is no exact way to add merges to it"
    if model.get("byte_fallback"):
        return "it is the export of a SentencePiece model; give that tokenizer.model instead"
    steps = raw.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    byte_level = [step for step in steps if step.get("type") == "ByteLevel"]
    # Some bases lack bytes that their corpus never had; those of Korean, and of continuation, must be there.
    if not byte_level or any(
        _TO_CHARACTER[byte] not in model["vocab"] for byte in (*range(0x80, 0xC0), *b"\xe1\xea\xed")
    ):
        return "it is not byte-level"
    if any(step.get("add_prefix_space") for step in byte_level):
        return "it puts a space before every text"
    normalizer = raw.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":
        return f"its normaliser is {normalizer.get('type')}, neither none nor NFC"
    return ""
