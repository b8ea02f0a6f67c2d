"""The documentation is true to the code: its Python runs, its tables match the structs, its links lead somewhere."""

import functools
import hashlib
import importlib
import re
import shlex
import subprocess
import tomllib
import typing
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
import yaml
from tiny import TINY, tiny_model

from redwhale.engine import (
    LoopConfig,
    PackedSequences,
    Stage,
    TokenShards,
    Trainer,
    select_parameters,
    write_shard,
)
from redwhale.engine.cli import _parser
from redwhale.engine.recipe import Recipe
from redwhale.filtering import RULES
from redwhale.model import Llama, ModelConfig, add_lora, load_model, save_model

PROJECT = Path(__file__).resolve().parents[1]
README = PROJECT / "README.md"
DOCS = PROJECT / "docs"
DOCUMENTS = [README, *sorted(DOCS.glob("*.md")), *sorted((PROJECT / "recipes").rglob("README.md"))]


def relative(path: Path) -> str:
    return str(path.relative_to(PROJECT))


def blocks(document: Path, language: str) -> list[tuple[int, str]]:
    """(lines before it, code) of every fenced block of a language."""
    text = document.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in found]


def execute(document: Path) -> dict[str, typing.Any]:
    """Run all Python of a document in one namespace; tracebacks show the document's own lines."""
    namespace: dict[str, typing.Any] = {"__name__": "documentation"}
    code = blocks(document, "python")
    assert code, f"{relative(document)} has no Python"
    for line, block in code:
        exec(compile("\n" * line + block, document, "exec"), namespace)
    return namespace


# The Python.


@pytest.fixture
def quickstart(tmp_path, monkeypatch) -> list[list[int]]:
    """A working folder with what `make demo` leaves, at the size of a test; gives the packed documents."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "quickstart"
    save_model(tiny_model(), run / "init" / "model")
    generator = np.random.default_rng(0)
    documents = [[1, *generator.integers(3, TINY.vocab_size, size).tolist(), 2] for size in (5, 700, 40, 900)]
    (run / "pack").mkdir()
    write_shard(
        run / "pack" / "train-00000",
        ((document, len(document)) for document in documents),
        vocab_size=TINY.vocab_size,
        tokenizer_sha256=hashlib.sha256(b"tokenizer").hexdigest(),
    )
    return documents


def test_readmes_program_trains_the_embedding_and_head_alone(quickstart):
    execute(README)
    before = dict(load_model(Path("runs/quickstart/init/model")).named_parameters())
    after = dict(load_model(Path("my-training/model")).named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"model.embed_tokens.weight", "lm_head.weight"}


def test_the_shard_formats_programs_agree_with_the_engine(quickstart):
    namespace = execute(DOCS / "token-shards.md")
    assert namespace["first_document"].tolist() == quickstart[0]


def test_the_embedding_guides_programs_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    execute(DOCS / "embedding.md")
    assert list(tmp_path.glob("tiny-training/metrics.jsonl"))


def test_the_model_guides_program_loads_a_padded_model(quickstart):
    model = execute(DOCS / "models.md")["model"]
    assert (model.config.vocab_size, model.lm_head.out_features) == (97, 128)


def test_the_python_of_the_kernels_runs_and_leaves_the_old_rows_alone():
    namespace = execute(DOCS / "kernels.md")
    assert [tuple(namespace[name].shape) for name in "qkvy"] == [(10, 32), (10, 16), (10, 16), (10, 32)]
    assert namespace["new_embed"].grad is None


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_no_python_is_left_out(document):
    executed = {README, *(DOCS / f"{name}.md" for name in ("token-shards", "embedding", "kernels", "models"))}
    assert document in executed or not blocks(document, "python")


# The recipe format.

SECTIONS = {
    "Top level": "Recipe",
    "[base]": "BaseConfig",
    "[base.pretrain]": "PretrainConfig",
    "[filter]": "FilterConfig",
    "[filter.duplicates]": "DuplicateConfig",
    "[filter.perplexity]": "PerplexityConfig",
    "[filter.thresholds.RULE]": "Threshold",
    "[tokenizer]": "TokenizerConfig",
    "[init]": "InitConfig",
    "[pack]": "PackConfig",
    "[train]": "TrainConfig",
    "[[train.stages]]": "Stage",
    "blocks": "BlockSchedule",
    "lora": "LoRAConfig",
    "[sft]": "SFTConfig",
    "[eval]": "EvalConfig",
    "[eval.qa.NAME]": "QAConfig",
    "[export]": "ExportConfig",
}
"""Headings of docs/recipes.md, and the struct that each one's table describes."""


