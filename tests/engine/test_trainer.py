"""The training loop: what moves, what resumes, what stops."""

import dataclasses
import gc
import json
import math

import msgspec
import numpy as np
import pytest
import torch
from tiny import TINY, tiny_model
from torch import nn

from redwhale.engine import (
    BlockSchedule,
    LoopConfig,
    LoRAConfig,
    MixedSequences,
    PackedSequences,
    Stage,
    TokenShards,
    Trainer,
    ValidationSet,
    plan_stages,
    write_shard,
)
from redwhale.engine.errors import RecipeError, TrainingError
from redwhale.engine.plans import PLANS
from redwhale.model import Llama, load_adapter, merge_lora
from redwhale.model.lora import adapted_layers

LENGTH = 16
FIRST_NEW = 80
STAGES = [
    ("embed", "head"),
    ("layers.odd",),
    ("layers.even",),
    ("lora",),
    ("norms",),
    ("head",),
    ("all",),
    ("embed", "lora"),
    ("embed.new",),
    ("head.new",),
    ("embed.new", "head.new", "lora"),
    ("embed.new", "head"),
    ("layers[1:3]", "head.new"),
]


def packed(folder, documents=60, seed=0):
    """Counting in steps of 1 to 3, so that there is something to learn."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    starts, strides = rng.integers(0, 94, documents), rng.integers(1, 4, documents)
    lengths = rng.integers(2, 40, documents)
    texts = [(3 + (a + d * np.arange(n)) % 94).tolist() for a, d, n in zip(starts, strides, lengths, strict=True)]
    write_shard(folder / "t-00000", ((d, len(d)) for d in texts), vocab_size=97, tokenizer_sha256="x")
    return PackedSequences(TokenShards.open(folder, "t"), LENGTH)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return packed(tmp_path_factory.mktemp("shards"))


def stage(train, steps=8, **options):
    defaults = {"lr": 1e-2, "weight_decay": 0.1, "lora": LoRAConfig(r=4, alpha=8.0)}
    return Stage(name="s", train=train, tokens=steps * 4 * LENGTH, **{**defaults, **options})


def trainer(model, stage, data, folder, *, validate=True, **options):
    named = {name: options.pop(name) for name in ("on_log", "on_step", "loss", "inherited") if name in options}
    loop = LoopConfig(**{"batch_size": 4, "micro_batch_size": 2, "log_every": 1, "checkpoint_every": 3, **options})
    return Trainer(
        model,
        stage,
        data,
        sequence_length=LENGTH,
        folder=folder,
        loop=loop,
        first_new_row=FIRST_NEW,
        validation={"counting": ValidationSet(data, 1000)} if validate else None,
        **named,
    )


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def rows_that_may_move(name, train):
    """First row of a tensor that a stage may change, None for none of it; written out once more by hand."""
    parts = name.split(".")
    layer = int(parts[2]) if "layers" in parts else None
    whole = {
        "embed": "embed_tokens" in parts,
        "head": "lm_head" in parts,
        "norms": "norm" in parts[-2],
        "layers": layer is not None,
        "layers.odd": layer in (1, 3),
        "layers.even": layer in (0, 2),
        "layers.lower": layer in (0, 1),
        "layers.upper": layer in (2, 3),
        "layers[1:3]": layer in (1, 2),
        "lora": layer is not None and parts[-2].endswith("_proj"),
        "all": True,
    }
    if any(whole.get(selector) for selector in train):
        return 0
    new = ("embed.new" in train and "embed_tokens" in parts) or ("head.new" in train and "lm_head" in parts)
    return FIRST_NEW if new else None


def assert_moved(before, after, train):
    """Exactly what `train` names has moved, bit by bit."""
    assert after.keys() == before.keys()
    for name in before:
        first = rows_that_may_move(name, train)
        still = before[name] if first is None else before[name][:first]
        assert torch.equal(still, after[name][: len(still)]), name
        assert (first is None) or not torch.equal(before[name][first:], after[name][first:]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("train", STAGES, ids="+".join)
def test_a_stage_moves_exactly_the_parameters_it_names(tmp_path, data, train, dtype):
    model = tiny_model(dtype)
    before = weights(model)
    trainer(model, stage(train), data, tmp_path).run()
    assert_moved(before, weights(model), train)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("plan", PLANS)
def test_every_stage_of_every_plan_moves_exactly_what_it_names(tmp_path, data, plan, optimizer):
    model = tiny_model(torch.bfloat16)
    for number, planned in enumerate(plan_stages(plan, 7 * 8 * 4 * LENGTH, lr_scale=500.0)):
        blocks = planned.blocks and BlockSchedule(layers=planned.blocks.layers, steps=2, order=planned.blocks.order)
        planned = msgspec.structs.replace(
            planned, blocks=blocks, weight_decay=0.1, lora=LoRAConfig(r=4), optimizer=optimizer
        )
        before = weights(model)
        trainer(model, planned, data, tmp_path / str(number), validate=False).run()
        assert_moved(before, weights(model), planned.train)


@pytest.mark.parametrize("train", [STAGES[number] for number in (0, 1, 3, 6, 10)], ids="+".join)
def test_what_was_frozen_in_fp8_comes_back_to_the_bit(tmp_path, data, train):
    model = tiny_model(torch.bfloat16)
    before, kinds = weights(model), [type(module) for module in model.modules()]
    in_fp8, validated = set(), []

    def look(run, done):
        found = {name for name, tensor in model.named_parameters() if tensor.dtype == torch.float8_e4m3fn}
        in_fp8.update(found)
        assert found == in_fp8

    run = trainer(model, stage(train), data, tmp_path, frozen="fp8", on_step=look, validate_every=4)
    run.on_log = lambda line: validated.append(line.get("validation"))
    result = run.run()
    # The adapters' bases are merged with them: what they were before must have gone into that.
    assert_moved(before, weights(model), train)
    assert [type(module) for module in model.modules()] == kinds
    linear = {name for name in before if name.split(".")[-2].endswith("_proj")}
    assert in_fp8 == {name for name in linear if "lora" in train or rows_that_may_move(name, train) is None}
    untouched = trainer(tiny_model(torch.bfloat16), stage(train), data, tmp_path / "stored").run()
    assert result.before == untouched.before
    during = [line for line in validated if line is not None][1]["counting"]["loss"]
    assert math.isfinite(during)
    assert result.loss_after == pytest.approx(untouched.loss_after, rel=0.02)


def test_adapters_are_merged_into_the_weights_that_fp8_stood_for(tmp_path, data):
    model, merged = tiny_model(torch.bfloat16), tiny_model(torch.bfloat16)
    run = trainer(model, stage(("lora",)), data, tmp_path, frozen="fp8")
    run.run()
    load_adapter(merged, tmp_path / "adapter")
    merge_lora(merged)
    for (name, a), b in zip(model.named_parameters(), merged.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_an_interrupted_stage_leaves_no_weight_in_fp8(tmp_path, data):
    model = tiny_model()
    before = weights(model)

    def crash(run, done):
        raise Crash

    with pytest.raises(Crash):
        trainer(model, stage(("head",)), data, tmp_path, frozen="fp8", on_step=crash).run()
    assert_moved(before, weights(model), ("head",))


class Crash(Exception):
    pass


DROPOUT = LoRAConfig(r=4, alpha=8.0, dropout=0.3)
LISA = BlockSchedule(layers=1, steps=2)
RESUMED = {
    "all": (stage(("all",)), {}),
    "lora": (stage(("lora",)), {}),
    "layers.odd": (stage(("layers.odd",)), {}),
    "new rows": (stage(("embed.new", "head.new")), {}),
    "8 bit": (stage(("all",), optimizer="adamw_8bit"), {}),
    "8 bit, stochastic": (stage(("layers",), optimizer="adamw_8bit", masters="stochastic"), {}),
    "split": (stage(("all",), masters="split"), {}),
    "in backward": (stage(("all",), in_backward=True), {}),
    "blocks": (stage(("head", "layers"), blocks=LISA), {}),
    "blocks, 8 bit": (stage(("layers",), blocks=LISA, optimizer="adamw_8bit"), {}),
    "best": (stage(("all",), lr=0.3), {"validate_every": 2, "keep_best": True}),
    "early stop": (stage(("all",), lr=1.0), {"validate_every": 1, "patience": 2}),
    "dropout": (stage(("lora",), lora=DROPOUT), {}),
    "dropout, recomputed": (stage(("lora",), lora=DROPOUT), {"activations": "full"}),
    "fp8": (stage(("lora",), lora=DROPOUT, frozen="fp8"), {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("chosen", "options"), RESUMED.values(), ids=RESUMED)
def test_resume_after_a_crash_at_any_step_is_bit_exact(tmp_path, data, chosen, options, dtype):
    whole = tiny_model(dtype)
    unbroken = trainer(whole, chosen, data, tmp_path / "whole", **options)
    expected = unbroken.run()
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    for crash_step in (1, 3, 4, 7):  # before, at and behind a saved state, and at the last step but one
        folder = tmp_path / f"crash-{crash_step}"

        def crash(run, done, at=crash_step):
            if done == at:
                raise Crash

        torch.manual_seed(crash_step)  # the state of the global generator plays no part
        first = trainer(tiny_model(dtype), chosen, data, folder, on_step=crash, **options)
        if crash_step <= expected.steps:
            with pytest.raises(Crash):
                first.run()
        resumed = tiny_model(dtype)
        second = trainer(resumed, chosen, data, folder, **options)
        result = second.run()
        for name, tensor in weights(resumed).items():
            assert torch.equal(tensor, weights(whole)[name]), (crash_step, name)
        for name, tensor in second.train_step.state_tensors().items():
            assert torch.equal(tensor, unbroken.train_step.state_tensors()[name]), (crash_step, name)
        assert (result.before, result.after) == (expected.before, expected.after)
        assert (result.steps, result.best_step) == (expected.steps, expected.best_step)
        again = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [(line["step"], line.get("loss"), line.get("validation")) for line in again] == [
            (line["step"], line.get("loss"), line.get("validation")) for line in lines
        ]


def gradients(model, data, micro_batch_size, tmp_path):
    run = trainer(model, stage(("all",)), data, tmp_path, micro_batch_size=micro_batch_size)
    batches = run.loader.micro_batches(0)
    run.train_step.forward_backward(0, batches, run.loader.num_targets(0))
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
        return gradients_of_all(packed, folder, length)

    expected = gradient_of((0, 1, 2, 3, 4), 36)
    for name, gradient in gradient_of((3, 0, 4, 2, 1), 36).items():
        assert (gradient - expected[name]).norm() <= 1e-6 * expected[name].norm(), name


def gradients_of_all(packed, folder, length):
    model = tiny_model()
    loop = LoopConfig(batch_size=len(packed), micro_batch_size=len(packed))
    run = Trainer(model, stage(("all",)), packed, sequence_length=length, folder=folder, loop=loop)
    run.train_step.forward_backward(0, run.loader.micro_batches(0), run.loader.num_targets(0))
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "chosen", [stage(("embed", "layers.odd")), stage(("embed", "lora"), lora=DROPOUT)], ids=["layers", "dropout"]
)
def test_what_is_kept_for_backward_changes_no_bit_of_the_result(tmp_path, data, chosen):
    results = []
    for policy in ("recompute-cheap", "none", "full", "offload"):
        model = tiny_model()
        trainer(model, chosen, data, tmp_path / policy, activations=policy).run()
        results.append(weights(model))
    for name in results[0]:
        assert all(torch.equal(results[0][name], other[name]) for other in results[1:]), name


def test_dropout_masks_differ_from_step_to_step_and_leave_the_global_generator_alone(tmp_path, data):
    model = tiny_model()
    run = trainer(model, stage(("lora",), lora=DROPOUT), data, tmp_path)
    for layer in adapted_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    batches = run.loader.micro_batches(0)
    state = torch.get_rng_state()
    losses = [run.train_step.forward_backward(step, batches, 50)[0].item() for step in (0, 1, 2, 0)]
    assert losses[0] == losses[3]
    assert len(set(losses)) == 3
    assert torch.equal(torch.get_rng_state(), state)


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


def test_training_lowers_the_validation_loss(tmp_path, data):
    model = tiny_model()
    result = trainer(model, stage(("all",), steps=30), data, tmp_path).run()
    assert result.loss_after < result.loss_before - 0.2
    assert result.trained_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert result.tokens == 30 * 4 * LENGTH
    assert result.corpora == {"corpus": result.tokens}


# Steps that must not be taken.


def poisoned(at, value):
    """The model's own loss, but for one global batch."""
    calls = iter(range(10**6))

    def loss(model, batch):
        output = model.loss(batch.input_ids, batch.targets, batch.documents)
        if model.training and next(calls) // 2 in at:
            return output._replace(loss_sum=output.loss_sum * value, token_losses=output.token_losses * value)
        return output

    return loss


