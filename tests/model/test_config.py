"""Configurations mean what they mean to transformers, and what is not supported is refused by name."""

import json

import pytest
from transformers import AutoConfig

from redwhale.model import CheckpointError, ModelConfig, read_config

LLAMA = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def write(folder, **settings):
    (folder / "config.json").write_text(json.dumps({**LLAMA, **settings}))
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {"rms_norm_eps": 1e-5, "num_key_value_heads": 2},
        {"rope_theta": 500_000.0, "head_dim": 32, "tie_word_embeddings": True},
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "max_position_embeddings": 77},
        {"rope_scaling": None, "rope_theta": 12345, "initializer_range": 0.5, "eos_token_id": 7},
        {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 9},
        {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None},
        {"model_type": "mistral", "num_key_value_heads": 2},
        # A sliding window is Mistral's: transformers ignores the key in a Llama configuration, and so do we.
        {"num_key_value_heads": 4},
    ],
    ids=str,
)
def test_a_configuration_means_what_it_means_to_transformers(tmp_path, settings):
    theirs = AutoConfig.from_pretrained(write(tmp_path, **settings))
    ours = read_config(tmp_path)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)
    shared = [
        *("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps"),
        *("num_key_value_heads", "intermediate_size", "tie_word_embeddings", "initializer_range"),
    ]
    for name in shared:
        assert getattr(ours, name) == getattr(theirs, name), name


def test_a_window_in_a_llama_configuration_is_not_used(tmp_path):
    assert read_config(write(tmp_path, sliding_window=9)).sliding_window is None


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_a_configuration_survives_being_written_and_read(model_type):
    config = ModelConfig(
        model_type=model_type,
        vocab_size=11,
        hidden_size=12,
        intermediate_size=13,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=4,
        max_position_embeddings=99,
        rms_norm_eps=1e-7,
        rope_theta=77.0,
        sliding_window=5 if model_type == "mistral" else None,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=4,
        eos_token_id=5,
        pad_token_id=6,
    )
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf("bfloat16")))) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported: llama, mistral"),
        ({"model_type": "mistral", "attention_bias": True}, "a Mistral checkpoint has no attention biases"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "sliding window on some layers is not supported"),
        ({"mlp_bias": True}, "biases are not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "RoPE scaling of type 'yarn' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "RoPE scaling of type 'linear' needs factor"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "RoPE scaling of type 'llama3' needs factor"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ({"head_dim": 15}, "15 rotated dimensions are odd"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, settings, message):
    with pytest.raises(CheckpointError, match=message) as error:
        read_config(write(tmp_path, **settings))
    assert str(tmp_path / "config.json") in str(error.value)


@pytest.mark.parametrize("missing", ["vocab_size", "hidden_size", "num_attention_heads"])
def test_a_missing_setting_is_named(tmp_path, missing):
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in LLAMA.items() if k != missing}))
    with pytest.raises(CheckpointError, match=f"config.json has no '{missing}'"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        (b"[1, 2]", "it holds a list"),
    ],
)
def test_a_damaged_configuration_is_one_clear_sentence(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        read_config(tmp_path)
    assert "\n" not in str(error.value)
