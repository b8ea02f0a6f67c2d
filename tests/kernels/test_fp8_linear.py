"""FP8 products with frozen weights: their rounding, and both directions from one copy, against float64."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_testing import BACKENDS, DEVICE, far_rows, normal, relative_error, strided

from redwhale.kernels import Fp8Rows, fp8_input_gradient, fp8_linear, lora_linears, lora_mlp, quantise_rows
from redwhale.kernels.dropout import torch_keep_mask
from redwhale.kernels.fp8_linear import E4M3, torch_transposed, triton_transposed
from redwhale.kernels.lora_linear import LoRAWeights

on_both = pytest.mark.parametrize("backend", BACKENDS)
SEED = torch.tensor([5, 11], device=DEVICE)
EPS = 1e-5


def bits(rows: Fp8Rows) -> list[torch.Tensor]:
    return [rows.codes.view(torch.uint8), rows.scales.view(torch.int32)]


def values(rows: Fp8Rows) -> torch.Tensor:
    return rows.codes.double() * rows.scales.double()


@on_both
def test_every_code_is_the_nearest_number_of_e4m3_and_ties_go_to_even(backend):
    exact = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(E4M3).float()
    finite = exact[exact.isfinite()].sort().values.unique()
    between = (finite[1:] + finite[:-1]) / 2
    near = torch.cat((finite, between, between * (1 + 2**-20), between * (1 - 2**-20)))
    # A row of which the largest is 448, so that its scale is one.
    found = quantise_rows([near[None]], backend=backend)
    assert found.scales.item() == 1
    assert torch.equal(found.codes.float()[0], near.to(E4M3).float())
    assert torch.equal(found.codes[0, : len(finite)].float(), finite)


@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    factors=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_both_backends_give_the_same_bits(rows, columns, factors, dtype, seed):
    spread = 10.0 ** normal(rows, 1, seed=seed)
    parts = [(normal(rows, n, seed=seed + n) * spread).to(dtype) for n in columns]
    scales = [normal(n, 1, seed=n).abs() for n in columns] if factors else []
    torch_rows, triton_rows = (quantise_rows(parts, scales, backend=backend) for backend in BACKENDS)
    assert all(torch.equal(a, b) for a, b in zip(bits(torch_rows), bits(triton_rows), strict=True))


@on_both
def test_an_entry_is_off_by_a_sixteenth_of_itself_or_of_its_rows_least_normal_number(backend):
    x = normal(40, 300) * 10.0 ** normal(40, 300, seed=1) * 10.0 ** (8 * normal(40, 1, seed=2))
    rows = quantise_rows([x], backend=backend)
    error = (values(rows) - x.double()).abs()
    assert bool((error <= torch.maximum(x.double().abs() / 16, rows.scales.double() * 2**-10) * (1 + 1e-6)).all())
    # The largest entry of each row is met to rounding in fp32.
    largest = x.abs().argmax(1, keepdim=True)
    torch.testing.assert_close(values(rows).gather(1, largest), x.double().gather(1, largest), rtol=1e-6, atol=0)


@on_both
def test_rows_of_zeros_stay_zeros_and_what_is_not_finite_is_seen(backend):
    x = normal(4, 24)
    x[0], x[1, 3], x[2, 5] = 0, torch.nan, torch.inf
    found = values(quantise_rows([x], backend=backend))
    assert not found[0].any()
    assert found[1].isnan().any()
    assert found[2].isnan().any()
    assert found[3].isfinite().all()


@on_both
def test_strided_and_far_rows_are_read_where_they_are(backend):
    x = normal(5, 33)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            bits(quantise_rows([strided(x)], backend=backend)), bits(quantise_rows([x], backend=backend)), strict=True
        )
    )
    far = far_rows(3, 40, torch.float16)
    far[:] = normal(3, 40, dtype=torch.float16)
    assert torch.equal(bits(quantise_rows([far], backend=backend))[0], bits(quantise_rows([far.clone()]))[0])


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 150), st.lists(st.integers(1, 90), min_size=1, max_size=3))
def test_codes_are_transposed_side_by_side(columns, rows):
    matrices = [torch.randint(256, (n, columns), device=DEVICE).to(torch.uint8).view(E4M3) for n in rows]
    expected = torch.cat([matrix.view(torch.uint8) for matrix in matrices]).T
    for transposed in (triton_transposed, torch_transposed):
        assert torch.equal(transposed(matrices).view(torch.uint8), expected)


def weight(outputs, inputs, seed=0, dtype=torch.float32):
    """A weight whose outputs differ in size."""
    W = normal(outputs, inputs, seed=seed, scale=inputs**-0.5) * 10.0 ** normal(outputs, 1, seed=seed + 1)
    return W.to(dtype), quantise_rows([W.to(dtype)])


@on_both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_is_the_product_of_what_the_codes_stand_for(backend, dtype):
    x, (W, coded) = normal(50, 64, dtype=dtype), weight(48, 64, dtype=dtype)
    rows = quantise_rows([x], backend=backend)
    y = fp8_linear(rows, coded, dtype)
    assert y.dtype == dtype
    assert relative_error(y, values(rows) @ values(coded).T) < (1e-6 if dtype == torch.float32 else 2**-8)
    # An entry is off by 2^-4 of itself at most, by less than half of that in the mean, and errors are independent.
    assert relative_error(y, x.double() @ W.double().T) < 0.05


@on_both
@pytest.mark.parametrize("sizes", [(48,), (48, 16, 33)])
def test_the_input_gradient_of_all_layers_together_needs_no_second_copy(backend, sizes):
    weights = [weight(size, 64, seed=10 * size) for size in sizes]
    grads = [normal(50, size, seed=size) * 10.0 ** normal(50, 1, seed=size + 1) for size in sizes]
    found = fp8_input_gradient(grads, [coded for _, coded in weights], backend=backend)
    together = torch.cat(
        [grad.double() * coded.scales.double().T for grad, (_, coded) in zip(grads, weights, strict=True)], 1
    )
    gradient_rows = quantise_rows([together.float()])
    expected = values(gradient_rows) @ torch.cat([coded.codes.double() for _, coded in weights])
    assert relative_error(found, expected) < 1e-6
    exact = torch.cat(grads, 1).double() @ torch.cat([W for W, _ in weights]).double()
    assert relative_error(found, exact) < 0.05
    for row in range(50):  # each token by itself, however small it is beside the others
        assert relative_error(found[row], exact[row]) < 0.15


def through_codes(x, coded):
    """What FP8 makes of a factor, as a constant plus the identity's gradient."""
    return x + (values(quantise_rows([x.detach().float()])) - x).detach() if coded else x


