"""Step `pack`: the filtered corpus, and others beside it, as memory-mapped token shards."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ...filtering import InputFile, find_inputs
from ...tokenizer.byte_level import is_byte_level
from ..copies import published_files
from ..errors import RecipeError, ShardError
from ..packing import pack_files
from ..progress import Progress, scaled
from ..run_folder import StepResult
from ..shards import TokenShards
from .context import Context, Unit, config_of
from .publish import published


def units(context: Context) -> list[Unit]:
    """One unit where the recipe packs, and one where it publishes the shards."""
    config = context.recipe.pack
    if config is None:
        return []

    def inputs() -> dict[str, str]:
        extra = {
            f"extra.{name}[{place}] {path}": path
            for name, paths in config.extra.items()
            for place, path in enumerate(find_inputs(paths))
        }
        return {
            "filter": context.outputs_digest("filter"),
            **context.tokenizer_hashes(),
            **context.heldout_hashes(),
            **dict(zip(extra, context.run.file_hashes(extra.values()), strict=True)),
        }

    def check() -> None:
        context.check_source("filter")
        if is_byte_level(context.base_tokenizer):
            raise RecipeError(
                f"[pack] and what follows need a SentencePiece tokenizer.model; {context.base_tokenizer} is byte-level"
            )
        context.check_heldout()
        for domain in context.recipe.heldout:
            if not re.fullmatch(r"[\w-]+", domain):
                raise RecipeError(f"held-out domain {domain!r} names shards: use letters, digits, _ and - alone")
        for paths in config.extra.values():
            find_inputs(paths)

    unit = Unit("pack", "pack", config_of(config), inputs, lambda folder: run_pack(context, folder), check)
    return [unit, *published(context, "pack", config.output)]


def run_pack(context: Context, folder: Path) -> StepResult:
    """Tokenise every corpus into shards, going on behind those that are already whole."""
    config = context.recipe.pack
    assert config is not None
    tokenizer = context.tokenizer()
    corpora = _corpora(context)
    shards = {
        folder / f"{name}-{number:05d}": files
        for name, by_shard in corpora.items()
        for number, files in enumerate(by_shard)
    }
    total = sum(path.stat().st_size for files in shards.values() for path in files)
    with Progress("pack", total, "B") as progress:
        pack_files(shards, tokenizer, engine=config.engine, workers=config.workers, on_bytes=progress.update)
    summary = {name: _described(folder, name, tokenizer.sha256) for name, by_shard in corpora.items() if by_shard}
    train, validation = summary["train"], summary.get("validation", {"tokens": 0})
    others = [f"{scaled(summary[name]['tokens'])} {name}" for name in config.extra]
    return StepResult(
        summary=summary,
        outputs=sorted(prefix.name + suffix for prefix in shards for suffix in (".bin", ".idx", ".json")),
        went_in=f"{train['documents']:,} documents, {train['text_bytes'] / 1e6:.1f} MB",
        came_out=", ".join([f"{scaled(train['tokens'])} train", *others])
        + f" and {scaled(validation['tokens'])} validation tokens",
    )


def _corpora(context: Context) -> Mapping[str, list[list[InputFile]]]:
    """By name, the files of each shard: one file a shard, but all of a held-out domain in one."""
    config = context.recipe.pack
    assert config is not None
    corpora: dict[str, list[list[InputFile]]] = {
        split: [[path] for path in _corpus_files(context, split)] for split in ("train", "validation")
    }
    if not corpora["train"]:
        raise ShardError("no document of the corpus is left to train on: lower filter.validation_fraction")
    corpora |= {name: [[path] for path in find_inputs(paths)] for name, paths in config.extra.items()}
    corpora |= {f"heldout-{domain}": [find_inputs(paths)] for domain, paths in context.recipe.heldout.items()}
    return corpora


def _corpus_files(context: Context, split: str) -> Sequence[InputFile]:
    """The filtered corpus; on a cluster its published copy, if there is one, so that machines need not share a disk."""
    files = context.corpus_files(split)
    pack, filtered = context.recipe.pack, context.recipe.filter
    if pack is None or filtered is None or pack.engine == "local" or filtered.output is None:
        return files
    copies = published_files(context.run.path / "filter", filtered.output)
    return [copies[path.name] for path in files]


def _described(folder: Path, name: str, tokenizer_sha256: str) -> dict[str, Any]:
    shards = TokenShards.open(folder, name, tokenizer_sha256=tokenizer_sha256)
    if shards.documents == 0:
        raise ShardError(f"corpus {name!r} holds no document: leave it out, or look at its files")
    return {
        "documents": shards.documents,
        "tokens": shards.tokens,
        "text_bytes": shards.text_bytes,
        "shards": msgspec.to_builtins(shards.manifests),
    }
