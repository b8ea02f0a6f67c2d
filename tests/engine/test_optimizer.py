"""The optimizer of a stage follows AdamW in every precision it offers, and its bits depend on nothing else."""

import contextlib
import copy
import gc
import itertools
import sys
import weakref

import msgspec
import pytest
import torch
from kernel_testing import DEVICE
from tiny import TINY, tiny_model
from torch import nn

from redwhale.engine import update_rules
from redwhale.engine.errors import RunError, TrainingError
from redwhale.engine.optimizer import StageOptimizer
from redwhale.engine.optimizer_config import OptimizerConfig
from redwhale.kernels import embedding, row_range
from redwhale.kernels.bf16_masters import fp32_masters
from redwhale.model import PackedDocuments

BF16, FP32 = torch.bfloat16, torch.float32
KINDS = [
    *(("adamw", masters) for masters in ("fp32", "split", "stochastic", "none")),
    *(("adamw_8bit", masters) for masters in ("split", "stochastic")),
    *(("bnb_adamw_8bit", masters) for masters in ("fp32", "split", "stochastic", "none")),
]
IDS = ["-".join(kind) for kind in KINDS]


class Net(nn.Module):
    """Every sort of parameter, with names as in a Llama."""

    def __init__(self, dtype=FP32):
        super().__init__()
        self.embed_tokens = nn.Embedding(96, 64)
        self.up = nn.Linear(64, 80)
        self.down = nn.Linear(80, 64, bias=False)
        self.norm = nn.LayerNorm(64, bias=False)
        self.lm_head = nn.Linear(64, 96, bias=False)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
        self.to(DEVICE, dtype)

    def loss(self, ids):
        x = self.embed_tokens(ids)
        x = self.norm(x + self.down(torch.nn.functional.silu(self.up(x))))
        return torch.nn.functional.cross_entropy(self.lm_head(x).float(), (7 * ids + 3) % 96, reduction="sum") / 48


def batch(step, rows=48):
    return torch.randint(0, 96, (rows,), generator=torch.Generator().manual_seed(step)).to(DEVICE)


def config(optimizer="adamw", masters="auto", **options):
    if optimizer.startswith("bnb"):
        pytest.importorskip("bitsandbytes")
    return OptimizerConfig(**{"optimizer": optimizer, "masters": masters, "weight_decay": 0.1, **options})


def started(dtype=FP32, lr=1e-2, **options):
    net = Net(dtype)
    return net, StageOptimizer(dict(net.named_parameters()), config(**options), lr=lr, seed=3)


def train(net, optimizer, steps, micro_batches=1, skip=None):
    """Steps by number, each on its own batch cut into micro-batches; returns the norms."""
    norms = []
    for step in steps:
        optimizer.start_step(micro_batches, 1 / step, skip)
        for measured in [True, False] if optimizer.needs_norm_pass else [False]:
            with optimizer.norm_pass() if measured else contextlib.nullcontext():
                for ids in batch(step).chunk(micro_batches):
                    net.loss(ids).backward()
        norms.append(optimizer.finish_step())
    return norms


def give(optimizer, gradients, lr_factor=1.0, skip=None):
    """One step with these gradients, by name."""
    optimizer.start_step(1, lr_factor, skip)
    for name, gradient in gradients.items():
        optimizer.parameters[name].grad = gradient.clone()
    return optimizer.finish_step()


def state(optimizer):
    """Copies of the weights and of all that is kept."""
    weights = {f"weight.{name}": parameter.detach() for name, parameter in optimizer.parameters.items()}
    return {name: tensor.clone() for name, tensor in {**weights, **optimizer.state_tensors()}.items()}


def differing(a, b):
    """Names of what is not the same in every bit."""
    assert a.keys() == b.keys()
    return [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])]


