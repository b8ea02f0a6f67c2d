"""Tiny random checkpoints, written by transformers: what the model is compared with."""

from pathlib import Path

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

_CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "phi": (PhiConfig, PhiForCausalLM),
}

_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 48,
}

VARIANTS = {
    "llama grouped queries": ("llama", {"num_key_value_heads": 2, "rope_theta": 500_000.0}),
    "llama tied": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "mistral sliding window": ("mistral", {"num_key_value_heads": 2, "sliding_window": 16}),
    "mistral wide heads": ("mistral", {"num_key_value_heads": 1, "head_dim": 32, "rope_theta": 1e6}),
    "llama biases": ("llama", {"attention_bias": True}),
    "llama linear scaling": ("llama", {"rope": {"rope_type": "linear", "factor": 3.0}}),
    "llama llama3 scaling": ("llama", {"rope": _LLAMA3}),
    "qwen2": ("qwen2", {"rope_theta": 1e6}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "phi": ("phi", {"num_key_value_heads": 4, "rope": {"partial_rotary_factor": 0.5}}),
    "phi grouped queries": ("phi", {"num_key_value_heads": 2, "rope": {"partial_rotary_factor": 0.25}}),
    "mistral tied window": ("mistral", {"num_key_value_heads": 2, "sliding_window": 7, "tie_word_embeddings": True}),
}


def write_transformers_checkpoint(
    folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, max_shard_size: str = "1GB", **settings
) -> PreTrainedModel:
    config_class, model_class = _CLASSES[kind]
    defaults = {
        "num_key_value_heads": 2,
        "rope_theta": 10_000.0,
        "sliding_window": None,
        "max_position_embeddings": 160,
    }
    settings = {**defaults, **settings}
    rope = {"rope_type": "default", **settings.pop("rope", {})}
    settings["rope_parameters"] = {"rope_theta": settings.pop("rope_theta"), **rope}
    if kind != "mistral":
        del settings["sliding_window"]
    config = config_class(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=3,
        num_attention_heads=4,
        **{"layer_norm_eps" if kind == "phi" else "rms_norm_eps": 1e-5},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
        # The eager attention is the formula itself, not the kernel that the model under test calls.
        attn_implementation="eager",
        **settings,
    )
    model = model_class(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Trained models have norms off one and logits of several units; the default of 0.02 would hide errors.
            if parameter.dim() == 1 and not name.endswith(".bias"):
                parameter.normal_(1.0, 0.3, generator=generator)
            else:
                parameter.normal_(0.0, 0.15, generator=generator)
    model.eval().to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return model


@pytest.fixture(scope="session")
def write_hf():
    """`write_transformers_checkpoint`, for tests that want a checkpoint of their own."""
    return write_transformers_checkpoint


@pytest.fixture(scope="session", params=VARIANTS)
def variant(request, tmp_path_factory) -> tuple[PreTrainedModel, Path]:
    """Every variant of the family: transformers' model and the folder it was saved to. Read only."""
    kind, settings = VARIANTS[request.param]
    folder = tmp_path_factory.mktemp("variant")
    return write_transformers_checkpoint(folder, kind, **settings), folder


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """One Llama checkpoint in fp32. Read only."""
    folder = tmp_path_factory.mktemp("base")
    write_transformers_checkpoint(folder)
    return folder


@pytest.fixture
def ids() -> torch.Tensor:
    """60 token ids, longer than every sliding window."""
    return torch.randint(0, 300, (60,), generator=torch.Generator().manual_seed(3))
