import json

import numpy as np
import pytest
import torch
from tiny import tiny_model

from redwhale.engine import LoopConfig, LoRAConfig, PackedSequences, Stage, TokenShards, Trainer, write_shard
from redwhale.engine.errors import TrainingError
from redwhale.engine.optimizer import MasterAdamW
from redwhale.engine.stages import learning_rate, select_parameters
from redwhale.engine.training_state import load_training_state, save_training_state
from redwhale.model import load_adapter, merge_lora
from redwhale.model.lora import adapted_layers

LENGTH = 16
STAGES = [
    ("embed", "head"),
    ("layers.odd",),
    ("layers.even",),
    ("lora",),
    ("norms",),
    ("head",),
    ("all",),
    ("embed", "lora"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    # Counting in steps of 1 to 3, so that there is something to learn.
    starts, strides, lengths = rng.integers(0, 94, 60), rng.integers(1, 4, 60), rng.integers(2, 40, 60)
    documents = [(3 + (a + d * np.arange(n)) % 94).tolist() for a, d, n in zip(starts, strides, lengths, strict=True)]
    write_shard(folder / "t-00000", ((d, len(d)) for d in documents), vocab_size=97, tokenizer_sha256="x")
    return PackedSequences(TokenShards.open(folder, "t"), LENGTH)


def stage(train, steps=8, **options):
    defaults = {"lr": 1e-2, "weight_decay": 0.1, "lora": LoRAConfig(r=4, alpha=8.0)}
    return Stage(name="s", train=train, tokens=steps * 4 * LENGTH, **{**defaults, **options})


def trainer(model, stage, data, folder, **options):
    loop = LoopConfig(**{"batch_size": 4, "micro_batch_size": 2, "log_every": 1, "checkpoint_every": 3, **options})
    return Trainer(model, stage, data, sequence_length=LENGTH, folder=folder, loop=loop, validation=data)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def is_named(name, selector):
    """Which parameters a selector means, written out once more by hand."""
    parts = name.split(".")
    layer = int(parts[2]) if "layers" in parts else None
    return {
        "embed": "embed_tokens" in parts,
        "head": "lm_head" in parts,
        "norms": "norm" in parts[-2],
        "layers.odd": layer in (1, 3),
        "layers.even": layer in (0, 2),
        "lora": layer is not None and parts[-2].endswith("_proj"),
        "all": True,
    }[selector]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("train", STAGES, ids="+".join)
def test_a_stage_moves_exactly_the_parameters_it_names(tmp_path, data, train, dtype):
    model = tiny_model(dtype)
    before = weights(model)
    trainer(model, stage(train), data, tmp_path).run()
    after = weights(model)
    assert after.keys() == before.keys()
    for name in before:
        moved = not torch.equal(before[name], after[name])
        assert moved == any(is_named(name, selector) for selector in train), name


def test_every_selector_is_tested_here():
    from redwhale.engine.stages import SELECTORS

    assert set(SELECTORS) - {selector for train in STAGES for selector in train} == {"layers"}
    model = tiny_model()
    both = {**select_parameters(model, ["layers.odd"]), **select_parameters(model, ["layers.even"])}
    assert both.keys() == select_parameters(model, ["layers"]).keys()


def test_layer_parity_looks_at_the_whole_number():
    """A prefix match would put layers 10 to 19 with layer 1."""
    from redwhale.engine.stages import SELECTORS

    odd = [i for i in range(40) if SELECTORS["layers.odd"](f"model.layers.{i}.mlp.up_proj.weight")]
    assert odd == list(range(1, 40, 2))


class Crash(Exception):
    pass


DROPOUT = LoRAConfig(r=4, alpha=8.0, dropout=0.3)
RESUMED = {
    "all": (stage(("all",)), "none"),
    "lora": (stage(("lora",)), "none"),
    "layers.odd": (stage(("layers.odd",)), "none"),
    "dropout": (stage(("lora",), lora=DROPOUT), "none"),
    "dropout, recomputed": (stage(("lora",), lora=DROPOUT), "full"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("chosen", "activations"), RESUMED.values(), ids=RESUMED)
def test_resume_after_a_crash_at_any_step_is_bit_exact(tmp_path, data, chosen, activations, dtype):
    whole = tiny_model(dtype)
    expected = trainer(whole, chosen, data, tmp_path / "whole", activations=activations).run()
    for crash_step in (1, 3, 4, 7):  # before, at and behind a saved state, and at the last step but one
        folder = tmp_path / f"crash-{crash_step}"

        def crash(line, at=crash_step):
            if line["step"] == at and "loss" in line:
                raise Crash

        torch.manual_seed(crash_step)  # the state of the global generator plays no part
        first = trainer(tiny_model(dtype), chosen, data, folder, activations=activations)
        first.on_log = crash
        with pytest.raises(Crash):
            first.run()
        resumed = tiny_model(dtype)
        result = trainer(resumed, chosen, data, folder, activations=activations).run()
        for name, tensor in weights(resumed).items():
            assert torch.equal(tensor, weights(whole)[name]), (crash_step, name)
        assert result.after == expected.after
        assert result.before == expected.before
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in steps if "loss" in line] == list(range(1, 9))
        reference = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
        assert [line.get("loss") for line in steps] == [line.get("loss") for line in reference]


def test_a_crash_while_saving_leaves_the_state_before_it(tmp_path, monkeypatch):
    save_training_state(tmp_path, 3, {"x": torch.ones(2)}, {"seconds": 1.0})

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("redwhale.engine.training_state.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_training_state(tmp_path, 6, {"x": torch.zeros(2)}, {"seconds": 2.0})
    tensors, state = load_training_state(tmp_path)
    assert state == {"step": 3, "seconds": 1.0}
    assert torch.equal(tensors["x"], torch.ones(2))


def test_only_the_latest_state_is_kept(tmp_path):
    for step in (3, 6, 9):
        save_training_state(tmp_path, step, {"x": torch.ones(1)}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000009"]


def gradients(model, data, micro_batch_size, tmp_path):
    run = trainer(model, stage(("all",)), data, tmp_path, micro_batch_size=micro_batch_size)
    run._forward_backward(0)
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_accumulated_gradients_equal_those_of_the_whole_batch(tmp_path, data, micro_batch_size):
    """Micro-batches have different numbers of targets: averaging their means would be wrong."""
    expected = gradients(tiny_model(), data, 4, tmp_path)
    for name, gradient in gradients(tiny_model(), data, micro_batch_size, tmp_path).items():
        assert (gradient - expected[name]).norm() <= 1e-6 * expected[name].norm(), name


def test_gradients_do_not_depend_on_how_documents_are_packed(tmp_path):
    rng = np.random.default_rng(1)
    documents = [rng.integers(3, 97, n).tolist() for n in (5, 9, 3, 12, 7)]

    def gradient_of(order, length):
        folder = tmp_path / f"{order}-{length}"
        folder.mkdir()
        items = [(documents[i], 1) for i in order]
        write_shard(folder / "t-0", iter(items), vocab_size=97, tokenizer_sha256="x")
        packed = PackedSequences(TokenShards.open(folder, "t"), length)
        model = tiny_model()
        loop = LoopConfig(batch_size=len(packed), micro_batch_size=len(packed))
        run = Trainer(model, stage(("all",)), packed, sequence_length=length, folder=folder, loop=loop)
        run._forward_backward(0)
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    expected = gradient_of((0, 1, 2, 3, 4), 36)
    for name, gradient in gradient_of((3, 0, 4, 2, 1), 36).items():
        assert (gradient - expected[name]).norm() <= 2e-6 * expected[name].norm(), name


@pytest.mark.parametrize(
    "chosen", [stage(("embed", "layers.odd")), stage(("embed", "lora"), lora=DROPOUT)], ids=["layers", "dropout"]
)
def test_recomputing_activations_changes_nothing(tmp_path, data, chosen):
    results = []
    for policy in ("none", "full"):
        model = tiny_model()
        trainer(model, chosen, data, tmp_path / policy, activations=policy).run()
        results.append(weights(model))
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name


def test_dropout_masks_differ_from_step_to_step_and_leave_the_global_generator_alone(tmp_path, data):
    model = tiny_model()
    run = trainer(model, stage(("lora",), lora=DROPOUT), data, tmp_path)
    for layer in adapted_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    batches = run.loader.micro_batches(0)
    run.loader.micro_batches = lambda step: batches
    state = torch.get_rng_state()
    losses = [run._forward_backward(step)[0].item() for step in (0, 1, 2, 0)]
    assert losses[0] == losses[3]
    assert len(set(losses)) == 3
    assert torch.equal(torch.get_rng_state(), state)
    plain = run._validate()
    assert run._validate() == plain
    assert model.training


def test_adapters_trained_alone_are_left_for_peft(tmp_path, data):
    model = tiny_model()
    trainer(model, stage(("lora",), lora=LoRAConfig(r=4, alpha=8.0, rslora=True)), data, tmp_path / "lora").run()
    again = tiny_model()
    load_adapter(again, tmp_path / "lora" / "adapter")
    merge_lora(again)
    assert all(torch.equal(tensor, weights(model)[name]) for name, tensor in weights(again).items())
    # Beside a trained embedding, the adapters alone would not give the stage's model.
    trainer(tiny_model(), stage(("embed", "lora")), data, tmp_path / "both").run()
    assert not (tmp_path / "both" / "adapter").exists()


def test_adamw_equals_the_formula_in_float64(data):
    model = tiny_model()
    chosen = stage(("all",), grad_clip=0.0)
    optimizer = MasterAdamW(dict(model.named_parameters()), chosen)
    reference = {name: parameter.detach().double().clone() for name, parameter in model.named_parameters()}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in reference.items()}
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 6):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            first, second = moments[name]
            gradient = parameter.grad.double()
            decay = 0.1 if parameter.dim() > 1 else 0.0
            reference[name] *= 1 - 1e-2 * decay
            first.mul_(0.9).add_(0.1 * gradient)
            second.mul_(0.95).add_(0.05 * gradient**2)
            corrected = (second / (1 - 0.95**step)).sqrt() + 1e-8
            reference[name] -= 1e-2 * (first / (1 - 0.9**step)) / corrected
        optimizer.accumulate()
        optimizer.step(1e-2)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), reference[name], rtol=1e-5, atol=1e-6)


