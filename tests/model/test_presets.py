"""Presets are the published shapes, and new checkpoints are reproducible, bounded in memory and readable elsewhere."""

import gc
import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from redwhale.model import (
    PRESETS,
    CheckpointError,
    CheckpointReader,
    ModelConfig,
    PackedDocuments,
    create_checkpoint,
    load_model,
    parameter_count,
    parameter_shapes,
    preset,
    with_vocab_size,
)
from redwhale.model.config import _SUPPORTED
from redwhale.model.rope_scaling import _KEYS

LARGE = [name for name in PRESETS if not name.startswith("tiny-")]
TINY = [f"tiny-{name}" for name in LARGE]
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "models.md"

# Known totals of the released weights. Each further piece adds a row of 4,096 to the embedding and one to the LM head.
PUBLISHED = {
    "solar-10.7b": 10_731_524_096,
    "solar-10.7b-instruct": 10_731_524_096,
    "mistral-7b-v0.1": 7_241_732_096,
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "eeve-korean-10.8b": 10_731_524_096 + 2 * 4096 * (40_960 - 32_000),
    "open-solar-ko-10.7b": 10_731_524_096 + 2 * 4096 * (46_592 - 32_000),
    "open-llama-2-ko-7b": 6_738_415_616 + 2 * 4096 * (46_336 - 32_000),
}

_SOLAR = {
    "model_type": "llama",
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 48,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
_LLAMA_2 = {**_SOLAR, "intermediate_size": 11008, "num_hidden_layers": 32, "num_key_value_heads": 32}

CONFIG_JSON = {
    "solar-10.7b": _SOLAR,
    "solar-10.7b-instruct": {**_SOLAR, "pad_token_id": 2},
    "mistral-7b-v0.1": {
        **_SOLAR,
        "model_type": "mistral",
        "max_position_embeddings": 32768,
        "num_hidden_layers": 32,
        "sliding_window": 4096,
    },
    "llama-2-7b": {key: value for key, value in _LLAMA_2.items() if key != "rope_theta"},
    "llama-3-8b": {
        **_SOLAR,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "max_position_embeddings": 8192,
        "num_hidden_layers": 32,
        "rope_theta": 500000.0,
        "vocab_size": 128256,
    },
    "eeve-korean-10.8b": {**_SOLAR, "eos_token_id": 32000, "vocab_size": 40960},
    "open-solar-ko-10.7b": {**_SOLAR, "max_position_embeddings": 2048, "pad_token_id": 2, "vocab_size": 46592},
    "open-llama-2-ko-7b": {
        **_LLAMA_2,
        "max_position_embeddings": 2048,
        "pad_token_id": 2,
        "rms_norm_eps": 1e-06,
        "vocab_size": 46336,
    },
}
"""What decides the model in the published `config.json`."""


@pytest.mark.parametrize("name", LARGE)
def test_a_preset_is_what_its_config_json_reads_as(name):
    assert PRESETS[name] == ModelConfig.from_hf(CONFIG_JSON[name])


@pytest.mark.parametrize("name", LARGE)
def test_a_preset_has_the_published_number_of_parameters(name):
    assert parameter_count(PRESETS[name]) == PUBLISHED[name]


@pytest.mark.parametrize("name", PRESETS)
def test_transformers_has_the_same_parameters(name):
    raw = PRESETS[name].to_hf("bfloat16")
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw))
    assert parameter_shapes(PRESETS[name]) == {key: tuple(value.shape) for key, value in theirs.named_parameters()}


