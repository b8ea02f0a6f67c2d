"""Model configuration, read from and written to Hugging Face's `config.json`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError
from .rope_scaling import RoPEScaling, inverse_frequencies

_SUPPORTED = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "phi": "PhiForCausalLM",
}
_ACTIVATION = {"phi": "gelu_new"}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and constants of a Llama- or Mistral-family decoder, under their Hugging Face names."""

    model_type: str = "llama"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    """Added to the mean square of a norm's input; of Phi's LayerNorm, to the variance."""
    rope_theta: float = 10_000.0
    rope_scaling: RoPEScaling | None = None
    """What stretches the context beyond that of pretraining."""
    partial_rotary_factor: float = 1.0
    """Share of each head's dimensions that positions rotate (Phi-2: 0.4)."""
    attention_bias: bool = False
    """Llama: biases on all four attention projections. Qwen-2 always has them on q, k and v alone."""
    sliding_window: int | None = None
    """Tokens that a position may look back on, itself included; None for all (Mistral-7B-v0.1: 4,096)."""
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.rotary_dim % 2:
            raise CheckpointError(f"{self.rotary_dim} rotated dimensions are odd, but rotary embedding turns pairs")

    @property
    def rotary_dim(self) -> int:
        """Dimensions of each head that positions rotate."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def qkv_bias(self) -> bool:
        return self.attention_bias or self.model_type == "qwen2"

    @property
    def output_bias(self) -> bool:
        return self.attention_bias

    @property
    def context_length(self) -> int:
        """Most tokens of a sequence; "dynamic" scaling reaches beyond the positions of pretraining."""
        if self.rope_scaling is not None and self.rope_scaling.rope_type == "dynamic":
            return int(self.max_position_embeddings * self.rope_scaling.factor)
        return self.max_position_embeddings

    def inverse_frequencies(self, lengths: Sequence[int], counts: Sequence[int], device: torch.device) -> Tensor:
        """Rotary frequencies of the last `counts` tokens of texts of `lengths` tokens; see rope_scaling.py."""
        return inverse_frequencies(
            self.rotary_dim, self.rope_theta, self.rope_scaling, self.max_position_embeddings, lengths, counts, device
        )

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> ModelConfig:
        """Build from the contents of a `config.json`; raises CheckpointError for what is not supported."""
        if not isinstance(raw, dict):
            raise CheckpointError(f"it holds a {type(raw).__name__}, not the settings of a model")
        model_type = raw.get("model_type", "?")
        if model_type not in _SUPPORTED:
            raise CheckpointError(f"model_type {model_type!r} is not supported; supported: {', '.join(_SUPPORTED)}")
        if raw.get("mlp_bias"):
            raise CheckpointError("checkpoints with MLP biases are not supported")
        if model_type == "mistral" and raw.get("attention_bias"):
            raise CheckpointError("a Mistral checkpoint has no attention biases, but attention_bias is true")
        if model_type == "qwen2" and raw.get("use_sliding_window"):
            raise CheckpointError("Qwen-2 with a sliding window on some layers is not supported")
        activation = _ACTIVATION.get(model_type, "silu")
        if raw.get("hidden_act", activation) != activation:
            raise CheckpointError(f"hidden_act {raw['hidden_act']!r} is not supported; the family uses {activation!r}")
        if raw.get("qk_layernorm"):
            raise CheckpointError("Phi with normalised queries and keys (qk_layernorm) is not supported")
        # transformers 5 nests the rotary constants; version 4 has `rope_theta` and `rope_scaling` on top.
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        partial = 0.5 if model_type == "phi" else 1.0
        try:
            heads = raw["num_attention_heads"]
            eos = raw.get("eos_token_id")
            return cls(
                model_type=model_type,
                vocab_size=raw["vocab_size"],
                hidden_size=raw["hidden_size"],
                intermediate_size=raw["intermediate_size"],
                num_hidden_layers=raw["num_hidden_layers"],
                num_attention_heads=heads,
                num_key_value_heads=raw.get("num_key_value_heads") or heads,
                head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
                max_position_embeddings=raw.get("max_position_embeddings", 2048),
                rms_norm_eps=raw.get("layer_norm_eps", 1e-5) if model_type == "phi" else raw.get("rms_norm_eps", 1e-6),
                rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10_000.0),
                partial_rotary_factor=rope.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or partial,
                rope_scaling=RoPEScaling.from_hf(rope),
                attention_bias=bool(raw.get("attention_bias", False)),
                # A Mistral configuration that says nothing means 4,096, as in transformers; null means none.
                sliding_window=raw.get("sliding_window", 4096) if model_type == "mistral" else None,
                tie_word_embeddings=raw.get("tie_word_embeddings", False),
                initializer_range=raw.get("initializer_range", 0.02),
                bos_token_id=raw.get("bos_token_id"),
                eos_token_id=eos[0] if isinstance(eos, list) else eos,
                pad_token_id=raw.get("pad_token_id"),
            )
        except KeyError as missing:
            raise CheckpointError(f"config.json has no {missing}") from None

    def to_hf(self, dtype: str) -> dict[str, Any]:
        """The contents of a `config.json` that transformers 4 and 5, vLLM and llama.cpp read.

        Args:
            dtype: name of the weights' dtype, such as "bfloat16".
        """
        scaling = self.rope_scaling.to_hf() if self.rope_scaling is not None else {}
        raw = {
            "architectures": [_SUPPORTED[self.model_type]],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": _ACTIVATION.get(self.model_type, "silu"),
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default", **scaling},
            "tie_word_embeddings": self.tie_word_embeddings,
            "initializer_range": self.initializer_range,
            "attention_dropout": 0.0,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "pad_token_id": self.pad_token_id,
            "use_cache": True,
            "torch_dtype": dtype,
        }
        if scaling:  # where version 4 of transformers, and tools written for it, look
            raw["rope_scaling"] = scaling
        if self.model_type == "mistral":
            raw["sliding_window"] = self.sliding_window
        elif self.model_type == "llama":
            raw.update(attention_bias=self.attention_bias, mlp_bias=False)
        elif self.model_type == "qwen2":
            raw["use_sliding_window"] = False
        else:
            raw["layer_norm_eps"] = raw.pop("rms_norm_eps")
            raw["partial_rotary_factor"] = self.partial_rotary_factor
            raw["rope_parameters"]["partial_rotary_factor"] = self.partial_rotary_factor
            raw.update(qk_layernorm=False, embd_pdrop=0.0, resid_pdrop=0.0)
        if self.model_type in ("qwen2", "phi") and self.head_dim * self.num_attention_heads == self.hidden_size:
            del raw["head_dim"]  # configurations of these families have no such key
        return raw


def read_config(checkpoint: Path) -> ModelConfig:
    """Read `checkpoint/config.json`; raises CheckpointError where it is missing or not usable."""
    path = Path(checkpoint) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{checkpoint} is not a checkpoint folder: it has no config.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    try:
        return ModelConfig.from_hf(raw)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
