"""Checkpoints round-trip bit for bit, load only when every tensor fits, and are replaced whole or not at all."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from redwhale.model import (
    CheckpointError,
    CheckpointReader,
    PackedDocuments,
    add_lora,
    load_model,
    merge_lora,
    save_model,
    write_checkpoint,
)

INDEX = "model.safetensors.index.json"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors, read by safetensors itself."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def copy(base, tmp_path) -> Path:
    """A checkpoint to be spoiled."""
    return Path(shutil.copytree(base, tmp_path / "copy"))


@pytest.fixture
def sharded(base, tmp_path) -> Path:
    write_checkpoint(
        tmp_path / "sharded", CheckpointReader(base).config, CheckpointReader(base), max_shard_bytes=60_000
    )
    return tmp_path / "sharded"


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_saving_and_loading_keeps_every_bit(base, tmp_path, dtype):
    model = load_model(base, dtype=dtype)
    save_model(model, tmp_path / "saved")
    reloaded = load_model(tmp_path / "saved")
    assert reloaded.lm_head.weight.dtype == dtype
    assert same(dict(reloaded.named_parameters()), dict(model.named_parameters()))
    assert json.loads((tmp_path / "saved/config.json").read_text())["torch_dtype"] == str(dtype).split(".")[1]


def test_a_loaded_model_is_frozen_until_asked_for_gradients(base):
    assert not any(parameter.requires_grad for parameter in load_model(base).parameters())


def test_dtype_none_keeps_the_stored_one(write_hf, tmp_path):
    write_hf(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in load_model(tmp_path).parameters()} == {torch.bfloat16}
    widened = load_model(tmp_path, dtype=torch.float32)
    stored = tensors_of(tmp_path)
    assert all(torch.equal(p, stored[name].float()) for name, p in widened.named_parameters())


def test_loading_a_folder_and_replacing_it_leaves_the_loaded_model_alone(copy):
    model = load_model(copy)
    before = {name: p.clone() for name, p in model.named_parameters()}
    write_checkpoint(copy, model.config, ((name, p * 2) for name, p in before.items()))
    assert same(dict(model.named_parameters()), before)
    assert same(dict(load_model(copy).named_parameters()), {name: p * 2 for name, p in before.items()})


def test_a_loaded_model_does_not_change_with_its_file(copy):
    model = load_model(copy)
    before = {name: p.clone() for name, p in model.named_parameters()}
    file = copy / "model.safetensors"
    with open(file, "r+b") as opened:  # in place: a mapping of the file would follow
        opened.write(b"\0" * file.stat().st_size)
    assert same(dict(model.named_parameters()), before)


def test_sharded_checkpoints_round_trip(base, sharded):
    files = sorted(sharded.glob("*.safetensors"))
    expected = tensors_of(base)
    # 300·64·4 = 76,800 bytes of embedding or head pass the limit alone; all other files keep to it.
    assert len(files) > 3
    for file in files:
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(t.numel() * t.element_size() for t in tensors.values()) <= 60_000
    index = json.loads((sharded / INDEX).read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in expected.values())
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert same(tensors_of(sharded), expected)
    assert same(dict(load_model(sharded).named_parameters()), expected)


def test_transformers_loads_our_shards(base, sharded, ids):
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(base)(ids[None]).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(sharded)(ids[None]).logits, expected)


def test_shards_written_by_transformers_load(write_hf, tmp_path):
    theirs = write_hf(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert same(dict(load_model(tmp_path).named_parameters()), dict(theirs.named_parameters()))


def test_a_reader_gives_single_tensors_by_name(sharded, base):
    reader, expected = CheckpointReader(sharded), tensors_of(base)
    assert sorted(reader.names()) == sorted(expected)
    for name in ("lm_head.weight", "model.layers.1.mlp.up_proj.weight"):
        assert torch.equal(reader.tensor(name), expected[name])
    with pytest.raises(CheckpointError, match="has no tensor nonsense"):
        reader.tensor("nonsense")


def test_all_tensors_that_do_not_fit_are_named_in_one_error(copy):
    def spoil(tensors):
        del tensors["model.norm.weight"], tensors["model.layers.1.self_attn.k_proj.weight"]
        tensors["model.layers.3.mlp.up_proj.weight"] = torch.zeros(2, 2)
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
        tensors["lm_head.weight"] = torch.zeros(299, 64)

    rewrite(copy, spoil)
    with pytest.raises(CheckpointError) as error:
        load_model(copy)
    message = str(error.value)
    assert "missing model.norm.weight" in message
    assert "missing model.layers.1.self_attn.k_proj.weight" in message
    assert "unexpected model.layers.3.mlp.up_proj.weight" in message
    assert "unexpected model.layers.0.self_attn.q_proj.bias" in message
    assert "lm_head.weight has shape (299, 64), the configuration says (300, 64)" in message
    assert message.count(";") == 4
    assert "\n" not in message


def test_stored_rotary_frequencies_are_passed_over(copy):
    rewrite(copy, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    load_model(copy)


def test_a_tied_head_is_one_parameter_and_is_stored_once(write_hf, tmp_path):
    write_hf(tmp_path / "tied", tie_word_embeddings=True)
    model = load_model(tmp_path / "tied")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    save_model(model, tmp_path / "saved")
    assert "lm_head.weight" not in tensors_of(tmp_path / "saved")


def test_a_repeated_tied_head_loads_and_a_different_one_is_an_error(write_hf, tmp_path):
    write_hf(tmp_path, tie_word_embeddings=True)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert load_model(tmp_path).lm_head.weight.shape == (300, 64)
    rewrite(tmp_path, lambda t: t["lm_head.weight"].add_(1e-3))
    with pytest.raises(CheckpointError, match="lm_head.weight differs from the embedding"):
        load_model(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", None], ids=["empty", "garbage", "cut short"])
@pytest.mark.parametrize("file", ["model.safetensors", "second shard"])
def test_damaged_weights_are_one_clear_sentence(copy, sharded, file, content):
    path = copy / file if file == "model.safetensors" else sorted(sharded.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(CheckpointError, match="is damaged.*copy or download it again") as error:
        load_model(path.parent)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_files_are_named(copy, sharded, tmp_path):
    lost = sorted(sharded.glob("*.safetensors"))[2]
    lost.unlink()
    with pytest.raises(CheckpointError, match=f"{lost.name} is named in {INDEX} but does not exist"):
        load_model(sharded)
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="neither model.safetensors nor model.safetensors.index.json"):
        load_model(copy)
    for nothing in (tmp_path / "nowhere", copy / "config.json"):
        with pytest.raises(CheckpointError, match="is not a checkpoint folder: it has no config.json"):
            load_model(nothing)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": 3}', b"\xff\xfe\x00"])
def test_a_damaged_index_is_one_clear_sentence(sharded, content):
    (sharded / INDEX).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(CheckpointError, match="index.json is damaged.*copy or download it again"):
        CheckpointReader(sharded)


def test_an_index_that_promises_too_much_is_an_error(sharded):
    index = json.loads((sharded / INDEX).read_text())
    names = list(index["weight_map"])
    index["weight_map"]["model.extra.weight"] = index["weight_map"][names[0]]
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="lacks model.extra.weight, which .* says it holds"):
        CheckpointReader(sharded).tensor("model.extra.weight")


def test_a_folder_survives_when_writing_the_new_one_fails_midway(copy):
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    config = CheckpointReader(copy).config

    def breaks_down():
        for count, pair in enumerate(CheckpointReader(copy)):
            if count == 10:
                raise OSError("no space left on device")
            yield pair

    with pytest.raises(OSError, match="no space left"):
        write_checkpoint(copy, config, breaks_down(), max_shard_bytes=50_000)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]  # and the partial copy is gone


def test_a_new_folder_does_not_appear_when_writing_it_fails(base, tmp_path):
    with pytest.raises(FileNotFoundError):
        write_checkpoint(
            tmp_path / "new", CheckpointReader(base).config, CheckpointReader(base), extra_files=[tmp_path / "absent"]
        )
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_write_do_not_stop_the_next(copy):
    for suffix in (".writing", ".replaced"):
        leftover = copy.with_name(copy.name + suffix)
        leftover.mkdir()
        (leftover / "part-00001").write_bytes(b"half")
    model = load_model(copy)
    save_model(model, copy)
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]
    assert same(tensors_of(copy), dict(model.named_parameters()))


def test_a_replaced_folder_keeps_nothing_of_the_old_one(sharded):
    (sharded / "stale.txt").write_text("old")
    extra = sharded.parent / "tokenizer.model"
    extra.write_bytes(b"pieces")
    save_model(load_model(sharded), sharded, extra_files=[extra])
    assert {path.name for path in sharded.iterdir()} == {"config.json", "model.safetensors", "tokenizer.model"}
    assert (sharded / "tokenizer.model").read_bytes() == b"pieces"


def test_a_checkpoint_can_be_rewritten_in_place_from_its_own_tensors(copy, base):
    reader = CheckpointReader(copy)
    write_checkpoint(copy, reader.config, reader, max_shard_bytes=100_000)
    assert same(tensors_of(copy), tensors_of(base))


def test_a_model_with_adapters_is_not_saved_without_them(base, tmp_path, ids):
    model = load_model(base)
    add_lora(model, r=2, alpha=2.0)
    with pytest.raises(CheckpointError, match="merge_lora before saving"):
        save_model(model, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []
    merge_lora(model)
    save_model(model, tmp_path / "saved")
    documents = PackedDocuments.from_lengths([len(ids)])
    assert torch.equal(load_model(tmp_path / "saved")(ids, documents), load_model(base)(ids, documents))
