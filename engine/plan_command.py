"""`redwhale plan`: memory, time and cost of every stage of a recipe, before anything is paid for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import torch

from ..model import PRESETS, ModelConfig, parameter_count, preset, read_config
from ..tokenizer import open_encoder
from .errors import CheckpointError, RecipeError
from .gpus import Gpu, find_gpu
from .loop_config import LoopConfig, loop_of
from .recipe import Recipe
from .run_folder import RunFolder, write_json
from .run_plan import CONTEXT_BYTES, FRAGMENTS, StagePlan, fastest_fit, least_of, plan_stage, remedy
from .stages import Stage

PAPER_TOKENS, PAPER_HOURS = 9_700_000_000, 498
"""Of continued pretraining in RedWhale (arXiv 2408.11294), on one H100."""


def plan_recipe(
    recipe: Recipe, gpu_name: str, *, model: str | None = None, price: float | None = None, output: Path | None = None
) -> Iterator[str]:
    """Lines of a plan for the recipe's stages.

    Args:
        recipe: whose `[train]` is planned.
        gpu_name: see `find_gpu`.
        model: preset or checkpoint in place of the recipe's base, which may not be there yet.
        price: of an hour of the GPU, in whatever currency.
        output: JSON file with everything, if wanted.

    Raises:
        RecipeError: for a recipe without stages, a model that is not there, and a GPU that is not known.
    """
    gpu = find_gpu(gpu_name)
    train = recipe.train
    if train is None:
        raise RecipeError("the recipe has no [train] section: there is no stage to plan")
    base, config = planned_model(recipe, model)
    options: dict[str, Any] = {
        "sequence_length": train.sequence_length,
        "dtype": torch.float32 if recipe.precision == "fp32" else torch.bfloat16,
        "first_new_row": base.vocab_size,
    }
    yield (
        f"{parameter_count(config) / 1e9:.2f} billion parameters, vocabulary {config.vocab_size:,}, sequences of "
        f"{train.sequence_length:,}, {train.batch_size} a step, on {gpu.name} with {gpu.bytes / 1e9:.0f} GB"
    )
    plans, notes = [], []
    for stage in train.all_stages:
        plan, note = _planned(config, stage, train, gpu, options)
        plans.append(plan)
        notes += note
    yield from table(plans, price)
    yield from (f"  {note}" for note in notes)
    yield from _summary(plans, price)
    if output is not None:
        write_json(output, {"gpu": msgspec.to_builtins(gpu), "stages": [_row(plan) for plan in plans], "notes": notes})


def planned_model(recipe: Recipe, model: str | None) -> tuple[ModelConfig, ModelConfig]:
    """Configurations of the base and of the model with its new rows."""
    run = RunFolder(recipe.run_dir)
    if model is not None and model in PRESETS:
        base = preset(model)
    else:
        folder = Path(model or recipe.base.checkpoint or run.path / "base" / "model")
        try:
            base = read_config(folder)
        except (CheckpointError, OSError):
            raise RecipeError(
                f"there is no checkpoint {str(folder)!r} yet: name its shape with --model, a checkpoint or one of "
                f"{', '.join(name for name in PRESETS if not name.startswith('tiny-'))}"
            ) from None
    tokenizer = recipe.tokenizer
    if tokenizer is None or recipe.init is None:
        return base, base
    built = run.step("tokenizer").manifest()
    if built is not None:
        size = open_encoder(run.path / "tokenizer").vocab_size
    else:
        multiple = tokenizer.pad_to_multiple
        size = -(-(base.vocab_size + (tokenizer.max_added or tokenizer.vocab_size)) // multiple) * multiple
    return base, replace(base, vocab_size=size)


def _planned(
    config: ModelConfig, stage: Stage, train: LoopConfig, gpu: Gpu, options: dict[str, Any]
) -> tuple[StagePlan, list[str]]:
    """A stage's plan as the recipe has it, and what to say about it."""
    loop, notes = loop_of(stage, train), []
    if loop.frozen == "fp8" and gpu.fp8_flops is None:
        notes.append(
            f'{stage.name} would end with an error: frozen = "fp8" needs FP8 tensor cores, and {gpu.name} has none; '
            'planned with "stored"'
        )
        loop = msgspec.structs.replace(loop, frozen="stored")
    stage = msgspec.structs.replace(stage, micro_batch_size=None, activations=None, frozen=None)
    free = msgspec.structs.replace(loop, micro_batch_size="auto", activations="auto")
    best = fastest_fit(config, stage, free, gpu, **options)
    plan = None
    if loop.is_auto:
        plan = best if loop == free else fastest_fit(config, stage, loop, gpu, **options)
    plan = plan or plan_stage(config, stage, least_of(loop), gpu, **options)
    if plan.host_bytes:
        notes.append(f"{stage.name} keeps {plan.host_bytes / 1e9:.1f} GB of frozen weights in the host's memory")
    if not plan.fits:
        notes.append(f"{stage.name} {remedy(config, stage, loop, gpu, **options)}")
    if best is not None and (not plan.fits or best.tokens_per_second > 1.02 * plan.tokens_per_second):
        notes.append(
            f"{stage.name} is estimated fastest with micro_batch_size = {best.micro_batch_size}, activations = "
            f'"{best.activations}": {best.tokens_per_second:,.0f} tokens a second in {best.bytes / 1e9:.1f} GB'
        )
    return plan, notes


