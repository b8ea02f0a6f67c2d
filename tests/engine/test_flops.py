"""Model FLOPs against a count of the matrix products that really run, and against published arithmetic."""

import dataclasses

import pytest
import torch
from tiny import TINY
from torch.utils.flop_counter import FlopCounterMode

from redwhale.engine.flops import attention_pairs, peak_flops_by_name, training_flops
from redwhale.model import ModelConfig, PackedDocuments, add_lora
from redwhale.model.attention_backends import set_attention_backend
from redwhale.model.phi import build_model

PHI = dataclasses.replace(TINY, model_type="phi", num_key_value_heads=4, partial_rotary_factor=0.5)
CONFIGS = {"llama": TINY, "tied": dataclasses.replace(TINY, tie_word_embeddings=True), "phi": PHI}
LENGTHS = (7, 12, 1, 4)


@pytest.fixture
def written_out_attention():
    """Attention as plain products of [N, N] scores, which the counter sees; torch's own on a CPU it does not."""
    set_attention_backend("reference")
    yield
    set_attention_backend("auto")


def chosen(names, train):
    """The names that train, by hand."""

    def trains(name: str, selector: str) -> bool:
        parts = name.split(".")
        layer = int(parts[2]) if parts[1] == "layers" else None
        return {
            "all": True,
            "embed": "embed_tokens" in parts,
            "head": parts[0] == "lm_head",
            "odd": layer is not None and layer % 2 == 1,
            "layer 3": layer == 3,
            "norms": "norm" in parts[-2],
            "last norm": parts[1] in ("norm", "final_layernorm"),
            "lora": parts[-1] in ("lora_A", "lora_B"),
        }[selector]

    return {name for selector in train for name in names if trains(name, selector)}


def product_flops(added_to, a, b, **options) -> int:
    (m, k), (_, n) = a, b
    return 2 * m * k * n


def counted(model, trained) -> int:
    """FLOPs of the products of one forward and backward pass."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    tokens = sum(LENGTHS)
    ids = torch.randint(0, TINY.vocab_size, (tokens,), generator=torch.Generator().manual_seed(0))
    # The counter knows addmm, but not its in-place form, with which adapters are added.
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product_flops}) as counter:
        model.loss(ids, ids.roll(-1), PackedDocuments.from_lengths(LENGTHS)).loss_sum.backward()
    return counter.get_total_flops()


STAGES = [
    ("all",),
    ("head",),
    ("embed",),
    ("embed", "head"),
    ("odd",),
    ("odd", "embed", "head"),
    ("layer 3",),
    ("layer 3", "head"),
    ("norms",),
    ("last norm",),
    ("lora",),
    ("lora", "embed"),
    ("lora", "embed", "head"),
]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("train", STAGES, ids="+".join)
@pytest.mark.usefixtures("written_out_attention")
def test_flops_are_those_of_the_products_that_run(train, config):
    model = build_model(config)
    model.init_weights(torch.Generator().manual_seed(0))
    repeated = 0
    if "lora" in train and config is PHI:
        add_lora(model, r=3, alpha=6.0, targets=("q_proj", "k_proj", "v_proj", "dense", "fc1"))
    elif "lora" in train:
        add_lora(model, r=3, alpha=6.0, targets=("q_proj", "o_proj", "up_proj", "down_proj"))
        # Backward adds the update of `up` once more instead of keeping the sum: no model FLOPs.
        repeated = 2 * 3 * config.intermediate_size * config.num_hidden_layers
    parameters = dict(model.named_parameters())
    # A tied head is the embedding.
    trained = {name: parameters[name] for name in chosen(parameters, train) or ["model.embed_tokens.weight"]}
    tokens = sum(LENGTHS)
    flops = training_flops(config, trained).of(tokens, tokens**2)
    assert flops == counted(model, trained) - repeated * tokens


@pytest.mark.parametrize("config", [TINY, CONFIGS["tied"]], ids=["llama", "tied"])
@pytest.mark.usefixtures("written_out_attention")
def test_new_rows_count_as_what_they_are(config):
    model = build_model(config)
    model.init_weights(torch.Generator().manual_seed(0))
    rows = model.train_rows(90, 90)
    tokens = sum(LENGTHS)
    measured = counted(model, ())
    assert training_flops(config, rows).of(tokens, tokens**2) == measured
    whole = training_flops(config, {name.partition("[")[0]: torch.empty(97, 32) for name in rows})
    assert whole.of(tokens, tokens**2) - measured == 2 * 90 * 32 * tokens


def test_padding_rows_are_no_model_flops():
    padded = {"lm_head.weight": torch.empty(128, 32)}
    assert training_flops(TINY, padded) == training_flops(TINY, {"lm_head.weight": torch.empty(97, 32)})


def test_a_10_7b_model_costs_what_its_parameters_say():
    """SOLAR-10.7B: 2, 4 or 6 FLOPs for each of 10.47e9 weights in layers, 4 or 6 · V·H, and 1.61e9 of attention."""
    solar = ModelConfig(
        vocab_size=49_152,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=4096,
    )
    with torch.device("meta"):
        parameters = dict(build_model(solar).named_parameters())
    layers, head, attention = 10.468e9, 49_152 * 4096, 48 * 4 * 4096 * 2048.5
    expected = {
        ("head",): 2 * layers + 4 * head + attention,  # the head's input gets no gradient
        ("embed", "head"): 4 * layers + 6 * head + 3 * attention,
        ("all",): 6 * layers + 6 * head + 3 * attention,
    }
    for train, flops in expected.items():
        trained = {name: parameters[name] for name in chosen(parameters, train)}
        step = training_flops(solar, trained).of(4096, attention_pairs([4096]))
        assert step == pytest.approx(4096 * flops, rel=1e-3), train


@pytest.mark.parametrize("window", [None, 1, 4, 12, 50])
def test_pairs_are_the_visible_entries_of_the_mask(window):
    visible = 0
    for length in LENGTHS:
        behind = torch.arange(length)[:, None] - torch.arange(length)[None, :]
        visible += int(((behind >= 0) & (behind < (window or 1000))).sum())
    assert attention_pairs(LENGTHS, window) == visible


@pytest.mark.parametrize(
    ("name", "bf16", "tf32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312, 156),
        ("NVIDIA H100 80GB HBM3", 989.4, 494.7),
        ("NVIDIA H100 PCIe", 756, 378),
        ("NVIDIA H100 NVL", 835.5, 417.5),
        ("NVIDIA H200", 989.4, 494.7),
        ("NVIDIA GH200 480GB", 989.4, 494.7),
        ("NVIDIA B200", 2250, 1125),
        ("NVIDIA H20", 148, 74),
        ("NVIDIA L40S", 362.05, 183),
        ("NVIDIA L4", 121, 60),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
        ("NVIDIA RTX A6000", 154.8, 77.4),
        ("NVIDIA A10", 125, 62.5),
        ("NVIDIA A10G", None, None),
        ("Tesla T4", None, None),
    ],
)
def test_peaks_go_by_the_whole_name(monkeypatch, name, bf16, tf32):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    for dtype, peak in ((torch.bfloat16, bf16), (torch.float16, bf16), (torch.float32, tf32)):
        assert peak_flops_by_name(name, dtype) == (None if peak is None else pytest.approx(peak * 1e12))


def test_fp32_means_tf32_only_where_torch_may_use_it():
    assert torch.get_float32_matmul_precision() == "highest"
    assert peak_flops_by_name("NVIDIA A100-SXM4-80GB", torch.float32) == 19.5e12
