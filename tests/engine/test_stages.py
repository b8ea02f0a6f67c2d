"""Stages as data: selectors, schedules, blocks, plans."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TINY, tiny_model

from redwhale.engine import Stage, select_parameters
from redwhale.engine.errors import RecipeError
from redwhale.engine.plans import PLANS, plan_stages
from redwhale.engine.schedules import learning_rate_factor
from redwhale.engine.selectors import KNOWN, layer_index, selected_layers
from redwhale.engine.stages import BlockSchedule
from redwhale.model import Llama, add_lora


def named(selector: str) -> set[str]:
    """Parameters of the tiny model that a selector means, spelt out by hand from its four layers."""
    layer = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    layer += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm")
    of = {n: {f"model.layers.{n}.{part}.weight" for part in layer} for n in range(4)}
    norms = {name for names in of.values() for name in names if "norm" in name} | {"model.norm.weight"}
    embed, head = {"model.embed_tokens.weight"}, {"lm_head.weight"}
    return {
        "embed": embed,
        "embed.new": {"model.embed_tokens.weight[90:]"},
        "head": head,
        "head.new": {"lm_head.weight[90:]"},
        "norms": norms,
        "layers": of[0] | of[1] | of[2] | of[3],
        "layers.odd": of[1] | of[3],
        "layers.even": of[0] | of[2],
        "layers.lower": of[0] | of[1],
        "layers.upper": of[2] | of[3],
        "layers[1:3]": of[1] | of[2],
        "layers[-1]": of[3],
        "layers[2:]": of[2] | of[3],
        "all": embed | head | of[0] | of[1] | of[2] | of[3] | {"model.norm.weight"},
    }[selector]


SELECTORS = [*(s for s in KNOWN if s not in ("lora", "layers[8:16]")), "layers[1:3]", "layers[-1]", "layers[2:]"]


@pytest.mark.parametrize("selector", SELECTORS)
def test_a_selector_means_exactly_these_parameters(selector):
    selected = select_parameters(tiny_model(), [selector], first_new_row=90)
    assert set(selected) == named(selector)


def test_adapters_belong_to_lora_alone():
    model = tiny_model()
    names = set(add_lora(model, r=2, alpha=2.0))
    assert set(select_parameters(model, ["lora"])) == names
    assert not names & set(select_parameters(model, ["all"]))


def test_layer_numbers_are_whole_path_components():
    """A prefix match would put layers 10 to 19 with layer 1."""
    assert layer_index("model.layers.12.mlp.up_proj.weight") == 12
    assert layer_index("model.norm.weight") is None
    assert selected_layers("layers.odd", 40) == list(range(1, 40, 2))
    assert selected_layers("layers.lower", 7) == [0, 1, 2]
    assert selected_layers("layers.upper", 7) == [3, 4, 5, 6]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.none() | st.integers(-15, 15), st.none() | st.integers(-15, 15))
def test_slices_of_layers_are_those_of_python(count, start, stop):
    text = f"layers[{'' if start is None else start}:{'' if stop is None else stop}]"
    assert selected_layers(text, count) == list(range(count))[start:stop]


@pytest.mark.parametrize(
    ("train", "sentence"),
    [
        (("layer",), "cannot train 'layer'; known: embed, embed.new"),
        (("layers[1:2:3]",), "cannot train 'layers"),
        (("embed", "embed.new"), "'embed.new' is part of what else this stage trains"),
        (("all", "head.new"), "'head.new' is part of what else this stage trains"),
        (("lora", "layers[0]"), "'lora' cannot be trained together with the layers it adapts"),
        (("lora", "all"), "'lora' cannot be trained together with the layers it adapts"),
        (("layers[4:]",), "'layers\\[4:\\]' selects no parameter of this model of 4 layers"),
        (("embed.new",), "need a Llama, and first_new_row"),
    ],
)
def test_selectors_that_cannot_be_meant_are_refused(train, sentence):
    with pytest.raises(RecipeError, match=sentence):
        select_parameters(tiny_model(), train)


def test_new_rows_of_a_tied_matrix_are_trained_once():
    model = Llama(dataclasses.replace(TINY, tie_word_embeddings=True))
    both = select_parameters(model, ["embed.new", "head.new"], first_new_row=90)
    assert list(both) == ["model.embed_tokens.weight[90:]"]
    assert set(select_parameters(model, ["head"])) == {"model.embed_tokens.weight"}
    with pytest.raises(RecipeError, match="one matrix"):
        select_parameters(model, ["embed", "head.new"], first_new_row=90)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.7, 0.4, 0.1]),
        ("cosine", [0.5, 1.0, 1.0, 0.775, 0.325, 0.1]),
        ("wsd", [0.5, 1.0, 1.0, 1.0, 0.1 + 0.9 * (1 - 0.5**0.5), 0.1]),
    ],
)
def test_learning_rate_warms_up_and_follows_its_schedule(schedule, expected):
    factors = [learning_rate_factor(schedule, step, 6, warmup=0.3, min_lr_ratio=0.1, decay=0.3) for step in range(6)]
    assert factors == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_no_step_is_without_a_learning_rate(schedule):
    for steps in range(1, 20):
        options = {"warmup": 0.05, "min_lr_ratio": 0.1, "decay": 0.2}
        factors = [learning_rate_factor(schedule, step, steps, **options) for step in range(steps)]
        assert all(0.1 <= factor <= 1.0 for factor in factors)
        assert max(factors) == 1.0


def test_cyclic_blocks_visit_every_layer_and_random_ones_depend_on_seed_and_period_alone():
    cyclic = BlockSchedule(layers=3, steps=2, order="cyclic")
    blocks = [cyclic.active(list(range(8)), step, 0) for step in range(8)]
    assert blocks == [[0, 1, 2]] * 2 + [[3, 4, 5]] * 2 + [[6, 7]] * 2 + [[0, 1, 2]] * 2
    drawn = BlockSchedule(layers=2, steps=5)
    odd = [1, 3, 5, 7]
    choices = [tuple(drawn.active(odd, step, 7)) for step in range(0, 200, 5)]
    assert all(len(choice) == 2 and set(choice) <= set(odd) for choice in choices)
    assert len(set(choices)) == 6  # all pairs occur
    assert all(drawn.active(odd, step, 7) == list(choices[step // 5]) for step in range(200))
    assert [tuple(drawn.active(odd, step, 8)) for step in range(0, 200, 5)] != choices


def test_blocks_leave_what_is_no_layer_alone():
    stage = Stage(
        name="s", train=("embed", "layers"), tokens=1, lr=1.0, blocks=BlockSchedule(layers=1, steps=1, order="cyclic")
    )
    names = list(select_parameters(tiny_model(), stage.train))
    active = stage.active(names, 2, 0)
    assert set(active) == named("embed") | {name for name in named("layers") if ".2." in name}


def test_plans_spend_their_tokens():
    for plan in PLANS:
        stages = plan_stages(plan, 1_000_000)
        assert abs(sum(stage.tokens for stage in stages) - 1_000_000) <= len(stages)
        assert len({stage.name for stage in stages}) == len(stages)
    assert [stage.train for stage in plan_stages("redwhale", 4)] == [
        ("embed", "head"),
        ("layers.odd",),
        ("layers.even",),
        ("lora",),
    ]
    assert len(plan_stages("eeve", 7)) == 7
    doubled = plan_stages("full", 10, lr_scale=2.0)[0]
    plain = plan_stages("full", 10)[0]
    assert (doubled.lr, doubled.embed_lr, doubled.head_lr) == (2 * plain.lr, 2 * plain.embed_lr, 2 * plain.head_lr)


def test_an_unknown_plan_is_named_with_those_that_exist():
    with pytest.raises(RecipeError, match="there is no plan 'fastest'; known: redwhale, eeve, full"):
        plan_stages("fastest", 10)


def test_new_rows_share_the_matrix_memory():
    model = tiny_model()
    rows = select_parameters(model, ["embed.new"], first_new_row=90)["model.embed_tokens.weight[90:]"]
    with torch.no_grad():
        rows.fill_(3.0)
    assert bool((model.model.embed_tokens.weight[90:] == 3.0).all())
