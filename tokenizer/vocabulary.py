"""SentencePiece and byte-level vocabularies under one face: names, bytes of text, exact spelling of new pieces."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .byte_level import ByteLevelBPE, decompose_tokens, from_alphabet, is_byte_level, to_alphabet
from .errors import TokenizerError
from .spm import BYTE, SPACE, ModelProto, decompose_pieces, load_model_proto, piece_surfaces


@dataclass(frozen=True)
class Vocabulary:
    """What a vocabulary consists of, by id."""

    path: Path
    names: list[str]  # as the file writes them
    surfaces: list[bytes]  # of text, with a space for ▁; none for control, unknown and special pieces
    _split: Callable[[Sequence[bytes]], list[list[int]]]

    def spell(self, surfaces: Sequence[bytes]) -> list[list[int]]:
        """Split bytes of text into ids whose own bytes are exactly those, by the vocabulary's merges.

        Nothing is added in front, so this is the spelling of a piece inside a text.

        Raises TokenizerError when the vocabulary cannot spell one of them.
        """
        spellings = self._split(surfaces)
        for surface, ids in zip(surfaces, spellings, strict=True):
            spelled = b"".join(self.surfaces[i] for i in ids)
            if spelled != surface:
                raise TokenizerError(
                    f"{str(self.path)!r} spells {surface.decode(errors='replace')!r} as "
                    f"{spelled.decode(errors='replace')!r}; use a base with tokens for all of its bytes"
                )
        return spellings


def find_vocabulary(folder: Path) -> Path:
    """Return the tokenizer's file in a checkpoint's folder: tokenizer.model, or tokenizer.json where there is none."""
    model, byte_level = Path(folder) / "tokenizer.model", Path(folder) / "tokenizer.json"
    return byte_level if byte_level.exists() and not model.exists() else model


def open_vocabulary(path: Path) -> Vocabulary:
    """Read a SentencePiece `.model` that can serve as a base, or a byte-level `tokenizer.json`.

    Raises TokenizerError when the file is missing, or is neither.
    """
    path = Path(path)
    return _byte_level(path, ByteLevelBPE.load(path)) if is_byte_level(path) else _spm(path, load_model_proto(path))


def _spm(path: Path, proto: ModelProto) -> Vocabulary:
    byte_ids = {int(piece.piece[1:-1], 16): i for i, piece in enumerate(proto.pieces) if piece.type == BYTE}

    def split(surfaces: Sequence[bytes]) -> list[list[int]]:
        pieces = [surface.decode(errors="ignore").replace(" ", SPACE) for surface in surfaces]
        return [
            ids if piece.replace(SPACE, " ").encode() == surface else [byte_ids[byte] for byte in surface]
            for surface, piece, ids in zip(surfaces, pieces, decompose_pieces(proto, pieces), strict=True)
        ]

    return Vocabulary(path, [piece.piece for piece in proto.pieces], piece_surfaces(proto), split)


def _byte_level(path: Path, bpe: ByteLevelBPE) -> Vocabulary:
    names, surfaces = [""] * bpe.size, [b""] * bpe.size
    for name, i in {**bpe.vocab, **bpe.specials}.items():
        names[i] = name
    for name, i in bpe.tokens().items():
        surfaces[i] = from_alphabet(name)
    return Vocabulary(path, names, surfaces, lambda wanted: decompose_tokens(bpe, map(to_alphabet, wanted)))
