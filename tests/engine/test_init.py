"""`redwhale init` compares methods on held-out text, keeps old rows, and says where every row came from."""

import json
import math
import re
import shutil

import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file

from redwhale.engine import load_recipe, run_recipe
from redwhale.engine.errors import RecipeError
from redwhale.engine.evaluation import evaluate_text
from redwhale.engine.init_choice import Choice
from redwhale.engine.init_evaluation import evaluate_vocabulary
from redwhale.engine.report import write_report
from redwhale.model import load_model
from redwhale.tokenizer import Tokenizer

TENSORS = {"model.embed_tokens.weight": "embedding", "lm_head.weight": "head"}


@pytest.fixture(scope="module")
def initialised(finished, tmp_path_factory):
    """The tiny run's init step with a prior, and every method that fits beside it."""
    root = tmp_path_factory.mktemp("init")
    runs = root / "runs" / "tiny"
    runs.mkdir(parents=True)
    for step in ("base", "filter", "tokenizer"):
        (runs / step).symlink_to(finished.run_dir / step)
    text = finished.run_dir.parents[1] / "data" / "english.jsonl"
    overrides = [
        f"runs={json.dumps(str(root / 'runs'))}",
        'init.embedding="exponential"',
        'init.head="mean+prior"',
        f"init.base_text={json.dumps([str(text)])}",
        'init.compare=["decomposition","focus","omp","distillation","decomposition+prior"]',
        "init.fit_steps=5",
        "init.fit_documents=20",
        "init.heldout_documents=3",
    ]
    recipe = load_recipe(finished.run_dir.parents[1] / "tiny.toml", overrides)
    run_recipe(recipe, only="init", say=lambda line: None)
    return runs / "init"


def test_all_choices_are_measured_and_the_chosen_one_is_written(initialised):
    summary = json.loads((initialised / "manifest.json").read_text())["summary"]
    assert summary["chosen"] == "exponential/mean+prior"
    assert list(summary["methods"]) == [
        *("exponential/mean+prior", "decomposition/decomposition", "focus/focus", "omp/omp"),
        *("distillation/decomposition", "decomposition/decomposition+prior"),
    ]
    assert all(math.isfinite(m["korean"]["bits_per_byte"]) for m in summary["methods"].values())
    assert not (initialised / "compared").exists()
    korean = {name: measured["korean"]["loss"] for name, measured in summary["methods"].items()}
    assert len(set(korean.values())) == len(korean)


def test_old_rows_are_kept_bit_by_bit_under_a_prior(initialised):
    base = load_file(initialised.parent / "base" / "model" / "model.safetensors")
    extended = load_file(initialised / "model" / "model.safetensors")
    for name, tensor in base.items():
        assert torch.equal(extended[name][: len(tensor)], tensor), name


def test_provenance_rebuilds_every_row(initialised):
    base = load_file(initialised.parent / "base" / "model" / "model.safetensors")
    extended = load_file(initialised / "model" / "model.safetensors")
    tokenizer = Tokenizer(initialised.parent / "tokenizer" / "tokenizer.model")
    lines = parquet.read_table(initialised / "provenance.parquet").to_pylist()
    first = len(base["lm_head.weight"])
    assert len(lines) == 2 * (tokenizer.vocab_size - first)
    exact = 0
    for line in lines:
        assert line["piece"] == tokenizer.id_to_piece(line["id"])
        row = extended[line["tensor"]][line["id"]]
        assert line["norm"] == pytest.approx(float(row.norm()), rel=1e-5)
        if TENSORS[line["tensor"]] == "head":
            assert (line["method"], line["base_ids"]) == ("mean+prior", [])
            continue
        weights = [math.exp(2 * k) for k in range(len(line["base_ids"]))]
        assert line["weights"] == pytest.approx([w / sum(weights) for w in weights], rel=1e-4, abs=1e-9)
        rebuilt = sum(w * base[line["tensor"]][i] for w, i in zip(line["weights"], line["base_ids"], strict=True))
        exact += bool((row - rebuilt).abs().max() < 1e-5)
    assert exact > 0.9 * len(lines) / 2  # the rest coincided with another row, and carry noise


def test_the_evaluation_counts_what_plain_logits_say(initialised):
    model = load_model(initialised / "model")
    tokenizer = Tokenizer(initialised / "model" / "tokenizer.model")
    texts, first = ["대한민국의 국회는 법률을 만든다.", "a plain text"], tokenizer.vocab_size - 40
    found = evaluate_vocabulary(model, tokenizer, texts, first)
    plain = evaluate_text(model, tokenizer, texts)
    assert found.loss == pytest.approx(plain.loss, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(plain.bits_per_byte, rel=1e-5)
    assert (found.accuracy, found.tokens) == (plain.accuracy, plain.tokens)
    from redwhale.model import PackedDocuments

    ranks, masses, new = [], [], 0
    for text in texts:
        ids = torch.tensor([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id])
        logits = model(ids, PackedDocuments.from_lengths([len(ids)]))
        for line, target in zip(logits, ids[1:].tolist(), strict=False):
            order = line.argsort(descending=True).tolist()
            ranks.append(order.index(target) + 1)
            masses.append(float(line.softmax(-1)[first:].sum()))
            new += target >= first
    assert found.mean_reciprocal_rank == pytest.approx(sum(1 / r for r in ranks) / len(ranks), rel=1e-5)
    assert found.median_rank == sorted(ranks)[(len(ranks) - 1) // 2]
    assert found.new_mass == pytest.approx(sum(masses) / len(masses), rel=1e-4)
    assert found.new_tokens == new


def test_the_report_shows_every_choice_of_this_and_of_earlier_versions(initialised, tmp_path):
    run = tmp_path / "tiny"
    shutil.copytree(initialised.parent, run)
    page = write_report(run).read_text()
    manifest = json.loads((run / "init" / "manifest.json").read_text())
    summary = manifest["summary"]
    section = page[page.index("New vocabulary before any training") :]
    for name, measured in summary["methods"].items():
        cells = re.findall(rf"<tr><td>{re.escape(name)}</td><td>korean</td>(.*?)</tr>", section)
        assert f"{measured['korean']['bits_per_byte']:.3f}" in cells[0]
        assert f"{measured['korean']['mean_reciprocal_rank']:.4f}" in cells[0]
        assert f">{name}<" in section[section.index("<svg") : section.index("</svg>")]
    # What the init step of earlier versions left.
    for key in ("byte_only", "tied", "rows"):
        del summary[key]
    for domains in [summary["base"], *summary["methods"].values()]:
        for name, measured in domains.items():
            domains[name] = {key: measured[key] for key in ("loss", "accuracy", "bits_per_byte", "tokens")}
    (run / "init" / "manifest.json").write_text(json.dumps(manifest))
    page = write_report(run).read_text()
    assert f"{summary['methods']['omp/omp']['korean']['bits_per_byte']:.3f}" in page


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("mean", Choice("mean", "mean")),
        ("decomposition/first+prior", Choice("decomposition", "first", True)),
        ("distillation", Choice("distillation", "decomposition")),
    ],
)
def test_choices_are_written_as_embedding_and_head(text, choice):
    assert Choice.parse(text) == choice == Choice.parse(str(choice))


@pytest.mark.parametrize("text", ["zeros", "mean/zeros", "mean/mean/mean", "mean/distillation", "+prior", ""])
def test_choices_that_do_not_exist_are_refused(text, tiny_root):
    with pytest.raises(RecipeError, match="initialisation|input rows"):
        load_recipe(tiny_root / "tiny.toml", [f"init.compare={json.dumps([text])}"])
