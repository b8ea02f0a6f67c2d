"""What is kept for backward changes neither losses nor gradients, and is as much as each policy says."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from redwhale.kernels import linear_cross_entropy, rope_cos_sin
from redwhale.model import Llama, ModelConfig, PackedDocuments, add_lora
from redwhale.model.activation_offload import HostOffload
from redwhale.model.activations import compile_layers

CONFIG = ModelConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=112,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
)
TOKENS = 60
IDS = torch.randint(0, 97, (TOKENS,), generator=torch.Generator().manual_seed(1))
DOCUMENTS = PackedDocuments.from_lengths([20, 40])
POLICIES = ("none", "recompute-cheap", "full", "offload")
TRAINED = ("everything", "odd layers", "adapters", "embedding and head")


def model(trained: str, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> Llama:
    made = Llama(CONFIG)
    made.init_weights(torch.Generator().manual_seed(0))
    made.to(dtype).requires_grad_(trained == "everything")
    if trained == "odd layers":
        for layer in made.model.layers[1::2]:
            layer.requires_grad_()
    elif trained == "embedding and head":
        made.model.embed_tokens.requires_grad_()
        made.lm_head.requires_grad_()
    elif trained == "adapters":
        generator = torch.Generator().manual_seed(2)
        for name in add_lora(made, r=4, alpha=8.0, dropout=dropout):
            parameter = made.get_parameter(name).requires_grad_()
            parameter.data.normal_(0.0, 0.1, generator=generator)
    return made.train()


def step(made: Llama, policy: str, documents: PackedDocuments = DOCUMENTS) -> list[Tensor]:
    """Loss and gradients."""
    made.zero_grad()
    made.model.activations = policy  # type: ignore[assignment]
    torch.manual_seed(3)
    loss = made.loss(IDS, IDS.roll(-1), documents).loss_sum
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in made.parameters() if p.grad is not None)]


def kept_bytes(made: Llama, function: Callable[[], Tensor]) -> float:
    """A token, of the storages that autograd keeps, parameters apart."""
    kept: dict[int, int] = {}
    parameters = {parameter.untyped_storage()._cdata for parameter in made.parameters()}
    tensors = []  # so that no storage's place is used again

    def pack(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(kept.values()) / TOKENS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", TRAINED)
def test_all_policies_give_the_same_bits(trained, dtype):
    made = model(trained, dtype)
    expected = step(made, "recompute-cheap")
    assert len(expected) > 1
    assert all(gradient.any() for gradient in expected)
    for policy in POLICIES:
        actual = step(made, policy)
        assert len(actual) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)), policy


@pytest.mark.parametrize("policy", POLICIES)
def test_adapters_drop_the_same_entries_under_every_policy(policy):
    made = model("adapters", dropout=0.3)
    expected = step(made, "recompute-cheap")
    torch.testing.assert_close(step(made, policy), expected, rtol=1e-5, atol=1e-6)
    other = step(model("adapters"), policy)
    assert not torch.allclose(other[0], expected[0], rtol=1e-5)


@pytest.mark.parametrize("trained", TRAINED)
def test_policies_keep_the_less_the_more_they_compute_again(trained):
    made = model(trained)
    made.model.embed_tokens.requires_grad_()  # so that the first layer keeps what the others do

    def kept(policy: str) -> float:
        made.model.activations = policy  # type: ignore[assignment]
        return kept_bytes(made, lambda: made.hidden_states(IDS, DOCUMENTS))

    none, cheap, full = kept("none"), kept("recompute-cheap"), kept("full")
    hidden, wide = 4 * CONFIG.hidden_size, 4 * CONFIG.intermediate_size
    trained_layers = {"everything": 4, "odd layers": 2, "adapters": 4, "embedding and head": 0}[trained]
    # Two normalised inputs and the product of SwiGLU a trained layer are all that "none" adds.
    assert none - cheap == pytest.approx(trained_layers * (2 * hidden + wide), rel=0.02, abs=1)
    # Each layer's input and the last one's output; angles, token ids and the final norm's scale come on top.
    assert 5 * hidden <= full <= 5 * hidden + 48
    assert full < cheap / 4


@pytest.mark.parametrize("trained", TRAINED)
def test_offloaded_layers_give_the_same_bits_from_host_memory(trained, monkeypatch):
    """On a CPU "offload" keeps tensors where they are; here the same code is made to move them."""
    monkeypatch.setattr("redwhale.model.activation_offload._LEAST_BYTES", 1024)
    made = model(trained)
    documents = PackedDocuments.from_lengths([30, 30])
    expected = step(made, "recompute-cheap", documents)
    made.zero_grad()
    frequencies = CONFIG.inverse_frequencies(documents.lengths, documents.lengths, torch.device("cpu"))
    cos, sin = rope_cos_sin(documents.position_ids, frequencies)
    x = made.model.embed_tokens(IDS)
    offload, copies = HostOffload(x.device, shared=(cos, sin)), []
    copy = HostOffload._copy_out
    monkeypatch.setattr(HostOffload, "_copy_out", lambda self, group: copies.append(group) or copy(self, group))
    for layer in made.model.layers:
        with offload.layer(layer):
            x = layer(x, cos, sin, documents, None)
    moved = [storage for group in copies for storage in group.storages()]
    assert len(copies) == CONFIG.num_hidden_layers - 1
    assert all(storage.on_device is None for storage in moved)
    sizes = [storage.on_host.numel() for storage in moved if storage.on_host is not None]
    # x, q, k, v, what attention returns, x again, gate and up: a storage is moved once, though it is saved in views.
    if trained in ("everything", "embedding and head"):
        assert sorted(sizes) == sorted(3 * [TOKENS * 4 * size for size in (32, 32, 16, 16, 32, 32, 112, 112)])
    assert sizes
    del moved
    loss = linear_cross_entropy(made.model.norm(x), made.lm_head.weight, IDS.roll(-1)).loss_sum
    loss.backward()
    actual = [loss.detach(), *(p.grad for p in made.parameters() if p.grad is not None)]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert not any(group.storages() for group in copies)  # nothing stays behind


@pytest.mark.parametrize("trained", ["everything", "adapters"])
@pytest.mark.parametrize("policy", ["recompute-cheap", "full"])
def test_compiled_layers_serve_all_document_lengths_with_the_graphs_of_the_first(trained, policy):
    eager, compiled = model(trained), model(trained)
    names = list(compiled.state_dict())
    compile_layers(compiled, backend="aot_eager")
    assert list(compiled.state_dict()) == names
    counters.clear()
    graphs = []
    for lengths in ([20, 40], [60], [7, 1, 30, 22], [30, 30]):
        documents = PackedDocuments.from_lengths(lengths)
        expected, actual = step(eager, policy, documents), step(compiled, policy, documents)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] == graphs[-1] <= 6  # and not more with more layers
    assert not counters["recompile_limit"]


def test_compiled_layers_may_be_offloaded(monkeypatch):
    monkeypatch.setattr("redwhale.model.activation_offload._LEAST_BYTES", 1024)
    made = model("everything")
    compile_layers(made, backend="aot_eager")
    frequencies = CONFIG.inverse_frequencies(DOCUMENTS.lengths, DOCUMENTS.lengths, torch.device("cpu"))
    cos, sin = rope_cos_sin(DOCUMENTS.position_ids, frequencies)
    moved = []
    copy = HostOffload._copy_out
    monkeypatch.setattr(HostOffload, "_copy_out", lambda self, group: moved.append(group) or copy(self, group))

    def gradients(offloaded: bool) -> list[Tensor]:
        made.zero_grad()
        x = made.model.embed_tokens(IDS)
        offload = HostOffload(x.device, shared=(cos, sin))
        for layer in made.model.layers:
            with offload.layer(layer) if offloaded else nullcontext():
                x = layer(x, cos, sin, DOCUMENTS, None)
        x.square().sum().backward()
        return [parameter.grad.clone() for parameter in made.model.layers.parameters() if parameter.grad is not None]

    expected = gradients(False)
    actual = gradients(True)
    assert moved
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
