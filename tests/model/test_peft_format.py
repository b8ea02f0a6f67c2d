"""Adapters move to and from the peft library with equal logits; what plain LoRA cannot hold is refused."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from redwhale.model import (
    CheckpointError,
    LoRALinear,
    PackedDocuments,
    add_lora,
    load_adapter,
    load_model,
    merge_lora,
    save_adapter,
    save_model,
)

# peft asks transformers by a name that is about to go.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

SEVEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}

OURS = {
    "all seven": {"r": 4, "alpha": 6.0},
    "rsLoRA": {"r": 4, "alpha": 2.0, "rslora": True},
    "fractional alpha": {"r": 3, "alpha": 4.5},
    "two projections": {"r": 2, "alpha": 4.0, "targets": ["q_proj", "up_proj"]},
    "one layer of one": {"r": 4, "alpha": 8.0, "targets": ["model.layers.1.mlp.down_proj"]},
    "pattern": {"r": 4, "alpha": 8.0, "targets": r"model\.layers\.[02]\.self_attn\..*_proj"},
    "dropout": {"r": 4, "alpha": 8.0, "dropout": 0.5},
}

THEIRS = {
    "list": {"target_modules": ["q_proj", "v_proj"]},
    "pattern": {"target_modules": r".*\.(0|2)\.mlp\.(up|down)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "rsLoRA": {"target_modules": ["o_proj"], "use_rslora": True},
    "some layers": {"target_modules": ["k_proj", "gate_proj"], "layers_to_transform": [0, 2]},
    "one layer": {"target_modules": ["k_proj"], "layers_to_transform": 1},
    "dropout": {"target_modules": ["q_proj"], "lora_dropout": 0.5},
    "whole name": {"target_modules": ["model.layers.2.self_attn.v_proj", "down_proj"]},
}


def fill(tensors, std=0.1):
    """Values that a trained adapter could have; fresh ones have B = 0 and change nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in tensors:
            tensor.normal_(0, std, generator=generator)


def adapted(base, dtype=torch.float32, **settings):
    model = load_model(base, dtype=dtype)
    names = add_lora(model, **settings)
    fill(model.get_parameter(name) for name in names)
    return model


@torch.inference_mode()
def logits(model, ids):
    return model(ids, PackedDocuments.from_lengths([len(ids)]))


@torch.inference_mode()
def their_logits(model, ids):
    return model.eval()(ids[None]).logits[0]


def theirs(base, folder=None, **settings):
    """transformers' model with an adapter, from a folder or a new one with values in it."""
    # The eager attention is the formula itself, not the kernel that the model under test calls.
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    if folder is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # peft only warns of keys that are missing
            return PeftModel.from_pretrained(model, folder)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **settings))
    fill(parameter for name, parameter in model.named_parameters() if "lora_" in name)
    return model


def assert_close(actual, expected, plain):
    """Within fp32 rounding of the largest logit, where the adapter makes a difference at all."""
    scale = float(expected.abs().max())
    assert float((expected - plain).abs().max()) > 0.01 * scale
    assert float((actual - expected).abs().max()) <= 1e-5 * max(1.0, scale)


@pytest.mark.parametrize("settings", OURS.values(), ids=OURS)
def test_an_adapter_of_ours_gives_equal_logits_in_peft(base, ids, tmp_path, settings):
    model = adapted(base, **settings)
    save_adapter(model, tmp_path / "adapter", base_model_name=str(base))
    expected = logits(model.eval(), ids)
    their_model = theirs(base, tmp_path / "adapter")
    assert_close(their_logits(their_model, ids), expected, logits(load_model(base), ids))
    config = their_model.peft_config["default"]
    assert (config.r, config.lora_alpha) == (settings["r"], settings["alpha"])
    assert config.lora_dropout == settings.get("dropout", 0.0)
    assert config.use_rslora == settings.get("rslora", False)
    assert config.base_model_name_or_path == str(base)
    if "targets" not in settings:
        assert config.target_modules == SEVEN