class Reference:
    """AdamW by its formula (arXiv 1711.05101, algorithm 2), in float64."""

    def __init__(self, weights, lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1):
        self.weights = {name: weight.detach().double() for name, weight in weights.items()}
        self.first = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        self.second = copy.deepcopy(self.first)
        self.lr, self.beta1, self.beta2, self.eps, self.weight_decay = lr, beta1, beta2, eps, weight_decay
        self.steps = 0

    def step(self, gradients, lr_factor=1.0):
        self.steps += 1
        for name, gradient in gradients.items():
            g, lr = gradient.double(), self.lr * lr_factor
            self.first[name] = self.beta1 * self.first[name] + (1 - self.beta1) * g
            self.second[name] = self.beta2 * self.second[name] + (1 - self.beta2) * g**2
            m = self.first[name] / (1 - self.beta1**self.steps)
            v = self.second[name] / (1 - self.beta2**self.steps)
            decay = self.weight_decay if gradient.dim() > 1 else 0.0
            self.weights[name] = self.weights[name] - lr * (m / (v.sqrt() + self.eps) + decay * self.weights[name])


def random_gradients(parameters, step, scale=1.0):
    generator = torch.Generator().manual_seed(step)
    return {
        name: (torch.randn(p.shape, generator=generator) * scale).to(p.device, p.dtype)
        for name, p in parameters.items()
    }


def relative_distance(actual, start, expected):
    """‖actual − expected‖ over how far the weights moved."""
    return float((actual.double() - expected).norm() / (expected - start.double()).norm())


def test_adamw_equals_the_formula_in_float64():
    net, optimizer = started(grad_clip=0.0)
    start = state(optimizer)
    reference = Reference(optimizer.parameters)
    for step in range(1, 8):
        gradients = random_gradients(optimizer.parameters, step)
        give(optimizer, gradients, lr_factor=1 / step)
        reference.step(gradients, lr_factor=1 / step)
    for name, parameter in net.named_parameters():
        assert relative_distance(parameter.detach(), start[f"weight.{name}"], reference.weights[name]) < 3e-6, name


WITH_MASTERS = [kind for kind in KINDS if kind[1] in ("fp32", "split")]


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("optimizer", "masters"), WITH_MASTERS, ids=map("-".join, WITH_MASTERS))
def test_masters_follow_the_formula_and_weights_are_their_nearest(optimizer, masters, dtype):
    _, ours = started(dtype, optimizer=optimizer, masters=masters, grad_clip=0.0)
    name = "up.weight"
    start = ours.parameters[name].detach().clone()
    reference = Reference(ours.parameters)
    for step in range(1, 21):
        gradients = {name: g + 0.5 for name, g in random_gradients(ours.parameters, step).items()}
        give(ours, gradients)
        reference.step(gradients)
    kept = state(ours)
    weight = master = kept[f"weight.{name}"]
    if dtype == BF16 and masters == "fp32":
        master = kept[f"master.{name}"].view_as(weight)
    elif dtype == BF16:
        master = fp32_masters(weight.view(-1), kept[f"master_low.{name}"]).view_as(weight)
    assert relative_distance(master, start, reference.weights[name]) < (3e-6 if optimizer == "adamw" else 0.02)
    spacing = torch.exp2(master.abs().log2().floor() - 7)
    assert bool(((weight.float() - master).abs() <= (spacing / 2 if dtype == BF16 else 0)).all())


WITHOUT_MASTERS = [kind for kind in KINDS if kind not in WITH_MASTERS]


@pytest.mark.parametrize(("optimizer", "masters"), WITHOUT_MASTERS, ids=map("-".join, WITHOUT_MASTERS))
def test_each_step_rounds_to_one_of_the_nearest_weights(optimizer, masters):
    _, ours = started(BF16, optimizer=optimizer, masters=masters, grad_clip=0.0)
    reference = Reference(ours.parameters)
    for step in range(1, 6):
        gradients = random_gradients(ours.parameters, step)
        reference.weights = {name: parameter.detach().double() for name, parameter in ours.parameters.items()}
        give(ours, gradients)
        reference.step(gradients)
        for name, exact in reference.weights.items():
            error = (ours.parameters[name].detach().double() - exact).abs()
            spacing = torch.exp2(exact.abs().log2().floor() - 7)
            # Moments in 8 bits may move a weight by another share of lr.
            moved = 1e-6 if optimizer == "adamw" else 1e-2
            assert bool((error <= spacing * (0.5 if masters == "none" else 1.0) * (1 + 1e-6) + moved).all()), name