def layer(outputs, inputs, rank, seed, fp8=True, bias=False):
    W = normal(outputs, inputs, seed=seed, scale=inputs**-0.5)
    coded = quantise_rows([W])
    A = normal(rank, inputs, seed=seed + 1, scale=inputs**-0.5) if rank else None
    B = normal(outputs, rank, seed=seed + 2, scale=rank**-0.5) if rank else None
    b = normal(outputs, seed=seed + 3) if bias else None
    return LoRAWeights(coded.codes, b, A, B, 0.7, coded.scales) if fp8 else LoRAWeights(W, b, A, B, 0.7)


def float64_linear(x, given, mask=1.0):
    """The layer in float64; its base sees x as FP8 does, its adapter as it is."""
    fp8 = given.weight_scales is not None
    W = values(Fp8Rows(given.weight, given.weight_scales)) if fp8 else given.weight.double()
    y = through_codes(x, fp8) @ W.T
    y = y if given.bias is None else y + given.bias.double()
    return y if given.A is None else y + given.scale * ((x * mask) @ given.A.double().T) @ given.B.double().T


def double_layer(given):
    """The same layer with leaves for its adapter."""
    leaves = [None if t is None else t.detach().double().requires_grad_() for t in (given.A, given.B)]
    return given._replace(A=leaves[0], B=leaves[1]), [leaf for leaf in leaves if leaf is not None]


def compare(actual, expected, bounds):
    for number, (a, e, bound) in enumerate(zip(actual, expected, bounds, strict=True)):
        assert relative_error(a, e) < bound, number


