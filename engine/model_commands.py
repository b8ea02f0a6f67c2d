"""Commands that make checkpoints without a recipe: `redwhale new` and `redwhale upscale`."""

from __future__ import annotations

from pathlib import Path

import torch

from ..model import (
    PRESETS,
    create_checkpoint,
    parameter_count,
    preset,
    read_config,
    upscale_checkpoint,
)
from .errors import CheckpointError
from .progress import Progress

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def list_presets() -> str:
    """A table of all presets: name, family, layers, hidden size, vocabulary, parameters, size in bf16."""
    rows: list[tuple[str, ...]] = [("preset", "family", "layers", "hidden", "vocabulary", "parameters", "bf16")]
    for name, config in PRESETS.items():
        count = parameter_count(config)
        sizes = (config.num_hidden_layers, config.hidden_size, config.vocab_size, count)
        rows.append((name, config.model_type, *(f"{size:,}" for size in sizes), size_text(2 * count)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            # Names to the left, numbers to the right.
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def new_model(name: str, folder: Path, *, vocab_size: int | None, seed: int, precision: str) -> str:
    """Write a random checkpoint of a preset; returns a line that says what was written.

    Raises:
        CheckpointError: if there is no such preset, or the folder has something in it.
    """
    config = preset(name, vocab_size=vocab_size)
    folder = unused(folder)
    count, dtype = parameter_count(config), _DTYPES[precision]
    with Progress(f"new {name}", count * dtype.itemsize, "B") as progress:
        create_checkpoint(config, folder, seed=seed, dtype=dtype, on_tensor=progress.update)
    return f"{folder}: {count:,} parameters, {size_text(count * dtype.itemsize)}"


def upscale(checkpoint: Path, folder: Path, *, first: int | None, last: int | None) -> str:
    """Write a deeper copy of a checkpoint; returns a line that says what was written.

    Raises:
        CheckpointError: if the checkpoint or the numbers cannot be used, or the folder has something in it.
    """
    folder = unused(folder)
    with Progress("upscale", None, "B") as progress:
        upscale_checkpoint(checkpoint, folder, first=first, last=last, on_tensor=progress.update)
    before, config = read_config(checkpoint), read_config(folder)
    return (
        f"{folder}: {config.num_hidden_layers} layers out of {before.num_hidden_layers}, "
        f"{parameter_count(config):,} parameters"
    )


def unused(folder: Path) -> Path:
    """The absolute path of a folder to be written.

    Raises:
        CheckpointError: if it is a file, or a folder with something in it.
    """
    folder = folder.resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists already and is not an empty folder: name another, or remove it first")
    return folder


def size_text(size: int) -> str:
    """Bytes in GB, or in MB where that would say nothing."""
    return f"{size / 1e9:.1f} GB" if size >= 5e8 else f"{size / 1e6:.1f} MB"
