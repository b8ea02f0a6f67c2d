"""Loss on held-out answers before and after fine-tuning a real checkpoint on a real instruction file, by what trains.

The pairs are a CSV file with the columns Q and A. A hash of the question decides which are held out, so that no
question is on both sides.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from common import parser, write_result

from redwhale.engine import load_recipe, run_recipe

RECIPE = """
name = "sft"
seed = 0

[base]
checkpoint = {checkpoint}

[sft]
data = [{train}]
heldout = [{heldout}]
sequence_length = {sequence_length}
batch_size = {batch_size}
micro_batch_size = {batch_size}
epochs = {epochs}
log_every = 5
checkpoint_every = 1000

[export]
"""

VARIANTS = {
    "lora, r 64, lr 2e-4": [],
    "lora, r 64, lr 2e-3": ["sft.lr=2e-3"],
    "everything, lr 5e-4": ['sft.train=["all"]', "sft.lr=5e-4"],
}
"""The first is RedWhale's setting, which is made for a model 700 times as large."""


def main() -> None:
    """Measure and write the result."""
    options = _options()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        counts = write_pairs(options.pairs, folder, options.rows)
        (folder / "sft.toml").write_text(
            RECIPE.format(
                checkpoint=json.dumps(str(options.checkpoint)),
                train=json.dumps(str(folder / "train.jsonl")),
                heldout=json.dumps(str(folder / "heldout.jsonl")),
                sequence_length=options.sequence_length,
                batch_size=options.batch_size,
                epochs=options.epochs,
            ),
            encoding="utf-8",
        )
        results = {variant: tune(folder, number, VARIANTS[variant]) for number, variant in enumerate(VARIANTS)}
    settings = {key: getattr(options, key) for key in ("sequence_length", "batch_size", "epochs")}
    data = [options.checkpoint, options.pairs]
    write_result(options.result, __file__, {"rows": counts, **settings, "results": results}, data=data)


def _options() -> argparse.Namespace:
    made = parser(__doc__, "sft")
    made.add_argument("checkpoint", type=Path, help="Hugging Face folder with tokenizer.model")
    made.add_argument("pairs", type=Path, help="CSV file with the columns Q and A")
    made.add_argument("--rows", type=int, default=3000, help="most pairs to train on (default: %(default)s)")
    made.add_argument("--sequence-length", type=int, default=256)
    made.add_argument("--batch-size", type=int, default=8, help="sequences in a step (default: %(default)s)")
    made.add_argument("--epochs", type=int, default=1)
    return made.parse_args()


def write_pairs(pairs: Path, folder: Path, most: int) -> dict[str, int]:
    """`train.jsonl` and `heldout.jsonl` in Alpaca's shape; gives how many rows each has."""
    rows: dict[str, list[str]] = {"train": [], "heldout": []}
    with pairs.open(encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file):
            split = "heldout" if hashlib.sha256(row["Q"].encode()).digest()[0] < 13 else "train"  # a twentieth
            rows[split].append(json.dumps({"instruction": row["Q"], "output": row["A"]}, ensure_ascii=False) + "\n")
    # The file is sorted by topic: take rows from all of it.
    step = max(1, len(rows["train"]) // most)
    rows["train"] = rows["train"][::step][:most]
    for split, lines in rows.items():
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return {split: len(lines) for split, lines in rows.items()}


def tune(folder: Path, number: int, overrides: list[str]) -> dict[str, Any]:
    """Fine-tune and export; gives the losses and what the packing held."""
    recipe = load_recipe(folder / "sft.toml", [f"runs={folder}/runs{number}", *overrides])
    tuned, exported = run_recipe(recipe)
    summary = tuned["summary"]
    return {
        "heldout_loss_before": tuned["before"],
        "heldout_loss_after": tuned["after"],
        "trained_parameters": summary["trained_parameters"],
        "steps": summary["steps"],
        "fill": round(summary["fill"], 4),
        "answer_tokens": summary["answer_tokens"],
        "left_out": summary["bad_rows"] + summary["too_long"],
        "seconds": tuned["seconds"],
        "export_difference": exported["summary"]["verification"]["relative_difference"],
        "export_same_chat": exported["summary"]["verification"]["same_chat"],
    }


if __name__ == "__main__":
    main()
