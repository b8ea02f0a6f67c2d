"""Layers with adapters compute the published formula and its gradients, and keep only what backward needs."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_testing import BACKENDS, DEVICE, EPSILON, far_rows, normal, relative_error, strided
from torch import nn
from torch.utils.checkpoint import checkpoint

from redwhale.kernels.dropout import dropout_seed, torch_keep_mask
from redwhale.kernels.lora_linear import LoRALinear, LoRAWeights, lora_linear, lora_linears

EPS = 1e-5
SEED = torch.tensor([5], device=DEVICE)


def layer_of(outputs, inputs, rank, *, bias=False, scale=1.5, seed=0, dtype=torch.float32):
    """A layer, without an adapter if its rank is 0."""
    like = {"dtype": dtype}
    return LoRAWeights(
        normal(outputs, inputs, seed=seed, scale=inputs**-0.5, **like),
        normal(outputs, seed=seed + 1, **like) if bias else None,
        normal(rank, inputs, seed=seed + 2, scale=inputs**-0.5, **like) if rank else None,
        normal(outputs, rank, seed=seed + 3, scale=rank**-0.5, **like) if rank else None,
        scale,
    )


def group(inputs=20, ranks=(4, 0, 7), outputs=(24, 9, 13), **options):
    """Layers of different sizes and scales, with and without bias and adapter."""
    return [
        layer_of(size, inputs, rank, bias=number % 2 == 0, scale=0.5 + number, seed=10 * number, **options)
        for number, (size, rank) in enumerate(zip(outputs, ranks, strict=True))
    ]


def formula(x, layers, *, norm_weight=None, dropout=0.0, seed=None):
    """As published, in the dtype of its inputs."""
    if norm_weight is not None:
        x = norm_weight * x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS)
    kept = x
    if dropout:
        mask = torch_keep_mask(seed, x[..., 0].numel(), x.shape[-1], dropout).view(x.shape)
        kept = x * mask / (1 - dropout)
    outputs = []
    for W, bias, A, B, scale, _ in layers:
        y = x @ W.mT
        y = y if bias is None else y + bias
        outputs.append(y if A is None else y + scale * (kept @ A.mT) @ B.mT)
    return tuple(outputs)


def exact(value):
    """Tensors in float64, without history."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().double()
    if isinstance(value, LoRAWeights):
        return LoRAWeights(*map(exact, value))
    return [exact(item) for item in value] if isinstance(value, list) else value


def run(function, x, layers, upstream, trained="xnWbAB", **options):
    """Outputs, then gradients of whatever `trained` names: x, the norm, and W, b(ias), A, B of all layers."""
    x = x.detach().requires_grad_("x" in trained)
    if options.get("norm_weight") is not None:
        options["norm_weight"] = options["norm_weight"].detach().requires_grad_("n" in trained)
    fresh = []
    for layer in layers:
        tensors = [
            None if tensor is None else tensor.detach().requires_grad_(name in trained)
            for name, tensor in zip("WbAB", layer[:4], strict=True)
        ]
        fresh.append(LoRAWeights(*tensors, layer.scale))
    outputs = function(x, fresh, **options)
    named = [("x", x), ("n", options.get("norm_weight"))]
    named += [pair for layer in fresh for pair in zip("WbAB", layer[:4], strict=True)]
    leaves = [tensor for name, tensor in named if name in trained and tensor is not None]
    # Of the formula, an output without adapter and bias has no history where base and input are frozen.
    pairs = [(y, grad) for y, grad in zip(outputs, upstream, strict=True) if y.requires_grad]
    gradients = torch.autograd.grad([y for y, _ in pairs], leaves, [grad for _, grad in pairs])
    return [*(y.detach() for y in outputs), *gradients]


def upstream_of(x, layers, dtype=torch.float32):
    return [normal(*x.shape[:-1], len(layer.weight), seed=90 + n, dtype=dtype) for n, layer in enumerate(layers)]


def check(x, layers, bound=1e-5, upstream=None, trained="xnWbAB", *, backend, **options):
    upstream = upstream_of(x, layers, x.dtype) if upstream is None else upstream
    actual = run(lora_linears, x, layers, upstream, trained, **options, backend=backend)
    options = {key: exact(value) for key, value in options.items()}
    expected = run(formula, exact(x), exact(layers), exact(upstream), trained, **options)
    for number, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.dtype == x.dtype
        assert relative_error(a, e) < bound, number


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_group_of_mixed_ranks_equals_float64(backend, norm, dropout):
    x = normal(3, 11, 20, scale=2)
    options = {"norm_weight": normal(20, seed=50)} if norm else {}
    check(x, group(), dropout=dropout, seed=SEED if dropout else None, **options, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=20, deadline=None)
