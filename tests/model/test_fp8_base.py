"""Frozen layers in FP8: which ones, that they come back, and what is refused."""

import copy

import pytest
import torch
from tiny import TINY, tiny_model

from redwhale.model import Fp8Base, PackedDocuments, add_lora, save_model
from redwhale.model.errors import CheckpointError
from redwhale.model.fp8_base import gpu_obstacle, input_means
from redwhale.model.lora import linear_layers
from redwhale.model.phi import Phi

IDS = torch.arange(20) % 90
DOCUMENTS = PackedDocuments.from_lengths([12, 8])


def loss_and_gradients(model):
    loss = model.loss(IDS, IDS.roll(-1), DOCUMENTS).loss_sum
    trained = [p for p in model.parameters() if p.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, trained)]


@pytest.mark.parametrize("policy", ["none", "recompute-cheap", "full"])
def test_what_is_kept_for_backward_changes_no_bit(policy):
    def run(policy):
        model = tiny_model(torch.bfloat16).requires_grad_(False).train()
        model.model.embed_tokens.requires_grad_()
        model.model.activations = policy
        Fp8Base(model, ["model.embed_tokens.weight"])
        return loss_and_gradients(model)

    assert all(torch.equal(a, b) for a, b in zip(run(policy), run("recompute-cheap"), strict=True))


@pytest.mark.parametrize("lora", [False, True])
def test_loss_and_gradients_are_near_those_of_the_stored_weights(lora):
    model = tiny_model().requires_grad_(False).train()
    names = add_lora(model, r=4, alpha=4.0) if lora else []
    for name in (*names, "model.embed_tokens.weight"):
        model.get_parameter(name).requires_grad_().data.add_(0.01)
    stored = loss_and_gradients(model)
    base = Fp8Base(model, [*names, "model.embed_tokens.weight"])
    assert len(base.layers) == 7 * TINY.num_hidden_layers
    in_fp8 = loss_and_gradients(model)
    for a, b in zip(in_fp8, stored, strict=True):
        assert 0 < (a - b).norm() < 0.25 * b.norm()  # of q and k, whose gradients nearly vanish
    base.restore()
    assert all(torch.equal(a, b) for a, b in zip(loss_and_gradients(model), stored, strict=True))


def test_every_module_and_every_bit_comes_back_and_the_mode_stays():
    model = tiny_model(torch.bfloat16)
    modules, before = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    base = Fp8Base(model, [])
    model.eval()
    base.restore()
    base.restore()
    assert dict(model.named_modules()) == modules
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))


@pytest.mark.parametrize("lora", [False, True])
def test_what_rounding_does_to_the_mean_of_an_output_is_taken_back(lora):
    """Inputs with a few channels that are always large, as those of language models."""
    model = tiny_model().requires_grad_(False)
    model.model.embed_tokens.weight[:, :3] += 40 * torch.tensor([1.0, -0.7, 0.4]) * TINY.initializer_range
    if lora:
        add_lora(model, r=2, alpha=2.0)
    run = lambda: model.hidden_states(IDS, DOCUMENTS)  # noqa: E731
    stored, means = run(), input_means(model, [], run)
    assert set(means) == set(linear_layers(model))
    x = model.model.layers[0].input_layernorm(model.model.embed_tokens(IDS))
    torch.testing.assert_close(means["model.layers.0.self_attn.q_proj"], x.mean(0))
    errors = {}
    for name, given in (("plain", None), ("corrected", means)):
        base = Fp8Base(model, [], given)
        errors[name] = (run() - stored).norm()
        base.restore()
    assert errors["corrected"] < 0.7 * errors["plain"]
    assert torch.equal(run(), stored)


def test_layers_with_biases_and_of_other_families_are_put_into_fp8_too():
    from dataclasses import replace

    config = replace(TINY, model_type="phi", tie_word_embeddings=False, num_key_value_heads=4)
    model = Phi(config).requires_grad_(False)
    model.init_weights(torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.02)
    stored = model(IDS, DOCUMENTS)
    base = Fp8Base(model, [])
    assert "model.layers.0.mlp.fc1" in base.layers
    in_fp8 = model(IDS, DOCUMENTS)
    assert 0 < (in_fp8 - stored).norm() < 0.1 * stored.norm()


def test_a_model_in_fp8_is_not_saved(tmp_path):
    model = tiny_model()
    base = Fp8Base(model, [])
    with pytest.raises(CheckpointError, match="cannot hold layers in FP8"):
        save_model(model, tmp_path / "m")
    with pytest.raises(CheckpointError, match="already"):
        Fp8Base(model, [])
    base.restore()
    save_model(model, tmp_path / "m")


def test_what_a_gpu_cannot_multiply_is_said_in_a_sentence():
    bf16, shape = torch.bfloat16, torch.Size((4096, 1024))
    assert gpu_obstacle("H100", True, bf16, shape) is None
    assert gpu_obstacle("A100", False, bf16, shape) == (
        "needs FP8 tensor cores (NVIDIA Ada, Hopper or later), and A100 has none: leave it out"
    )
    assert "set precision" in (gpu_obstacle("H100", True, torch.float32, shape) or "")
    assert "multiples of 16" in (gpu_obstacle("H100", True, bf16, torch.Size((100, 1024))) or "")