@pytest.mark.parametrize("settings", THEIRS.values(), ids=THEIRS)
def test_an_adapter_of_peft_gives_equal_logits_here(base, ids, tmp_path, settings):
    their_model = theirs(base, **settings)
    their_model.save_pretrained(tmp_path)
    model = load_model(base)
    plain = logits(model, ids)
    names = load_adapter(model, tmp_path)
    assert_close(logits(model, ids), their_logits(their_model, ids), plain)
    expected = {name for name, module in their_model.named_modules() if hasattr(module, "lora_A")}
    assert {f"base_model.model.{name.removesuffix('.lora_A')}" for name in names[::2]} == expected
    assert not any(model.get_parameter(name).requires_grad for name in names)
    layer = next(module for module in model.modules() if isinstance(module, LoRALinear))
    assert layer.dropout == settings.get("lora_dropout", 0.0)


@pytest.mark.parametrize(
    ("kind", "settings"), [("qwen2", {}), ("mistral", {"sliding_window": 16}), ("phi", {"num_key_value_heads": 4})]
)
def test_every_family_can_be_adapted(write_hf, ids, tmp_path, kind, settings):
    write_hf(tmp_path / "base", kind, **settings)
    model = adapted(tmp_path / "base", r=4, alpha=6.0, targets="all-linear")
    save_adapter(model, tmp_path / "adapter")
    their_model = theirs(tmp_path / "base", tmp_path / "adapter")
    assert_close(their_logits(their_model, ids), logits(model, ids), logits(load_model(tmp_path / "base"), ids))


@pytest.mark.parametrize("rslora", [False, True])
def test_merged_weights_equal_those_of_peft(base, tmp_path, rslora):
    model = adapted(base, r=4, alpha=6.0, rslora=rslora)
    save_adapter(model, tmp_path / "adapter")
    expected = dict(theirs(base, tmp_path / "adapter").merge_and_unload().named_parameters())
    merge_lora(model)
    actual = dict(model.named_parameters())
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("settings", OURS.values(), ids=OURS)
def test_saving_and_loading_gives_the_very_same_adapter(base, tmp_path, settings):
    model = adapted(base, torch.bfloat16, **settings)
    save_adapter(model, tmp_path / "adapter")
    again = load_model(base, dtype=torch.bfloat16)
    load_adapter(again, tmp_path / "adapter")
    expected, actual = dict(model.named_parameters()), dict(again.named_parameters())
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    for one, other in zip(model.modules(), again.modules(), strict=True):
        if isinstance(one, LoRALinear):
            assert (one.r, one.alpha, one.scale, one.dropout) == (other.r, other.alpha, other.scale, other.dropout)


def test_a_merged_and_saved_bf16_model_is_as_exact_as_the_unmerged_one(base, ids, tmp_path):
    model = adapted(base, torch.bfloat16, r=4, alpha=6.0)
    save_adapter(model, tmp_path / "adapter")
    unmerged = logits(model, ids).double()
    merge_lora(model)
    save_model(model, tmp_path / "merged")
    merged = logits(load_model(tmp_path / "merged"), ids).double()
    # The same bf16 weights and adapter, multiplied and added in fp64.
    exact_model = load_model(base, dtype=torch.bfloat16).double()
    load_adapter(exact_model, tmp_path / "adapter")
    exact = logits(exact_model, ids)
    errors = [float((value - exact).norm() / exact.norm()) for value in (unmerged, merged)]
    # Merging rounds every weight once more, to 8 bits; the forward pass alone loses as much.
    assert errors[1] < 1.5 * errors[0]
    assert errors[0] < 0.05


# What is refused.


@pytest.fixture
def adapter(base, tmp_path):
    """An adapter of two projections, on disk."""
    save_adapter(adapted(base, r=4, alpha=6.0, targets=["q_proj", "up_proj"]), tmp_path / "adapter")
    return tmp_path / "adapter"


