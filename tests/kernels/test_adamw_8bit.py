"""AdamW in 8 bits follows AdamW, keeps exact masters, and resumes with the same bits."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_testing import BACKENDS, DEVICE, normal, relative_error, strided

from redwhale.kernels.adamw_8bit import AdamWSettings, MomentCodes, _adamw_8bit, adamw_8bit_step_
from redwhale.kernels.adamw_8bit import adamw_8bit_update as update_operator
from redwhale.kernels.adamw_8bit_optimizer import AdamW8bit
from redwhale.kernels.launch import captured_launches, launch
from redwhale.kernels.minifloat import torch_decode, torch_dither, torch_encode, torch_random_words

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")

SIZES = (1, 255, 256, 257, 1024, 1300)
DTYPES = (torch.bfloat16, torch.float32)


def parameters(sizes=SIZES, dtypes=DTYPES, seed=0):
    tensors = [normal(size, seed=seed + i, dtype=dtype) for i, size in enumerate(sizes) for dtype in dtypes]
    return [torch.nn.Parameter(tensor) for tensor in tensors]


def give_gradients(params, step):
    for i, param in enumerate(params):
        size = param.numel()
        values = normal(size, seed=1000 * step + i) * torch.exp2(1.5 * normal(size, seed=i)) * 1e-2
        param.grad = values.view(param.shape).to(param.dtype)


def train(params, optimizer, steps, first=1, **options):
    for step in range(first, first + steps):
        give_gradients(params, step)
        optimizer.step(**options)


def same_bits(actual, expected):
    """Equal, NaN included."""
    if not isinstance(actual, torch.Tensor):
        return actual == expected
    kinds = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
    view = kinds.get(actual.dtype, actual.dtype)
    return actual.dtype == expected.dtype and torch.equal(actual.detach().view(view), expected.detach().view(view))


def assert_same_training(run, other_run):
    (params, optimizer), (others, other) = run, other_run
    for param, twin in zip(params, others, strict=True):
        assert same_bits(param, twin)
        mine, theirs = optimizer.state[param], other.state[twin]
        assert mine.keys() == theirs.keys()
        assert all(same_bits(mine[name], theirs[name]) for name in mine)


def started(backend="torch", params=None, **options):
    params = parameters() if params is None else params
    options = {"lr": 1e-2, "weight_decay": 0.1, "seed": 3, **options}
    return params, AdamW8bit(params, backend=backend, **options)


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 1100), min_size=1, max_size=2),
    masters=st.sampled_from(["split", "stochastic"]),
    grad_dtype=st.sampled_from(DTYPES),
    scaled=st.booleans(),
    seed=st.integers(0, 2**63 - 1),
)
def test_backends_agree_in_every_bit(sizes, masters, grad_dtype, scaled, seed):
    runs = []
    for backend in BACKENDS:
        params, optimizer = started(backend, parameters(sizes), masters=masters, seed=seed)
        for step in range(1, 3):
            give_gradients(params, step)
            gradients = {param: param.grad.to(grad_dtype) for param in params}
            optimizer.step(gradients=gradients, grad_scale=torch.tensor(0.37, device=DEVICE) if scaled else None)
        runs.append((params, optimizer))
    assert_same_training(*runs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_step_equals_that_of_adamw(backend, dtype):
    # The moments enter it before they are rounded.
    params, optimizer = started(backend, parameters((700,), (dtype,)), betas=(0.9, 0.95), eps=1e-6)
    (exact,) = parameters((700,), (dtype,))
    exact = torch.nn.Parameter(exact.detach().double())
    reference = torch.optim.AdamW([exact], lr=1e-2, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1)
    before = exact.detach().clone()
    give_gradients(params, 1)
    exact.grad = params[0].grad.double()
    optimizer.step()
    reference.step()
    assert relative_error(optimizer.masters()[params[0]], exact) < 1e-7
    assert relative_error(optimizer.masters()[params[0]] - before, exact - before) < 1e-5


@pytest.mark.parametrize("beta2", [0.95, 0.999])
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_steps_stay_close_to_adamw(dtype, beta2):
    params, optimizer = started("torch", parameters((4000,), (dtype,)), betas=(0.9, beta2))
    exact = torch.nn.Parameter(params[0].detach().double())
    reference = torch.optim.AdamW([exact], lr=1e-2, betas=(0.9, beta2), weight_decay=0.1)
    before = exact.detach().clone()
    for step in range(1, 51):
        give_gradients(params, step)
        params[0].grad += 0.3 * params[0].grad.abs().mean()  # a drift, besides the noise
        exact.grad = params[0].grad.double()
        optimizer.step()
        reference.step()
    moved = optimizer.masters()[params[0]] - before
    assert relative_error(moved, exact - before) < 0.05


@pytest.mark.parametrize("backend", BACKENDS)
def test_split_masters_are_those_of_fp32_training_and_weights_their_nearest_bf16(backend):
    # Without memory in the moments, nothing but the masters carries over from step to step.
    params, optimizer = started(backend, parameters((600,), (torch.bfloat16,)), betas=(0.0, 0.0), lr=1e-3)
    twins, twin = started(backend, [torch.nn.Parameter(params[0].detach().float())], betas=(0.0, 0.0), lr=1e-3)
    exact = params[0].detach().double()
    for step in range(1, 11):
        give_gradients(params, step)
        twins[0].grad = params[0].grad.float()
        gradient = params[0].grad.double()
        exact -= 1e-3 * (0.1 * exact + gradient / (gradient.abs() + 1e-8))
        optimizer.step()
        twin.step()
    masters = optimizer.masters()[params[0]]
    assert torch.equal(masters, twins[0])
    assert relative_error(masters, exact) < 1e-6
    distance = (params[0].detach().double() - masters.double()).abs()
    spacing = torch.exp2(masters.double().abs().log2().floor() - 7)
    assert bool((distance <= spacing / 2).all())
    assert float(distance.max()) > 0


def test_stochastic_weights_follow_changes_far_below_their_spacing():
    weights = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16, device=DEVICE))
    optimizer = AdamW8bit([weights], lr=1e-5, weight_decay=0.0, masters="stochastic", backend="torch")
    for _ in range(400):  # each by 1/400 of the distance between 1 and the next smaller bf16 number
        weights.grad = torch.ones_like(weights)
        optimizer.step()
    assert "master_low" in optimizer.state[weights]
    assert optimizer.state[weights]["master_low"].numel() == 0
    torch.testing.assert_close(weights.detach().double().mean().item(), 1 - 400e-5, rtol=0, atol=1e-4)
    assert torch.equal(optimizer.masters()[weights], weights.detach().float())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masters", ["split", "stochastic"])
def test_resuming_from_a_file_gives_the_same_bits(backend, masters):
    straight = started(backend, parameters((300, 1030)), masters=masters)
    train(*straight, steps=5)
    params, optimizer = started(backend, parameters((300, 1030)), masters=masters)
    train(params, optimizer, steps=2)
    file = io.BytesIO()
    torch.save({"params": params, "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = started(backend, saved["params"], lr=5.0, masters=masters, seed=99)  # options come from the file
    resumed[1].load_state_dict(saved["optimizer"])
    train(*resumed, steps=3, first=3)
    assert_same_training(straight, resumed)


def test_loading_copies_the_states():
    params, optimizer = started()
    train(params, optimizer, steps=1)
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    others, other = started()
    other.load_state_dict(saved)
    train(others, other, steps=1, first=2)
    for index, state in saved["state"].items():
        assert all(same_bits(value, kept["state"][index][name]) for name, value in state.items())


def test_a_state_that_does_not_fit_is_refused():
    params, optimizer = started(params=parameters((300,), (torch.bfloat16,)))
    train(params, optimizer, steps=1)
    for sizes, dtype in (((301,), torch.bfloat16), ((300,), torch.float32)):
        _, other = started(params=parameters(sizes, (dtype,)))
        with pytest.raises(ValueError, match="saved for another shape, dtype or kind of masters"):
            other.load_state_dict(optimizer.state_dict())


def test_copies_of_the_optimizer_go_on_alike():
    params, optimizer = started()
    train(params, optimizer, steps=1)
    copied, other = copy.deepcopy((params, optimizer))
    train(params, optimizer, steps=1, first=2)
    train(copied, other, steps=1, first=2)
    assert_same_training((params, optimizer), (copied, other))


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_give_the_same_bits_and_other_seeds_others(backend):
    runs = [started(backend, seed=seed) for seed in (3, 3, 4)]
    for run in runs:
        train(*run, steps=2)
    assert_same_training(runs[0], runs[1])
    with pytest.raises(AssertionError):
        assert_same_training(runs[0], runs[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_differ_in_learning_rate_and_weight_decay(backend):
    first, second = parameters((300,), (torch.float32,)), parameters((300,), (torch.float32,))
    groups = [{"params": first, "weight_decay": 0.0}, {"params": second, "lr": 1e-3, "weight_decay": 0.5}]
    optimizer = AdamW8bit(groups, lr=1e-2, betas=(0.0, 0.0), backend=backend)
    start = first[0].detach().double()
    for param in (*first, *second):
        param.grad = torch.ones_like(param)
    optimizer.step()
    torch.testing.assert_close(first[0].detach().double(), start - 1e-2, rtol=0, atol=1e-6)
    torch.testing.assert_close(second[0].detach().double(), start - 1e-3 * (0.5 * start + 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_grad_scale_multiplies_gradients(backend):
    scaled, plain = (
        started(backend, parameters(dtypes=(torch.float32,))),
        started(backend, parameters(dtypes=(torch.float32,))),
    )
    give_gradients(scaled[0], 1)
    give_gradients(plain[0], 1)
    for param in plain[0]:
        param.grad *= 0.25
    scaled[1].step(grad_scale=torch.tensor(0.25, device=DEVICE))
    plain[1].step()
    assert_same_training(scaled, plain)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masters", ["split", "stochastic"])
@pytest.mark.parametrize("bad_gradients", [False, True])
def test_a_grad_scale_that_is_nan_skips_the_step(backend, masters, bad_gradients):
    params, optimizer = started(backend, masters=masters)
    train(params, optimizer, steps=2)
    before, kept = copy.deepcopy((params, [optimizer.state[param] for param in params]))
    give_gradients(params, 3)
    if bad_gradients:
        for param in params:
            param.grad[0] = float("nan")
    optimizer.step(grad_scale=torch.tensor(float("nan"), device=DEVICE))
    for param, old, state in zip(params, before, kept, strict=True):
        assert same_bits(param, old)
        assert optimizer.state[param]["step"] == 3
        assert all(same_bits(optimizer.state[param][name], state[name]) for name in state if name != "step")
    train(params, optimizer, steps=1, first=4, grad_scale=torch.ones((), device=DEVICE))
    assert not any(torch.equal(param, old) for param, old in zip(params, before, strict=True) if param.numel() > 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_without_gradients_stay_and_get_no_state(backend):
    params, optimizer = started(backend)
    before = [param.detach().clone() for param in params]
    optimizer.step()
    give_gradients(params, 1)
    params[0].grad = None
    assert optimizer.step(lambda: 17) == 17
    assert torch.equal(params[0], before[0])
    assert params[0] not in optimizer.state
    assert all(not torch.equal(param, old) for param, old in zip(params[1:], before[1:], strict=True))
    optimizer.step(gradients={params[0]: torch.ones_like(params[0], dtype=torch.float32)})
    assert optimizer.state[params[0]]["step"] == 1
    assert optimizer.state[params[1]]["step"] == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_a_matrix_train_as_a_tensor_of_their_own_does(backend):
    matrix = normal(9, 64, dtype=torch.bfloat16)
    kept = matrix.clone()
    rows = matrix[2:7].detach().requires_grad_()
    alone = rows.detach().clone().requires_grad_()
    runs = [started(backend, [rows]), started(backend, [alone])]
    for run in runs:
        train(*run, steps=2)
    assert_same_training(*runs)
    assert torch.equal(matrix[2:7], alone)
    assert torch.equal(matrix[:2], kept[:2])
    assert torch.equal(matrix[7:], kept[7:])


def test_tensors_at_odd_addresses_and_strided_gradients_give_the_same():
    storage = torch.zeros(1101, dtype=torch.bfloat16, device=DEVICE)
    odd = storage[1:].copy_(normal(1100)).requires_grad_()
    (even,) = ours = parameters((1100,), (torch.bfloat16,))
    assert odd.data_ptr() % 16 != even.data_ptr() % 16
    runs = [started("triton", [odd.detach().requires_grad_()]), started("triton", ours)]
    for params, optimizer in runs:
        params[0].data.copy_(normal(1100))
        gradient = normal(1100, seed=5)
        optimizer.step(gradients={params[0]: strided(gradient) if params is ours else gradient})
    assert_same_training(*runs)
    assert storage[0] == 0


def test_one_launch_updates_all_tensors_of_a_kind():
    params = parameters()
    groups = [{"params": params[:4]}, {"params": params[4:], "lr": 1e-4, "weight_decay": 0.0, "betas": (0.8, 0.9)}]
    optimizer = AdamW8bit(groups, backend="triton")
    give_gradients(params, 1)
    with captured_launches() as launches:
        optimizer.step()
    assert len(launches) == 2
    with captured_launches() as launches:  # fp32 sums of the gradients of bf16 parameters, too
        optimizer.step(gradients={param: torch.ones_like(param, dtype=torch.float32) for param in params})
    assert len(launches) == 2
    assert {kind["FP32_GRADS"] for *_, kind in launches} == {True}


def test_entries_behind_2_to_the_31_are_updated_where_they_are():
    size, far = 600, 2**33
    settings = AdamWSettings(1e-2, 0.9, 0.95, 1e-8, 0.1, step=7, seed=3, number=5)
    param, grad = normal(size, dtype=torch.bfloat16), normal(size, seed=1)
    near, codes = param.clone(), MomentCodes.zeros(param)
    adamw_8bit_step_([near], [grad], [MomentCodes.zeros(param)], [settings], backend="torch")
    # Addresses of tensors that begin long before the memory that is touched.
    addresses = [tensor.data_ptr() - far * tensor.element_size() for tensor in (param, grad, codes.low)]
    for kept, exponents in ((codes.first, codes.first_exponents), (codes.root, codes.root_exponents)):
        addresses += [kept.data_ptr() - far, exponents.data_ptr() - far // 256]
    row = [*addresses, far + size, -(far // 1024), settings.step, settings.number, settings.seed]
    launch(
        *(_adamw_8bit, (1,), torch.tensor([row], device=DEVICE), torch.tensor([settings.factors()], device=DEVICE)),
        *(torch.zeros(1, dtype=torch.int32, device=DEVICE), grad),
        **{"FP32_WEIGHTS": False, "MASTERS": True, "FP32_GRADS": True, "HAS_SCALE": False, "K": 4, "num_warps": 4},
        enable_fp_fusion=False,
    )
    assert torch.equal(param, near)
    words = torch_random_words(settings.seed, settings.number, far, 768, 0, DEVICE).view(3, 256)
    factors = [torch.tensor(value, device=DEVICE) for value in settings.factors()]
    first = torch.nn.functional.pad(grad * factors[1], (0, 168)).view(3, 256)
    expected, exponents = torch_encode(first, torch_dither(words << 16, settings.step), 3, 4)
    assert torch.equal(codes.first, expected.view(-1)[:size])
    assert torch.equal(codes.first_exponents, exponents.view(-1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("inf"), float("nan"), -float("inf")])
def test_a_gradient_that_is_not_finite_shows_in_its_weight_at_once_and_in_its_block_next(backend, bad):
    params, optimizer = started(backend, parameters((600,)))
    give_gradients(params, 1)
    for param in params:
        param.grad[300] = bad
    optimizer.step()
    for param in params:
        assert bool(param[300].isnan())
        assert int(param.isnan().sum()) == 1
    give_gradients(params, 2)
    optimizer.step()
    for param in params:
        broken = param.isnan().nonzero().view(-1)
        assert broken.tolist() == list(range(256, 512))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_whose_square_overflows_shows_in_its_block_in_the_next_step(backend):
    params, optimizer = started(backend, parameters((600,)))
    give_gradients(params, 1)
    for param in params:
        param.grad[300] = 1e25
    optimizer.step()
    assert not any(param.isnan().any() for param in params)
    give_gradients(params, 2)
    optimizer.step()
    for param in params:
        assert param.isnan().nonzero().view(-1).tolist() == list(range(256, 512))


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_gradients_leave_zero_moments_and_weight_decay_alone(backend):
    (param,), optimizer = started(backend, parameters((300,), (torch.float32,)))
    before = param.detach().double()
    param.grad = torch.zeros_like(param)
    optimizer.step()
    torch.testing.assert_close(param.detach().double(), before * (1 - 1e-3), rtol=1e-6, atol=0)
    assert not optimizer.state[param]["exp_avg_codes"].any()
    assert not optimizer.state[param]["root_codes"].any()


def test_the_kept_second_moment_follows_the_gradients_when_they_shrink():
    (param,), optimizer = started(params=parameters((4096,), (torch.float32,)), betas=(0.9, 0.99), lr=0.0)
    exact = torch.zeros(4096, dtype=torch.float64, device=DEVICE)
    for step in range(1, 401):
        param.grad = normal(4096, seed=step) * (1.0 if step < 200 else 0.1)
        optimizer.step()
        exact = 0.99 * exact + 0.01 * param.grad.double() ** 2
    state = optimizer.state[param]
    root = torch_decode(state["root_codes"].view(-1, 256), state["root_exponents"][:, None], 3, 5).view(-1).double()
    ratio = root / exact.sqrt()
    assert abs(float(ratio.log().mean())) < 0.03
    assert float(ratio.log().std()) < 0.08


def test_the_state_takes_two_bytes_an_entry_and_masters_two_more():
    for masters, dtype, most in (
        ("split", torch.bfloat16, 4),
        ("stochastic", torch.bfloat16, 2),
        ("split", DTYPES[1], 2),
    ):
        (param,), optimizer = started(params=parameters((2560,), (dtype,)), masters=masters)
        give_gradients([param], 1)
        optimizer.step()
        state = optimizer.state[param]
        taken = sum(value.nbytes for value in state.values() if isinstance(value, torch.Tensor))
        assert taken == most * 2560 + 2 * 10


def test_the_operator_declares_what_it_changes():
    params = [normal(300, dtype=torch.bfloat16), normal(40)]
    codes = [list(kinds) for kinds in zip(*(MomentCodes.zeros(param) for param in params), strict=True)]
    settings = AdamWSettings(1e-2, 0.9, 0.95, 1e-8, 0.1, step=1, seed=3, number=0)
    factors, counters = torch.tensor([settings.factors()] * 2), torch.tensor([[1, 0, 3, 0], [1, 1, 3, 0]])
    grads = [normal(300, seed=1), normal(40, seed=1)]
    args = (params, grads, *codes, factors, counters, torch.ones((), device=DEVICE))
    torch.library.opcheck(torch.ops.redwhale.adamw_8bit_update.default, args)

    def twice(*args):
        update_operator(*args)
        update_operator(*args)
        return args[0][0] * 2

    plain, compiled = copy.deepcopy(args), copy.deepcopy(args)
    twice(*plain)
    torch.compile(twice, backend="aot_eager", fullgraph=True)(*compiled)
    for a, b in zip(plain[:7], compiled[:7], strict=True):
        assert all(same_bits(x, y) for x, y in zip(a, b, strict=True))


def test_what_cannot_be_updated_is_refused():
    with pytest.raises(TypeError, match="updates bf16 and fp32 parameters"):
        started(params=parameters((4,), (torch.float16,)))
    with pytest.raises(ValueError, match="not contiguous"):
        started(params=[normal(4, 4).t().requires_grad_()])
    for options, message in (
        ({"masters": "fp32"}, "not one of split, stochastic"),
        ({"betas": (0.9, 1.0)}, "not in"),
        ({"lr": -1.0}, "negative"),
        ({"seed": -1}, "not in"),
    ):
        with pytest.raises(ValueError, match=message):
            started(**options)
    (param,), optimizer = started(params=parameters((4,), (torch.float32,)))
    with pytest.raises(ValueError, match="does not fit"):
        optimizer.step(gradients={param: normal(5)})
    with pytest.raises(TypeError, match="takes bf16 and fp32 gradients"):
        optimizer.step(gradients={param: normal(4).half()})
    with pytest.raises(ValueError, match="one number for all"):
        optimizer.step(gradients={param: normal(4)}, grad_scale=normal(2))
