"""Write a tokenizer as SentencePiece `.model` and as Hugging Face files that give the same ids."""

import json
import os
from pathlib import Path
from typing import Any

from .errors import TokenizerError
from .spm import CONTROL, NORMAL, SPACE, UNKNOWN, ModelProto


def export_hf_tokenizer(
    proto: ModelProto,
    output_dir: str | Path,
    *,
    chat_template: str | None = None,
    model_max_length: int | None = None,
) -> list[Path]:
    """Write tokenizer.model, tokenizer.json, tokenizer_config.json and special_tokens_map.json; return their paths.

    `tokenizer.json` adds BOS as Llama does, normalises to NFC as `Tokenizer.encode` does, and else gives the ids
    of the `.model`. Two differences cannot be avoided: a special such as `<s>` written in a text becomes its id, and
    the text after it gets a ▁ of its own. Every file appears under its name only when it is complete.
    Raises TokenizerError when no list of merges can reproduce the model: tied scores, a piece with a character that
    is no piece.
    """
    specials = {
        "bos_token": proto.pieces[proto.trainer_spec.bos_id].piece,
        "eos_token": proto.pieces[proto.trainer_spec.eos_id].piece,
        "unk_token": proto.pieces[proto.trainer_spec.unk_id].piece,
    }
    config: dict[str, Any] = {
        # transformers' LlamaTokenizer rebuilds the normaliser and so loses leading spaces.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **specials,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "added_tokens_decoder": {
            str(token.pop("id")): token for token in (_added_token(i, text) for i, text in _special_pieces(proto))
        },
    }
    if model_max_length is not None:
        config["model_max_length"] = model_max_length
    if chat_template is not None:
        config["chat_template"] = chat_template
    require_exportable(proto)
    files = {
        "tokenizer.model": proto.SerializeToString(deterministic=True),
        "tokenizer.json": _json(tokenizer_json(proto)),
        "tokenizer_config.json": _json(config),
        "special_tokens_map.json": _json(specials),
    }
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    return [write_file(output_dir / name, data) for name, data in files.items()]


def require_exportable(proto: ModelProto) -> None:
    """Raise TokenizerError when no list of merges gives the ids of this model."""
    names = {piece.piece for piece in proto.pieces}
    scores: dict[float, str] = {}
    for piece in proto.pieces:
        if piece.type != NORMAL or len(piece.piece) == 1:
            continue
        missing = set(piece.piece) - names
        if missing:
            raise TokenizerError(
                f"the piece {piece.piece!r} has the character {min(missing)!r}, which is no piece itself, so Hugging "
                "Face files could not build it; add the character"
            )
        if not piece.piece.strip(SPACE):
            continue
        if piece.score in scores:
            raise TokenizerError(
                f"the pieces {scores[piece.score]!r} and {piece.piece!r} share the score {piece.score:g}, so Hugging "
                "Face files could not give the same ids; give every new piece its own score"
            )
        scores[piece.score] = piece.piece


def tokenizer_json(proto: ModelProto) -> dict[str, Any]:
    """Return the content of a Hugging Face `tokenizer.json` for this model."""
    bos_id = proto.trainer_spec.bos_id
    bos = proto.pieces[bos_id].piece
    prefix = proto.normalizer_spec.add_dummy_prefix

    def sequence(letter: str, type_id: int) -> list[dict[str, Any]]:
        return [
            {"SpecialToken": {"id": bos, "type_id": type_id}},
            {"Sequence": {"id": letter, "type_id": type_id}},
        ]

    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(i, text) for i, text in _special_pieces(proto)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "NFC"},
                *([{"type": "Prepend", "prepend": SPACE}] if prefix else []),
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": sequence("A", 0),
            "pair": sequence("A", 0) + sequence("B", 1),
            "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []),
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": proto.pieces[proto.trainer_spec.unk_id].piece,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece.piece: i for i, piece in enumerate(proto.pieces)},
            "merges": [list(pair) for pair in merges(proto)],
        },
    }


def merges(proto: ModelProto) -> list[tuple[str, str]]:
    """Return every split of a piece into two pieces, ordered by falling score of the whole.

    SentencePiece stores no merges: it joins the adjacent pair whose concatenation has the highest score, the
    leftmost of equals. Whitespace runs share one score; leftmost-first grows the leftmost run as far as it goes,
    and a list of merges does the same when longer runs come first.
    """
    normal = [(i, piece.piece, piece.score) for i, piece in enumerate(proto.pieces) if piece.type == NORMAL]
    # Only normal pieces take part: "</" + "s>" must not become the control piece.
    names = {text for _, text, _ in normal}

    def rank(entry: tuple[int, str, float]) -> tuple[float, int, int]:
        i, text, score = entry
        return -score, 0 if text.strip(SPACE) else -len(text), i

    return [
        (text[:cut], text[cut:])
        for _, text, _ in sorted(normal, key=rank)
        for cut in range(1, len(text))
        if text[:cut] in names and text[cut:] in names
    ]


def _special_pieces(proto: ModelProto) -> list[tuple[int, str]]:
    return [(i, piece.piece) for i, piece in enumerate(proto.pieces) if piece.type in (UNKNOWN, CONTROL)]


def _added_token(index: int, content: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": index, "content": content, **flags}


def _json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()


def write_file(path: Path, data: bytes) -> Path:
    """Write a file that appears under its name only when it is complete; return its path.

    Raises TokenizerError when the system does not let it be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise TokenizerError(
            f"cannot write {str(path)!r} ({error.strerror}); free the space or choose another folder"
        ) from error
    return path
