"""Copies of the steps `filter` and `pack` on an object store, where the recipe asks for one."""

from __future__ import annotations

from pathlib import Path

from ...filtering.storage import is_url
from ..copies import publish
from ..errors import RecipeError
from ..progress import Progress
from ..run_folder import StepResult
from .context import Context, Unit


def published(context: Context, step: str, url: str | None) -> list[Unit]:
    """One unit that copies a finished step to `url`, none where that is None; it is out of date when the step is."""
    if url is None:
        return []

    def check() -> None:
        if not is_url(url):
            raise RecipeError(f"{step}.output = {url!r} is no address with a scheme, such as s3://bucket/{step}")

    return [
        Unit(
            step,
            f"published/{step}",
            {"output": url},
            lambda: {step: context.outputs_digest(step)},
            lambda folder: _publish(context, step, url, folder),
            check,
        )
    ]


def _publish(context: Context, step: str, url: str, folder: Path) -> StepResult:
    outputs = context.run.step(step).require()["outputs"]
    total = sum(recorded["bytes"] for recorded in outputs.values())
    with Progress(f"publish {step}", total, "B") as progress:
        size = publish(context.run.path / step, url, folder, progress.update)
    return StepResult(
        summary={"files": len(outputs), "bytes": size},
        outputs=[],
        went_in=f"{len(outputs):,} files, {size / 1e6:.1f} MB",
        came_out=url,
    )
