"""One way to encode with any tokenizer: a SentencePiece `.model` or a Hugging Face `tokenizer.json`."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from .errors import TokenizerError
from .spm import SPACE, Tokenizer, nfc


class Encoder(Protocol):
    """What comparisons and proofs need of a tokenizer; ids without BOS and EOS."""

    path: Path
    vocab_size: int
    sha256: str

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        ...

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """Return the ids of every text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids."""
        ...

    def normalized(self, text: str) -> str:
        """Return what decoding the ids of a text should give back."""
        ...

    def byte_ids(self) -> frozenset[int]:
        """Return the ids that stand for bytes which are no character: byte fallback, or parts of characters."""
        ...


class SentencePieceEncoder(Tokenizer):
    """A `.model`, with what comparisons need beside what the engine does."""

    def normalized(self, text: str) -> str:
        """Return NFC(text) with spaces for ▁, which SentencePiece cannot tell apart."""
        return nfc(text).replace(SPACE, " ")

    def byte_ids(self) -> frozenset[int]:
        """Return the ids of byte fallback."""
        return frozenset(i for i in range(self.vocab_size) if self.processor.is_byte(i))


class JsonEncoder:
    """A `tokenizer.json` under the package tokenizers, which normalises as the file says.

    Raises TokenizerError when the package is missing, or the file is no tokenizer.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.tokenizer = load_json_tokenizer(self.path)
        self.sha256 = hashlib.sha256(self.path.read_bytes()).hexdigest()
        self.vocab_size: int = self.tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """Return the ids of every text; the package takes its threads from the environment.

        Raises TokenizerError when a text holds a lone surrogate and so is no Unicode text.
        """
        try:
            encoded = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):
            raise TokenizerError(
                "a text holds a lone surrogate; decode the source as UTF-8 with errors='replace' first"
            ) from None
        return [encoding.ids for encoding in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens included."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def normalized(self, text: str) -> str:
        """Return the text as the file normalises it, with spaces for ▁ where it writes them so."""
        normalizer = self.tokenizer.normalizer
        text = normalizer.normalize_str(text) if normalizer is not None else text
        if (
            self.tokenizer.token_to_id("<0x0A>") is not None
        ):  # the export of a SentencePiece model, dummy prefix and all
            text = text.replace(SPACE, " ").removeprefix(" ")
        return text

    def byte_ids(self) -> frozenset[int]:
        """Return the ids that decode to no character of their own."""
        vocabulary = range(self.vocab_size)
        return frozenset(i for i in vocabulary if "\ufffd" in self.tokenizer.decode([i], skip_special_tokens=False))


def load_json_tokenizer(path: Path) -> Any:
    """Return the `tokenizers.Tokenizer` of a file.

    Raises TokenizerError when the package is missing, or the file is no tokenizer.
    """
    try:
        from tokenizers import Tokenizer as HFTokenizer
    except ImportError:
        raise TokenizerError("a tokenizer.json needs the package tokenizers: pip install tokenizers") from None
    try:
        return HFTokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain Exception
        raise TokenizerError(
            f"{str(path)!r} is no tokenizer.json ({' '.join(str(error).split())}); give the one of a checkpoint"
        ) from None


def open_encoder(path: str | Path) -> Encoder:
    """Return the tokenizer at a path: a `.model`, a `.json`, or a folder with either (the `.model` first).

    Raises TokenizerError when there is none that can be read.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("tokenizer.model", "tokenizer.json") if (path / name).exists()]
        if not found:
            raise TokenizerError(f"{str(path)!r} has neither tokenizer.model nor tokenizer.json; name the file itself")
        path = found[0]
    return JsonEncoder(path) if path.suffix == ".json" else SentencePieceEncoder(path)
