"""Resumable checkpoints: written in the background, whole or not at all, the last and the best ones kept."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..model.atomic_folder import fsync
from .errors import RunError
from .parts import Span

TENSORS = "state.safetensors"
_PREFIX = "step-"
_STAGING = "writing-"
_REMOVED = "removed-"


class Wanted(NamedTuple):
    """What a process needs of one tensor of a checkpoint that several processes may have written."""

    like: Tensor
    """In the shape and dtype of the part that it needs."""
    span: Span | None
    """Where that part lies in the whole tensor; None for a tensor that all processes have alike."""


class CheckpointStore:
    """The checkpoints of one stage, `folder/step-NNNNNNNN/` each, written by one thread in the background.

    A checkpoint is complete and on the disk before it gets its name, and others go only after that, so that a crash
    or a full disk at any moment leaves the latest complete one in place. A checkpoint is copied to host memory first,
    and training goes on while the copy is written: the host needs room for one copy of all tensors (pinned memory,
    in blocks of powers of two, where they come from a GPU). Only one process may write to a folder.

    Args:
        folder: holds the checkpoints.
        keep_last: how many of the latest ones stay.
        keep_best: whether the one with the lowest score stays too.

    Raises:
        ValueError: if no checkpoint would stay.

    Example:
        with CheckpointStore(folder, keep_last=2) as store:
            store.save(100, optimizer.state_tensors(), {"seconds": 12.5})
    """

    def __init__(self, folder: Path, *, keep_last: int = 1, keep_best: bool = False) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last = {keep_last}: a run can only go on if at least 1 checkpoint stays")
        self.folder = Path(folder)
        self.keep_last, self.keep_best = keep_last, keep_best
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")
        self._pending: Future[None] | None = None

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        *,
        score: float | None = None,
        wait: bool = False,
    ) -> None:
        """Copy the tensors to host memory and begin to write them; nothing is done if `step` has a checkpoint.

        Waits for the write before this one. The tensors may change as soon as this returns: on a GPU the copies are
        queued on the current stream, in front of whatever changes them.

        Args:
            step: steps done. Checkpoints of later steps, from which nothing went on, are deleted.
            tensors: of any device and dtype, by name.
            state: JSON values; the keys "step" and "score" are taken.
            score: such as a validation loss, for `keep_best`; the lowest wins, one that is not finite never does.
            wait: return when the checkpoint is on the disk.

        Raises:
            OSError: if this write (with `wait`) or the one before it failed, on a full disk for example. The
                checkpoints before the failed one are as they were.
        """
        self.wait()
        # A run that resumed from it and was stopped before another step: it must never be missing.
        if not self._path(step).exists():
            text = state_text(step, state, score)
            snapshot, copied = _snapshot(tensors)
            self._pending = self._thread.submit(self._write, step, snapshot, copied, text)
            del snapshot  # the thread's alone, so that it is freed once it is written
        if wait:
            self.wait()

    def wait(self) -> None:
        """Return when nothing is being written; raises the OSError of a write that failed, once."""
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                pending.result()
            except KeyboardInterrupt:
                self._pending = pending
                raise

    def load(
        self,
        step: int | Literal["best"] | None = None,
        wanted: Callable[[int], Mapping[str, Wanted]] | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Read a complete checkpoint into host memory.

        Args:
            step: the one to read; "best" for the lowest score, None for the latest.
            wanted: tells, for the step that is read, what to read of it; None for all, which only a checkpoint that
                one process wrote can give.

        Returns:
            (tensors, state), where the state has its "step" and, if there was one, its "score"; None where there is
            no such checkpoint.

        Raises:
            RunError: if it is damaged.
            OSError: if a write failed before.
        """
        self.wait()
        if step == "best":
            step = self._best(self.steps())
        elif step is None:
            step = max(self.steps(), default=None)
        if step is None or not self._path(step).exists():
            return None
        path = self._path(step)
        try:
            return self._read(path, wanted), read_state(path)
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            earlier = [other for other in self.steps() if other < step]
            remedy = f"go on from step {earlier[-1]}" if earlier else "start this stage again"
            raise RunError(f"{path} cannot be read ({error}); delete it to {remedy}") from None

    def _read(self, path: Path, wanted: Callable[[int], Mapping[str, Wanted]] | None) -> dict[str, Tensor]:
        if wanted is None or (path / TENSORS).exists():
            return load_file(path / TENSORS)
        from .sharded_checkpoints import read_parts  # brings in torch.distributed

        return read_parts(path, wanted(read_state(path)["step"]))

    def steps(self) -> list[int]:
        """Steps that have a complete checkpoint, ascending."""
        names = os.listdir(self.folder) if self.folder.exists() else []
        return sorted(int(name.removeprefix(_PREFIX)) for name in names if re.fullmatch(rf"{_PREFIX}\d+", name))

    def close(self) -> None:
        """Wait for the last write and end the thread; raises the OSError of a write that failed."""
        self._thread.shutdown()
        self.wait()

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except Exception as failed:
            error.add_note(f"and the last checkpoint could not be written: {failed}")

    def _path(self, step: int) -> Path:
        return self.folder / f"{_PREFIX}{step:08d}"

    def _write(self, step: int, snapshot: dict[str, Tensor], copied: torch.cuda.Event | None, state: str) -> None:
        self._make_room()
        staging = self._staging(step)
        if copied is not None:
            copied.synchronize()
        try:
            staging.mkdir()
            save_file(snapshot, staging / TENSORS)
            snapshot.clear()  # so that its memory is free before the next one is taken
            self._complete(step, state)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(staging, ignore_errors=True)
            raise _os_error(error, self.folder) from error
        self._prune(step)

    def _staging(self, step: int) -> Path:
        return self.folder / f"{_STAGING}{step:08d}"

    def _make_room(self) -> None:
        if not self.folder.exists():
            self.folder.mkdir(parents=True)
            fsync(self.folder.parent)
        # What a crash left must not keep the disk full.
        for stale in (*self.folder.glob(f"{_STAGING}*"), *self.folder.glob(f"{_REMOVED}*")):
            shutil.rmtree(stale, ignore_errors=True)

    def _complete(self, step: int, state: str) -> None:
        """Give a checkpoint, whose tensors are written, its state and then its name."""
        staging = self._staging(step)
        (staging / "state.json").write_text(state, encoding="utf-8")
        for path in (*staging.iterdir(), staging):
            fsync(path)
        staging.rename(self._path(step))
        fsync(self.folder)

    def _prune(self, step: int) -> None:
        steps = self.steps()
        candidates = [other for other in steps if other <= step]
        kept: set[int | None] = {*candidates[-self.keep_last :], self._best(candidates) if self.keep_best else None}
        for other in set(steps) - kept:
            removed = self.folder / f"{_REMOVED}{other:08d}"
            self._path(other).rename(removed)  # at once, so that no half of it is taken for a checkpoint
            shutil.rmtree(removed, ignore_errors=True)

    def _best(self, steps: Sequence[int]) -> int | None:
        """The step of the lowest score, the latest of equal ones; None where none has a score."""
        scores = {}
        for step in steps:
            # One that cannot be read must not stop the next checkpoint; reading it says what is wrong with it.
            with contextlib.suppress(OSError, ValueError, KeyError):
                scores[step] = read_state(self._path(step))["score"]
        return min(scores, key=lambda step: (scores[step], -step), default=None)


def _snapshot(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
    """Copies in host memory, and the event after which those from a GPU are complete."""
    copies, device = {}, None
    for name, tensor in tensors.items():
        on_gpu = tensor.device.type == "cuda"
        device = tensor.device if on_gpu else device
        copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
        copies[name].copy_(tensor.detach(), non_blocking=on_gpu)
    if device is None:
        return copies, None
    copied = torch.cuda.Event(blocking=True)
    copied.record(torch.cuda.current_stream(device))
    return copies, copied


def state_text(step: int, state: Mapping[str, Any], score: float | None) -> str:
    ranked = {} if score is None or not math.isfinite(score) else {"score": float(score)}
    return json.dumps({**state, **ranked, "step": step}) + "\n"


def read_state(path: Path) -> dict[str, Any]:
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if not isinstance(state, dict) or "step" not in state:
        raise ValueError("state.json does not say its step")
    return state


def _os_error(error: Exception, folder: Path) -> Exception:
    """The system's error behind one of the safetensors library, which tells it in the text alone."""
    if isinstance(error, OSError):
        code = error.errno
    else:
        match = re.search(r"os error (\d+)", str(error))
        code = int(match[1]) if match else None
    return error if code is None else OSError(code, os.strerror(code), str(folder))
