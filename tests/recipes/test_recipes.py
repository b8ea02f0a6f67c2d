"""Every recipe in the repository loads, and RedWhale's says what the paper and the documentation say."""

from pathlib import Path

import pytest
from tiny import tiny_model

from redwhale.engine import load_recipe, run_recipe, select_parameters
from redwhale.engine.errors import USER_ERRORS

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
SFT = Path(__file__).parents[2] / "recipes" / "sft-redwhale.toml"
SOLAR = Path(__file__).parents[2] / "recipes" / "solar-10.7b.toml"


def test_there_are_recipes():
    assert {path.name for path in RECIPES} >= {"quickstart.toml", "sft-redwhale.toml", "solar-10.7b.toml"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_under_its_own_name(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem  # or two recipes could share a run folder
    adaptation = [recipe.filter, recipe.tokenizer, recipe.init, recipe.pack, recipe.train]
    assert adaptation.count(None) == (len(adaptation) if path == SFT else 0)


def test_solar_spends_the_papers_tokens_on_twenty_thousand_pieces():
    recipe = load_recipe(SOLAR)
    assert sum(stage.tokens for stage in recipe.train.stages) == 9_700_000_000
    assert recipe.tokenizer.max_added == 20_000
    assert recipe.train.sequence_length == 4096
    lora = recipe.train.stages[-1]
    assert (lora.train, lora.lora.r) == (("lora",), 128)


@pytest.mark.parametrize("path", [SFT, SOLAR], ids=lambda path: path.stem)
def test_fine_tuning_has_the_papers_settings(path):
    sft = load_recipe(path).sft
    assert (sft.train, sft.epochs, sft.template) == (("lora",), 1, "redwhale")
    assert (sft.lora.r, sft.lora.alpha, sft.lr, sft.batch_size, sft.sequence_length) == (64, 16.0, 2e-4, 128, 1024)


def test_solars_full_stages_move_every_weight_but_the_final_norm_exactly_once():
    model = tiny_model()
    moved = [name for stage in load_recipe(SOLAR).train.stages[:3] for name in select_parameters(model, stage.train)]
    everything = [name for name, _ in model.named_parameters()]
    assert sorted([*moved, "model.norm.weight"]) == sorted(everything)


def test_placeholder_paths_end_in_one_sentence_that_names_the_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(SOLAR, ["device=cpu"])
    with pytest.raises(USER_ERRORS, match="data/korean"):
        run_recipe(recipe, say=lambda line: pytest.fail(f"{line!r} was done without any input"))