@on_both
@pytest.mark.parametrize("ranks", [(4, 0, 7), (0, 0, 0)])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_layers_with_adapters_on_an_fp8_base_equal_float64(backend, ranks, mixed, dropout):
    layers = [
        layer(48, 40, ranks[0], 1, bias=True),
        layer(16, 40, ranks[1], 2),
        layer(24, 40, ranks[2], 3, fp8=not mixed),
    ]
    x, norm = normal(30, 40, scale=2), 1 + normal(40, seed=9, scale=0.2)
    upstream = [normal(30, len(given.weight), seed=20 + n) for n, given in enumerate(layers)]

    def differentiate(outputs, x, leaves):
        pairs = [(y, g.to(y.dtype)) for y, g in zip(outputs, upstream, strict=True)]
        gradients = torch.autograd.grad([y for y, _ in pairs], [x, *leaves], [g for _, g in pairs])
        return [*(y.detach() for y in outputs), *gradients]

    leaves = [t.requires_grad_() for given in layers for t in (given.A, given.B) if t is not None]
    x_own = x.clone().requires_grad_()
    seed = SEED[:1] if dropout else None
    found = differentiate(
        lora_linears(x_own, layers, norm_weight=norm, norm_eps=EPS, dropout=dropout, seed=seed, backend=backend),
        x_own,
        leaves,
    )
    x64 = x.double().requires_grad_()
    doubled = [double_layer(given) for given in layers]
    normalised = norm.double() * x64 * torch.rsqrt(x64.square().mean(-1, keepdim=True) + EPS)
    mask = torch_keep_mask(SEED[:1], 30, 40, dropout).double() / (1 - dropout) if dropout else 1.0
    exact = differentiate(
        [float64_linear(normalised, given, mask) for given, _ in doubled], x64, [t for _, ts in doubled for t in ts]
    )
    # Outputs and the adapters' gradients see what float64 sees; x's gradient has dY rounded to e4m3.
    compare(found, exact, [1e-4] * 3 + [0.05] + [1e-4] * len(leaves))


@on_both
@pytest.mark.parametrize("ranks", [(4, 8, 2), (0, 0, 0)])
def test_a_gated_mlp_on_an_fp8_base_equals_float64(backend, ranks):
    hidden, wide = 32, 80
    layers = [layer(wide, hidden, ranks[0], 1), layer(wide, hidden, ranks[1], 2), layer(hidden, wide, ranks[2], 3)]
    h, norm, upstream = normal(30, hidden), 1 + normal(hidden, seed=9, scale=0.2), normal(30, hidden, seed=50)
    leaves = [t.requires_grad_() for given in layers for t in (given.A, given.B) if t is not None]
    h_own = h.clone().requires_grad_()
    y = lora_mlp(h_own, *layers, norm_weight=norm, norm_eps=EPS, backend=backend)
    found = [y.detach(), *torch.autograd.grad(y, [h_own, *leaves], upstream)]
    h64 = h.double().requires_grad_()
    (gate, up, down), doubled = zip(*map(double_layer, layers), strict=True)
    x = norm.double() * h64 * torch.rsqrt(h64.square().mean(-1, keepdim=True) + EPS)
    gates = float64_linear(x, gate)
    y64 = float64_linear(gates * torch.sigmoid(gates) * float64_linear(x, up), down)
    exact = [y64.detach(), *torch.autograd.grad(y64, [h64, *(t for ts in doubled for t in ts)], upstream.double())]
    # The activation is rounded a second time, by fp32 here and float64 there: a few codes differ by one.
    compare(found, exact, [2e-3, *[0.05] * (len(exact) - 1)])


@on_both
def test_the_same_inputs_give_the_same_bits(backend):
    given, x = layer(48, 40, 4, 1), normal(30, 40)
    first, second = (lora_linears(x, [given], backend=backend)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_an_fp8_weight_takes_a_byte_an_entry_and_four_an_output():
    coded = quantise_rows([normal(48, 64)])
    assert (coded.codes.nbytes, coded.scales.nbytes) == (48 * 64, 48 * 4)


def test_adapters_are_not_merged_into_codes():
    from torch import nn

    from redwhale.kernels import LoRALinear

    made = LoRALinear(nn.Linear(16, 16), 2, 2.0)
    made.weight, made.weight_scales = (nn.Parameter(t, requires_grad=False) for t in quantise_rows([made.weight]))
    with pytest.raises(ValueError, match="put back what it was made from"):
        made.merged_weight()


@pytest.mark.parametrize("sizes", [(48,), (64, 16, 32)])
def test_the_librarys_product_computes_the_same_from_the_same_layouts(monkeypatch, sizes):
    """What a GPU is given, on a CPU: torch has its product of FP8 matrices there, too."""
    weights = [weight(size, 64, seed=size, dtype=torch.bfloat16)[1] for size in sizes]
    x = quantise_rows([normal(32, 64, dtype=torch.bfloat16)])
    grads = [normal(32, size, seed=size, dtype=torch.bfloat16) for size in sizes]
    bias = normal(sizes[0], dtype=torch.bfloat16)
    expected = [fp8_linear(x, weights[0], torch.bfloat16, bias), fp8_input_gradient(grads, weights)]
    monkeypatch.setattr(importlib.import_module("redwhale.kernels.fp8_linear"), "on_gpu", lambda tensor: True)
    found = [fp8_linear(x, weights[0], torch.bfloat16, bias), fp8_input_gradient(grads, weights)]
    for a, e in zip(found, expected, strict=True):
        assert relative_error(a, e) < 2**-7