_COLUMNS = ("weights", "masters", "moments", "gradients", "activations", "logits", "workspace", "other")


def table(plans: list[StagePlan], price: float | None = None) -> Iterator[str]:
    """A text table of plans; memory in GB when it is highest."""
    head = (
        "stage",
        "optimizer",
        "micro",
        "keeps",
        "frozen",
        *_COLUMNS,
        "reserve",
        "needs",
        "at",
        "",
        "GF/token",
        "tok/s",
        "hours",
    )
    rows: list[tuple[str, ...]] = [(*head, "cost") if price is not None else head]
    for plan in plans:
        sizes = [plan.peak.get(kind, 0) for kind in _COLUMNS] + [plan.reserve, plan.bytes]
        row = (
            *(plan.stage, plan.optimizer, str(plan.micro_batch_size), plan.activations, plan.frozen),
            *(f"{size / 1e9:.1f}" for size in sizes),
            *(plan.moment, "fits" if plan.fits else "TOO LARGE"),
            *(f"{plan.model_flops_per_token / 1e9:.1f}", f"{plan.tokens_per_second:,.0f}", f"{plan.hours:.1f}"),
        )
        rows.append((*row, f"{plan.hours * price:,.0f}") if price is not None else row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(
            cell.ljust(width) if name in ("stage", "optimizer", "keeps", "frozen", "at", "") else cell.rjust(width)
            for name, cell, width in zip((*head, "cost"), row, widths, strict=False)
        ).rstrip()


def _summary(plans: list[StagePlan], price: float | None) -> Iterator[str]:
    tokens, hours = sum(plan.tokens for plan in plans), sum(plan.hours for plan in plans)
    cost = f", {hours * price:,.0f} at {price:g} an hour" if price is not None else ""
    yield f"{tokens / 1e9:.2f} billion tokens in {hours:.0f} hours{cost}"
    yield (
        f"(RedWhale's own run: {PAPER_TOKENS / 1e9:.1f} billion tokens in {PAPER_HOURS} hours of one H100, so "
        f"{PAPER_HOURS * tokens / PAPER_TOKENS:.0f} hours for as many)"
    )
    yield (
        f"Memory follows from the model and the trainer, and {CONTEXT_BYTES / 1e9:.0f} GB and {FRAGMENTS:.0%} are set "
        "aside for what lies outside of them. Speeds are estimates from data-sheet rates, not measurements."
    )


def _row(plan: StagePlan) -> dict[str, Any]:
    return {**msgspec.to_builtins(plan), "bytes": plan.bytes, "hours": plan.hours}
