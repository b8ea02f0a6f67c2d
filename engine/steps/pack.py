"""Step `pack`: the filtered corpus as memory-mapped token shards."""

from __future__ import annotations

from pathlib import Path

import msgspec

from ..errors import ShardError
from ..packing import pack_texts
from ..progress import Progress, scaled
from ..run_folder import StepResult
from ..shards import TokenShards
from .context import Context, Unit, config_of, first_texts

SPLITS = ("train", "validation")


def units(context: Context) -> list[Unit]:
    """One unit where the recipe packs."""
    config = context.recipe.pack
    if config is None:
        return []

    def inputs() -> dict[str, str]:
        return {"filter": context.outputs_digest("filter"), **context.tokenizer_hashes()}

    def check() -> None:
        context.check_source("filter")

    return [Unit("pack", "pack", config_of(config), inputs, lambda folder: run_pack(context, folder), check)]


def run_pack(context: Context, folder: Path) -> StepResult:
    """Tokenise every corpus file into a shard of its own, going on behind the shards that are already whole."""
    config = context.recipe.pack
    assert config is not None
    tokenizer = context.tokenizer()
    files = {split: context.corpus_files(split) for split in SPLITS}
    if not files["train"]:
        raise ShardError("no document of the corpus is left to train on: lower filter.validation_fraction")
    with Progress("pack", sum(p.stat().st_size for paths in files.values() for p in paths), "B") as progress:
        for split, paths in files.items():
            for number, path in enumerate(paths):
                prefix = folder / f"{split}-{number:05d}"
                if not prefix.with_name(prefix.name + ".json").exists():
                    pack_texts(first_texts([path]), tokenizer, prefix, threads=config.threads)
                progress.update(path.stat().st_size)
    summary = {}
    for split, paths in files.items():
        if not paths:
            continue
        shards = TokenShards.open(folder, split, tokenizer_sha256=tokenizer.sha256)
        summary[split] = {
            "documents": shards.documents,
            "tokens": shards.tokens,
            "text_bytes": shards.text_bytes,
            "shards": msgspec.to_builtins(shards.manifests),
        }
    train = summary["train"]
    validation = summary.get("validation", {"tokens": 0})
    return StepResult(
        summary=summary,
        outputs=sorted(path.name for split in SPLITS for path in folder.glob(f"{split}-*")),
        went_in=f"{train['documents']:,} documents, {train['text_bytes'] / 1e6:.1f} MB",
        came_out=f"{scaled(train['tokens'])} train and {scaled(validation['tokens'])} validation tokens",
    )
