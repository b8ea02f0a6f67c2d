"""The gated MLP with adapters equals its formula in float64, and keeps as little as it says."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_testing import BACKENDS, DEVICE, EPSILON, normal, relative_error, strided
from torch.utils.checkpoint import checkpoint

from redwhale.kernels.dropout import dropout_seed, torch_keep_mask
from redwhale.kernels.lora_linear import LoRAWeights, lora_linear, lora_linears
from redwhale.kernels.lora_mlp import lora_mlp
from redwhale.kernels.swiglu import swiglu

on_both = pytest.mark.parametrize("backend", BACKENDS)
SEED = torch.tensor([2**33 + 1, 77], device=DEVICE)
SCALES = (0.5, 2.0, 0.75)
LEAVES = ("h", "norm", *(f"{tensor}_{layer}" for layer in ("gate", "up", "down") for tensor in "WAB"))
EPS = 1e-5


def case(*tokens, hidden=20, features=33, ranks=(8, 24, 1), norm=True, seed=0, dtype=torch.float32):
    """All leaves by name, None for what there is not (rank 0: no adapter), and an upstream gradient."""
    leaves = {"h": normal(*tokens, hidden, seed=seed, dtype=dtype)}
    leaves["norm"] = 1 + normal(hidden, seed=seed + 1, dtype=dtype, scale=0.3) if norm else None
    for n, (layer, rank) in enumerate(zip(("gate", "up", "down"), ranks, strict=True)):
        inputs, outputs = (features, hidden) if layer == "down" else (hidden, features)
        shapes = {"W": (outputs, inputs), "A": (rank, inputs), "B": (outputs, rank)}
        for m, (name, shape) in enumerate(shapes.items()):
            matrix = normal(*shape, seed=seed + 10 * n + m + 2, dtype=dtype, scale=max(1, shape[1]) ** -0.5)
            leaves[f"{name}_{layer}"] = matrix if rank or name == "W" else None
    return leaves, normal(*tokens, hidden, seed=seed + 99, dtype=dtype)


def layers_of(leaves):
    names = ("gate", "up", "down")
    return [
        LoRAWeights(leaves[f"W_{name}"], None, leaves[f"A_{name}"], leaves[f"B_{name}"], scale)
        for name, scale in zip(names, SCALES, strict=True)
    ]


def operation(leaves, p=0.0, **options):
    seed = SEED if p else None
    return lora_mlp(
        leaves["h"], *layers_of(leaves), norm_weight=leaves["norm"], norm_eps=EPS, dropout=p, seed=seed, **options
    )


def formula(leaves, p=0.0):
    """The operation as one writes it down."""

    def linear(x, layer, mask):
        y = x @ layer.weight.T
        return y if layer.A is None else y + layer.scale * ((x * mask) @ layer.A.T) @ layer.B.T

    def mask(x, seed):
        rows = x.numel() // x.shape[-1]
        return torch_keep_mask(seed, rows, x.shape[-1], p).view(x.shape).to(x.dtype) / (1 - p) if p else 1.0

    gate, up, down = layers_of(leaves)
    x = leaves["h"]
    if leaves["norm"] is not None:
        x = x / torch.sqrt(x.square().mean(-1, keepdim=True) + EPS) * leaves["norm"]
    gates, ups = (linear(x, layer, mask(x, SEED[:1])) for layer in (gate, up))
    act = gates / (1 + torch.exp(-gates)) * ups
    return linear(act, down, mask(act, SEED[1:]))


def run(function, leaves, upstream, trained=LEAVES, **options):
    """The output and the gradient of each leaf that is trained, by name."""
    fresh = {n: None if t is None else t.detach().requires_grad_(n in trained) for n, t in leaves.items()}
    output = function(fresh, **options)
    wanted = {name: tensor for name, tensor in fresh.items() if name in trained and tensor is not None}
    gradients = torch.autograd.grad(output, list(wanted.values()), upstream)
    return {"output": output.detach(), **dict(zip(wanted, gradients, strict=True))}


def exact(leaves):
    return {name: None if tensor is None else tensor.double() for name, tensor in leaves.items()}


def check(given_case, bound=1e-5, trained=LEAVES, p=0.0, **options):
    leaves, upstream = given_case
    actual = run(operation, leaves, upstream, trained, p=p, **options)
    expected = run(formula, exact(leaves), upstream.double(), trained, p=p)
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert tensor.dtype == leaves["h"].dtype
        assert relative_error(tensor, expected[name]) < bound, name


@on_both
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("ranks", [(8, 24, 1), (0, 8, 0), (8, 0, 0), (0, 0, 8), (0, 1, 24), (0, 0, 0)])
def test_output_and_all_gradients_equal_float64(backend, ranks, norm, p):
    check(case(3, 7, ranks=ranks, norm=norm), p=p, backend=backend)


@on_both
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_larger_adapters_equal_float64(backend, p):
    check(case(40, hidden=48, features=72, ranks=(64, 64, 64)), p=p, backend=backend)


@on_both
@settings(max_examples=15, deadline=None)
@given(
    tokens=st.integers(1, 40),
    hidden=st.integers(2, 30),
    features=st.integers(1, 70),
    trained=st.sets(st.sampled_from(LEAVES), min_size=1),
    p=st.sampled_from([0.0, 0.25]),
    seed=st.integers(0, 2**16),
)
def test_whatever_is_trained_gets_its_own_gradient_and_the_rest_none(
    backend, tokens, hidden, features, trained, p, seed
):
    leaves, upstream = case(tokens, hidden=hidden, features=features, seed=seed)
    full = run(operation, leaves, upstream, p=p, backend="torch")
    part = run(operation, leaves, upstream, trained, p=p, backend=backend)
    assert part.keys() == {"output", *trained}
    for name, tensor in part.items():
        torch.testing.assert_close(tensor, full[name], rtol=1e-4, atol=1e-4)


@on_both
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_fp16_is_within_its_roundings_of_float64(backend, p):
    check(case(30, hidden=48, features=72, dtype=torch.float16), 8 * EPSILON[torch.float16], p=p, backend=backend)


def test_bf16_of_the_torch_backend_is_within_its_roundings_of_float64():
    check(case(30, hidden=48, features=72, dtype=torch.bfloat16), 8 * EPSILON[torch.bfloat16], p=0.3, backend="torch")


@on_both
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_it_equals_the_same_layers_one_after_the_other_with_the_same_masks(backend, p):
    def apart(leaves, p):
        gate, up, down = layers_of(leaves)
        seeds = (SEED[:1], SEED[1:]) if p else (None, None)
        options = {"dropout": p, "backend": backend}
        gates, ups = lora_linears(leaves["h"], [gate, up], norm_weight=leaves["norm"], seed=seeds[0], **options)
        return lora_linear(swiglu(gates, ups, backend=backend), down, seed=seeds[1], **options)

    leaves, upstream = case(2, 9)
    expected = run(apart, leaves, upstream, p=p)
    for name, tensor in run(operation, leaves, upstream, p=p, backend=backend).items():
        assert relative_error(tensor, expected[name]) < 1e-5, name


def test_without_adapters_and_norm_the_torch_backend_is_bit_equal_to_plain_layers():
    leaves, _ = case(9, ranks=(0, 0, 0), norm=False, dtype=torch.bfloat16)
    h, gate, up, down = (leaves[name] for name in ("h", "W_gate", "W_up", "W_down"))
    expected = F.linear(F.silu(F.linear(h, gate)) * F.linear(h, up), down)
    assert torch.equal(operation(leaves, backend="torch"), expected)


@on_both
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("norm", [False, True])
def test_backward_keeps_the_input_two_wide_tensors_and_the_narrow_ones(backend, norm, p):
    leaves, _ = case(40, norm=norm)
    weights = {tensor.data_ptr() for name, tensor in leaves.items() if name != "h" and tensor is not None}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    fresh = {
        name: None if tensor is None else tensor.requires_grad_(not name.startswith(("W", "n")))
        for name, tensor in leaves.items()
    }
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        operation(fresh, p, backend=backend)
    activations = sum(size for pointer, size in kept.items() if pointer not in {*weights, SEED.data_ptr()})
    assert activations == 4 * 40 * (20 + norm + 2 * 33 + 8 + 24 + 1)


@on_both
def test_checkpointing_with_dropout_draws_the_same_masks_again(backend):
    leaves, upstream = case(9)

    def with_drawn_seeds(leaves):
        seed = torch.cat([dropout_seed(DEVICE), dropout_seed(DEVICE)])
        weights = layers_of(leaves)
        return lora_mlp(leaves["h"], *weights, norm_weight=leaves["norm"], dropout=0.3, seed=seed, backend=backend)

    torch.manual_seed(3)
    plain = run(with_drawn_seeds, leaves, upstream)
    torch.manual_seed(3)
    again = run(lambda fresh: checkpoint(with_drawn_seeds, fresh, use_reentrant=False), leaves, upstream)
    assert all(torch.equal(again[name], tensor) for name, tensor in plain.items())


@on_both
@pytest.mark.parametrize("ranks", [(8, 24, 1), (0, 0, 0)])
def test_a_second_backward_pass_through_the_same_graph_gives_the_same(backend, ranks):
    leaves, upstream = case(9, ranks=ranks)
    fresh = [None if tensor is None else tensor.requires_grad_() for tensor in leaves.values()]
    output = operation(leaves, 0.3, backend=backend)
    present = [tensor for tensor in fresh if tensor is not None]
    first = torch.autograd.grad(output, present, upstream, retain_graph=True)
    second = torch.autograd.grad(output, present, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@on_both
def test_gradients_of_two_backward_passes_add_up(backend):
    leaves, upstream = case(9)
    once = run(operation, leaves, upstream, p=0.3, backend=backend)
    for tensor in leaves.values():
        tensor.requires_grad_()
    for _ in range(2):
        operation(leaves, 0.3, backend=backend).backward(upstream)
    for name, tensor in leaves.items():
        torch.testing.assert_close(tensor.grad, 2 * once[name], rtol=1e-5, atol=1e-5)


@on_both
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_compiled_without_graph_breaks_it_gives_the_same(backend, p):
    leaves, upstream = case(9)

    def function(leaves):
        return operation(leaves, p, backend=backend)

    plain = run(function, leaves, upstream)
    compiled = run(torch.compile(function, backend="aot_eager", fullgraph=True), leaves, upstream)
    for name, tensor in compiled.items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-5, atol=1e-5)


@on_both
def test_strided_inputs_and_upstream_gradients_give_the_same(backend):
    leaves, upstream = case(2, 9)
    plain = run(operation, leaves, upstream, p=0.3, backend=backend)

    def of_strided(fresh, p):
        apart = {name: strided(tensor) for name, tensor in fresh.items()}
        return operation(apart, p, backend=backend)

    for name, tensor in run(of_strided, leaves, strided(upstream), p=0.3).items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-5, atol=1e-5)


@on_both
def test_no_tokens_give_zero_gradients_of_the_weights(backend):
    leaves, upstream = case(0)
    results = run(operation, leaves, upstream, p=0.3, backend=backend)
    assert results["output"].shape == results["h"].shape == (0, 20)
    assert not any(tensor.any() for tensor in results.values())


@on_both
def test_the_output_may_be_changed_in_place(backend):
    leaves, _ = case(2, 9)
    leaves["h"].requires_grad_()
    output = operation(leaves, backend=backend)
    output += leaves["h"]
    output.sum().backward()
    assert leaves["h"].grad is not None


def test_second_derivatives_are_refused_rather_than_wrong():
    leaves, _ = case(5)
    leaves["h"].requires_grad_()
    (grad,) = torch.autograd.grad(operation(leaves).square().sum(), leaves["h"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_what_it_cannot_do_is_refused():
    leaves, _ = case(5)
    h, (gate, up, down) = leaves["h"], layers_of(leaves)
    with pytest.raises(ValueError, match=r"dropout 1.0 is not in \[0, 1\)"):
        lora_mlp(h, gate, up, down, dropout=1.0, seed=SEED)
    for seed in (None, SEED[:1]):
        with pytest.raises(ValueError, match="dropout needs two seeds"):
            lora_mlp(h, gate, up, down, dropout=0.1, seed=seed)
    with pytest.raises(ValueError, match="biases are not supported"):
        lora_mlp(h, gate, up, down._replace(bias=torch.zeros(20, device=DEVICE)))
    with pytest.raises(ValueError, match="an adapter needs both A and B"):
        lora_mlp(h, gate, up._replace(B=None), down)
