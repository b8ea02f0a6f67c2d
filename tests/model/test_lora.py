"""LoRA adapters are W + (alpha/r)·B·A, in the forward pass, the gradients and the merge."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

from redwhale.model import LINEAR_LAYERS, CheckpointError, LoRALinear, PackedDocuments, add_lora, load_model, merge_lora

R, ALPHA = 4, 6.0


def documents_of(ids):
    return PackedDocuments.from_lengths([len(ids)])


def adapted_model(base, dtype=torch.float32, targets=LINEAR_LAYERS):
    """A model whose adapters have been trained: B is no longer zero."""
    model = load_model(base, dtype=dtype)
    names = add_lora(model, r=R, alpha=ALPHA, targets=targets, seed=5)
    generator = torch.Generator().manual_seed(9)
    parameters = dict(model.named_parameters())
    for name in names:
        if name.endswith("lora_B"):
            parameters[name].data.normal_(0, 0.05, generator=generator)
    return model, names


def effective_weights(model) -> dict[str, torch.Tensor]:
    """The published formula, W + (alpha/r)·B·A, written out for every adapter, as a function of A and B."""
    parameters = dict(model.named_parameters())
    weights = {}
    for name, parameter in parameters.items():
        if name.endswith((".lora_A", ".lora_B")):
            continue
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A" in parameters:
            parameter = parameter + (ALPHA / R) * (parameters[f"{layer}.lora_B"] @ parameters[f"{layer}.lora_A"])
        weights[name] = parameter
    return weights


def test_adapters_start_as_the_model_they_are_added_to(base, ids):
    plain, model = load_model(base), load_model(base)
    add_lora(model, r=R, alpha=ALPHA)
    assert torch.equal(model(ids, documents_of(ids)), plain(ids, documents_of(ids)))


@pytest.mark.parametrize("targets", [LINEAR_LAYERS, ("q_proj", "down_proj")])
def test_only_the_targets_of_every_layer_are_adapted(base, targets):
    model = load_model(base)
    before = {name: p.clone() for name, p in model.named_parameters()}
    names = add_lora(model, r=R, alpha=ALPHA, targets=targets)
    where = {"gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp"}
    expected = {
        f"model.layers.{layer}.{where.get(target, 'self_attn')}.{target}.lora_{matrix}"
        for layer in range(3)
        for target in targets
        for matrix in "AB"
    }
    assert set(names) == expected
    parameters = dict(model.named_parameters())
    assert parameters.keys() - before.keys() == expected
    assert all(torch.equal(parameters[name], tensor) for name, tensor in before.items())
    assert {name for name, p in parameters.items() if p.requires_grad} == expected


def test_matrices_start_as_in_the_paper(base):
    model = load_model(base, dtype=torch.bfloat16)
    add_lora(model, r=R, alpha=ALPHA)
    layer = model.model.layers[1].mlp.down_proj
    assert layer.lora_A.shape == (R, 112)
    assert layer.lora_B.shape == (64, R)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.bfloat16
    assert not layer.lora_B.any()
    # U(−1/√in, 1/√in) has standard deviation 1/√(3·in).
    assert float(layer.lora_A.detach().abs().max()) <= 1.005 / math.sqrt(112)
    assert float(layer.lora_A.detach().float().std()) == pytest.approx(1 / math.sqrt(3 * 112), rel=0.1)


def test_one_layer_computes_the_published_formula():
    torch.manual_seed(0)
    base = nn.Linear(10, 7, bias=True)
    layer = LoRALinear(base, R, ALPHA)
    layer.lora_B.data.normal_()
    x = torch.randn(3, 5, 10)
    w, a, b, bias = (t.detach().double() for t in (base.weight, layer.lora_A, layer.lora_B, base.bias))
    expected = x.double() @ (w + ALPHA / R * (b @ a)).T + bias
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_gradients_equal_those_of_the_explicit_product(base, ids):
    model, names = adapted_model(base)
    parameters = dict(model.named_parameters())
    logits = model(ids, documents_of(ids))
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    adapters = [parameters[name] for name in names]
    actual = torch.autograd.grad(logits, adapters, upstream)
    explicit = functional_call(load_model(base), effective_weights(model), (ids, documents_of(ids)))
    torch.testing.assert_close(logits, explicit, rtol=0, atol=5e-5)
    for name, a, e in zip(names, actual, torch.autograd.grad(explicit, adapters, upstream), strict=True):
        assert float((a - e).norm() / e.norm()) < 1e-4, name


def test_merging_keeps_the_logits(base, ids):
    model, _ = adapted_model(base)
    with torch.no_grad():
        plain = load_model(base)(ids, documents_of(ids))
        expected = model(ids, documents_of(ids))
        merge_lora(model)
        actual = model(ids, documents_of(ids))
    assert float((expected - plain).abs().max()) > 0.1
    # The logits are of several units; fp32 holds them to about 1e-6 of that.
    assert float((actual - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_rounds_once_and_leaves_other_tensors_bit_identical(base, dtype):
    model, _ = adapted_model(base, dtype, targets=("v_proj", "gate_proj"))
    plain = dict(load_model(base, dtype=dtype).named_parameters())
    exact = {name: p.double() for name, p in effective_weights(model.double()).items()}
    model, _ = adapted_model(base, dtype, targets=("v_proj", "gate_proj"))
    merge_lora(model)
    merged = dict(model.named_parameters())
    assert list(merged) == list(plain)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    for name, tensor in merged.items():
        assert tensor.dtype == dtype
        if not name.endswith(("v_proj.weight", "gate_proj.weight")):
            assert torch.equal(tensor, plain[name]), name
            continue
        assert not torch.equal(tensor, plain[name]), name
        # bf16: the nearest neighbour of the exact sum, save where fp32 lands on the other side of a tie.
        wrong = (tensor != exact[name].to(dtype)).float().mean()
        assert dtype == torch.float32 or float(wrong) < 1e-3
        torch.testing.assert_close(
            tensor.double(), exact[name], rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
        )


def test_merging_keeps_biases_and_frozenness():
    torch.manual_seed(0)
    parent = nn.ModuleDict({"q_proj": nn.Linear(6, 5, bias=True)})
    parent.requires_grad_(False)
    bias = parent["q_proj"].bias.clone()
    add_lora(parent, r=2, alpha=2.0, targets=["q_proj"])
    parent["q_proj"].lora_B.data.normal_()
    x = torch.randn(4, 6)
    expected = parent["q_proj"](x)
    merge_lora(parent)
    assert type(parent["q_proj"]) is nn.Linear
    assert torch.equal(parent["q_proj"].bias, bias)
    assert not any(p.requires_grad for p in parent.parameters())
    torch.testing.assert_close(parent["q_proj"](x), expected, rtol=1e-5, atol=1e-5)


def test_a_seed_gives_the_same_adapters_and_another_gives_others(base):
    def matrices(seed):
        model = load_model(base)
        names = add_lora(model, r=R, alpha=ALPHA, seed=seed)
        parameters = dict(model.named_parameters())
        return [parameters[name].detach() for name in names if name.endswith("lora_A")]

    torch.manual_seed(1)
    first = matrices(3)
    torch.manual_seed(2)  # the global generator plays no part
    assert all(torch.equal(a, b) for a, b in zip(first, matrices(3), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, matrices(4), strict=True))
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("target", ["qproj", "lm_head", "embed_tokens", "layers"])
def test_a_target_that_is_no_projection_is_an_error_and_changes_nothing(base, target):
    model = load_model(base)
    with pytest.raises(CheckpointError, match=f"'{target}' names no linear layer; known: q_proj, .*down_proj"):
        add_lora(model, r=R, alpha=ALPHA, targets=["q_proj", target])
    assert not any(isinstance(module, LoRALinear) for module in model.modules())


def test_a_second_adapter_does_not_silently_drop_the_first(base):
    model, _ = adapted_model(base, targets=["o_proj"])
    with pytest.raises(CheckpointError, match="o_proj has a LoRA adapter already"):
        add_lora(model, r=R, alpha=ALPHA)
    merge_lora(model)
    assert len(add_lora(model, r=R, alpha=ALPHA)) == 3 * 7 * 2


def test_a_rank_below_one_is_an_error(base):
    with pytest.raises(CheckpointError, match="rank 0 is not positive"):
        add_lora(load_model(base), r=0, alpha=ALPHA)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_a_dropout_that_is_no_share_is_an_error(base, dropout):
    with pytest.raises(CheckpointError, match=r"dropout .* is not in \[0, 1\)"):
        add_lora(load_model(base), r=R, alpha=ALPHA, dropout=dropout)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["model.layers.1.mlp.up_proj"], ["model.layers.1.mlp.up_proj"]),
        (["layers.2.self_attn.k_proj", "layers.0.mlp.down_proj"], ["0.mlp.down_proj", "2.self_attn.k_proj"]),
        (r"model\.layers\.[12]\..*\.[qk]_proj", [f"{i}.self_attn.{p}_proj" for i in (1, 2) for p in "qk"]),
        (r".*\.2\.mlp\..*", [f"2.mlp.{name}_proj" for name in ("gate", "up", "down")]),
    ],
)
def test_layers_are_chosen_by_whole_name_or_pattern(base, targets, expected):
    model = load_model(base)
    names = add_lora(model, r=R, alpha=ALPHA, targets=targets)
    chosen = [f"model.layers.{name.removeprefix('model.layers.')}" for name in expected]
    assert names == [f"{name}.{matrix}" for name in chosen for matrix in ("lora_A", "lora_B")]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(names)


def test_all_linear_is_every_projection_but_the_head(base):
    model = load_model(base)
    assert len(add_lora(model, r=R, alpha=ALPHA, targets="all-linear")) == 3 * 7 * 2
    assert type(model.lm_head) is nn.Linear


def test_last_names_are_whole_words(base):
    """A plain suffix match would take every projection for "proj"."""
    with pytest.raises(CheckpointError, match="'proj' names no linear layer"):
        add_lora(load_model(base), r=R, alpha=ALPHA, targets=["proj"])


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("q_proj", "'q_proj' names no linear layer; .* a pattern matches whole names, such as model.layers.0"),
        (".*lm_head", "'.*lm_head' names no linear layer"),
        ("(", r"'\(' is not a regular expression: missing \)"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(base, pattern, message):
    model = load_model(base)
    with pytest.raises(CheckpointError, match=message):
        add_lora(model, r=R, alpha=ALPHA, targets=pattern)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())


def test_rslora_scales_by_the_root_of_the_rank():
    torch.manual_seed(0)
    base = nn.Linear(10, 7, bias=False)
    layer = LoRALinear(base, R, ALPHA, rslora=True)
    layer.lora_B.data.normal_()
    x = torch.randn(5, 10)
    w, a, b = (t.detach().double() for t in (base.weight, layer.lora_A, layer.lora_B))
    expected = w + ALPHA / 2.0 * (b @ a)  # √4 = 2
    torch.testing.assert_close(layer(x).double(), x.double() @ expected.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.merged_weight().double(), expected, rtol=1e-5, atol=1e-5)


def dropping_layer(dropout):
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(10, 7, bias=False).train(), R, ALPHA, dropout=dropout)
    layer.lora_B.data.normal_()
    return layer, torch.randn(1, 10)


def test_dropout_leaves_the_expectation_and_has_the_variance_of_a_bernoulli_mask():
    dropout = 0.3
    layer, x = dropping_layer(dropout)
    repeats = 40_000
    with torch.no_grad():
        samples = layer(x.expand(repeats, -1)).double()
        kept = layer.eval()(x).double()[0]
        update = (ALPHA / R * layer.lora_B @ layer.lora_A).double()
    # Each input is x·m/(1−p) with m ~ Bernoulli(1−p): mean x, variance x²·p/(1−p). The base's share has none.
    variance = (update**2 * x.double() ** 2).sum(1) * dropout / (1 - dropout)
    error = (samples.mean(0) - kept).abs() / (variance / repeats).sqrt()
    assert float(error.max()) < 4
    torch.testing.assert_close(samples.var(0), variance, rtol=0.05, atol=0)


def test_dropout_reaches_the_adapter_alone():
    layer, x = dropping_layer(0.5)
    layer.lora_B.data.zero_()
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight))


def test_dropout_is_off_in_eval_and_in_a_loaded_model(base, ids):
    model = load_model(base)
    names = add_lora(model, r=R, alpha=ALPHA, dropout=0.5, seed=5)
    plain = load_model(base)
    add_lora(plain, r=R, alpha=ALPHA, seed=5)
    for one in (model, plain):
        generator = torch.Generator().manual_seed(9)
        for name in names[1::2]:
            one.get_parameter(name).data.normal_(0, 0.05, generator=generator)
    expected = plain(ids, documents_of(ids))
    assert torch.equal(model(ids, documents_of(ids)), expected)
    assert not torch.equal(model.train()(ids, documents_of(ids)), expected)
    assert torch.equal(model.eval()(ids, documents_of(ids)), expected)
    model.train()
    merge_lora(model)
    merge_lora(plain)
    assert torch.equal(model(ids, documents_of(ids)), plain(ids, documents_of(ids)))


def test_recomputed_layers_see_the_masks_of_the_first_pass(base, ids):
    gradients = []
    for recompute in (False, True):
        model, names = adapted_model(base)
        for module in model.modules():
            if isinstance(module, LoRALinear):
                module.dropout = 0.4
        model.train().model.activations = "full" if recompute else "none"
        torch.manual_seed(11)
        model.loss(ids, ids.roll(-1), documents_of(ids)).loss_sum.backward()
        gradients.append([model.get_parameter(name).grad for name in names])
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*gradients, strict=True))


def test_recomputed_layers_train_the_adapters_of_a_frozen_trunk(base, ids):
    gradients = []
    for recompute in (False, True):
        model, names = adapted_model(base)
        model.model.activations = "full" if recompute else "none"
        model.loss(ids, ids.roll(-1), documents_of(ids)).loss_sum.backward()
        parameters = dict(model.named_parameters())
        assert {name for name, p in parameters.items() if p.grad is not None} == set(names)
        gradients.append([parameters[name].grad for name in names])
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*gradients, strict=True))
