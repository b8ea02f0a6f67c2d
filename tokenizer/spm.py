"""Read SentencePiece BPE models, decompose pieces exactly, and wrap a model for the engine."""

import hashlib
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sentencepiece
from google.protobuf.message import DecodeError

from .errors import TokenizerError

if TYPE_CHECKING:

    class ModelProto(Any):
        """The protobuf message of a SentencePiece model; its generated module has no type information."""
else:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

# ModelProto.SentencePiece.Type and TrainerSpec.ModelType of sentencepiece_model.proto.
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
BPE_MODEL_TYPE = 2
SPACE = "▁"


def nfc(text: str) -> str:
    """Return `text` in Unicode NFC (decomposed Hangul costs ten times the tokens)."""
    return text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


def read_model_bytes(path: str | Path) -> bytes:
    """Return the bytes of a model file.

    Raises TokenizerError when there is no readable file.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise TokenizerError(
            f"cannot read the tokenizer model {str(path)!r} ({error.strerror}); give the path of a SentencePiece .model"
        ) from None


def parse_model(data: bytes, name: str | Path) -> ModelProto:
    """Return the ModelProto held in `data`; `name` is what error messages call it.

    Raises TokenizerError when the bytes are no SentencePiece model.
    """
    proto = ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError:
        proto.Clear()
    if not proto.pieces:
        raise TokenizerError(
            f"{str(name)!r} is not a SentencePiece model; give the tokenizer.model of a Llama or Mistral checkpoint "
            "(Llama 3 and later have none)"
        )
    return proto


def load_model_proto(path: str | Path) -> ModelProto:
    """Read a SentencePiece model that can serve as a base: BPE, identity normaliser, byte fallback.

    Raises TokenizerError when the file is missing, is no SentencePiece model, or is of a kind whose extension could
    not be exported with identical ids.
    """
    proto = parse_model(read_model_bytes(path), path)
    problem = _why_unusable(proto)
    if problem:
        raise TokenizerError(
            f"{str(path)!r} cannot be extended: {problem}; use a base of the Llama 2 or Mistral kind "
            "(BPE, identity normaliser, byte fallback)"
        )
    _load(proto.SerializeToString(), path)
    return proto


def _load(data: bytes, name: str | Path) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=data)
    except RuntimeError as error:  # duplicate pieces and other contradictions
        raise TokenizerError(
            f"SentencePiece refuses {str(name)!r} ({' '.join(str(error).split())}); get an undamaged copy of the model"
        ) from error


def _why_unusable(proto: ModelProto) -> str:
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != BPE_MODEL_TYPE:
        kind = trainer.DESCRIPTOR.enum_types_by_name["ModelType"].values_by_number[trainer.model_type].name
        return f"its model type is {kind.lower()}, not bpe"
    if normalizer.precompiled_charsmap:
        return f"its normaliser is {normalizer.name or 'custom'!r}, not identity"
    if normalizer.remove_extra_whitespaces or not normalizer.escape_whitespaces or trainer.treat_whitespace_as_suffix:
        return "its whitespace handling is not that of Llama (spaces kept, escaped as a prefix)"
    types = [piece.type for piece in proto.pieces]
    if not trainer.byte_fallback or types.count(BYTE) != 256:
        return "it has no byte fallback"
    if set(types) - {NORMAL, UNKNOWN, CONTROL, BYTE}:
        return "it has user-defined or unused pieces"
    for name, index, kind in (
        ("unknown", trainer.unk_id, UNKNOWN),
        ("beginning-of-text", trainer.bos_id, CONTROL),
        ("end-of-text", trainer.eos_id, CONTROL),
    ):
        if not 0 <= index < len(types) or types[index] != kind:
            return f"it has no {name} piece"
    return ""


def bare_processor(proto: ModelProto) -> sentencepiece.SentencePieceProcessor:
    """Return a processor of `proto` that segments exactly the characters it is given.

    No dummy prefix is added and no whitespace removed, so a piece can be encoded as itself, its ▁ included.
    """
    copy = ModelProto()
    copy.CopyFrom(proto)
    copy.normalizer_spec.add_dummy_prefix = False
    copy.normalizer_spec.remove_extra_whitespaces = False
    return sentencepiece.SentencePieceProcessor(model_proto=copy.SerializeToString())


def decompose_pieces(base: ModelProto, pieces: Iterable[str]) -> list[list[int]]:
    """Split each piece into base ids whose pieces and bytes concatenate to exactly that piece.

    `base.encode(piece)` is not this: it puts a dummy ▁ before every piece, and a second one before a piece that
    starts with ▁. Raises TokenizerError when the base cannot spell a piece (no byte fallback).
    """
    pieces = list(pieces)
    decompositions = bare_processor(base).encode(pieces)
    surface = [_surface(piece) for piece in base.pieces]
    for piece, ids in zip(pieces, decompositions, strict=True):
        spelled = b"".join(surface[i] for i in ids)
        if spelled != piece.encode():
            raise TokenizerError(
                f"the base tokenizer spells the piece {piece!r} as {spelled.decode(errors='replace')!r}; "
                "use a base with byte fallback and an identity normaliser"
            )
    return decompositions


def piece_surfaces(proto: ModelProto) -> list[bytes]:
    """Return the bytes of text that each piece stands for, none for control and unknown pieces."""
    return [_surface(piece).replace(SPACE.encode(), b" ") for piece in proto.pieces]


def _surface(piece: Any) -> bytes:
    """Bytes that a piece stands for, ▁ kept as it is."""
    if piece.type == BYTE:
        return bytes([int(piece.piece[1:-1], 16)])
    return piece.piece.encode() if piece.type == NORMAL else b""


class Tokenizer:
    """A SentencePiece `.model` as the engine uses it.

    Texts are NFC-normalised before they are encoded, so `decode(encode(text)) == NFC(text)` for text without a
    literal ▁ (which SentencePiece cannot tell from a space). Neither BOS nor EOS is added.
    Raises TokenizerError when the file is missing or is no SentencePiece model.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        data = read_model_bytes(path)
        normalizer = parse_model(data, path).normalizer_spec
        # What decoding takes off the start of a text: the dummy prefix, or all of the leading spaces.
        self.strips_prefix: bool = normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces
        self.strips_leading_spaces: bool = normalizer.remove_extra_whitespaces
        self.sha256 = hashlib.sha256(data).hexdigest()  # of the file's bytes
        self.processor = _load(data, path)
        self.vocab_size: int = self.processor.vocab_size()
        self.bos_id: int = self.processor.bos_id()
        self.eos_id: int = self.processor.eos_id()
        self.unk_id: int = self.processor.unk_id()

    def __reduce__(self) -> tuple[Callable[..., "Tokenizer"], tuple[Path]]:
        return Tokenizer, (self.path,)

    def encode(self, text: str) -> list[int]:
        """Return the ids of NFC(text).

        Raises TokenizerError when the text holds a lone surrogate and so is no Unicode text.
        """
        return self.processor.encode(_utf8(text))

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """Return the ids of every NFC(text), using `threads` native threads; same results as `encode`.

        Raises TokenizerError when a text holds a lone surrogate and so is no Unicode text.
        """
        return self.processor.encode([_utf8(text) for text in texts], num_threads=threads)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; BOS and EOS vanish, each byte that is not UTF-8 becomes U+FFFD.

        Raises TokenizerError when an id is outside the vocabulary.
        """
        ids = [self._checked(i) for i in ids]
        return self.processor.decode(ids)

    def id_to_piece(self, index: int) -> str:
        """Return the piece with this id, ▁ and `<0xNN>` as they are in the vocabulary.

        Raises TokenizerError when the id is outside the vocabulary.
        """
        return self.processor.id_to_piece(self._checked(index))

    def _checked(self, index: int) -> int:
        index = int(index)
        if not 0 <= index < self.vocab_size:
            raise TokenizerError(
                f"token id {index} is outside the vocabulary of {self.vocab_size} pieces of {str(self.path)!r}; "
                "use the tokenizer that belongs to the checkpoint or token shards"
            )
        return index


def _utf8(text: str) -> bytes:
    try:
        return nfc(text).encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"the text {text[:40]!r} holds the lone surrogate {error.object[error.start]!r}; "
            "decode the source as UTF-8 with errors='replace' first"
        ) from None