def change(adapter, **settings):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def assert_refused(base, adapter, match):
    model = load_model(base)
    with pytest.raises(CheckpointError, match=match):
        load_adapter(model, adapter)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "asks for use_dora = true, which plain LoRA does not have: merge the adapter with peft"),
        ({"bias": "all"}, 'bias = "all"'),
        ({"modules_to_save": ["lm_head"]}, r'modules_to_save = \["lm_head"\]'),
        ({"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 1}}, 'rank_pattern = {"q_proj": 8}, alpha_pat'),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights = "pissa"'),
        ({"peft_type": "IA3"}, "an adapter of type 'IA3'; only LORA"),
        ({"r": 0}, "r = 0 cannot be used"),
        ({"r": "four"}, 'r = "four" cannot be used'),
        ({"lora_alpha": None}, "lora_alpha = null cannot be used"),
        ({"lora_dropout": 1.0}, "lora_dropout = 1.0 cannot be used"),
        ({"target_modules": None}, "target_modules = null cannot be used"),
        ({"target_modules": ["c_attn"]}, r"target_modules \['c_attn'\] match no linear layer"),
        ({"target_modules": "("}, r"LoRA target '\(' is not a regular expression"),
    ],
)
def test_settings_that_plain_lora_does_not_have_are_refused(base, adapter, settings, message):
    change(adapter, **settings)
    assert_refused(base, adapter, message)


def test_a_dora_adapter_of_peft_is_refused(base, tmp_path):
    theirs(base, target_modules=["q_proj"], use_dora=True).save_pretrained(tmp_path)
    assert_refused(base, tmp_path, "asks for use_dora = true")


def test_one_error_names_every_tensor_that_does_not_fit(base, adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers"
    del tensors[f"{prefix}.0.self_attn.q_proj.lora_A.weight"]
    tensors[f"{prefix}.0.self_attn.k_proj.lora_A.weight"] = torch.zeros(4, 64)
    tensors[f"{prefix}.2.mlp.up_proj.lora_B.weight"] = torch.zeros(112, 5)
    save_file(tensors, adapter / "adapter_model.safetensors")
    model = load_model(base)
    with pytest.raises(CheckpointError) as error:
        load_adapter(model, adapter)
    assert str(error.value) == (
        f"{adapter} does not fit this model: missing {prefix}.0.self_attn.q_proj.lora_A.weight; "
        f"unexpected {prefix}.0.self_attn.k_proj.lora_A.weight; "
        f"{prefix}.2.mlp.up_proj.lora_B.weight has shape (112, 5), model and rank say (112, 4)"
    )


def test_missing_and_damaged_files_are_errors(base, adapter, tmp_path):
    assert_refused(base, tmp_path / "nowhere", "is no PEFT adapter: it has no adapter_config.json")
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    (adapter / "adapter_model.safetensors").write_bytes(weights[:100])
    assert_refused(base, adapter, "adapter_model.safetensors is damaged")
    (adapter / "adapter_model.safetensors").unlink()
    assert_refused(base, adapter, "adapter_model.safetensors does not exist")
    for content in ("{", "[]"):
        (adapter / "adapter_config.json").write_text(content)
        assert_refused(base, adapter, "adapter_config.json is damaged")


def test_a_model_without_adapters_or_with_unequal_ones_cannot_be_saved_as_one(base, tmp_path):
    model = load_model(base)
    with pytest.raises(CheckpointError, match="the model has none"):
        save_adapter(model, tmp_path / "adapter")
    add_lora(model, r=2, alpha=4.0, targets=["q_proj"])
    add_lora(model, r=4, alpha=4.0, targets=["v_proj"])
    with pytest.raises(CheckpointError, match="adapters with 2 different settings"):
        save_adapter(model, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_a_second_adapter_is_refused(base, adapter):
    model = load_model(base)
    load_adapter(model, adapter)
    with pytest.raises(CheckpointError, match="has a LoRA adapter already"):
        load_adapter(model, adapter)


def test_a_full_disk_leaves_the_adapter_that_was_there(base, adapter, monkeypatch):
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("redwhale.model.peft_format.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(adapted(base, r=2, alpha=1.0), adapter)
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before
    assert [path.name for path in adapter.parent.iterdir()] == ["adapter"]
