"""One training run of a condition with a seed, kept as one small json file, so that no finished run is done again."""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import torch
from reproduction.preparation import Prepared
from reproduction.schedules import small_stages

from redwhale.engine import LoopConfig, Trainer, evaluate_text
from redwhale.engine.run_folder import write_json
from redwhale.model import Llama, load_model
from redwhale.tokenizer import Tokenizer


class Condition(msgspec.Struct, frozen=True, kw_only=True):
    """What a run is made with, but for its seed."""

    schedule: str = "redwhale"
    tokens: int
    lr_scale: float
    """Factor on the plan's learning rates of layers and adapters."""
    rows_scale: float
    """Factor on those of embedding and head."""
    added: int
    init: str = "decomposition"
    corpus: str = "filtered"
    english: float = 0.1
    """Share of English among the tokens."""
    curve: tuple[int, ...] = ()
    """Steps of the first stage after which the first domain is measured."""
    domains: tuple[str, ...] = ("korean", "wikipedia", "stories")
    """Held-out texts that are measured; the first one after every stage."""


def run_of(prepared: Prepared, condition: Condition, seed: int) -> dict[str, Any]:
    """The run's results: found, or trained and written."""
    sizes = prepared.sizes
    described = {
        "condition": msgspec.to_builtins(condition),
        "seed": seed,
        "sequence_length": sizes.sequence_length,
        "batch_size": sizes.batch_size,
    }
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
    path = prepared.root / "runs" / f"{digest}.json"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        began = time.monotonic()
        write_json(path, {**described, **_train(prepared, condition, seed)})
        print(f"{condition} seed {seed}: {time.monotonic() - began:.0f} s", flush=True)
    return json.loads(path.read_text(encoding="utf-8"))


def _train(prepared: Prepared, condition: Condition, seed: int) -> dict[str, Any]:
    """Train all stages one after the other, each going on in the data where the one before it ended."""
    sizes = prepared.sizes
    tokenizer = prepared.tokenizer(condition.added)
    model = load_model(prepared.initial(condition.added, condition.init, seed), dtype=torch.bfloat16)
    first_new_row = tokenizer.vocab_size - prepared.pieces(condition.added)
    texts = {name: text for name, text in prepared.heldout().items() if name in condition.domains}
    first = {name: texts[name] for name in condition.domains[:1]}
    loop = LoopConfig(
        batch_size=sizes.batch_size,
        micro_batch_size=sizes.batch_size,
        activations="none",
        log_every=10**6,
        checkpoint_every=10**6,
    )
    stages = small_stages(
        condition.schedule,
        condition.tokens,
        lr_scale=condition.lr_scale,
        rows_scale=condition.rows_scale,
        layers=model.config.num_hidden_layers,
        step_tokens=sizes.batch_size * sizes.sequence_length,
    )
    data = prepared.mixture(condition.added, condition.corpus, condition.english, seed)
    before = _measured_before(prepared, condition, seed, model, texts)
    curve, done, found = [], 0, []

    def on_step(trainer: Trainer, step: int) -> None:
        if not found and step in condition.curve:
            assert isinstance(trainer.model, Llama)
            curve.append([step, measured(trainer.model, tokenizer, first)])

    for number, stage in enumerate(stages):
        folder = Path(tempfile.mkdtemp(dir=prepared.root))
        trainer = Trainer(
            model, stage, data, sequence_length=sizes.sequence_length, folder=folder, loop=loop, seed=seed,
            first_sequence=done, first_new_row=first_new_row, on_step=on_step,
        )  # fmt: skip
        result = trainer.run()
        done += result.steps * sizes.batch_size
        speed = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        shutil.rmtree(folder)
        last = number == len(stages) - 1
        after = measured(model, tokenizer, texts if last else first)
        found.append(
            {
                "name": stage.name,
                "train": stage.train,
                "steps": result.steps,
                "tokens": result.tokens,
                "trained_parameters": result.trained_parameters,
                "skipped_steps": result.skipped_steps,
                "seconds": round(result.seconds, 2),
                "flops_per_token": speed["model_flops_per_second"] / speed["tokens_per_second"],
                "after": after,
            }
        )
        del trainer
        gc.collect()
    return {"before": before, "curve": curve, "stages": found, "after": found[-1]["after"]}


def _measured_before(
    prepared: Prepared, condition: Condition, seed: int, model: Llama, texts: dict[str, list[str]]
) -> dict[str, Any]:
    """What the initial checkpoint is worth, measured once for all conditions that begin with it."""
    checkpoint = prepared.initial(condition.added, condition.init, seed)
    path = checkpoint / f"measured-{'-'.join(condition.domains)}.json"
    if not path.exists():
        write_json(path, measured(model, prepared.tokenizer(condition.added), texts))
    return json.loads(path.read_text(encoding="utf-8"))


def measured(model: Llama, tokenizer: Tokenizer, texts: dict[str, list[str]]) -> dict[str, Any]:
    """Loss, accuracy and bits per byte by domain."""
    training = model.training
    model.eval()
    found = {
        name: msgspec.to_builtins(evaluate_text(model, tokenizer, some, window=256, batch_size=4))
        for name, some in texts.items()
    }
    model.train(training)
    return found
