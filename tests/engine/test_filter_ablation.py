import json
import math
import random
import statistics

import pytest
from filtering_corpus import ENGLISH, korean

from redwhale.engine.cli import main
from redwhale.engine.filter_ablation import AblationConfig, groups_of, run_ablation, variants_of
from redwhale.engine.recipe import BaseConfig, Recipe
from redwhale.filtering import DuplicateConfig, FilterConfig, PerplexityConfig
from redwhale.filtering.diversity import Topics, distinct_ngrams

TINY = AblationConfig(
    megabytes=0.2,
    tokens=12_000,
    seeds=2,
    hidden_size=32,
    num_hidden_layers=1,
    sequence_length=128,
    groups=("language",),
)


def recipe(tmp_path) -> Recipe:
    rng = random.Random(0)
    good = [korean(rng) for _ in range(150)]
    bad = ["".join(chr(rng.randrange(0x400, 0x450)) for _ in range(600)) for _ in range(150)]
    raw = [json.dumps({"id": str(n), "text": text}) for n, text in enumerate(good + bad)]
    (tmp_path / "raw.jsonl").write_text("\n".join(raw))
    (tmp_path / "heldout.jsonl").write_text("\n".join(json.dumps({"text": korean(rng)}) for _ in range(12)))
    return Recipe(
        name="tiny",
        runs=str(tmp_path / "runs"),
        base=BaseConfig(checkpoint="unused"),
        heldout={"korean": (str(tmp_path / "heldout.jsonl"),)},
        filter=FilterConfig(inputs=[str(tmp_path / "raw.jsonl")]),
    )


def test_variants_switch_the_rules_of_one_group():
    config = FilterConfig(inputs=["x"], duplicates=DuplicateConfig(jaccard=0.7))
    groups = groups_of(config)
    assert "hate" not in groups
    assert groups[-2:] == ["near_duplicates", "frequent_lines"]
    variants = variants_of(config, ())
    assert len(variants) == 2 + 2 * len(groups)

    def on(name: str) -> set[str]:
        return set(groups_of(variants[name]))

    assert on("everything") == set(groups)
    assert on("nothing") == set()
    for group in groups:
        assert on(f"without {group}") == set(groups) - {group}
        assert on(f"only {group}") == {group}
    assert variants["only near_duplicates"].duplicates.jaccard == 0.7
    cut = FilterConfig(inputs=["x"], perplexity=PerplexityConfig(train=("y",)))
    more = variants_of(cut, ("spam",))
    assert [more[f"everything and {name}"].perplexity.method for name in ("ngram", "prior")] == ["ngram", "prior"]
    with pytest.raises(ValueError, match="there is no group 'grammer' in the filter: it has boilerplate, eojeol"):
        variants_of(config, ("grammer",))


@pytest.mark.slow
def test_an_ablation_finds_the_group_that_pays_and_goes_on_where_it_stopped(tmp_path):
    some = recipe(tmp_path)
    said: list[str] = []

    def stop(line: str) -> None:
        said.append(line)
        if line.startswith("nothing"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_ablation(some, TINY, say=stop)
    results = {one.name: one for one in run_ablation(some, TINY, say=said.append)}
    assert list(results) == ["everything", "nothing", "without language", "only language"]
    assert sum(line.startswith("sampling") for line in said) == 1
    everything, without = results["everything"], results["nothing"]
    assert everything.documents <= 150 < results["nothing"].documents
    # Half of what the model without the rules learns from is Cyrillic noise, which the language rules alone find.
    assert without.difference > 0.02
    assert abs(results["only language"].difference) < without.difference / 2
    differences = [a - b for a, b in zip(without.bits_per_byte, everything.bits_per_byte, strict=True)]
    assert without.difference == pytest.approx(statistics.mean(differences))
    assert without.interval == pytest.approx(12.706 * statistics.stdev(differences) / math.sqrt(2))
    assert without.mean == pytest.approx(statistics.mean(without.by_domain["korean"]))
    written = json.loads((tmp_path / "runs" / "tiny" / "filter-ablation" / "ablation.json").read_text())
    assert [one["name"] for one in written["variants"]] == list(results)


def test_a_recipe_without_heldout_text_is_refused(tmp_path, capsys):
    (tmp_path / "a.toml").write_text('[base]\ncheckpoint = "x"\n[filter]\ninputs = ["x"]\n')
    assert main(["filter-ablation", str(tmp_path / "a.toml")]) == 2
    assert "needs a [filter] section and [heldout] text" in capsys.readouterr().err


def test_distinct_ngrams_count_sets_and_repeats():
    text = korean(random.Random(1))
    grams = {"".join(text.split())[start : start + 8] for start in range(len("".join(text.split())) - 7)}
    windows = len("".join(text.split())) - 7
    assert distinct_ngrams([text]) == pytest.approx(len(grams) / windows)
    assert distinct_ngrams([text] * 10) == pytest.approx(len(grams) / windows / 10)
    assert distinct_ngrams([text, "다른 글"], characters=len(text)) == distinct_ngrams([text])


def test_topics_are_covered_by_the_whole_and_not_by_a_part():
    rng = random.Random(2)
    words = [[f"{chr(0xAC00 + 97 * topic + n)}{chr(0xB000 + n)}는" for n in range(30)] for topic in range(8)]
    texts = [" ".join(rng.choice(words[n % 8]) for _ in range(60)) for n in range(400)] + [ENGLISH]
    topics = Topics(texts, topics=40)
    assert topics.coverage(texts) == pytest.approx(1)
    assert topics.coverage(texts[::2]) == pytest.approx(4 / 8, abs=0.15)
    assert topics.coverage(texts[:1]) < 0.3
    assert topics.coverage([]) == 0