@pytest.mark.parametrize("options", [{}, {"optimizer": "adamw_8bit"}, {"in_backward": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_step_that_is_not_finite_changes_no_weight_and_training_goes_on(tmp_path, data, options, dtype):
    model = tiny_model(dtype)
    seen = []
    run = trainer(
        model,
        stage(("all",), **options),
        data,
        tmp_path,
        loss=poisoned({3}, math.nan),
        on_step=lambda run, done: seen.append(weights(run.model)),
    )
    result = run.run()
    assert result.skipped_steps == 1
    assert all(torch.equal(seen[2][name], seen[3][name]) for name in seen[2])
    assert not all(torch.equal(seen[3][name], seen[4][name]) for name in seen[2])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = {line["step"]: line for line in lines if "lr" in line}
    assert "loss" not in steps[4]
    assert steps[5]["skipped_steps"] == 1
    assert math.isfinite(result.loss_after)


def test_a_loss_far_beyond_the_last_ones_is_skipped(tmp_path, data):
    result = trainer(tiny_model(), stage(("all",), steps=50), data, tmp_path, loss=poisoned({40}, 50.0)).run()
    assert result.skipped_steps == 1
    off = trainer(
        tiny_model(), stage(("all",), steps=50), data, tmp_path / "off", loss=poisoned({40}, 50.0), spike_sigma=0.0
    ).run()
    assert off.skipped_steps == 0


def test_many_steps_that_are_not_finite_stop_with_a_sentence(tmp_path, data):
    model = tiny_model()
    before = weights(model)
    run = trainer(model, stage(("all",)), data, tmp_path, loss=poisoned(range(2, 9), math.nan), most_skipped=4)
    with pytest.raises(TrainingError, match=r"stage .s. skipped its last 4 steps, 3 to 6.*corpus 8 to 23"):
        run.run()
    assert all(bool(tensor.isfinite().all()) for tensor in weights(model).values())
    assert not all(torch.equal(before[name], tensor) for name, tensor in weights(model).items())


# Validation.


def test_the_best_validation_is_what_the_stage_ends_with(tmp_path, data):
    """A learning rate that grows too large: the middle is better than the end."""
    kept = []
    options = {"lr": 0.5, "schedule": "constant", "warmup": 1.0, "grad_clip": 0.0, "steps": 24}
    run = trainer(
        tiny_model(),
        stage(("all",), **options),
        data,
        tmp_path,
        validate_every=2,
        keep_best=True,
        on_step=lambda run, done: kept.append(weights(run.model)),
    )
    result = run.run()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["validation"]["counting"]["loss"] for line in lines if "validation" in line}
    del losses[0]
    best = min(losses, key=losses.get)
    assert 0 < best < 24
    assert result.best_step == best
    assert result.loss_after == losses[best]
    assert all(torch.equal(tensor, kept[best - 1][name]) for name, tensor in weights(run.model).items())


def test_training_stops_when_validation_gets_no_better(tmp_path, data):
    run = trainer(tiny_model(), stage(("all",), lr=2.0, grad_clip=0.0), data, tmp_path, validate_every=1, patience=2)
    result = run.run()
    assert result.steps < 8
    assert result.steps == (result.best_step or 0) + 2


def test_every_validation_set_is_measured_and_the_first_decides(tmp_path, data):
    other = packed(tmp_path / "other", documents=5, seed=9)
    sets = {"korean": ValidationSet(data, 1000), "english": ValidationSet(other, 500)}
    run = Trainer(
        tiny_model(),
        stage(("all",)),
        data,
        sequence_length=LENGTH,
        folder=tmp_path / "run",
        loop=LoopConfig(batch_size=4, validate_every=4),
        validation=sets,
    )
    result = run.run()
    assert list(result.after) == ["korean", "english"]
    assert result.loss_after == result.after["korean"].loss
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    measured = [line["validation"] for line in lines if "validation" in line]
    assert [set(line) for line in measured] == [{"korean", "english"}] * 3
    for line in measured:
        result = line["english"]
        assert result["bits_per_byte"] == pytest.approx(result["loss"] * result["tokens"] / math.log(2) / 500)


# What a later stage inherits.


def test_a_stage_that_inherits_equals_one_long_stage(tmp_path, data):
    """Moments, step counts and masters go on: two stages of four steps are one of eight."""
    options = {"schedule": "constant", "warmup": 0.0, "masters": "split"}
    whole = tiny_model(torch.bfloat16)
    trainer(whole, stage(("layers", "head"), **options), data, tmp_path / "whole").run()
    model = tiny_model(torch.bfloat16)
    first = trainer(model, stage(("layers", "head"), steps=4, **options), data, tmp_path / "1")
    first.run()

    def second(inherit, inherited):
        return Trainer(
            model,
            stage(("layers", "head"), steps=4, inherit=inherit, **options),
            data,
            sequence_length=LENGTH,
            folder=tmp_path / f"2-{inherit}",
            loop=LoopConfig(batch_size=4, micro_batch_size=2),
            first_sequence=4 * 4,
            inherited=inherited,
        )

    second(True, first.inheritance()).run()
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(model).items())


def test_what_only_the_later_stage_trains_begins_anew(tmp_path, data):
    model = tiny_model(torch.bfloat16)
    first = trainer(model, stage(("embed", "lora")), data, tmp_path / "1")
    first.run()
    inherited = first.inheritance()
    assert not any("lora" in name for name in inherited)
    second = trainer(model, stage(("embed", "head"), inherit=True), data, tmp_path / "2", inherited=inherited)
    state = second.train_step.optimizer.state_tensors()
    assert int(state["step.model.embed_tokens.weight"]) == 8
    assert int(state["step.lm_head.weight"]) == 0


def test_layers_that_rest_hold_no_optimizer_state(tmp_path, data):
    sizes = []
    run = trainer(
        tiny_model(torch.bfloat16),
        stage(("layers",), blocks=BlockSchedule(layers=1, steps=2, order="cyclic")),
        data,
        tmp_path,
        on_step=lambda run, done: sizes.append(
            (sorted(run.train_step.optimizer.parameters), run.train_step.optimizer.state_bytes())
        ),
    )
    run.run()
    layers = [{name.split(".")[2] for name in names} for names, _ in sizes]
    assert layers == [{"0"}, {"0"}, {"1"}, {"1"}, {"2"}, {"2"}, {"3"}, {"3"}]
    of_one_layer = sum(parameter.numel() for name, parameter in run.train_step.trained.items() if ".0." in name)
    assert all(bytes_["moments"] == 8 * of_one_layer and bytes_["masters"] == 4 * of_one_layer for _, bytes_ in sizes)


def test_training_new_rows_holds_gradients_and_moments_for_them_alone(tmp_path, data):
    run = trainer(tiny_model(torch.bfloat16), stage(("embed.new", "head.new")), data, tmp_path)
    run.run()
    new = 2 * (97 - FIRST_NEW) * TINY.hidden_size
    assert run.train_step.optimizer.state_bytes() == {"masters": 4 * new, "moments": 8 * new, "gradients": 4 * new}
    assert all(parameter.grad is None for parameter in run.model.parameters())


# Data, metrics, the user's own parts.


def test_a_mix_trains_on_each_corpus_by_its_weight(tmp_path, data):
    english = packed(tmp_path / "english", documents=20, seed=5)
    mixed = MixedSequences({"corpus": data, "english": english}, {"corpus": 0.75, "english": 0.25}, seed=0)
    result = trainer(tiny_model(), stage(("all",), steps=25), mixed, tmp_path / "run", validate=False).run()
    assert sum(result.corpora.values()) == 25 * 4 * LENGTH
    assert result.corpora["english"] == pytest.approx(0.25 * 25 * 4 * LENGTH, abs=2 * LENGTH)


def test_a_line_of_metrics_says_what_an_operator_asks(tmp_path, data):
    lines = []
    trainer(tiny_model(), stage(("all",)), data, tmp_path, on_log=lines.append, log_every=2).run()
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == [2, 4, 6, 8]
    for line in training:
        assert set(line) >= {"stage", "tokens", "lse", "lr", "grad_norm", "tokens_per_second", "seconds"}
        assert line["model_flops_per_second"] > 0
        assert line["peak_memory_bytes"] >= line["memory_bytes"] > 0
        assert line["position"]["corpus"]["sequences"] == 4 * line["step"]
        assert 0 < line["lse"] < 10
    assert [line["eta_seconds"] > 0 for line in training] == [True, True, True, False]


def test_a_users_own_module_trains_with_a_loss_of_their_own(tmp_path, data):
    class Bigram(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(97, 97)
            self.drop = nn.Dropout(0.1)

    def loss(model, batch):
        logits = model.drop(model.table(batch.input_ids))
        return nn.functional.cross_entropy(logits, batch.targets, ignore_index=-100, reduction="sum")

    def run(folder, **options):
        torch.manual_seed(0)
        made = trainer(Bigram(), stage(("all",), steps=40, lr=0.1), data, folder, loss=loss, **options)
        return made, made.run()

    made, result = run(tmp_path / "a")
    assert result.loss_after < result.loss_before - 0.5
    assert result.after["counting"].accuracy is None
    again, _ = run(tmp_path / "b")
    assert torch.equal(made.model.table.weight, again.model.table.weight)


def test_pythons_garbage_collector_rests_while_steps_run(tmp_path, data):
    states = []
    trainer(tiny_model(), stage(("all",)), data, tmp_path, on_step=lambda *_: states.append(gc.isenabled())).run()
    assert states == [False] * 8
    assert gc.isenabled()


def test_values_out_of_bounds_are_refused_though_no_recipe_was_read(tmp_path, data):
    with pytest.raises(RecipeError, match=r"LoopConfig: .*>= 1.*checkpoint_every"):
        trainer(tiny_model(), stage(("all",)), data, tmp_path, checkpoint_every=0)


def test_new_rows_without_knowing_where_they_begin_are_refused(tmp_path, data):
    with pytest.raises(RecipeError, match="first_new_row"):
        Trainer(tiny_model(), stage(("embed.new",)), data, sequence_length=LENGTH, folder=tmp_path)


def test_tied_new_rows_train_and_leave_the_rest_alone(tmp_path, data):
    model = Llama(dataclasses.replace(TINY, tie_word_embeddings=True))
    model.init_weights(torch.Generator().manual_seed(0))
    before = weights(model)
    trainer(model, stage(("embed.new", "head.new")), data, tmp_path).run()
    for name, tensor in weights(model).items():
        old = FIRST_NEW if name in ("model.embed_tokens.weight", "lm_head.weight") else len(tensor)
        assert torch.equal(tensor[:old], before[name][:old]), name
        assert old == len(tensor) or not torch.equal(tensor[old:], before[name][old:])


def test_a_profile_of_some_steps_is_left_behind(tmp_path, data):
    trainer(tiny_model(), stage(("all",)), data, tmp_path, profile=2).run()
    assert (tmp_path / "profile" / "trace.json.gz").stat().st_size > 1000


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU can be waited for")
def test_a_step_never_waits_for_the_gpu(tmp_path, data):
    model = tiny_model(torch.bfloat16).cuda()
    run = trainer(model, stage(("all",), optimizer="adamw_8bit"), data, tmp_path)
    batches = [run.loader.micro_batches(step) for step in range(3)]
    run.train_step.take(0, batches[0], 50)  # compiles kernels, tries GEMMs
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in (1, 2):
            run.train_step.take(step, batches[step], 50)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_auto_settings_train_as_those_they_resolve_to(tmp_path, data):
    auto = trainer(tiny_model(), stage(("all",)), data, tmp_path / "auto", micro_batch_size="auto", activations="auto")
    found = {"micro_batch_size": auto.loop.micro_batch_size, "activations": auto.loop.activations}
    assert found["micro_batch_size"] == 4
    assert found["activations"] in ("none", "recompute-cheap")
    auto.run()
    fixed = trainer(tiny_model(), stage(("all",)), data, tmp_path / "fixed", **found)
    fixed.run()
    for (name, a), b in zip(auto.model.named_parameters(), fixed.model.parameters(), strict=True):
        assert torch.equal(a, b), name
