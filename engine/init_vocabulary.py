"""Base and hybrid vocabulary of an init step, whether SentencePiece or byte-level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..model import ModelConfig
from ..tokenizer import Encoder, Tokenizer, Vocabulary, open_encoder, open_vocabulary
from ..tokenizer.byte_level import is_byte_level
from .evaluation import TextEncoder


@dataclass(frozen=True)
class ByteLevelEncoder:
    """A byte-level tokenizer.json, with the special tokens that a model's configuration names."""

    encoder: Encoder
    vocab_size: int
    bos_id: int | None
    eos_id: int | None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts, without BOS and EOS."""
        return self.encoder.encode_batch(texts)


def text_encoder(path: Path, config: ModelConfig) -> TextEncoder:
    """The encoder of a tokenizer's file, for a model with this configuration."""
    if not is_byte_level(path):
        return Tokenizer(path)
    size = len(open_vocabulary(path).names)
    return ByteLevelEncoder(open_encoder(path), size, config.bos_token_id, config.eos_token_id)


@dataclass(frozen=True)
class HybridVocabulary:
    """New pieces behind those of a base, and how the base spells them."""

    base: Vocabulary
    hybrid: Vocabulary
    decompositions: list[list[int]]
    """Base ids of every new piece."""

    @classmethod
    def open(cls, base_path: Path, hybrid_path: Path) -> HybridVocabulary:
        """Read both files; raises TokenizerError where one cannot be used or the base cannot spell a piece."""
        base, hybrid = open_vocabulary(base_path), open_vocabulary(hybrid_path)
        return cls(base, hybrid, base.spell(_new_surfaces(hybrid, len(base.names))))

    @property
    def first_new_row(self) -> int:
        """Id of the first new piece."""
        return len(self.base.names)

    @property
    def pieces(self) -> list[str]:
        """Names of the new pieces."""
        return self.hybrid.names[self.first_new_row :]

    @property
    def surfaces(self) -> list[bytes]:
        """Bytes of text of every token; of new special tokens, their names'."""
        return [*self.base.surfaces, *_new_surfaces(self.hybrid, self.first_new_row)]


def _new_surfaces(hybrid: Vocabulary, first: int) -> list[bytes]:
    # Reserved special tokens are no text; their rows begin as what their names say.
    return [
        surface or name.encode() for surface, name in zip(hybrid.surfaces[first:], hybrid.names[first:], strict=True)
    ]