def test_split_masters_are_fp32_masters_bit_for_bit():
    (net, split), (twin, whole) = (started(BF16, masters=masters) for masters in ("split", "fp32"))
    for micro_batches, first in ((1, 1), (3, 11)):
        train(net, split, range(first, first + 10), micro_batches)
        train(twin, whole, range(first, first + 10), micro_batches)
    a, b = state(split), state(whole)
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, twin.get_parameter(name)), name
        masters = fp32_masters(a[f"weight.{name}"].view(-1), a[f"master_low.{name}"])
        assert torch.equal(masters, b[f"master.{name}"]), name
        assert torch.equal(a[f"exp_avg_sq.{name}"], b[f"exp_avg_sq.{name}"]), name


@pytest.mark.parametrize("masters", ["fp32", "split", "stochastic", "none"])
def test_only_weights_without_masters_lose_changes_below_their_spacing(masters):
    """200 changes of 1/200 of a bf16 spacing: rounded to nearest, none of them is ever seen."""
    weight = nn.Parameter(torch.ones(4096, dtype=BF16, device=DEVICE))
    options = OptimizerConfig(masters=masters, grad_clip=0.0)
    optimizer = StageOptimizer({"w": weight}, options, lr=2**-8 / 200, seed=5)
    for _ in range(200):
        give(optimizer, {"w": torch.ones_like(weight)})
    mean = weight.detach().double().mean().item()
    expected = 1.0 if masters == "none" else 1 - 2**-8
    assert mean == pytest.approx(expected, abs=2**-8 / 20)


def test_stochastic_rounding_is_a_function_of_seed_name_and_step_alone():
    def weights(seed, other_names=()):
        parameters = {
            name: nn.Parameter(torch.ones(64, 8, dtype=BF16, device=DEVICE)) for name in (*other_names, "w", "x")
        }
        optimizer = StageOptimizer(parameters, OptimizerConfig(masters="stochastic"), lr=1e-3, seed=seed)
        for _ in range(3):
            give(optimizer, {name: torch.ones_like(parameter) for name, parameter in parameters.items()})
        return parameters

    one = weights(1)
    assert torch.equal(one["w"], weights(1, other_names=["before"])["w"])
    assert not torch.equal(one["w"], one["x"])
    assert not torch.equal(one["w"], weights(2)["w"])


@pytest.mark.parametrize("masters", ["fp32", "split", "stochastic", "none"])
@pytest.mark.parametrize("optimizer", ["adamw", "bnb_adamw_8bit"])
def test_computing_by_the_chunk_changes_no_bit(monkeypatch, optimizer, masters):
    net, whole = started(BF16, optimizer=optimizer, masters=masters)
    train(net, whole, range(1, 4))
    monkeypatch.setattr(update_rules, "_CHUNK", 1024)
    net, parts = started(BF16, optimizer=optimizer, masters=masters)
    train(net, parts, range(1, 4))
    assert differing(state(whole), state(parts)) == []


@pytest.mark.parametrize("micro_batches", [2, 4])
@pytest.mark.parametrize("in_backward", [False, True])
def test_accumulated_micro_batches_equal_the_whole_batch(micro_batches, in_backward):
    # One moment decides alone, undivided by the other, so that a weight's move is its gradient.
    options = {"beta1": 0.0, "beta2": 0.0, "eps": 1e3, "weight_decay": 0.0, "grad_clip": 0.0}
    net, whole = started(lr=1e3, **options)
    twin, parts = started(lr=1e3, in_backward=in_backward, **options)
    start = state(whole)
    (expected,) = train(net, whole, [1])
    (norm,) = train(twin, parts, [1], micro_batches)
    assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
    for name in (f"exp_avg.{name}" for name in whole.parameters):
        a, b = state(parts)[name].double(), state(whole)[name].double()
        assert (a - b).norm() <= 1e-6 * b.norm(), name
    assert all(not torch.equal(start[f"weight.{name}"], state(whole)[f"weight.{name}"]) for name in whole.parameters)


def test_bf16_gradients_add_up_in_fp32():
    net, optimizer = started(BF16, grad_clip=0.0, beta1=0.0)
    expected = {name: torch.zeros(p.shape, device=DEVICE) for name, p in net.named_parameters()}
    twin = Net(BF16)
    for ids in batch(1).chunk(3):
        twin.zero_grad()
        twin.loss(ids).backward()
        for name, parameter in twin.named_parameters():
            expected[name] += parameter.grad.float()
    train(net, optimizer, [1], micro_batches=3)
    for name, gradient in expected.items():
        assert torch.equal(state(optimizer)[f"exp_avg.{name}"], gradient.view(-1)), name


