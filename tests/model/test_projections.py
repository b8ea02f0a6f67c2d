"""A decoder layer's fused projections compute what its modules do one by one, and keep what training needs, no more."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from redwhale.kernels import RMSNorm
from redwhale.model import Llama, LoRALinear, ModelConfig, PackedDocuments, add_lora
from redwhale.model.projections import gated_mlp, project

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=88,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
)
TOKENS, RANK = 24, 4


def model(lora: bool = True, dropout: float = 0.0) -> Llama:
    made = Llama(CONFIG)
    made.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for layer in made.model.layers:
            layer.post_attention_layernorm.weight.normal_(1.0, 0.1, generator=torch.Generator().manual_seed(1))
    if lora:
        made.requires_grad_(False)
        add_lora(made, r=RANK, alpha=8.0, dropout=dropout)
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.requires_grad_(True)
            if "lora_B" in name:
                parameter.data.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(2))
    return made


def of_layer(made, change=lambda function: function):
    """Outputs and gradients of the MLP and of the attention's projections, for one input."""
    layer = made.model.layers[0]
    x = torch.randn(TOKENS, CONFIG.hidden_size, generator=torch.Generator().manual_seed(3)).requires_grad_()
    attention, mlp = layer.self_attn, layer.mlp
    torch.manual_seed(7)

    def function(x):
        q, k, v = project(x, layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj))
        y = gated_mlp(x, layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        return torch.cat((q, k, v, y), 1)

    output = change(function)(x)
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    used = torch.autograd.grad(output.square().sum(), [x, *trained], allow_unused=True)
    return [output.detach(), *(gradient for gradient in used if gradient is not None)]


def with_a_hook(made):
    """The same model, on whose every linear layer a hook that does nothing forbids the fused operations."""
    for module in made.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, inputs, output: None)
    return made


@pytest.mark.parametrize("lora", [True, False])
def test_fused_projections_equal_the_modules_one_by_one(lora):
    fused, one_by_one = of_layer(model(lora)), of_layer(with_a_hook(model(lora)))
    assert len(fused) == len(one_by_one) > 8
    for a, b in zip(fused, one_by_one, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_hooks_on_a_layer_are_called():
    made, seen = model(), []
    made.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    of_layer(made)
    assert seen == [(TOKENS, CONFIG.intermediate_size)]


def test_a_layer_of_another_class_is_called():
    class Doubled(torch.nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    made = model(lora=False)
    attention = made.model.layers[0].self_attn
    plain = of_layer(made)[0]
    doubled = Doubled(CONFIG.hidden_size, CONFIG.hidden_size, bias=False)
    doubled.weight = attention.q_proj.weight
    attention.q_proj = doubled
    q = slice(0, CONFIG.hidden_size)
    torch.testing.assert_close(of_layer(made)[0][:, q], 2 * plain[:, q])


def test_dropout_in_training_is_the_same_when_activations_are_computed_again():
    made = model(dropout=0.3).train()
    dropped = of_layer(made)
    again = of_layer(made, lambda function: lambda x: checkpoint(function, x, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(again, dropped, strict=True))
    assert not torch.allclose(dropped[0], of_layer(made.eval())[0])


def test_layers_with_other_dropouts_drop_each_for_itself():
    made = model(dropout=0.3).train()
    up = made.model.layers[0].mlp.up_proj
    assert isinstance(up, LoRALinear)
    up.dropout = 0.0
    assert torch.isfinite(of_layer(made)[0]).all()


@pytest.mark.parametrize("lora", [True, False])
def test_a_layer_keeps_the_residual_stream_gate_and_up_and_what_attention_needs(lora):
    made = model(lora)
    if not lora:
        made.requires_grad_(True)
    weights = {parameter.untyped_storage().data_ptr() for parameter in made.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.is_floating_point():
            kept[storage.data_ptr()] = max(kept.get(storage.data_ptr(), 0), storage.nbytes())
        kept_tensors.append(tensor)  # so that no address is used twice
        return tensor

    kept_tensors = []
    documents = PackedDocuments.from_lengths([TOKENS])
    x = torch.randn(TOKENS, CONFIG.hidden_size, requires_grad=True)
    cos = sin = torch.randn(TOKENS, CONFIG.head_dim // 2)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        made.model.layers[0](x, cos, sin, documents, None)
    hidden, wide, keys = CONFIG.hidden_size, CONFIG.intermediate_size, 2 * CONFIG.head_dim
    streams = 2 * hidden  # into attention and into the MLP
    attention = hidden + 2 * keys + hidden  # q, k, v and what attention returns
    low_rank = 7 * RANK if lora else 0
    rows = 2 + CONFIG.num_attention_heads + CONFIG.head_dim // 2  # two norms, attention's log-sum-exp, angles
    values = streams + attention + 2 * wide + low_rank + rows
    assert sum(kept.values()) <= 4 * TOKENS * values * 1.02


def test_the_norm_in_front_trains():
    made = model(lora=False)
    norm = made.model.layers[0].input_layernorm
    assert isinstance(norm, RMSNorm)
    layer = made.model.layers[0].self_attn
    x = torch.randn(TOKENS, CONFIG.hidden_size)
    (fused,) = torch.autograd.grad(project(x, norm, (layer.q_proj,))[0].square().sum(), norm.weight)
    (plain,) = torch.autograd.grad(layer.q_proj(norm(x)).square().sum(), norm.weight)
    torch.testing.assert_close(fused, plain)
