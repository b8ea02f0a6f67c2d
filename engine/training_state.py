"""Resumable training state on disk: written whole or not at all, the latest one kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..model.atomic_folder import fsync
from .errors import RunError

_PREFIX = "step-"
_STAGING_PREFIX = "writing-"


def save_training_state(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write `folder/step-NNNNNNNN/` unless it is there, then delete older states.

    The state is complete before it gets its name, and older ones go only after that, so that a crash or
    a full disk at any moment leaves the latest complete state in place.

    Args:
        folder: holds the states of one stage.
        step: steps done.
        tensors: what the optimizer needs, by name.
        state: JSON values, such as running sums.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{_PREFIX}{step:08d}"
    if final.exists():  # a run that resumed from it and was stopped before another step: it must never be missing
        return
    for stale in folder.glob(f"{_STAGING_PREFIX}*"):  # what a crash or a full disk left must not keep the disk full
        shutil.rmtree(stale, ignore_errors=True)
    staging = folder / f"{_STAGING_PREFIX}{step:08d}"
    staging.mkdir()
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, staging / "state.safetensors")
    (staging / "state.json").write_text(json.dumps({"step": step, **state}) + "\n", encoding="utf-8")
    for path in (*staging.iterdir(), staging):
        fsync(path)
    staging.rename(final)
    fsync(folder)
    for older in folder.iterdir():
        if older != final:
            shutil.rmtree(older, ignore_errors=True)


def load_training_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The latest complete state of `folder` as (tensors, state), or None where there is none."""
    complete = sorted(folder.glob(f"{_PREFIX}*")) if folder.exists() else []
    if not complete:
        return None
    latest = complete[-1]
    try:
        return load_file(latest / "state.safetensors"), json.loads((latest / "state.json").read_text(encoding="utf-8"))
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise RunError(f"{latest} cannot be read ({error}); delete it to start this stage again") from None
