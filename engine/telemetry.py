"""What a stage reports while it trains: a file of metrics, and TensorBoard or Weights & Biases if asked for."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import secrets
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from .errors import TrainingError

Tracker = Literal["tensorboard", "wandb"]


class Telemetry:
    """Appends to `folder/metrics.jsonl`, one JSON object a line, and passes numbers on to trackers; a context manager.

    TensorBoard's files are in `folder/tensorboard`, those of Weights & Biases in `folder/wandb`, with the id of its run
    in `folder/wandb_run_id`, under which a resumed stage goes on (its project is that of WANDB_PROJECT, or "redwhale").

    Args:
        folder: of the stage.
        trackers: besides the file.
        run_name: what trackers call the stage.

    Raises:
        TrainingError: if the package of a tracker is not installed.

    Example:
        with Telemetry(folder, run_name="solar/1-embed") as telemetry:
            telemetry.resume(position=0, step=0)
            telemetry.log(10, {"loss": 2.5, "validation": {"korean": {"bits_per_byte": 1.1}}})
    """

    def __init__(self, folder: Path, *, trackers: Sequence[Tracker] = (), run_name: str) -> None:
        for tracker in trackers:
            if importlib.util.find_spec(tracker) is None:
                extra = 'pip install "redwhale[track]"' + (" wandb" if tracker == "wandb" else "")
                raise TrainingError(f"the tracker {tracker!r} needs a package that is not installed: {extra}")
        self.folder = Path(folder)
        self.run_name = run_name
        self._wanted = tuple(trackers)
        self._trackers: list[_Tracker] | None = None
        self._next_step: int | None = None
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = open(self.folder / "metrics.jsonl", "ab")  # noqa: SIM115 (closed by close)
        self._drop_torn_line()

    def resume(self, position: int, step: int) -> None:
        """Forget what was logged behind a saved state: its steps are about to be repeated.

        Call it before the first `log`. Weights & Biases keeps the forgotten points, and gets the steps once more.

        Args:
            position: from `position()` when the state was saved; 0 to begin anew.
            step: of the state; 0 to begin anew.
        """
        # Never longer: where lines were lost, zeros would fill the gap.
        self._file.truncate(min(position, self._size()))
        self._drop_torn_line()
        self._next_step = step + 1 if step else 0

    def position(self) -> int:
        """Bytes of the file so far, all of them on the disk: what `resume` takes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._size()

    def log(self, step: int, fields: Mapping[str, Any]) -> None:
        """Append one line.

        Args:
            step: steps done, at which trackers place the numbers.
            fields: JSON values; numbers that are not finite become null, and nested objects go to the trackers under
                names joined by "/".
        """
        trackers = self._opened()
        line = json.dumps(_finite({"step": step, **fields}), ensure_ascii=False, allow_nan=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        numbers = {name: value for name, value in _numbers(fields) if name != "step"}
        for tracker in trackers:
            tracker.log(step, numbers)

    def close(self) -> None:
        """Write everything out; the trackers' too."""
        self._file.close()
        for tracker in self._trackers or ():
            tracker.close()
        self._trackers = None

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _drop_torn_line(self) -> None:
        """Cut off what a killed process began to write."""
        self._file.truncate((self.folder / "metrics.jsonl").read_bytes().rfind(b"\n") + 1)

    def _opened(self) -> list[_Tracker]:
        # Not before the first line: until then, `resume` may say where to go on.
        if self._trackers is None:
            kinds = {"tensorboard": _TensorBoard, "wandb": _WeightsAndBiases}
            self._trackers = [kinds[name](self.folder, self.run_name, self._next_step) for name in self._wanted]
        return self._trackers


class Silence(Telemetry):
    """Reports nothing: the telemetry of every process but the first."""

    def __init__(self) -> None:
        """Nothing is opened."""

    def resume(self, position: int, step: int) -> None:
        """See `Telemetry`."""

    def position(self) -> int:
        """See `Telemetry`."""
        return 0

    def log(self, step: int, fields: Mapping[str, Any]) -> None:
        """See `Telemetry`."""

    def close(self) -> None:
        """See `Telemetry`."""


class _Tracker(Protocol):
    def log(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, folder: Path, run_name: str, next_step: int | None) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        # It hides what earlier files say of this step and later ones.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=next_step)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, folder: Path, run_name: str, next_step: int | None) -> None:
        import wandb  # type: ignore[import-not-found]

        id_file = folder / "wandb_run_id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(8), encoding="utf-8")
        project = os.environ.get("WANDB_PROJECT", "redwhale")
        run_id = id_file.read_text(encoding="utf-8").strip()
        self._run = wandb.init(project=project, name=run_name, id=run_id, resume="allow", dir=str(folder))
        # Its own counter of steps never goes back, as a resumed run has to.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log({**numbers, "step": step})

    def close(self) -> None:
        self._run.finish()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + name, value


class Throughput:
    """Tokens and model FLOPs a second between two log lines, and the time left.

    Args:
        total_tokens: of the whole stage.
        done_tokens: before this process began.
        peak_flops: the device's, as from `device_peak_flops`, for MFU; None where it is not known.
        smoothing: weight of the past, from one log line to the next, in the rate that the time left is computed from.
    """

    def __init__(
        self, total_tokens: int, *, done_tokens: int = 0, peak_flops: float | None = None, smoothing: float = 0.8
    ) -> None:
        self.total_tokens, self.done_tokens = total_tokens, done_tokens
        self.peak_flops, self.smoothing = peak_flops, smoothing
        self._intervals = 0
        self._seconds_per_token = 0.0
        self._last = time.monotonic()

    def restart(self) -> None:
        """Begin to measure here: what came before, such as a validation, is not training."""
        self._last = time.monotonic()

    def update(self, tokens: int, flops: float) -> dict[str, float]:
        """Fields of a log line.

        Args:
            tokens: trained on since the last call.
            flops: model FLOPs of these, as from `training_flops`.

        Returns:
            `tokens_per_second`, `model_flops_per_second`, `mfu` (their share of the peak, if that is known) and
            `eta_seconds`.
        """
        now = time.monotonic()
        seconds, self._last = max(1e-9, now - self._last), now
        self.done_tokens += tokens
        self._intervals += 1
        # The first interval holds compilation and cold caches: the second one replaces it.
        past = self.smoothing if self._intervals > 2 else 0.0
        self._seconds_per_token = past * self._seconds_per_token + (1 - past) * seconds / max(1, tokens)
        fields = {"tokens_per_second": tokens / seconds, "model_flops_per_second": flops / seconds}
        if self.peak_flops is not None:
            fields["mfu"] = flops / seconds / self.peak_flops
        fields["eta_seconds"] = max(0, self.total_tokens - self.done_tokens) * self._seconds_per_token
        return fields


def memory(device: torch.device) -> dict[str, int]:
    """Bytes in use now and at most so far: torch's allocations on a GPU, the process' resident memory on a CPU.

    Returns:
        `memory_bytes` and `peak_memory_bytes`, the latter alone where the system does not tell the former.
    """
    if device.type == "cuda":
        return {
            "memory_bytes": torch.cuda.memory_allocated(device),
            "peak_memory_bytes": torch.cuda.max_memory_allocated(device),
        }
    status = Path("/proc/self/status")
    if status.exists():
        sizes = dict(line.split(":", 1) for line in status.read_text(encoding="ascii").splitlines() if ":" in line)
        now, peak = (int(sizes[name].removesuffix("kB")) * 1024 for name in ("VmRSS", "VmHWM"))
        return {"memory_bytes": now, "peak_memory_bytes": max(now, peak)}
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
