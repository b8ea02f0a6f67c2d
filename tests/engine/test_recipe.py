import pytest
from tiny import write_recipe

from redwhale.engine import load_recipe
from redwhale.engine.errors import RecipeError
from redwhale.engine.recipe import apply_override


@pytest.fixture
def path(tmp_path):
    return write_recipe(tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stages[0].lr=oops", r"train\.stages\[0\]\.lr: Expected float, got str \('oops'\)"),
        ("trane.lr=1", "Object contains unknown field trane"),
        ("train.stages[1].tokns=5", r"train\.stages\[1\]: Object contains unknown field tokns"),
        ("train.stages[7].lr=1", r"train\.stages has 4 entries, there is no \[7\]"),
        ("train.stages[0].train=[]", r"train\.stages\[0\]\.train"),
        ('train.stages[0].train=["wings"]', "cannot train 'wings'; known: embed, embed.new, head"),
        ("train.stages[1].name=embed-head", "two stages share a name"),
        ("train.stages[0].warmup=2", r"warmup: Expected float <= 1\.0 \(2\)"),
        ("filter.thresholds.nonsense.minimum=1", "unknown rule 'nonsense'"),
        ("name=../elsewhere", "name"),
        ("seed.x=1", "seed is not a section"),
        ("nothing", "write it as section.key=value"),
        ("a b=1", "write it as section.key=value"),
        ("base.checkpoint=somewhere", "either a checkpoint or a"),
        ("export.precision=fp8", r"export\.precision: Invalid enum value 'fp8'"),
        ("train.stages[3].lora.dropout=1", r"train\.stages\[3\]\.lora\.dropout: Expected float < 1\.0 \(1\)"),
        ("train.stages[3].lora.targets=(", r"train\.stages\[3\]\.lora: targets '\(' is not a regular expression"),
        ('sft.lora.targets=["model.layers.0.mlp.up"]', "cannot adapt 'model.layers.0.mlp.up'; known: q_proj, k_proj"),
    ],
)
def test_a_bad_override_is_one_sentence_that_names_the_key(path, override, message):
    if override.startswith("seed.x"):
        path.write_text("seed = 3\n" + path.read_text())
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(path, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("a.b=3", {"a": {"b": 3}}),
        ("a.b=1e-4", {"a": {"b": 1e-4}}),
        ("a=true", {"a": True}),
        ('a=["x", "y"]', {"a": ["x", "y"]}),
        ("a=plain text", {"a": "plain text"}),
        ("a=runs/x=y", {"a": "runs/x=y"}),
        ('a="3"', {"a": "3"}),
    ],
)
def test_an_override_is_toml_or_else_text(override, expected):
    raw = {}
    apply_override(raw, override)
    assert raw == expected


def test_overrides_replace_what_the_file_says(path):
    recipe = load_recipe(path, ["train.stages[3].lora.r=2", "seed=9", "name=other"])
    assert recipe.train is not None
    assert recipe.train.stages[3].lora.r == 2
    assert recipe.train.stages[3].lora.alpha == 8.0
    assert (recipe.seed, recipe.name) == (9, "other")


@pytest.mark.parametrize("targets", [r".*\.[0-3]\.mlp\..*", "all-linear", ("q_proj", "model.layers.0.mlp.up_proj")])
def test_lora_targets_are_names_or_one_pattern(path, targets):
    toml = f"'{targets}'" if isinstance(targets, str) else str(list(targets))
    recipe = load_recipe(path, [f"sft.lora.targets={toml}"])
    assert recipe.sft is not None
    assert recipe.sft.lora.targets == targets


def test_the_name_is_the_files_unless_given(path):
    text = path.read_text().replace('name = "tiny"\n', "")
    path.write_text(text)
    assert load_recipe(path).name == "tiny"
    renamed = path.rename(path.with_name("solar.toml"))
    assert load_recipe(renamed).name == "solar"


def test_a_file_that_is_not_toml_is_refused(tmp_path):
    (tmp_path / "x.toml").write_text("name = [")
    with pytest.raises(RecipeError, match="is not valid TOML"):
        load_recipe(tmp_path / "x.toml")
    with pytest.raises(RecipeError, match="there is no recipe"):
        load_recipe(tmp_path / "missing.toml")
