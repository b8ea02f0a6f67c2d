"""The scripts under bench/ start, their results say where they come from, and the log quotes what the results say."""

import importlib.util
import json
import re
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).parents[2]
BENCH = PROJECT / "bench"
SCRIPTS = sorted(path for path in BENCH.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))
SCRIPTS.append(BENCH / "reproduction" / "run.py")
RESULTS = sorted((BENCH / "results").rglob("*.json"))
LOG = PROJECT / "docs" / "log.md"


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def common():
    spec = importlib.util.spec_from_file_location("bench_common", BENCH / "common.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_explains_itself(script):
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--result" in done.stdout


NEEDS_A_GPU = {"bench/full_size.py"}
"""Scripts whose result waits for a machine that has one."""


def test_every_script_has_its_result():
    scripts = {script.relative_to(PROJECT).as_posix() for script in SCRIPTS}
    assert {read(path)["script"] for path in RESULTS} | NEEDS_A_GPU == scripts


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_result_says_what_ran_where_and_when(path):
    result = read(path)
    assert {"cpu", "cores", "memory_gib"} <= set(result["machine"])
    assert {"python", "torch", "sentencepiece"} <= set(result["versions"])
    assert (PROJECT / result["script"]).is_file()
    assert result["command"].startswith(f"python {result['script']}")
    assert date.fromisoformat(result["date"])


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_no_result_holds_an_absolute_path(path):
    strings = re.findall(r'"((?:[^"\\]|\\.)*)"', path.read_text(encoding="utf-8"))
    assert not [text for text in strings if re.search(r"(^|[\s='])/\w", text)]


def test_a_shown_command_names_neither_the_machines_folders_nor_loses_the_projects(common, tmp_path, monkeypatch):
    monkeypatch.chdir(PROJECT)
    raw, heldout = tmp_path / "corpus" / "raw" / "a.jsonl", tmp_path / "corpus" / "heldout" / "a.jsonl"
    for file in (raw, heldout):
        file.parent.mkdir(parents=True)
        file.touch()
    arguments = [str(raw), "--heldout", f"x={heldout}", "recipes/quickstart.toml", "--size", "7"]
    shown = common.shown_command("bench/x.py", [raw, heldout, Path("recipes/quickstart.toml")], arguments)
    expected = "DATA/raw/a.jsonl --heldout x=DATA/heldout/a.jsonl recipes/quickstart.toml --size 7"
    assert shown == f"python bench/x.py {expected}"
    assert common.shown_command("bench/x.py", [raw], [str(raw)]) == "python bench/x.py DATA/a.jsonl"
    assert common.shown_command("bench/x.py", [raw.parent], [str(raw.parent)]) == "python bench/x.py DATA"


# The log's tables, row by row.


def initialisation_rows() -> list[str]:
    def row(label: str, bits: dict[str, dict[str, float]]) -> str:
        cells = [f"{bits[f'{method}/{method}']['korean']:.2f}" for method in ("decomposition", "mean", "random")]
        return f"| {label} | {' | '.join(cells)} |"

    runs = read(BENCH / "results" / "base_korean.json")["runs"]
    rows = [row(f"{run['base']}, {run['pretraining_tokens']:,} tokens", run["bits_per_byte"]) for run in runs]
    quickstart = read(BENCH / "results" / "quickstart.json")
    return [*rows, row("the quickstart's", quickstart["init"]["methods"])]


def cross_entropy_rows() -> list[str]:
    found = read(BENCH / "results" / "linear_cross_entropy-cpu.json")["implementations"]
    rows = {(one["implementation"], one["chunk_tokens"]): one for one in found}

    def cells(one: dict[str, Any]) -> str:
        return f"{one['median_seconds']:.2f} | {one['peak_allocated_mb']:.0f}"

    plain = f"| all 2,048, plain PyTorch | | | {cells(rows.pop(('plain', None)))} |"
    chunks = sorted({chunk for _, chunk in rows})
    return [
        *(f"| {chunk:,} | {cells(rows['kernel', chunk])} | {cells(rows['fresh_blocks', chunk])} |" for chunk in chunks),
        plain,
    ]


def token_ratio_rows() -> list[str]:
    hybrids = {
        (hybrid["base"], hybrid["character_coverage"]): hybrid
        for hybrid in read(BENCH / "results" / "token_ratio.json")["hybrids"]
    }
    mistral, llama2 = (hybrids[base, 0.9999]["domains"] for base in ("mistral", "llama2"))
    rows = [f"| {name} | {mistral[name]['ratio']:.3f} | {llama2[name]['ratio']:.3f} |" for name in mistral]
    narrow, wide = (hybrids["mistral", coverage]["domains"] for coverage in (0.9995, 0.9999))
    for name in mistral:
        ratios = " | ".join(f"{domains[name]['ratio']:.4f}" for domains in (narrow, wide))
        byte_tokens = " | ".join(f"{domains[name]['hybrid_byte_tokens']:,}" for domains in (narrow, wide))
        rows.append(f"| {name} | {ratios} | {byte_tokens} |")
    return rows


def filter_rows() -> list[str]:
    result = read(BENCH / "results" / "filter_speed.json")
    speeds = [
        f"| {speed['workers']} | {speed['mb_per_cpu_second']:.2f} | {speed['peak_memory_of_parent_mb']:.0f} |"
        for speed in result["speeds"]
    ]
    sources = [
        f"| {name} | {source['documents_in']:,} | {source['kept']:.1%} |" for name, source in result["sources"].items()
    ]
    return [*speeds, *sources]


def lora_rows() -> list[str]:
    layers = read(BENCH / "results" / "lora_variants-cpu.json")["layers"]
    labels = {"augmented": "augmented-K", "library": "library (what runs)", "unfused": "plain autograd", "peft": "peft"}

    def cells(name: str) -> str:
        found = (next(way for way in layer["ways"] if way["name"] == name) for layer in layers)
        return " | ".join(f"{way['times_base']:.2f}" for way in found)

    return [f"| {label} | {cells(name)} |" for name, label in labels.items()]


def adamw_rows() -> list[str]:
    result = read(BENCH / "results" / "adamw_8bit-cpu.json")
    errors = result["steps"]["mean_and_mean_of_the_last_fifth"]
    rows = []
    for code in errors["beta2 0.95"]:
        found = (errors[beta][code][how][0] for beta in errors for how in ("nearest", "independent", "dither"))
        rows.append(f"| {code} | {' | '.join(f'{error:.1%}' for error in found)} |")
    for name, losses in result["losses"]["optimizers"].items():
        rows.append(f"| {name} | {losses['mean']:.3f} | {', '.join(f'{loss:.3f}' for loss in losses['seeds'])} |")
    return rows


def fp8_rows() -> list[str]:
    rows = []
    for text, result in read(BENCH / "results" / "fp8_base.json")["texts"].items():
        for stage, found in result["stages"].items():
            cells = [f"{found[how][-1]:.3f}" for how in ("stored", "fp8")]
            behind = found["largest_difference_behind_the_first_window"]
            cells += [f"{value:+.2%}" for value in (found["difference"][0], found["mean_difference"])]
            cells += [f"{behind:.2%}", *(f"{found['heldout'][how]:.3f}" for how in ("stored", "fp8"))]
            rows.append(f"| {text}, {stage} | {' | '.join(cells)} |")
    return rows


def fp8_plan_rows() -> list[str]:
    rows = []
    for number, stage in enumerate(read(BENCH / "results" / "memory_plan.json")["plans"]["h100-80gb"]):
        ways = [stage["fastest"], stage["fastest_fp8"]]
        cells = [f"{way['peak']['weights'] / 1e9:.1f}" for way in ways]
        cells += [f"{way['bytes'] / 1e9:.1f}" for way in ways]
        speeds = [way["tokens_per_second"] for way in ways]
        cells += [*(f"{speed:,.0f}" for speed in speeds), f"{speeds[1] / speeds[0]:.2f}"]
        rows.append(f"| {number + 1}. {ways[0]['stage']} | {' | '.join(cells)} |")
    return rows


@pytest.mark.parametrize(
    "rows",
    [
        *(initialisation_rows, cross_entropy_rows, token_ratio_rows, filter_rows, lora_rows, adamw_rows),
        *(fp8_rows, fp8_plan_rows),
    ],
)
def test_the_logs_tables_are_what_the_results_say(rows):
    log = LOG.read_text(encoding="utf-8").splitlines()
    assert [row for row in rows() if row not in log] == []
