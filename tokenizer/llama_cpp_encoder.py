"""Ask llama.cpp what ids it gives, by a GGUF file that holds a vocabulary and no weights."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .byte_level import is_byte_level
from .errors import TokenizerError
from .gguf_file import pre_tokenizer_name
from .spm import ModelProto, parse_model, read_model_bytes

# Token types of the GGUF specification for those of byte-level vocabularies; SentencePiece's have the same numbers.
_NORMAL, _CONTROL, _UNUSED = 1, 3, 5


class LlamaCpp:
    """The tokenizer of llama.cpp for a `.model` or a byte-level `tokenizer.json`.

    llama.cpp does not normalise, so texts are given to it in NFC.

    Args:
        path: of the file.

    Raises:
        ImportError: where llama-cpp-python or gguf is not installed.
        TokenizerError: when llama.cpp has no tokenizer of this kind.
    """

    def __init__(self, path: Path) -> None:
        from llama_cpp import Llama  # pyright: ignore[reportMissingImports]

        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "vocabulary.gguf"
            write_vocabulary(Path(path), file)
            try:
                self._llama = Llama(str(file), vocab_only=True, verbose=False)
            except ValueError as error:
                raise TokenizerError(f"llama.cpp does not load the vocabulary of {str(path)!r} ({error})") from None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of normalised texts, without BOS, specials in them taken as text."""
        return [self._llama.tokenize(text.encode(), add_bos=False, special=False) for text in texts]


def write_vocabulary(path: Path, output: Path) -> None:
    """Write the vocabulary of a `.model` or a byte-level `tokenizer.json` as a GGUF file.

    Raises:
        ImportError: where gguf is not installed.
        TokenizerError: for a byte-level tokenizer that cuts texts into words by rules which have no name in GGUF.
    """
    from gguf import GGUFWriter  # pyright: ignore[reportMissingImports]

    writer = GGUFWriter(output, "llama")
    if is_byte_level(path):
        _add_byte_level(writer, json.loads(path.read_text(encoding="utf-8")), path)
    else:
        _add_sentencepiece(writer, parse_model(read_model_bytes(path), path))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def _add_sentencepiece(writer: Any, proto: ModelProto) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece.piece.encode() for piece in proto.pieces])
    writer.add_token_scores([piece.score for piece in proto.pieces])
    writer.add_token_types([piece.type for piece in proto.pieces])
    writer.add_bos_token_id(proto.trainer_spec.bos_id)
    writer.add_eos_token_id(proto.trainer_spec.eos_id)
    writer.add_unk_token_id(proto.trainer_spec.unk_id)
    writer.add_add_space_prefix(proto.normalizer_spec.add_dummy_prefix)


def _add_byte_level(writer: Any, raw: dict[str, Any], path: Path) -> None:
    specials = {token["content"]: token["id"] for token in raw.get("added_tokens", [])}
    tokens = {i: token for token, i in {**raw["model"]["vocab"], **specials}.items()}
    names = [tokens.get(i, f"<unused {i}>") for i in range(max(tokens) + 1)]
    kinds = [_CONTROL if name in specials else _NORMAL if i in tokens else _UNUSED for i, name in enumerate(names)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in raw["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(raw, path))
    writer.add_token_list(names)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