def structs(kind: typing.Any) -> dict[str, type[msgspec.Struct]]:
    """All structs that a type is made of, by name."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        inner = [structs(field.type) for field in msgspec.structs.fields(kind)]
        return functools.reduce(lambda a, b: a | b, inner, {kind.__name__: kind})
    return functools.reduce(lambda a, b: a | structs(b), typing.get_args(kind), {})


@functools.cache
def tables(first_column: str) -> dict[str, dict[str, list[str]]]:
    """{heading: {first cell: other cells}} of the tables of docs/recipes.md with this first column."""
    found: dict[str, dict[str, list[str]]] = {}
    heading, inside = "", False
    for line in (DOCS / "recipes.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            heading = line.lstrip("#").strip()
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith(f"| {first_column} |"):
            inside = True
        elif not line.startswith("|"):
            inside = False
        elif inside and not line.startswith("| ---"):
            found.setdefault(heading, {})[cells[0].strip("`")] = cells[1:]
    return found


def test_every_section_of_a_recipe_is_documented():
    # SFTLoRAConfig has the keys of LoRAConfig with other defaults, which the text tells.
    assert set(structs(Recipe)) == {*SECTIONS.values(), "SFTLoRAConfig"}


@pytest.mark.parametrize("heading", SECTIONS)
def test_a_sections_table_has_its_keys_and_their_defaults(heading):
    kind = structs(Recipe)[SECTIONS[heading]]
    rows = tables("key")[heading]
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    if issubclass(kind, LoopConfig):
        rows = tables("key")["Loop keys"] | rows
    assert set(rows) == set(fields)
    for key, (_type, default, *_meaning) in rows.items():
        field = fields[key]
        if default == "*unset*":
            assert field.default is None, key
        elif default in ("*required*", "*file name*"):
            assert field.required, key
        else:
            value = tomllib.loads(f"value = {default.strip('`')}")["value"]
            actual = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
            assert msgspec.convert(value, field.type) == actual, key


def test_the_table_of_rules_has_their_thresholds():
    def number(cell: str) -> float | None:
        return float(cell) if cell else None

    rows = tables("rule")["[filter.thresholds.RULE]"]
    documented = [(name, text, number(low), number(high)) for name, (text, low, high) in rows.items()]
    assert documented == [(rule.name, rule.description, rule.minimum, rule.maximum) for rule in RULES.values()]


# What the text names.


def anchors(document: Path) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        assert path.exists(), f"{relative(document)} links to {target}"
        assert not anchor or anchor in anchors(path), f"{relative(document)} links to {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_names_of_the_package_exist(document):
    for name in set(re.findall(r"(?<![-\w])redwhale(?:\.[A-Za-z_]\w*)+", document.read_text(encoding="utf-8"))):
        parts = name.split(".")
        module, rest = importlib.import_module(".".join(parts[:2])), parts[2:]
        for depth, part in enumerate(rest, 3):
            module = getattr(module, part, None) or importlib.import_module(".".join(parts[:depth]))


@pytest.mark.parametrize(
    "document",
    [README, *(DOCS / f"{name}.md" for name in ("recipes", "hand-over", "evaluation", "scaling"))],
    ids=relative,
)
def test_command_lines_are_understood(document):
    lines = [line for _, block in blocks(document, "sh") for line in block.splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines if re.match(r"(\.venv/bin/)?redwhale ", line)]
    assert commands
    for command in commands:
        _parser().parse_args(command[1:])


def test_the_launch_files_of_the_scaling_guide_are_shell_and_yaml():
    scripts = [block for _, block in blocks(DOCS / "scaling.md", "sh")]
    assert sum("#SBATCH" in script for script in scripts) == 2
    for script in scripts:
        assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    kinds = {yaml.safe_load(block)["kind"] for _, block in blocks(DOCS / "scaling.md", "yaml")}
    assert kinds == {"JobSet", "RayJob"}


# The memory that README computes.


@pytest.mark.parametrize(("optimizer", "size"), [("adamw", 18), ("adamw_8bit", 10)])
def test_what_a_trained_bf16_parameter_takes(tmp_path, optimizer, size):
    """Weight, master, moments and the fp32 sum of its gradients, with several micro-batches."""
    model = tiny_model(torch.bfloat16)
    document = np.arange(TINY.vocab_size)
    write_shard(tmp_path / "t-0", [(document.tolist(), 1)] * 8, vocab_size=TINY.vocab_size, tokenizer_sha256="x")
    trainer = Trainer(
        model,
        Stage(name="all", train=("all",), tokens=1, lr=1e-3, optimizer=optimizer),
        PackedSequences(TokenShards.open(tmp_path, "t"), TINY.vocab_size),
        sequence_length=TINY.vocab_size,
        folder=tmp_path / "run",
        loop=LoopConfig(batch_size=2, micro_batch_size=1),
    )
    trainer.run()
    trained = sum(parameter.numel() for parameter in model.parameters())
    held = sum(trainer.train_step.optimizer.state_bytes().values()) + 2 * trained
    # Blocks of 256 entries share the exponents of their 8-bit moments: 2 bytes in 256, and a few for short tensors.
    assert size * trained <= held <= 1.01 * size * trained + 2 * 2 * len(list(model.parameters()))


def test_readmes_memory_table_follows_from_solars_shape():
    # Mistral-7B's layers, 48 of them (SOLAR, arXiv 2312.15166), and 32,000 + 20,000 pieces.
    shape = ModelConfig(
        vocab_size=52_000,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=4096,
    )
    with torch.device("meta"):
        model = Llama(shape)
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = {
        "embedding and LM head": ("embed", "head"),
        "odd layers, or even layers": ("layers.odd",),
    }
    counts = {
        label: sum(parameter.numel() for parameter in select_parameters(model, selectors).values())
        for label, selectors in trained.items()
    }
    projections = {name: module for name, module in model.named_modules() if name.endswith("_proj")}
    adapters = sum(128 * (module.in_features + module.out_features) for module in projections.values())
    text = README.read_text(encoding="utf-8")
    assert f"has {total / 1e9:.3f} billion parameters" in text
    adapted = "LoRA, r = 128"
    frozen = {label: total - count for label, count in counts.items()} | {adapted: total}
    for label, count in {**counts, adapted: adapters}.items():
        sizes = [(count * size + frozen[label] * 2) / 1e9 for size in (18, 10)]
        assert f"| {label} | {count / 1e9:.3f} billion | {sizes[0]:.1f} GB | {sizes[1]:.1f} GB |" in text


def test_the_adapters_formula_is_that_of_add_lora():
    model = tiny_model()
    projections = [module for name, module in model.named_modules() if name.endswith("_proj")]
    expected = sum(3 * (module.in_features + module.out_features) for module in projections)
    names = add_lora(model, r=3, alpha=3.0)
    parameters = dict(model.named_parameters())
    assert sum(parameters[name].numel() for name in names) == expected
