"""Runs the steps of a recipe, skipping what is finished and current."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

from safetensors import SafetensorError

from .errors import RecipeError
from .recipe import Recipe
from .run_folder import STAGES, Stopwatch, digest_of, write_json
from .steps import base, corpus, evaluate, export, hybrid_tokenizer, init, pack, sft, train
from .steps.context import Context, Unit
from .world import ALONE, World

STEPS = {
    "base": base,
    "filter": corpus,
    "tokenizer": hybrid_tokenizer,
    "init": init,
    "pack": pack,
    "train": train,
    "sft": sft,
    "eval": evaluate,
    "export": export,
}
"""Steps in the order they run, and the module of each."""

_RESULT_VERSION = 3
"""Part of every digest: raise it when a change of the code changes what steps write."""


def run_recipe(
    recipe: Recipe,
    *,
    only: str | None = None,
    force: bool = False,
    say: Callable[[str], None] = print,
    world: World = ALONE,
) -> list[dict[str, Any]]:
    """Run every step of a recipe that is out of date, or one step.

    Args:
        recipe: what to do.
        only: name of the one step to run, on what the steps before it have left.
        force: redo steps that are up to date.
        say: called with one line for each step.
        world: the processes of the run, each of which calls this with the same arguments. They train together; the
            first one does the rest, and says it.

    Returns:
        The manifests of all units that were run or skipped, in order; none in processes other than the first.

    Raises:
        One of `USER_ERRORS` for what the user can mend; `Interrupted` once a stopped stage is saved.
    """
    context = Context.create(recipe, world)
    names = list(STEPS) if only is None else [only]
    units = [unit for name in names for unit in STEPS[name].units(context)]
    if not units:
        missing = {None: "sections of steps", "base": "[base.pretrain] section"}.get(only, f"[{only}] section")
        raise RecipeError(f"this recipe has no {missing}, so there is nothing to run")

    def check() -> None:
        for unit in units:  # hours of work should not end in a file that was never there
            unit.check()

    world.first(check)
    if not world.is_first:
        for unit in units:
            _join_unit(context, unit)
        return []
    with context.run.locked():
        if stages := [unit.name for unit in units if unit.step == "train"]:
            # A stage that the recipe no longer has keeps its folder; this says which ones count.
            context.run.path.joinpath("train").mkdir(exist_ok=True)
            write_json(context.run.path / STAGES, stages)
        return [_run_unit(context, unit, force, say) for unit in units]


def _run_unit(context: Context, unit: Unit, force: bool, say: Callable[[str], None]) -> dict[str, Any]:
    inputs = dict(unit.inputs())
    digest = digest_of({"version": _RESULT_VERSION, "unit": unit.name, "config": unit.config, "inputs": inputs})
    step = context.run.step(unit.name)
    if not force and step.is_current(digest):
        context.world.first(lambda: False)
        say(f"{unit.name}: up to date")
        return step.require()
    folder = step.begin(digest)
    context.world.first(lambda: True)
    watch = Stopwatch()
    try:
        result = unit.run(folder)
    except SafetensorError as error:
        # The library hides which of the system's errors it was in the text.
        if (code := re.search(r"os error (\d+)", str(error))) is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(folder)) from error
    step.finish(digest, unit.config, inputs, result, watch.seconds)
    context.world.first(lambda: None)
    say(f"{unit.name}: {result.went_in} -> {result.came_out} ({watch.seconds:.1f} s)")
    return step.require()


def _join_unit(context: Context, unit: Unit) -> None:
    """Do another process' part of what `_run_unit` does in the first."""
    if not context.world.first(lambda: True):  # it is up to date
        return
    if unit.shared:
        unit.run(context.run.step(unit.name).partial)
    context.world.first(lambda: None)  # its folder has its name


def table(rows: list[dict[str, Any]]) -> str:
    """The run as a text table: per unit what went in, what came out, and the loss before and after."""
    header = ["step", "in", "out", "loss before", "after", "seconds"]
    cells = [header]
    for row in rows:
        before, after = (f"{row[key]:.4f}" if row[key] is not None else "" for key in ("before", "after"))
        cells.append([row["step"], row["went_in"], row["came_out"], before, after, f"{row['seconds']:.1f}"])
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    lines = []
    for number, line in enumerate(cells):
        padded = [
            text.rjust(width) if column >= 3 else text.ljust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
        if number == 0:
            lines.append("  ".join("-" * width for width in widths))
    return "\n".join(lines)