@pytest.mark.parametrize("name", LARGE)
def test_the_tiny_version_keeps_family_proportions_and_positions(name):
    large, small = PRESETS[name], PRESETS[f"tiny-{name}"]
    assert 100_000 < parameter_count(small) < 1_000_000
    for kept in (
        *("model_type", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling"),
        *("attention_bias", "sliding_window", "tie_word_embeddings", "initializer_range"),
    ):
        assert getattr(small, kept) == getattr(large, kept), kept
    for one, other in (
        ("num_attention_heads", "num_key_value_heads"),
        ("intermediate_size", "hidden_size"),
    ):
        assert getattr(small, one) * getattr(large, other) == getattr(large, one) * getattr(small, other)
    assert small.head_dim % 2 == 0
    assert small.head_dim * small.num_attention_heads == small.hidden_size
    assert small.vocab_size < 5000


def test_tiny_solar_is_tiny_mistral_scaled_up():
    solar, mistral = PRESETS["tiny-solar-10.7b"], PRESETS["tiny-mistral-7b-v0.1"]
    assert solar.num_hidden_layers == 2 * (mistral.num_hidden_layers * 3 // 4)


def test_special_tokens_stay_inside_another_vocabulary():
    config = preset("llama-3-8b", vocab_size=32_000)
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id) == (32_000, 1, 2)
    assert preset("eeve-korean-10.8b", vocab_size=40_000).eos_token_id == 32_000
    assert with_vocab_size(replace(PRESETS["llama-2-7b"], pad_token_id=31_999), 31_999).pad_token_id is None
    for name in TINY:
        ids = (PRESETS[name].bos_token_id, PRESETS[name].eos_token_id, PRESETS[name].pad_token_id)
        assert all(token_id is None or token_id < PRESETS[name].vocab_size for token_id in ids)


def test_what_cannot_be_a_preset_is_refused():
    with pytest.raises(CheckpointError, match=r"no preset 'solar'; presets: solar-10.7b, "):
        preset("solar")
    with pytest.raises(CheckpointError, match="vocabulary of 2 is too small"):
        preset("tiny-llama-2-7b", vocab_size=2)


# The checkpoints.


def digests(folder: Path) -> dict[str, str]:
    return {
        name: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in CheckpointReader(folder)
    }


@pytest.fixture(scope="module")
def tiny_solar(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("new") / "solar"
    create_checkpoint(PRESETS["tiny-solar-10.7b"], folder, seed=3, dtype=torch.float32)
    return folder


@pytest.mark.parametrize("name", TINY)
def test_a_new_checkpoint_computes_the_same_in_transformers(tmp_path, name):
    config = PRESETS[name]
    create_checkpoint(config, tmp_path / "new", dtype=torch.float32)
    theirs, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "new", dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.randint(0, config.vocab_size, (50,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = theirs(ids[None]).logits[0]
        actual = load_model(tmp_path / "new")(ids, PackedDocuments.from_lengths([50]))
    assert expected.std() > 0.01
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_weights_are_normal_norms_one_and_no_two_matrices_alike(tiny_solar):
    tensors = dict(CheckpointReader(tiny_solar))
    matrices = {name: tensor.double() for name, tensor in tensors.items() if tensor.dim() == 2}
    values = torch.cat([tensor.flatten() for tensor in matrices.values()]) / 0.02
    # 447,488 draws: the bounds are five standard errors.
    error = len(values) ** -0.5
    assert abs(values.mean()) < 5 * error
    assert abs(values.var() - 1) < 5 * 2**0.5 * error
    assert abs((values**4).mean() - 3) < 5 * 96**0.5 * error
    assert abs((values.abs() > 1.959964).double().mean() - 0.05) < 5 * (0.05 * 0.95) ** 0.5 * error
    assert all(torch.equal(tensor, torch.ones_like(tensor)) for tensor in tensors.values() if tensor.dim() == 1)
    assert len({digests(tiny_solar)[name] for name in matrices}) == len(matrices)


def test_biases_are_zero_and_a_tied_head_is_not_stored(tmp_path):
    config = replace(PRESETS["tiny-llama-2-7b"], model_type="qwen2", tie_word_embeddings=True)
    create_checkpoint(config, tmp_path / "new")
    tensors = dict(CheckpointReader(tmp_path / "new"))
    biases = [tensor for name, tensor in tensors.items() if name.endswith(".bias")]
    assert len(biases) == 3 * config.num_hidden_layers
    assert not any(tensor.any() for tensor in biases)
    assert "lm_head.weight" not in tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_shards_depth_and_precision_do_not_change_the_values_and_the_seed_does(tmp_path, tiny_solar):
    config = PRESETS["tiny-solar-10.7b"]
    create_checkpoint(config, tmp_path / "shards", seed=3, dtype=torch.float32, max_shard_bytes=300_000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    assert digests(tmp_path / "shards") == digests(tiny_solar)

    create_checkpoint(replace(config, num_hidden_layers=2), tmp_path / "shallow", seed=3, dtype=torch.float32)
    shallow = digests(tmp_path / "shallow")
    assert shallow == {name: digests(tiny_solar)[name] for name in shallow}

    create_checkpoint(config, tmp_path / "bf16", seed=3)
    expected = dict(CheckpointReader(tiny_solar))
    for name, tensor in CheckpointReader(tmp_path / "bf16"):
        assert torch.equal(tensor, expected[name].bfloat16())

    create_checkpoint(config, tmp_path / "seed", seed=4, dtype=torch.float32)
    other = digests(tmp_path / "seed")
    matrices = [name for name, tensor in CheckpointReader(tiny_solar) if tensor.dim() == 2]
    assert all(other[name] != digests(tiny_solar)[name] for name in matrices)


def test_a_processor_without_vector_instructions_and_one_thread_give_the_same_weights(tmp_path, tiny_solar):
    program = (
        "import sys, torch; from pathlib import Path; from redwhale.model import PRESETS, create_checkpoint\n"
        "torch.set_num_threads(1)\n"
        "assert torch.backends.cpu.get_cpu_capability() == 'DEFAULT'\n"
        "create_checkpoint(PRESETS['tiny-solar-10.7b'], Path(sys.argv[1]), seed=3, dtype=torch.float32)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "plain")]
    subprocess.run(command, check=True, env={**os.environ, "ATEN_CPU_CAPABILITY": "default"})
    assert digests(tmp_path / "plain") == digests(tiny_solar)


def test_blocks_larger_than_one_are_filled_to_the_end(tmp_path):
    # 40,000 × 64 entries are two whole blocks of 2^20 and a part of a third.
    create_checkpoint(preset("tiny-llama-2-7b", vocab_size=40_000), tmp_path / "new", dtype=torch.float32)
    flat = CheckpointReader(tmp_path / "new").tensor("model.embed_tokens.weight").flatten()
    blocks = flat.split(1 << 20)
    assert [len(block) for block in blocks] == [1 << 20, 1 << 20, 40_000 * 64 - (2 << 20)]
    assert all(abs(block.std() / 0.02 - 1) < 0.01 for block in blocks)
    assert all(abs(block[-16:].std() / 0.02 - 1) < 0.9 for block in blocks)
    assert not torch.equal(blocks[0], blocks[1])


def held_bytes() -> int:
    """Bytes of all CPU tensors made since `gc.freeze`, each storage once."""
    storages = {}
    for thing in gc.get_objects():
        if type(thing) is torch.Tensor and not thing.is_meta:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.fixture
def frozen():
    """Hides all objects that are there already from `gc.get_objects`."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def test_no_more_than_a_shard_and_a_tensor_are_in_memory(tmp_path, frozen):
    config = preset("tiny-solar-10.7b", vocab_size=500)
    shard, total = 200_000, 4 * parameter_count(config)
    largest = max(4 * torch.Size(shape).numel() for shape in parameter_shapes(config).values())
    assert total > 4 * (shard + largest)
    held = []
    create_checkpoint(
        config,
        tmp_path / "new",
        dtype=torch.float32,
        max_shard_bytes=shard,
        on_tensor=lambda size: held.append(held_bytes()),
    )
    assert max(held) > shard  # the count sees the shard
    assert max(held) <= shard + largest


# What docs/models.md says of them.


def rows_of(first_column: str) -> dict[str, list[str]]:
    """{first cell: other cells} of the table of docs/models.md with this first column."""
    _, table = DOCUMENT.read_text(encoding="utf-8").split(f"| {first_column} |")
    lines = [line.strip("|").split("|") for line in table.split("\n\n")[0].splitlines()[2:]]
    return {first.strip(" `"): [cell.strip() for cell in cells] for first, *cells in lines}


def test_the_documents_table_has_all_presets_with_their_numbers():
    rows = rows_of("preset")
    assert list(rows) == LARGE
    for name, cells in rows.items():
        config = PRESETS[name]
        sizes = (config.num_hidden_layers, config.vocab_size, config.max_position_embeddings, parameter_count(config))
        tiny_count = parameter_count(PRESETS[f"tiny-{name}"])
        assert cells[1:] == [config.model_type, *(f"{size:,}" for size in sizes), f"{tiny_count:,}"], name


def test_the_document_names_all_families_and_scalings():
    assert list(rows_of("`model_type`")) == list(_SUPPORTED)
    assert list(rows_of("`rope_type`")) == list(_KEYS)
