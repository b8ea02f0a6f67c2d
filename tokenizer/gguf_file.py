"""Read the byte-level tokenizer of a GGUF file as the `tokenizer.json` it was made of."""

import mmap
import struct
from pathlib import Path
from typing import Any

from .errors import TokenizerError

# Value types of the GGUF specification, version 3, with struct's letters; strings and arrays apart.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_CONTROL, _USER_DEFINED = 3, 4

_GPT2 = [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split_by(digits: str) -> list[dict[str, Any]]:
    pattern = {"Regex": _SPLIT % digits}
    return [
        {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]


# `tokenizer.ggml.pre` names how a model cuts texts into words.
_PRE_TOKENIZERS = {
    "gpt-2": _GPT2,
    "smollm": [{"type": "Digits", "individual_digits": True}, *_GPT2],
    "llama-bpe": _split_by("{1,3}"),
    "qwen2": _split_by(""),
}


def byte_level_json(path: Path) -> dict[str, Any]:
    """Return the content of a `tokenizer.json` with the vocabulary, merges and special tokens of a GGUF file.

    Raises TokenizerError when the file is no GGUF, or its tokenizer is not byte-level BPE of a kind known here.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        metadata = _metadata(data, path)
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or pre not in _PRE_TOKENIZERS:
        known = ", ".join(_PRE_TOKENIZERS)
        raise TokenizerError(f"the tokenizer of {str(path)!r} is {kind}/{pre}; known are gpt2 with one of {known}")
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    specials = [i for i, kind in enumerate(kinds) if kind in (_CONTROL, _USER_DEFINED)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": tokens[i], **flags} for i in specials],
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _PRE_TOKENIZERS[pre]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre == "llama-bpe",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": metadata["tokenizer.ggml.merges"],
        },
    }


def pre_tokenizer_name(raw: dict[str, Any], path: Path) -> str:
    """Return the name that GGUF has for how a `tokenizer.json` cuts texts into words.

    Raises TokenizerError when it has none that is known here.
    """
    steps = raw["pre_tokenizer"].get("pretokenizers", [raw["pre_tokenizer"]])
    for name, known in _PRE_TOKENIZERS.items():
        if _essence(steps) == _essence(known):
            return name
    raise TokenizerError(f"GGUF has no name for how {str(path)!r} cuts texts into words, or none that is known here")


def _essence(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    # Trimmed offsets change no ids; a regular expression is on where a file does not say.
    return [{"use_regex": True, **{k: v for k, v in step.items() if k != "trim_offsets"}} for step in steps]


def _metadata(data: mmap.mmap, path: Path) -> dict[str, Any]:
    if data[:4] != b"GGUF":
        raise TokenizerError(f"{str(path)!r} is no GGUF file")
    place = 24
    (pairs,) = struct.unpack_from("<Q", data, 16)

    def scalar(letter: str) -> Any:
        nonlocal place
        (value,) = struct.unpack_from("<" + letter, data, place)
        place += struct.calcsize("<" + letter)
        return value

    def string() -> str:
        nonlocal place
        size = scalar("Q")
        place += size
        return data[place - size : place].decode(errors="replace")

    def value(kind: int) -> Any:
        if kind == _STRING:
            return string()
        if kind == _ARRAY:
            inner, length = scalar("I"), scalar("Q")
            return [value(inner) for _ in range(length)]
        return scalar(_SCALARS[kind])

    return {string(): value(scalar("I")) for _ in range(pairs)}