@pytest.mark.parametrize(("optimizer", "masters"), KINDS, ids=IDS)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
def test_updating_in_the_backward_pass_changes_no_bit(optimizer, masters, dtype):
    for clip, micro_batches in itertools.product((0.0, 0.05), (1, 3)):
        runs = []
        for in_backward in (False, True):
            options = {"optimizer": optimizer, "masters": masters, "grad_clip": clip, "in_backward": in_backward}
            net, ours = started(dtype, **options)
            norms = train(net, ours, range(1, 4), micro_batches)
            runs.append({**state(ours), "norms": torch.stack(norms)})
        assert differing(*runs) == [], (clip, micro_batches)
        assert float(runs[0]["norms"].min()) > 0.05


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
def test_updating_in_the_backward_pass_leaves_no_gradient(dtype):
    for micro_batches, clip, expected in ((1, 0.0, 0), (1, 1.0, 0), (3, 0.0, 0), (3, 1.0, 4)):
        net, optimizer = started(dtype, in_backward=True, grad_clip=clip)
        entries = sum(parameter.numel() for parameter in net.parameters())
        optimizer.start_step(micro_batches, 1.0)
        assert optimizer.needs_norm_pass == (clip > 0 and micro_batches == 1)
        if optimizer.needs_norm_pass:
            with optimizer.norm_pass():
                net.loss(batch(1)).backward()
            assert optimizer.state_bytes()["gradients"] == 0
        for ids in batch(1).chunk(micro_batches):
            net.loss(ids).backward()
        assert optimizer.state_bytes()["gradients"] == expected * entries
        optimizer.finish_step()
        assert optimizer.state_bytes()["gradients"] == 0


