"""The product with a low-rank second product equals float64 for every shape, stride and part that may be absent."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_testing import BACKENDS, DEVICE, EPSILON, far_rows, normal, relative_error

from redwhale.kernels import low_rank_gemm as module
from redwhale.kernels.backend import kernel_backend
from redwhale.kernels.dropout import torch_keep_mask
from redwhale.kernels.launch import captured_launches
from redwhale.kernels.low_rank_gemm import CONFIGS, GemmConfig, default_config, low_rank_gemm

SMALL = GemmConfig(32, 32, 16, 4, 2)
"""Several blocks along every axis, even of tiny matrices."""
SEED = torch.tensor([5], device=DEVICE)


def case(m, k, n, r, dtype=torch.float32, seed=0):
    """x, w, t, b as views that forward and backward make, bias, addend."""
    like = {"dtype": dtype}
    return (
        normal(m, k, seed=seed, **like),
        normal(n, k, seed=seed + 1, **like).T,
        normal(m, 2 * r + 1, seed=seed + 2, **like)[:, r : 2 * r],
        normal(n, r, seed=seed + 3, **like).T,
        normal(n, seed=seed + 4, **like),
        normal(m, n, seed=seed + 5, **like),
    )


def formula(x, w, t=None, b=None, scale=1.0, *, bias=None, addend=None, seed=None, dropout=0.0):
    c = x.double() @ w.double()
    if t is not None:
        update = scale * (t.double() @ b.double())
        c += update * torch_keep_mask(seed, *c.shape, dropout) / (1 - dropout) if dropout else update
    return c + sum(part.double() for part in (bias, addend) if part is not None)


def tolerance(dtype, roundings=2):
    """Of a result that is rounded that often: sums in fp32 add the more error the longer they are."""
    return roundings * EPSILON[dtype] + 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, 75) for _ in range(3)), st.integers(1, 40)),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    parts=st.tuples(*(st.booleans() for _ in range(4))),
    seed=st.integers(0, 2**16),
)
def test_any_shape_and_choice_of_parts_equals_float64(backend, shape, dtype, parts, seed):
    x, w, t, b, bias, addend = case(*shape, dtype=dtype, seed=seed)
    has_update, has_bias, has_addend, has_dropout = parts
    inputs = (x, w, t, b, 1.5) if has_update else (x, w)
    options = {"bias": bias if has_bias else None}
    if has_update and has_dropout:
        options |= {"seed": SEED, "dropout": 0.25}
    given_addend = {"addend": addend.clone() if has_addend else None}
    actual = low_rank_gemm(*inputs, **options, **given_addend, config=SMALL, backend=backend)
    expected = formula(*inputs, **options, addend=addend if has_addend else None)
    assert actual.dtype == dtype
    # Sums that happen to cancel in a matrix of one entry leave no relative bound.
    scale = expected.norm() + x.double().norm() * w.double().norm() / max(1, shape[1]) ** 0.5
    assert float((actual.double() - expected).norm() / scale) < tolerance(dtype, 5)


@pytest.mark.parametrize("config", [*CONFIGS, None])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_every_block_size_gives_the_same(config, dropout):
    x, w, t, b, bias, _ = case(150, 70, 270, 20, torch.float16)
    options = {"bias": bias, "seed": SEED, "dropout": dropout}
    actual = low_rank_gemm(x, w, t, b, 0.5, **options, config=config, backend="triton")
    assert relative_error(actual, formula(x, w, t, b, 0.5, **options)) < tolerance(torch.float16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rank", [1, 4, 16, 64, 100, 256])
def test_any_rank_is_summed_to_its_end(backend, rank):
    x, w, t, b, _, _ = case(40, 24, 33, rank, torch.float16)
    actual = low_rank_gemm(x, w, t, b, 2.0, backend=backend)
    assert relative_error(actual, formula(x, w, t, b, 2.0)) < tolerance(torch.float16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_matrices_of_any_stride_are_read_as_they_are(backend):
    x, w, t, b, bias, addend = case(40, 24, 33, 5)
    expected = formula(x, w, t, b, bias=bias, addend=addend)

    def spread(matrix):
        return torch.full((3 * len(matrix), 2 * matrix.shape[1]), float("nan"), device=DEVICE)[::3, ::2].copy_(matrix)

    for change in (spread, torch.Tensor.contiguous, lambda matrix: matrix.T.contiguous().T):
        inputs = [change(matrix) for matrix in (x, w, t, b)]
        actual = low_rank_gemm(
            *inputs, bias=bias.repeat_interleave(2)[::2], addend=change(addend.clone()), backend=backend
        )
        assert relative_error(actual, expected) < tolerance(torch.float32)


def test_values_beyond_a_matrix_are_never_read():
    """Everything around the inputs is NaN, which a mask that is missing brings into the result."""

    def surrounded(matrix):
        wide = torch.full((len(matrix) + 80, matrix.shape[1] + 80), float("nan"), device=DEVICE)
        return wide[40 : 40 + len(matrix), 40 : 40 + matrix.shape[1]].copy_(matrix)

    x, w, t, b, _, addend = case(33, 17, 35, 3)
    inputs = [surrounded(matrix) for matrix in (x, w, t, b)]
    options = {"seed": SEED, "dropout": 0.3}
    actual = low_rank_gemm(*inputs, addend=surrounded(addend), **options, config=SMALL, backend="triton")
    assert relative_error(actual, formula(x, w, t, b, addend=addend, **options)) < tolerance(torch.float32)


def test_rows_behind_2_to_the_31_entries_are_read_where_they_are():
    x, w, t, b, _, addend = case(3, 16, 24, 4, torch.float16)
    w = w.contiguous()
    expected = low_rank_gemm(x, w, t, b, addend=addend.clone(), config=SMALL, backend="triton")

    def far(matrix):
        return far_rows(*matrix.shape, torch.float16).copy_(matrix)

    for inputs, total in (
        ((far(x), w, far(t), b), far(addend)),
        ((x, far(w.T).T, t, far(b.T).T), addend),
        ((x, far(w[:3]), t[:, :3], far(b[:3])), addend),
    ):
        if inputs[1].shape[0] == 3:
            want = formula(x[:, :3], w[:3], t[:, :3], b[:3], addend=addend)
            got = low_rank_gemm(x[:, :3], *inputs[1:], addend=total, config=SMALL, backend="triton")
            assert relative_error(got, want) < tolerance(torch.float16)
        else:
            assert torch.equal(low_rank_gemm(*inputs, addend=total, config=SMALL, backend="triton"), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 8, 8, 2), (4, 8, 0, 2), (4, 0, 8, 2), (4, 8, 8, 0)])
def test_an_empty_axis_leaves_the_other_parts(backend, shape):
    x, w, t, b, _, addend = case(*shape)
    actual = low_rank_gemm(x, w, t, b, addend=addend.clone(), backend=backend)
    torch.testing.assert_close(actual.double(), formula(x, w, t, b, addend=addend), rtol=1e-5, atol=1e-5)


def test_results_are_the_same_bits_every_time():
    x, w, t, b, bias, addend = case(70, 50, 60, 8, torch.float16)
    options = {"bias": bias, "addend": addend, "seed": SEED, "dropout": 0.2, "backend": "triton"}
    assert torch.equal(low_rank_gemm(x, w, t, b, **options), low_rank_gemm(x, w, t, b, **options))


@pytest.mark.filterwarnings("ignore:invalid value")  # of the interpreter, in entries outside C
def test_an_inf_that_the_mask_drops_leaves_the_products_of_the_base():
    x, w, t, b, _, _ = case(20, 8, 30, 2)
    t = torch.full_like(t, float("inf"))
    b = torch.ones_like(b)
    kept = torch_keep_mask(SEED, 20, 30, 0.5)
    for backend in BACKENDS:
        actual = low_rank_gemm(x, w, t, b, seed=SEED, dropout=0.5, backend=backend)
        assert actual[kept].isinf().all()
        torch.testing.assert_close(actual[~kept], (x @ w)[~kept])


def test_blocks_are_the_largest_that_occupy_the_gpu():
    with captured_launches(90):
        assert default_config(torch.empty(8192, 64, device="meta", dtype=torch.bfloat16), 4096) == CONFIGS[0]
        assert default_config(torch.empty(64, 64, device="meta", dtype=torch.bfloat16), 128) == CONFIGS[-1]
    with captured_launches(80):
        found = default_config(torch.empty(8192, 64, device="meta", dtype=torch.bfloat16), 4096)
        assert found.least_capability == 80


def test_auto_goes_by_the_constant_and_the_other_backends_insist(monkeypatch):
    x, w = torch.ones(2, 3, device=DEVICE), torch.ones(3, 4, device=DEVICE)
    monkeypatch.setattr(module, "use_triton", lambda backend, *tensors: backend != "torch")
    for constant in (False, True):
        monkeypatch.setattr(module, "AUTO_TAKES_TRITON", constant)
        assert module.triton_gemms("auto", x, w) == constant
        assert module.triton_gemms("triton", x, w)
        assert not module.triton_gemms("torch", x, w)
        with kernel_backend("triton"):
            assert module.triton_gemms(None, x, w)
            assert module.triton_gemms("auto", x, w) == constant


def test_half_an_update_or_a_mask_of_nothing_is_an_error():
    x, w, t, b, _, _ = case(2, 3, 4, 1)
    with pytest.raises(ValueError, match="needs both t and b"):
        low_rank_gemm(x, w, t)
    for inputs in ((x, w, t, b), (x, w)):
        with pytest.raises(ValueError, match="dropout needs a seed, and an update to mask"):
            low_rank_gemm(*inputs, dropout=0.5, seed=None if len(inputs) == 4 else SEED)


def test_compiled_without_graph_breaks_it_gives_the_same():
    x, w, t, b, bias, _ = case(20, 12, 30, 4)

    def function(x, w, t, b, bias):
        return low_rank_gemm(x, w, t, b, 0.5, bias=bias, seed=SEED, dropout=0.2, config=SMALL, backend="triton") * 2

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, w, t, b, bias), function(x, w, t, b, bias))


def test_compiled_code_does_not_trace_the_questions_to_the_gpu(monkeypatch):
    monkeypatch.setattr(module, "multiprocessors", torch.compiler.disable(lambda tensor: 3))
    x, w, t, b, bias, _ = case(20, 12, 30, 4, dtype=torch.float16)

    def function(x, w, t, b, bias):
        return low_rank_gemm(x, w, t, b, 0.5, bias=bias, backend="triton")

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, w, t, b, bias), function(x, w, t, b, bias))


def test_the_operator_is_registered_as_torch_asks():
    x, w, t, b, bias, addend = case(20, 12, 30, 4)
    operator = torch.ops.redwhale.triton_low_rank_gemm.default
    torch.library.opcheck(operator, (x, w, t, b, bias, addend, SEED, 0.5, 0.2, list(SMALL[:5])))
    torch.library.opcheck(operator, (x, w, None, None, None, None, None, 1.0, 0.0, list(SMALL[:5])))
