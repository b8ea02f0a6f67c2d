"""Configurations of well-known models by name, and a tiny version of each to try things with."""

from __future__ import annotations

from dataclasses import replace

from .config import ModelConfig
from .errors import CheckpointError

# huggingface.co/upstage/SOLAR-10.7B-v1.0, config.json.
_SOLAR = ModelConfig(
    model_type="llama",
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=48,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    rope_theta=10_000.0,
)

# huggingface.co/mistralai/Mistral-7B-v0.1, config.json.
_MISTRAL_7B = replace(
    _SOLAR, model_type="mistral", num_hidden_layers=32, max_position_embeddings=32_768, sliding_window=4096
)

# huggingface.co/meta-llama/Llama-2-7b-hf, config.json.
_LLAMA_2_7B = replace(_SOLAR, intermediate_size=11_008, num_hidden_layers=32, num_key_value_heads=32)

# huggingface.co/meta-llama/Meta-Llama-3-8B, config.json.
_LLAMA_3_8B = replace(
    _SOLAR,
    vocab_size=128_256,
    num_hidden_layers=32,
    max_position_embeddings=8192,
    rope_theta=500_000.0,
    bos_token_id=128_000,
    eos_token_id=128_001,
)

_PUBLISHED = {
    "solar-10.7b": _SOLAR,
    # upstage/SOLAR-10.7B-Instruct-v1.0.
    "solar-10.7b-instruct": replace(_SOLAR, pad_token_id=2),
    "mistral-7b-v0.1": _MISTRAL_7B,
    "llama-2-7b": _LLAMA_2_7B,
    "llama-3-8b": _LLAMA_3_8B,
    # yanolja/EEVE-Korean-10.8B-v1.0. Its end of text is the first of the added tokens.
    "eeve-korean-10.8b": replace(_SOLAR, vocab_size=40_960, eos_token_id=32_000),
    # beomi/OPEN-SOLAR-KO-10.7B.
    "open-solar-ko-10.7b": replace(_SOLAR, vocab_size=46_592, max_position_embeddings=2048, pad_token_id=2),
    # beomi/open-llama-2-ko-7b. Its epsilon is not that of Llama-2.
    "open-llama-2-ko-7b": replace(
        _LLAMA_2_7B, vocab_size=46_336, max_position_embeddings=2048, rms_norm_eps=1e-6, pad_token_id=2
    ),
}


def with_vocab_size(config: ModelConfig, vocab_size: int) -> ModelConfig:
    """`config` for another vocabulary; special tokens that it ends before get the ids of SentencePiece models.

    These are 1 for the beginning of a text and 2 for its end; there is no padding token.

    Raises:
        CheckpointError: if the vocabulary has no place for them.
    """
    if vocab_size < 3:
        raise CheckpointError(f"a vocabulary of {vocab_size} is too small: it needs ids 1 and 2 for special tokens")

    def fitting(token_id: int | None, otherwise: int | None) -> int | None:
        return token_id if token_id is None or token_id < vocab_size else otherwise

    return replace(
        config,
        vocab_size=vocab_size,
        bos_token_id=fitting(config.bos_token_id, 1),
        eos_token_id=fitting(config.eos_token_id, 2),
        pad_token_id=fitting(config.pad_token_id, None),
    )


def tiny(config: ModelConfig) -> ModelConfig:
    """A model of a few hundred thousand parameters with the proportions of `config`.

    Sizes are divided: hidden and feed-forward by 64, vocabulary by 32, layers by 8, heads of both kinds by 4. What
    belongs to positions stays (theta, scaling, window, context length), so that a recipe made for the large model
    runs on the tiny one with the same sequences.
    """
    heads = config.num_attention_heads // 4
    hidden = config.hidden_size // 64
    smaller = replace(
        config,
        hidden_size=hidden,
        intermediate_size=config.intermediate_size // 64,
        num_hidden_layers=config.num_hidden_layers // 8,
        num_attention_heads=heads,
        num_key_value_heads=config.num_key_value_heads // 4,
        head_dim=hidden // heads,
    )
    return with_vocab_size(smaller, config.vocab_size // 32)


PRESETS: dict[str, ModelConfig] = {
    **_PUBLISHED,
    **{f"tiny-{name}": tiny(config) for name, config in _PUBLISHED.items()},
}
"""All presets by name.

The values are those of the models' own `config.json`: read there for solar-10.7b, in published copies of it for
mistral-7b-v0.1, llama-2-7b and llama-3-8b. Of the other four, only the `config.json` of models fine-tuned from them
could be compared, which copy it; for open-solar-ko-10.7b one of these said 4,096 positions instead of 2,048.
"""


def preset(name: str, *, vocab_size: int | None = None) -> ModelConfig:
    """The preset of this name, with another vocabulary size if one is given.

    Raises:
        CheckpointError: if there is no such preset, or no such vocabulary can be.
    """
    if name not in PRESETS:
        raise CheckpointError(f"there is no preset {name!r}; presets: {', '.join(PRESETS)}")
    return PRESETS[name] if vocab_size is None else with_vocab_size(PRESETS[name], vocab_size)