@pytest.mark.parametrize("activations", ["none", "full"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_a_llama_trains_alike_with_updates_in_the_backward_pass(optimizer, activations):
    ids = torch.arange(TINY.vocab_size, device=DEVICE)
    documents = PackedDocuments.from_lengths([len(ids)], device=DEVICE)
    runs = []
    for in_backward, clip in itertools.product((False, True), (0.0, 0.1)):
        model = tiny_model(BF16).to(DEVICE)
        model.model.activations = activations
        options = config(optimizer, in_backward=in_backward, grad_clip=clip)
        ours = StageOptimizer(dict(model.named_parameters()), options, lr=1e-2)
        model.set_gradient_buffers(*map(ours.gradient_buffer, ("model.embed_tokens.weight", "lm_head.weight")))
        norms = []
        for micro_batches in (1, 1, 2):
            ours.start_step(micro_batches, 1.0)
            for measured in [True, False] if ours.needs_norm_pass else [False]:
                with ours.norm_pass() if measured else contextlib.nullcontext():
                    for _ in range(micro_batches):
                        (model.loss(ids, ids.roll(-1), documents).loss_sum / len(ids)).backward()
            norms.append(ours.finish_step())
        assert model.model.embed_tokens.weight.grad is None
        runs.append({**state(ours), "norms": torch.stack(norms)})
    unclipped, clipped, unclipped_in_backward, clipped_in_backward = runs
    assert differing(unclipped, unclipped_in_backward) == []
    assert differing(clipped, clipped_in_backward) == []
    assert differing(unclipped, clipped) != []


def test_a_second_bf16_gradient_never_meets_the_first():
    net, optimizer = started(BF16)
    entries = sum(parameter.numel() for parameter in net.parameters())
    for _ in range(2):
        optimizer.start_step(2, 1.0)
        for ids in batch(1).chunk(2):
            net.loss(ids).backward()
            assert all(parameter.grad is None for parameter in net.parameters())
            assert optimizer.state_bytes()["gradients"] == 4 * entries
        optimizer.finish_step()
    optimizer.start_step(1, 1.0)
    net.loss(batch(1)).backward()
    assert optimizer.state_bytes()["gradients"] == (4 + 2) * entries


@pytest.mark.parametrize(("optimizer", "masters"), KINDS, ids=IDS)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
def test_training_goes_on_from_saved_state_with_the_same_bits(optimizer, masters, dtype):
    net, straight = started(dtype, optimizer=optimizer, masters=masters)
    half = {name: p for name, p in straight.parameters.items() if name.startswith(("up", "down"))}
    train(net, straight, [1, 2])
    straight.set_parameters(half)
    train(net, straight, [3])
    saved, weights = state(straight), copy.deepcopy(net.state_dict())
    other, resumed = started(dtype, optimizer=optimizer, masters=masters)
    other.load_state_dict(weights)
    resumed.set_parameters({name: resumed.parameters[name] for name in half})
    for parameter in resumed.parameters.values():
        parameter.detach().fill_(7.0)  # the state holds the weights too
    resumed.load_state_tensors({name: tensor for name, tensor in saved.items() if name in straight.state_tensors()})
    assert differing(state(resumed), saved) == []
    train(net, straight, [4, 5])
    train(other, resumed, [4, 5])
    assert differing(state(resumed), state(straight)) == []


def test_state_that_does_not_fit_is_refused_and_changes_nothing():
    _, optimizer = started(BF16)
    _, other = started(BF16, optimizer="adamw_8bit")
    before = state(optimizer)
    with pytest.raises(RunError, match=r"the saved master\.embed_tokens\.weight is missing, not torch\.float32"):
        optimizer.load_state_tensors(other.state_tensors())
    tensors = {**state(optimizer), "exp_avg.up.bias": torch.zeros(81, device=DEVICE)}
    with pytest.raises(RunError, match=r"exp_avg\.up\.bias is torch\.float32 \[81\], not torch\.float32 \[80\]"):
        optimizer.load_state_tensors(tensors)
    assert differing(before, state(optimizer)) == []


@pytest.mark.parametrize(("optimizer", "masters"), KINDS, ids=IDS)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("in_backward", [False, True])
def test_a_skipped_step_leaves_every_bit_but_counts(optimizer, masters, dtype, in_backward):
    net, ours = started(dtype, optimizer=optimizer, masters=masters, in_backward=in_backward)
    train(net, ours, [1, 2], micro_batches=2)
    before = state(ours)
    skip = torch.ones((), device=DEVICE, dtype=torch.bool)
    for step, micro_batches in ((3, 1), (4, 2)):
        train(net, ours, [step], micro_batches, skip)
    steps = [name for name in before if name.startswith("step.")]
    assert sorted(differing(before, state(ours))) == sorted(steps)
    assert all(state(ours)[name] == before[name] + 2 for name in steps)
    skip.zero_()  # the same tensor, by now false
    train(net, ours, [5], 2, skip)
    assert all(f"weight.{name}" in differing(before, state(ours)) for name in ours.parameters)


@pytest.mark.parametrize(("optimizer", "masters"), KINDS, ids=IDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_no_weight(optimizer, masters, bad):
    for dtype in (BF16, FP32):
        _, ours = started(dtype, optimizer=optimizer, masters=masters)
        give(ours, random_gradients(ours.parameters, 1))
        before = state(ours)
        gradients = random_gradients(ours.parameters, 2)
        gradients["up.weight"][3, 5] = bad
        assert not give(ours, gradients).isfinite()
        assert all(name.startswith("step.") for name in differing(before, state(ours)))


def test_skipping_after_weights_have_changed_is_refused():
    net, optimizer = started(in_backward=True, grad_clip=0.0)
    optimizer.start_step(1, 1.0)
    net.loss(batch(1)).backward()
    with pytest.raises(ValueError, match="updated in the backward pass already: give `skip` to start_step"):
        optimizer.finish_step(torch.ones((), device=DEVICE))


def test_clipping_uses_the_norm_of_all_gradients_together():
    _, optimizer = started(grad_clip=0.5)
    gradients = {name: torch.full_like(p, 2.0) for name, p in optimizer.parameters.items()}
    entries = sum(gradient.numel() for gradient in gradients.values())
    assert give(optimizer, gradients).item() == pytest.approx(2.0 * entries**0.5, rel=1e-6)
    first = [tensor / 0.1 for name, tensor in optimizer.state_tensors().items() if name.startswith("exp_avg.")]
    assert torch.cat(first).norm().item() == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize(("optimizer", "masters"), KINDS, ids=IDS)
def test_every_kind_clips_as_if_gradients_had_been_scaled(optimizer, masters):
    runs = []
    for clip in (0.5, 0.0):
        _, ours = started(optimizer=optimizer, masters=masters, grad_clip=clip)
        start = ours.parameters["up.weight"].detach().clone()
        gradients = random_gradients(ours.parameters, 1)
        norm = torch.cat([gradient.view(-1) for gradient in gradients.values()]).norm()
        factor = 1.0 if clip else 0.5 / norm
        give(ours, {name: gradient * factor for name, gradient in gradients.items()})
        give(
            ours, {name: g * 0.25 / norm for name, g in random_gradients(ours.parameters, 2).items()}
        )  # below the limit
        runs.append(ours.parameters["up.weight"].detach())
    assert relative_distance(runs[0], start, runs[1].double()) < 0.01


def test_the_norm_is_known_before_the_update_unless_weights_changed_first():
    for in_backward, clip in itertools.product((False, True), (0.0, 1.0)):
        net, optimizer = started(in_backward=in_backward, grad_clip=clip)
        optimizer.start_step(1, 1.0)
        if optimizer.needs_norm_pass:
            with optimizer.norm_pass():
                net.loss(batch(1)).backward()
        net.loss(batch(1)).backward()
        early = optimizer.gradient_norm()
        assert (early is None) == (in_backward and clip == 0)
        norm = optimizer.finish_step()
        assert early is None or torch.equal(early, norm)


def test_parameters_without_a_gradient_stay_as_they_are():
    net, optimizer = started()
    train(net, optimizer, [1])
    before = state(optimizer)
    give(optimizer, {"norm.weight": torch.ones_like(net.norm.weight)})
    changed = {name.partition(".")[2] for name in differing(before, state(optimizer))}
    assert changed == {"norm.weight"}


@pytest.mark.parametrize(("optimizer", "masters"), KINDS, ids=IDS)
def test_state_of_what_rests_is_freed_and_that_of_what_stays_is_kept(optimizer, masters):
    net, ours = started(BF16, optimizer=optimizer, masters=masters)
    train(net, ours, [1, 2], micro_batches=2)
    kept = {name: p for name, p in ours.parameters.items() if name.startswith("up")}
    before, whole = state(ours), ours.state_bytes()
    ours.set_parameters(kept)
    alone = StageOptimizer(kept, ours.config, lr=1.0).state_bytes()
    entries = sum(parameter.numel() for parameter in kept.values())
    assert ours.state_bytes() == {**alone, "gradients": 4 * entries}
    assert all(ours.state_bytes()[kind] < whole[kind] or whole[kind] == 0 for kind in whole)
    assert differing({name: before[name] for name in state(ours)}, state(ours)) == []
    net.loss(batch(3)).backward()
    ours.start_step(1, 1.0)
    net.loss(batch(3)).backward()
    assert net.down.weight.grad is not None  # nobody takes it any more
    ours.finish_step()
    assert sorted(name for name, p in net.state_dict().items() if not torch.equal(p, before[f"weight.{name}"])) == [
        "up.bias",
        "up.weight",
    ]
    ours.set_parameters(dict(net.named_parameters()))
    assert ours.state_tensors()["step.up.weight"] == 3
    assert ours.state_tensors()["step.down.weight"] == 0


def test_bytes_of_masters_and_moments_are_those_the_formats_take():
    for kind, masters, moments in (
        (("adamw", "fp32"), 4, 8),
        (("adamw", "split"), 2, 8),
        (("adamw", "none"), 0, 8),
        (("adamw_8bit", "split"), 2, 2 + 2 / 256),
        (("bnb_adamw_8bit", "fp32"), 4, 2 + 8 / 256),
    ):
        weight = nn.Parameter(torch.zeros(64, 256, dtype=BF16, device=DEVICE))
        optimizer = StageOptimizer({"w": weight}, config(*kind), lr=1.0)
        expected = {"masters": masters * 64 * 256, "moments": moments * 64 * 256, "gradients": 0}
        assert optimizer.state_bytes() == expected


def test_a_dropped_optimizer_frees_its_state_while_the_model_lives():
    net, optimizer = started()
    kept = weakref.ref(optimizer.state_tensors()["exp_avg.up.weight"])
    assert kept() is not None
    del optimizer
    gc.collect()
    assert kept() is None
    assert all(not parameter._post_accumulate_grad_hooks for parameter in net.parameters())


def test_a_later_stage_goes_on_from_the_state_it_inherits():
    net, earlier = started(BF16, optimizer="adamw", masters="split")
    train(net, earlier, [1, 2])
    handed = {name: tensor for name, tensor in state(earlier).items() if not name.endswith("down.weight")}
    net.norm.weight.data += 1
    later = StageOptimizer(dict(net.named_parameters()), earlier.config, lr=1e-2)
    assert later.inherit(handed) == [name for name in earlier.parameters if name != "down.weight"]
    mine, old = state(later), state(earlier)
    fresh = {name for name in differing(mine, old) if "down.weight" in name or "norm.weight" in name}
    assert set(differing(mine, old)) == fresh
    assert not mine["exp_avg.down.weight"].any()
    assert torch.equal(mine["exp_avg.norm.weight"], old["exp_avg.norm.weight"])
    assert not mine["master_low.norm.weight"].any()  # the weight is another: its low bits mean nothing
    other = StageOptimizer(dict(net.named_parameters()), config("adamw_8bit"), lr=1e-2)
    assert other.inherit(handed) == []


def test_learning_rates_and_decay_are_those_of_the_parameters_kind():
    shapes = {
        "model.embed_tokens.weight": (6, 4),
        "model.embed_tokens.weight[4:]": (2, 4),
        "lm_head.weight": (6, 4),
        "lm_head.bias": (6,),
        "model.layers.0.mlp.up_proj.weight": (6, 4),
        "model.layers.0.mlp.up_proj.lora_A": (2, 4),
        "model.layers.0.mlp.up_proj.lora_B": (6, 2),
        "model.norm.weight": (4,),
    }
    changes = {}
    for decay, embeddings in ((0.0, True), (0.1, True), (0.1, False)):
        parameters = {name: nn.Parameter(torch.ones(shape, device=DEVICE)) for name, shape in shapes.items()}
        options = OptimizerConfig(
            embed_lr=1e-4, head_lr=2e-4, lora_b_lr_ratio=16.0, weight_decay=decay, decay_embeddings=embeddings
        )
        optimizer = StageOptimizer(parameters, options, lr=1e-3)
        give(optimizer, {name: torch.ones_like(p) for name, p in parameters.items()}, lr_factor=0.5)
        changes[decay, embeddings] = [1 - p.detach().double().mean().item() for p in parameters.values()]
    rates = [0.5 * rate for rate in (1e-4, 1e-4, 2e-4, 2e-4, 1e-3, 1e-3, 16e-3, 1e-3)]
    assert changes[0.0, True] == pytest.approx(rates, rel=1e-3)
    decays = [0.1, 0.1, 0.1, 0, 0.1, 0.1, 0.1, 0]
    assert changes[0.1, True] == pytest.approx([r * (1 + d) for r, d in zip(rates, decays, strict=True)], rel=1e-3)
    decays[:3] = [0, 0, 0]
    assert changes[0.1, False] == pytest.approx([r * (1 + d) for r, d in zip(rates, decays, strict=True)], rel=1e-3)


@pytest.mark.parametrize(("in_backward", "clip"), list(itertools.product((False, True), (0.0, 0.5))))
def test_gradients_that_kernels_add_to_a_buffer_train_like_any_other(in_backward, clip):
    generator = torch.Generator().manual_seed(0)
    table, layer, upstream, gradient = (
        torch.randn(shape, generator=generator).to(DEVICE, BF16) for shape in ((96, 8), (5, 8), (48, 8), (5, 8))
    )
    parameters = {"model.embed_tokens.weight": nn.Parameter(table), "layer.weight": nn.Parameter(layer)}
    options = OptimizerConfig(in_backward=in_backward, grad_clip=clip, beta1=0.0)
    optimizer = StageOptimizer(parameters, options, lr=1e-2)
    buffer = optimizer.gradient_buffer("model.embed_tokens.weight")
    assert buffer is not None
    assert optimizer.gradient_buffer("layer.weight") is None
    for step, micro_batches in ((1, 1), (2, 1), (3, 2)):
        ids = batch(step)
        optimizer.start_step(micro_batches, 1.0)
        for measured in [True, False] if optimizer.needs_norm_pass else [False]:
            with optimizer.norm_pass() if measured else contextlib.nullcontext():
                for part in torch.arange(48, device=DEVICE).chunk(micro_batches):
                    rows = embedding(ids[part], parameters["model.embed_tokens.weight"], weight_grad=buffer)
                    products = (rows * upstream[part]).sum(), (parameters["layer.weight"] * gradient).sum()
                    sum(products).backward()
        norm = optimizer.finish_step()
        assert parameters["model.embed_tokens.weight"].grad is None
        expected = {
            "model.embed_tokens.weight": torch.zeros(96, 8).to(DEVICE).double().index_add_(0, ids, upstream.double()),
            "layer.weight": gradient.double() * micro_batches,
        }
        exact = torch.cat([each.view(-1) for each in expected.values()]).norm()
        assert norm.item() == pytest.approx(exact.item(), rel=1e-6)
        factor = clip / exact if clip else 1.0
        for name, each in expected.items():
            kept = optimizer.state_tensors()[f"exp_avg.{name}"].view_as(each)
            torch.testing.assert_close(kept.double(), each * factor, rtol=1e-5, atol=1e-6)


def test_rows_of_a_matrix_train_alone():
    model = tiny_model(BF16).to(DEVICE)
    weight = model.model.embed_tokens.weight.requires_grad_(False)
    before = weight.clone()
    rows = row_range(weight, 90, TINY.vocab_size - 90)
    optimizer = StageOptimizer({"model.embed_tokens.weight[90:]": rows}, config(weight_decay=0.5), lr=1e-1)
    assert optimizer.state_bytes()["moments"] == 8 * rows.numel()
    buffer = optimizer.gradient_buffer("model.embed_tokens.weight[90:]")
    assert buffer is not None
    optimizer.start_step(1, 1.0)
    buffer.fill_(1.0)
    optimizer.finish_step()
    assert torch.equal(weight[:90], before[:90])
    assert not bool((weight[90:] == before[90:]).any())


def test_the_moments_of_bitsandbytes_are_those_of_its_own_optimizer():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    net, ours = started(optimizer="bnb_adamw_8bit", grad_clip=0.0)
    twin = Net()
    matrices = [parameter for parameter in twin.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in twin.parameters() if parameter.dim() <= 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    theirs = bitsandbytes.optim.AdamW8bit(groups, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(1, 6):
        gradients = random_gradients(ours.parameters, step)
        give(ours, gradients)
        for name, parameter in twin.named_parameters():
            parameter.grad = gradients[name]
        theirs.step()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter, twin.get_parameter(name), rtol=1e-6, atol=1e-7)


def test_what_does_not_exist_is_refused(monkeypatch):
    with pytest.raises(ValueError, match='masters "none" does not exist for optimizer "adamw_8bit"; choose "split"'):
        OptimizerConfig(optimizer="adamw_8bit", masters="none")
    with pytest.raises(msgspec.ValidationError, match="Expected `float` > 0"):
        msgspec.convert({"embed_lr": 0.0}, OptimizerConfig)
    half = nn.Parameter(torch.zeros(4, 4, dtype=torch.float16))
    strided = nn.Parameter(torch.zeros(4, 4).t()[:, ::2])
    for parameter in (half, strided):
        with pytest.raises(TrainingError, match="what trains must be contiguous and bf16 or fp32"):
            StageOptimizer({"w": parameter}, OptimizerConfig(), lr=1.0)
    net, optimizer = started()
    with pytest.raises(RuntimeError, match="finish_step belongs after start_step"):
        optimizer.finish_step()
    with pytest.raises(ValueError, match="micro_batches is 0"):
        optimizer.start_step(0, 1.0)
    optimizer.start_step(1, 1.0)
    net.loss(batch(1)).backward()
    with pytest.raises(RuntimeError, match="more backward passes than start_step named"):
        net.loss(batch(1)).backward()
    with pytest.raises(RuntimeError, match="norm_pass belongs after start_step"), optimizer.norm_pass():
        pass
    if not torch.cuda.is_available() and "bitsandbytes" in sys.modules:
        with pytest.raises(TrainingError, match="there is no GPU here"):
            StageOptimizer({}, OptimizerConfig(optimizer="bnb_paged_adamw"), lr=1.0)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(TrainingError, match=r'pip install "redwhale\[gpu\]"'):
        StageOptimizer({}, OptimizerConfig(optimizer="bnb_adamw_8bit"), lr=1.0)
