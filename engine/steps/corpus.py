"""Step `filter`: raw text to a clean, deduplicated corpus."""

from __future__ import annotations

from pathlib import Path

import msgspec

from ...filtering import benchmark_files, filter_corpus, find_inputs
from ..progress import Progress
from ..run_folder import StepResult
from .context import Context, Unit, config_of
from .publish import published


def units(context: Context) -> list[Unit]:
    """One unit where the recipe filters, and one where it publishes what is kept."""
    config = context.recipe.filter
    if config is None:
        return []

    def inputs() -> dict[str, str]:
        clean = find_inputs(config.perplexity.train) if config.perplexity is not None else []
        return context.file_hashes([*find_inputs(config.inputs), *clean, *benchmark_files(config.decontaminate)])

    def check() -> None:
        find_inputs(config.inputs)
        if config.perplexity is not None:
            find_inputs(config.perplexity.train)
        benchmark_files(config.decontaminate)

    unit = Unit("filter", "filter", config_of(config), inputs, lambda folder: run_filter(context, folder), check)
    return [unit, *published(context, "filter", config.output)]


def run_filter(context: Context, folder: Path) -> StepResult:
    """Filter the recipe's inputs into parquet files."""
    config = context.recipe.filter
    assert config is not None
    total = sum(path.stat().st_size for path in find_inputs(config.inputs))
    with Progress("filter", total, "B") as progress:
        summary = filter_corpus(config, folder, progress=progress.update, say=lambda part: print(f"filter: {part}"))
    return StepResult(
        summary=msgspec.to_builtins(summary),
        outputs=sorted(path.name for path in folder.glob("*.parquet")),
        went_in=f"{summary.documents_in:,} documents, {summary.bytes_in / 1e6:.1f} MB",
        came_out=f"{summary.documents_out:,} documents, {summary.bytes_out / 1e6:.1f} MB",
    )
