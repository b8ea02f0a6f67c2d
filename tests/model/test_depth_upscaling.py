"""Depth up-scaling stacks the first layers of a model and its last ones, bit for bit."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from redwhale.model import (
    CheckpointError,
    CheckpointReader,
    PackedDocuments,
    create_checkpoint,
    load_model,
    preset,
    read_config,
    source_layers,
    upscale_checkpoint,
)


def stacked_by_hand(model, layers: list[int]):
    """transformers' model with these of its layers, copies where one is there twice."""
    model = deepcopy(model)
    model.model.layers = nn.ModuleList(deepcopy(model.model.layers[layer]) for layer in layers)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    model.config.num_hidden_layers = len(layers)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[layer] for layer in layers]
    return model


@pytest.mark.parametrize(
    ("first", "last", "layers"), [(2, 2, [0, 1, 1, 2]), (3, 2, [0, 1, 2, 1, 2]), (1, 3, [0, 0, 1, 2])]
)
def test_every_family_computes_what_a_stack_of_layers_does(variant, ids, tmp_path, first, last, layers):
    model, folder = variant
    upscale_checkpoint(folder, tmp_path / "deep", first=first, last=last)
    expected_model = stacked_by_hand(model, layers)
    with torch.inference_mode():
        expected = expected_model(ids[None], use_cache=False).logits[0]
        actual = load_model(tmp_path / "deep")(ids, PackedDocuments.from_lengths([len(ids)]))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "deep", local_files_only=True, attn_implementation="eager")
    with torch.inference_mode():
        torch.testing.assert_close(theirs(ids[None]).logits[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shard", [10**9, 150_000])
def test_every_tensor_is_that_of_its_source_layer(write_hf, tmp_path, shard):
    write_hf(tmp_path / "base", dtype=torch.bfloat16, max_shard_size=shard)
    sharded = (tmp_path / "base" / "model.safetensors.index.json").exists()
    assert sharded == (shard == 150_000)
    upscale_checkpoint(tmp_path / "base", tmp_path / "deep", first=2, last=3, max_shard_bytes=shard)
    assert (tmp_path / "deep" / "model.safetensors.index.json").exists() == sharded
    base, deep = dict(CheckpointReader(tmp_path / "base")), dict(CheckpointReader(tmp_path / "deep"))
    expected = {name: tensor for name, tensor in base.items() if ".layers." not in name}
    for layer, source in enumerate([0, 1, 0, 1, 2]):
        prefix = f"model.layers.{source}."
        of_source = {name.removeprefix(prefix): base[name] for name in base if name.startswith(prefix)}
        assert len(of_source) == 9
        expected |= {f"model.layers.{layer}.{name}": tensor for name, tensor in of_source.items()}
    assert set(deep) == set(expected)
    for name, tensor in deep.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor.view(torch.int16), expected[name].view(torch.int16)), name


def test_the_configuration_changes_in_its_depth_alone(base, tmp_path):
    upscale_checkpoint(base, tmp_path / "deep")
    before = json.loads((base / "config.json").read_text())
    after = json.loads((tmp_path / "deep" / "config.json").read_text())
    assert (before["num_hidden_layers"], after["num_hidden_layers"]) == (3, 4)
    same = set(before) & set(after) - {"num_hidden_layers"}
    assert {"hidden_size", "vocab_size", "rms_norm_eps", "max_position_embeddings", "model_type"} <= same
    assert {key: after[key] for key in same if key != "use_cache"} == {
        key: before[key] for key in same if key != "use_cache"
    }


def test_three_quarters_of_mistrals_layers_make_solar():
    assert source_layers(32) == [*range(24), *range(8, 32)]
    assert source_layers(32, first=24, last=24) == source_layers(32)
    assert source_layers(32, first=30) == [*range(30), *range(8, 32)]
    assert source_layers(4, last=2) == [0, 1, 2, 2, 3]


def test_tiny_mistral_becomes_as_deep_as_tiny_solar(tmp_path):
    create_checkpoint(preset("tiny-mistral-7b-v0.1"), tmp_path / "base")
    upscale_checkpoint(tmp_path / "base", tmp_path / "deep")
    config = read_config(tmp_path / "deep")
    assert config.num_hidden_layers == preset("tiny-solar-10.7b").num_hidden_layers
    assert config.sliding_window == 4096


def test_tokenizer_files_come_along_and_nothing_else_does(write_hf, tmp_path):
    folder = tmp_path / "base"
    write_hf(folder)
    kept = {"tokenizer.model": b"\x00\xff", "tokenizer.json": b"{}", "tokenizer_config.json": b"{ }"}
    for name, content in {**kept, "README.md": b"the base's", "notes.txt": b"notes"}.items():
        (folder / name).write_bytes(content)
    upscale_checkpoint(folder, tmp_path / "deep", first=3, last=3)
    written = {path.name for path in (tmp_path / "deep").iterdir()}
    assert written - {"generation_config.json"} == {*kept, "config.json", "model.safetensors"}
    assert all((tmp_path / "deep" / name).read_bytes() == content for name, content in kept.items())


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"first": 4}, "base has 3 layers, so the first 4 and the last 2 cannot be taken: give numbers from 1 to 3"),
        ({"last": 4}, "the first 2 and the last 4 cannot be taken"),
        ({"first": 0, "last": 3}, "the first 0 and the last 3 cannot be taken"),
        ({"first": -1}, "the first -1"),
        ({"first": 1, "last": 2}, "the first 1 and the last 2 layers make 3, and the base has 3 already"),
        ({"first": 1, "last": 1}, "make 2, and the base has 3 already: give numbers with a greater sum"),
    ],
)
def test_numbers_that_make_no_deeper_model_are_refused(base, tmp_path, numbers, message):
    with pytest.raises(CheckpointError, match=message):
        upscale_checkpoint(base, tmp_path / "deep", **numbers)
    assert list(tmp_path.iterdir()) == []


def test_a_base_of_one_layer_needs_numbers():
    with pytest.raises(CheckpointError, match="the first 0 and the last 0 cannot be taken: give numbers from 1 to 1"):
        source_layers(1)
    assert source_layers(1, first=1, last=1) == [0, 0]


def damaged(folder: Path, write_hf, change) -> Path:
    write_hf(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_base_with_gaps_is_refused_before_anything_is_written(write_hf, tmp_path):
    def drop_layer(tensors):
        for name in [name for name in tensors if name.startswith("model.layers.1.")]:
            del tensors[name]

    def drop_tensor(tensors):
        del tensors["model.layers.2.mlp.up_proj.weight"]

    (tmp_path / "out").mkdir()
    folder = damaged(tmp_path / "layer", write_hf, drop_layer)
    with pytest.raises(CheckpointError, match="says 3 layers: layers 1 are missing or too many"):
        upscale_checkpoint(folder, tmp_path / "out" / "deep")
    folder = damaged(tmp_path / "tensor", write_hf, drop_tensor)
    with pytest.raises(CheckpointError, match=r"is not complete: missing model\.layers\.2\.mlp\.up_proj\.weight$"):
        upscale_checkpoint(folder, tmp_path / "out" / "deep")
    assert list((tmp_path / "out").iterdir()) == []
