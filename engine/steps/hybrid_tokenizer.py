"""Step `tokenizer`: the base tokenizer with Korean pieces behind its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from ...filtering import InputFile, read_documents
from ...tokenizer import build_hybrid_tokenizer
from ..progress import Progress
from ..run_folder import StepResult
from .context import Context, Unit, config_of

_REPORT_DOCUMENTS = 1000


def units(context: Context) -> list[Unit]:
    """One unit where the recipe builds a tokenizer."""
    config = context.recipe.tokenizer
    if config is None:
        return []

    def inputs() -> dict[str, str]:
        base = context.file_hashes([context.base_tokenizer])
        return {**base, **context.heldout_hashes(), "filter": context.outputs_digest("filter")}

    def check() -> None:
        context.check_source("filter")
        context.check_base(byte_level=True)
        context.check_heldout()

    described = config_of(config)
    return [Unit("tokenizer", "tokenizer", described, inputs, lambda folder: run_tokenizer(context, folder), check)]


def run_tokenizer(context: Context, folder: Path) -> StepResult:
    """Train on the filtered corpus, append to the base, export, and measure token ratios on held-out text."""
    config = context.recipe.tokenizer
    assert config is not None
    domains = context.heldout_texts(_REPORT_DOCUMENTS)
    english = [line for text in domains.get("english", []) for line in text.splitlines() if line.strip()]
    summary = build_hybrid_tokenizer(
        sourced_texts("read corpus", context.corpus_files("train")),
        context.base_tokenizer,
        folder,
        config,
        domains=domains,
        english_sample=english,
    )
    ratios = {domain.domain: domain for domain in summary.domains}
    korean = ratios.get("korean")
    ratio = f", token ratio {korean.ratio:.2f} on held-out Korean" if korean else ""
    return StepResult(
        summary={"base": str(context.base_tokenizer), **msgspec.to_builtins(summary)},
        outputs=sorted(path.name for path in folder.glob("*token*") if path.suffix in (".json", ".model")),
        went_in=f"{summary.base_pieces:,} base pieces",
        came_out=f"{summary.vocab_size:,} pieces ({summary.added:,} Korean){ratio}",
    )


def sourced_texts(
    label: str, paths: Iterable[InputFile], sources: dict[InputFile, str] | None = None
) -> Iterator[tuple[str, str]]:
    """Source and text of all documents in files, showing how far they are read.

    Args:
        label: of the progress bar.
        paths: the files.
        sources: names to give the documents of a file instead of their own.
    """
    paths = list(paths)
    with Progress(label, sum(path.stat().st_size for path in paths), "B") as progress:
        for path in paths:
            for document in read_documents(path):
                yield (sources or {}).get(path, document.source), document.text
            progress.update(path.stat().st_size)