def test_bf16_weights_keep_small_updates_in_their_masters():
    """Ten updates of 1e-4 vanish in a bf16 weight of 1.0 but not in its fp32 master."""
    model = tiny_model(torch.bfloat16)
    norm = model.model.norm.weight
    assert float(norm.detach()[0]) == 1.0
    optimizer = MasterAdamW({"model.norm.weight": norm}, stage(("norms",), grad_clip=0.0))
    for _ in range(50):
        norm.grad = torch.ones_like(norm)
        optimizer.accumulate()
        optimizer.step(1e-4)
    assert optimizer.masters["model.norm.weight"][0].item() == pytest.approx(1.0 - 50e-4, abs=1e-5)
    assert float(norm.detach()[0]) == pytest.approx(1.0 - 50e-4, abs=2**-9)


def test_clipping_uses_the_norm_of_all_gradients_together():
    model = tiny_model()
    named = {"a": model.lm_head.weight, "b": model.model.norm.weight}
    optimizer = MasterAdamW(named, stage(("all",), grad_clip=0.5))
    for parameter in named.values():
        parameter.grad = torch.full_like(parameter, 2.0)
    expected = 2.0 * sum(parameter.numel() for parameter in named.values()) ** 0.5
    assert optimizer.step(1e-3).item() == pytest.approx(expected, rel=1e-6)
    moments = optimizer._adamw.state
    total = sum((moments[parameter]["exp_avg"] / 0.1).square().sum() for parameter in named.values()).sqrt()
    assert total.item() == pytest.approx(0.5, rel=1e-4)


def test_training_lowers_the_validation_loss(tmp_path, data):
    model = tiny_model()
    result = trainer(model, stage(("all",), steps=30), data, tmp_path).run()
    assert result.after.loss < result.before.loss - 0.2
    assert result.trained_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert result.tokens == 30 * 4 * LENGTH


def test_a_loss_that_is_not_finite_stops_with_a_sentence(tmp_path, data):
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="the loss of stage 's' is nan at step 1: lower its learning rate"):
        trainer(model, stage(("all",)), data, tmp_path).run()


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.7, 0.4, 0.1]),
        ("cosine", [0.5, 1.0, 1.0, 0.775, 0.325, 0.1]),
    ],
)
def test_learning_rate_warms_up_and_follows_its_schedule(schedule, expected):
    chosen = stage(("all",), lr=1.0, schedule=schedule, warmup=0.3, min_lr_ratio=0.1)
    assert [learning_rate(chosen, step, 6) for step in range(6)] == pytest.approx(expected)