@given(
    tokens=st.integers(1, 40),
    inputs=st.integers(1, 70),
    ranks=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    dropout=st.sampled_from([0.0, 0.5]),
    norm=st.booleans(),
)
def test_any_shape_equals_float64(backend, tokens, inputs, ranks, dropout, norm):
    x = normal(tokens, inputs, scale=2)
    layers = group(inputs, ranks, [3 + 17 * number for number in range(len(ranks))])
    options = (
        {"norm_weight": normal(inputs, seed=50)} if norm and inputs > 1 else {}
    )  # a norm of one number is its sign
    options |= {"dropout": dropout, "seed": SEED}
    upstream = upstream_of(x, layers)
    actual = run(lora_linears, x, layers, upstream, **options, backend=backend)
    expected = run(formula, exact(x), exact(layers), exact(upstream), **{k: exact(v) for k, v in options.items()})
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rank", [1, 4, 16, 64])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_one_layer_of_any_rank_equals_float64(backend, rank, dropout):
    check(normal(33, 47), [layer_of(29, 47, rank, bias=True)], dropout=dropout, seed=SEED, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_within_its_roundings_of_float64(backend, dtype):
    if backend == "triton" and dtype == torch.bfloat16 and DEVICE.type == "cpu":
        pytest.skip("Triton's interpreter multiplies bf16 matrices wrongly")
    x, norm_weight = normal(50, 64, dtype=dtype), normal(64, seed=50, dtype=dtype)
    layers = group(64, (8, 0, 16), (32, 48, 40), dtype=dtype)
    # The normalised input, t and U, three sums of dX, and the results are rounded; errors of a sum partly cancel.
    check(x, layers, 4 * EPSILON[dtype], norm_weight=norm_weight, dropout=0.2, seed=SEED, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("trained", ["".join(c) for n in range(1, 5) for c in itertools.combinations("xWAB", n)])
def test_whatever_is_frozen_changes_no_other_gradient(backend, norm, trained):
    options = {"norm_weight": normal(20, seed=50)} if norm else {}
    check(normal(12, 20), group(), trained=trained, dropout=0.3, seed=SEED, backend=backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_norm_may_train_alone(backend):
    check(normal(12, 20), group(), trained="n", norm_weight=normal(20, seed=50), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_of_a_group_may_be_frozen_apart(backend):
    x, layers = normal(12, 20), group()
    full = run(lora_linears, x, layers, upstream_of(x, layers), backend=backend)
    layers[2].A.requires_grad_()
    layers[0].B.requires_grad_()
    layers[1].weight.requires_grad_()
    outputs = lora_linears(x, layers, backend=backend)
    torch.autograd.backward(outputs, upstream_of(x, layers))
    # After three outputs and x: W, bias, A, B of the first layer, W of the second, W, bias, A, B of the third.
    for tensor, place in ((layers[0].B, 7), (layers[1].weight, 8), (layers[2].A, 11)):
        torch.testing.assert_close(tensor.grad, full[place], rtol=1e-5, atol=1e-5)
    assert layers[2].B.grad is layers[0].A.grad is layers[0].weight.grad is None


def test_dropped_inputs_are_those_of_the_mask():
    x, layer = torch.ones(40, 30, device=DEVICE), layer_of(8, 30, 30)
    identity = layer._replace(weight=torch.zeros(8, 30, device=DEVICE), A=torch.eye(30, device=DEVICE), scale=1.0)
    kept = torch_keep_mask(SEED, 40, 30, 0.5).float() * 2
    for backend in BACKENDS:
        y = lora_linear(x, identity, dropout=0.5, seed=SEED, backend=backend)
        torch.testing.assert_close(y, kept @ identity.B.T, rtol=1e-4, atol=1e-4)


def kept_bytes(function):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel() * t.element_size()) or t, lambda t: t
    ):
        function()
    return sorted(kept)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", [False, True])
def test_backward_keeps_the_input_once_and_the_low_rank_products(backend, norm):
    x, layers = normal(100, 20).requires_grad_(), group()
    weights = [tensor.nbytes for layer in layers for tensor in (layer.weight, layer.A, layer.B) if tensor is not None]
    for layer in layers:
        for tensor in (layer.A, layer.B):
            if tensor is not None:
                tensor.requires_grad_()
    norm_weight = normal(20, seed=50) if norm else None
    kept = kept_bytes(lambda: lora_linears(x, layers, norm_weight=norm_weight, dropout=0.1, seed=SEED, backend=backend))
    of_norm = [100 * 4, norm_weight.nbytes] if norm else []
    assert kept == sorted([*weights, x.nbytes, 100 * (4 + 7) * 4, SEED.nbytes, *of_norm])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_frozen_layer_without_an_adapter_keeps_no_input(backend):
    x, layers = normal(100, 20).requires_grad_(), group(ranks=(0, 0, 0))
    assert kept_bytes(lambda: lora_linears(x, layers, backend=backend)) == sorted(w.weight.nbytes for w in layers)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_input_without_a_gradient_costs_no_base_weight(backend):
    x, layer = normal(100, 20), layer_of(24, 20, 4)
    layer.A.requires_grad_(), layer.B.requires_grad_()
    kept = kept_bytes(lambda: lora_linear(x, layer, backend=backend))
    assert kept == sorted([x.nbytes, 100 * 4 * 4, layer.B.nbytes])


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_weights_and_upstream_gradients_give_the_same(backend):
    x, layers = normal(4, 6, 20), group()
    upstream = upstream_of(x, layers)
    plain = run(lora_linears, x, layers, upstream, dropout=0.3, seed=SEED, backend=backend)

    def of_strided(x, layers, **options):
        views = [
            LoRAWeights(*(None if tensor is None else strided(tensor) for tensor in layer[:4]), layer.scale)
            for layer in layers
        ]
        return lora_linears(strided(x), views, **options)

    others = run(of_strided, x, layers, [strided(u) for u in upstream], dropout=0.3, seed=SEED, backend=backend)
    for a, e in zip(others, plain, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_a_joined_weight_and_of_a_transposed_one_are_weights(backend):
    x, joined, layer = normal(9, 20), normal(50, 20, seed=3), layer_of(24, 20, 4)
    views = [joined[5:29], joined.T.contiguous().T[5:29], normal(24, 50, seed=8)[:, 7:27]]
    for view in views:
        check(x, [layer._replace(weight=view)], trained="xAB", backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_upstream_gradient_that_is_one_number_is_every_entrys(backend):
    x, layers = normal(9, 20), group()
    ones = [torch.ones((), device=DEVICE).expand(9, len(layer.weight)) for layer in layers]
    check(x, layers, upstream=ones, backend=backend)


def test_rows_behind_2_to_the_31_entries_are_read_where_they_are():
    values, layer = normal(3, 16, dtype=torch.float16), layer_of(16, 16, 4, dtype=torch.float16)
    x, upstream = far_rows(3, 16, torch.float16).copy_(values), far_rows(3, 16, torch.float16).copy_(values)
    for options in ({}, {"dropout": 0.5, "seed": SEED}):
        near = run(lora_linears, values, [layer], [values], backend="triton", **options)
        far = run(lora_linears, x, [layer], [upstream], backend="triton", **options)
        assert all(torch.equal(a, e) for a, e in zip(far, near, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_give_no_outputs_and_zero_gradients(backend):
    x, layers = normal(0, 20), group()
    options = {"norm_weight": normal(20, seed=50), "dropout": 0.3, "seed": SEED, "backend": backend}
    y, _, _, grad_x, *others = run(lora_linears, x, layers, upstream_of(x, layers), **options)
    assert y.shape == (0, 24)
    assert grad_x.shape == (0, 20)
    assert not any(gradient.any() for gradient in others)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_vector_is_a_batch_of_one(backend):
    check(normal(20), group(), dropout=0.3, seed=SEED, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_two_passes_add_up(backend):
    x, layers = normal(9, 20), group()
    for layer in layers:
        for tensor in (layer.A, layer.B):
            if tensor is not None:
                tensor.requires_grad_()
    sums = []
    for _ in range(2):
        torch.autograd.backward(lora_linears(x, layers, backend=backend), upstream_of(x, layers))
        sums.append([tensor.grad.clone() for layer in layers for tensor in (layer.A, layer.B) if tensor is not None])
    assert all(torch.equal(both, 2 * first) for first, both in zip(*sums, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_recomputation_sees_the_mask_of_the_first_pass(backend):
    layers, gradients = group(), []

    def function(x, norm_weight, *tensors):
        fresh = [LoRAWeights(*tensors[4 * n : 4 * n + 4], layer.scale) for n, layer in enumerate(layers)]
        seed = dropout_seed(x.device)
        return lora_linears(x, fresh, norm_weight=norm_weight, dropout=0.4, seed=seed, backend=backend)

    for call in (function, lambda *args: checkpoint(function, *args, use_reentrant=False)):
        torch.manual_seed(7)
        leaves = [normal(9, 20).requires_grad_(), normal(20, seed=50)]
        leaves += [None if t is None else t.detach().requires_grad_() for layer in layers for t in layer[:4]]
        torch.autograd.backward(call(*leaves), upstream_of(leaves[0], layers))
        gradients.append([leaf.grad for leaf in leaves if leaf is not None and leaf.requires_grad])
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", ["xnWbAB", "AB"])
def test_compiled_without_graph_breaks_it_gives_the_same(backend, trained):
    x, layers = normal(3, 5, 20), group()
    upstream = upstream_of(x, layers)
    options = {"norm_weight": normal(20, seed=50), "dropout": 0.3, "seed": SEED, "backend": backend}
    plain = run(lora_linears, x, layers, upstream, trained, **options)
    compiled = torch.compile(lora_linears, backend="aot_eager", fullgraph=True)
    for a, e in zip(run(compiled, x, layers, upstream, trained, **options), plain, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_may_be_changed_in_place(backend):
    for shape in ((9, 20), (3, 3, 20)):
        x = normal(*shape).requires_grad_()
        y, z = lora_linears(x, [layer_of(8, 20, 4), layer_of(6, 20, 0)], backend=backend)
        y.mul_(2)
        z.unflatten(-1, (2, 3)).add_(1)
        (y.sum() + z.sum()).backward()
        assert x.grad.any()


def test_second_derivatives_are_refused_rather_than_wrong():
    x = normal(3, 20).requires_grad_()
    (grad,) = torch.autograd.grad(lora_linear(x, layer_of(8, 20, 4)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"B": None}, {}, "needs both A and B"),
        ({}, {"dropout": 1.0, "seed": SEED}, r"dropout 1.0 is not in \[0, 1\)"),
        ({}, {"dropout": 0.1}, "dropout needs a seed"),
    ],
)
def test_half_an_adapter_or_half_a_dropout_is_an_error(change, options, message):
    with pytest.raises(ValueError, match=message):
        lora_linear(normal(3, 20), layer_of(8, 20, 4)._replace(**change), **options)


def test_the_module_has_the_outputs_and_gradients_of_peft():
    peft = pytest.importorskip("peft")
    base = nn.Linear(20, 12).to(DEVICE)
    ours = LoRALinear(base, 4, 6.0)
    ours.lora_B.data.copy_(normal(12, 4))
    base.requires_grad_(False)
    config = peft.LoraConfig(r=4, lora_alpha=6.0, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(20, 12)).to(DEVICE), config).base_model.model[0]
    with torch.no_grad():
        theirs.base_layer.weight.copy_(base.weight)
        theirs.base_layer.bias.copy_(base.bias)
        theirs.lora_A["default"].weight.copy_(ours.lora_A)
        theirs.lora_B["default"].weight.copy_(ours.lora_B)
    results = []
    for module, A, B in (
        (ours, ours.lora_A, ours.lora_B),
        (theirs, theirs.lora_A["default"].weight, theirs.lora_B["default"].weight),
    ):
        x = normal(3, 5, 20).requires_grad_()
        y = module(x)
        results.append([y, *torch.autograd.grad(y, [x, A, B], normal(3, 5, 12, seed=1))])
    for a, e in zip(*results, strict=True):
        assert relative_error(a, e) < 1e-6


def test_the_module_drops_in_training_by_the_generator_of_torch():
    layer = LoRALinear(nn.Linear(20, 12).train().to(DEVICE), 4, 6.0, dropout=0.5)
    layer.lora_B.data.copy_(normal(12, 4))
    x = normal(9, 20)
    torch.manual_seed(3)
    first, second = layer(x), layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    options = {"dropout": 0.5, "seed": dropout_seed(DEVICE)}
    assert torch.equal(lora_linear(x, layer.adapter_weights(), **options), first)
    assert torch.equal(layer.eval()(x), lora_linear(x, layer.adapter_weights()))
