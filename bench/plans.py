"""Bits per byte through the stages of built-in plans, on a real pretrained checkpoint and real text.

Filters a corpus, makes a hybrid tokenizer, initialises and packs once, then trains each plan from the same checkpoint
on the same tokens, with a tenth of base-language text against forgetting. Held-out text is measured before, during and
after every stage. Writes the result and docs/plans.svg, the curves.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from common import PROJECT, parser, write_result

from redwhale.engine import PLANS, load_recipe, run_recipe
from redwhale.filtering import find_inputs, read_documents

RECIPE = """
name = "plans"
seed = 0

[base]
checkpoint = {checkpoint}

[heldout]
{heldout}

[filter]
inputs = {korean}
validation_fraction = 0.0

[tokenizer]
vocab_size = 12_000
max_added = 8_000

[init]
compare = []
heldout_documents = 20

[pack.extra]
english = {english}

[train]
plan = "redwhale"
tokens = {tokens}
lr_scale = {lr_scale}
mix = {{ corpus = 0.9, english = 0.1 }}
sequence_length = {sequence_length}
batch_size = {batch_size}
micro_batch_size = {micro_batch_size}
log_every = 5
checkpoint_every = 1000
"""


def first_bytes(paths: list[Path], most: int) -> list[dict[str, str]]:
    """Documents of the files, in order, up to `most` UTF-8 bytes in all."""
    kept, room = [], most
    for path in paths:
        for document in read_documents(path):
            text = document.text.encode()[:room].decode(errors="ignore")
            if text:
                kept.append({"text": text})
            room -= len(text.encode())
            if room <= 0:
                return kept
    return kept


def write_recipe(folder: Path, given: argparse.Namespace) -> Path:
    """The recipe and its held-out files, in `folder`."""
    heldout = {}
    for name, paths in {"korean": given.heldout_korean, "english": given.heldout_english}.items():
        rows = [row for path in paths for row in first_bytes([path], given.heldout_bytes // len(paths))]
        file = folder / f"heldout-{name}.jsonl"
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        heldout[name] = f"{name} = {json.dumps([str(file)])}"
    text = RECIPE.format(
        checkpoint=json.dumps(str(given.checkpoint)),
        heldout="\n".join(heldout.values()),
        korean=json.dumps([str(path) for path in given.korean]),
        english=json.dumps([str(path) for path in given.english]),
        **{name: getattr(given, name) for name in ("tokens", "lr_scale", "sequence_length")},
        **{name: getattr(given, name) for name in ("batch_size", "micro_batch_size")},
    )
    path = folder / "plans.toml"
    path.write_text(text, encoding="utf-8")
    return path


def stage_of(run: Path, manifest: dict[str, Any], offset: int) -> dict[str, Any]:
    """One stage's numbers: bits per byte by domain before, during and after it, and its speed."""
    lines = [json.loads(line) for line in (run / manifest["step"] / "metrics.jsonl").read_text().splitlines()]
    summary = manifest["summary"]
    return {
        "stage": manifest["step"].partition("/")[2],
        "trained_parameters": summary["trained_parameters"],
        "tokens": summary["tokens"],
        "corpora": summary["corpora"],
        "seconds": round(summary["seconds"], 1),
        "before": {name: result["bits_per_byte"] for name, result in summary["before"].items()},
        "after": {name: result["bits_per_byte"] for name, result in summary["after"].items()},
        "curve": [
            [offset + line["tokens"], *(result["bits_per_byte"] for result in line["validation"].values())]
            for line in lines
            if "validation" in line
        ],
    }


def draw(results: dict[str, list[dict[str, Any]]], target: Path) -> None:
    """The curves of all plans, one colour each; a dot where a stage ends."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4))
    for column, (axes, domain) in enumerate(zip(panels, ("Korean", "English"), strict=True), 1):
        for number, (plan, stages) in enumerate(results.items()):
            points = [point for stage in stages for point in stage["curve"]]
            ends = [stage["curve"][-1] for stage in stages]
            axes.plot([p[0] / 1e6 for p in points], [p[column] for p in points], color=f"C{number}", label=plan)
            axes.plot([p[0] / 1e6 for p in ends], [p[column] for p in ends], "o", color=f"C{number}", markersize=4)
        axes.set(title=f"{domain}, held out", xlabel="million tokens", ylabel="bits per byte")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    with matplotlib.rc_context({"svg.hashsalt": "redwhale"}):
        figure.savefig(target, bbox_inches="tight", metadata={"Date": None})


def main() -> None:
    """Measure and write the result and the figure."""
    arguments = parser(__doc__, "plans")
    arguments.add_argument("--checkpoint", type=Path, required=True, help="Hugging Face folder with tokenizer.model")
    arguments.add_argument("--korean", type=Path, nargs="+", required=True, help="raw corpus")
    arguments.add_argument("--english", type=Path, nargs="+", required=True, help="base-language text to replay")
    arguments.add_argument("--heldout-korean", type=Path, nargs="+", required=True)
    arguments.add_argument("--heldout-english", type=Path, nargs="+", required=True)
    arguments.add_argument("--heldout-bytes", type=int, default=100_000, help="of each language")
    arguments.add_argument("--plans", nargs="+", choices=PLANS, default=["redwhale"])
    arguments.add_argument("--tokens", type=int, default=2_000_000, help="of each plan (default: %(default)s)")
    arguments.add_argument("--lr-scale", type=float, default=20.0, help="for a small model (default: %(default)s)")
    arguments.add_argument("--sequence-length", type=int, default=256)
    arguments.add_argument("--batch-size", type=int, default=16)
    arguments.add_argument("--micro-batch-size", type=int, default=8)
    given = arguments.parse_args()
    paths = [given.checkpoint, *given.korean, *given.english, *given.heldout_korean, *given.heldout_english]
    for name in ("korean", "english", "heldout_korean", "heldout_english"):
        setattr(given, name, find_inputs(getattr(given, name)))

    with tempfile.TemporaryDirectory() as temporary, contextlib.chdir(PROJECT):
        folder = Path(temporary)
        path, runs = write_recipe(folder, given), f"runs={json.dumps(temporary)}"
        prepared = {
            step: run_recipe(load_recipe(path, [runs]), only=step)[0]
            for step in ("filter", "tokenizer", "init", "pack")
        }
        results = {}
        steps = given.tokens // (given.batch_size * given.sequence_length)
        for plan in given.plans:
            every = max(1, steps // (4 * len(PLANS[plan])))
            recipe = load_recipe(path, [runs, f"train.plan={plan}", f"train.validate_every={every}"])
            manifests, stages = run_recipe(recipe, only="train"), []
            for manifest in manifests:
                stages.append(stage_of(recipe.run_dir, manifest, sum(stage["tokens"] for stage in stages)))
            results[plan] = stages
            shutil.rmtree(recipe.run_dir / "train")
    docs = PROJECT / "docs" / f"{given.result}.svg"
    draw(results, docs)
    shown = {"init": prepared["init"]["summary"], "pack": prepared["pack"]["came_out"]}
    write_result(given.result, __file__, {"prepared": shown, "plans": results}, data=paths)


if __name__ == "__main__":
    main()
