"""Step `eval`: the run's checkpoints on held-out text and on KoBEST."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from ...tokenizer import Tokenizer
from ..evaluation import evaluate_text
from ..kobest import KOBEST_TASKS, read_task, score
from ..choice_scoring import log_likelihoods
from ..progress import Progress
from ..run_folder import StepResult
from .context import Context, Unit, config_of


def units(context: Context) -> list[Unit]:
    """One unit where the recipe evaluates."""
    config = context.recipe.eval
    if config is None:
        return []

    def inputs() -> dict[str, str]:
        hashes = context.heldout_hashes()
        makers = {"base": context.base_hashes, "init": context.initial_hashes, "train": context.trained_hashes}
        for name, hashes_of in {**makers, "sft": context.final_hashes}.items():
            if name in config.checkpoints:
                hashes.update(hashes_of())
        if context.recipe.filter is not None:
            hashes["filter"] = context.outputs_digest("filter")
        if config.kobest is not None:
            hashes.update(context.file_hashes(sorted(Path(config.kobest).glob(f"*/{config.kobest_split}.tsv"))))
        return hashes

    def check() -> None:
        context.check_heldout()
        if config.kobest is not None:
            for task in KOBEST_TASKS:
                read_task(Path(config.kobest), task, config.kobest_split)

    described = config_of(config, precision=context.precision)
    return [Unit("eval", "eval", described, inputs, lambda folder: run_eval(context, folder), check)]


def _checkpoints(context: Context) -> Iterator[tuple[str, Path, Tokenizer]]:
    config, recipe = context.recipe.eval, context.recipe
    assert config is not None
    if "base" in config.checkpoints:
        yield "base", context.base_model, Tokenizer(context.base_tokenizer)
    places = {
        "init": (recipe.init, context.initial_model),
        "train": (recipe.train, context.trained_model),
        "sft": (recipe.sft, context.final_model),
    }
    for name, (section, folder) in places.items():
        if name in config.checkpoints and section is not None:
            yield name, folder, context.tokenizer()


def run_eval(context: Context, folder: Path) -> StepResult:
    """Bits per byte by domain, and KoBEST by task, for every checkpoint asked for."""
    config = context.recipe.eval
    assert config is not None
    heldout = context.heldout_texts(config.documents)
    results: dict[str, Any] = {}
    checkpoints = list(_checkpoints(context))
    tasks = {}
    if config.kobest is not None:
        tasks = {task: read_task(Path(config.kobest), task, config.kobest_split) for task in KOBEST_TASKS}
    with Progress("eval", len(checkpoints) * (len(heldout) + len(tasks)), " sets") as progress:
        for name, model_folder, tokenizer in checkpoints:
            model = context.load(model_folder, tokenizer)
            measured: dict[str, Any] = {"text": {}, "kobest": {}}
            for domain, texts in heldout.items():
                result = evaluate_text(model, tokenizer, texts, window=config.window, batch_size=config.batch_size)
                measured["text"][domain] = msgspec.to_builtins(result)
                progress.update(1, checkpoint=name)
            for task, items in tasks.items():
                scores = log_likelihoods(model, tokenizer, items, max_tokens=config.batch_size * config.window)
                measured["kobest"][task] = msgspec.to_builtins(score(items, scores, task=task))
                progress.update(1, checkpoint=name)
            results[name] = measured
    shown = [
        f"{domain} " + " → ".join(f"{results[name]['text'][domain]['bits_per_byte']:.2f}" for name in results)
        for domain in heldout
    ]
    return StepResult(
        summary={"checkpoints": results},
        outputs=[],
        went_in=f"{', '.join(results)} on {sum(map(len, heldout.values())):,} held-out documents",
        came_out="bits per byte: " + "; ".join(shown),
    )
