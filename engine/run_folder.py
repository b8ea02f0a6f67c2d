"""Run folders: `runs/NAME/STEP/` with a manifest written last, so that finished work is known and never redone.

A step works in `STEP.partial/`. When it is done its manifest is written there and the folder is renamed
to `STEP/`. A folder that must make room is kept as `STEP.previous/`. A run that is killed between the manifest
and the rename loses nothing: the next one finds the manifest and renames.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from ..filtering import InputFile, RemoteFile
from .errors import RunError

MANIFEST = "manifest.json"
STAGES = "train/stages.json"
"""Names of the stages of the recipe that ran last, in order."""
_STARTED = "started.json"
_MANIFEST_KEYS = {
    *("step", "digest", "finished", "seconds", "config", "inputs", "outputs", "outputs_digest"),
    *("went_in", "came_out", "before", "after", "summary", "versions"),
}
_PACKAGES = ("redwhale", "torch", "numpy", "safetensors", "sentencepiece", "pyarrow", "msgspec")


@dataclass(frozen=True)
class StepResult:
    """What a step hands back for its manifest."""

    summary: dict[str, Any]
    """Everything measured, as JSON values."""
    outputs: Sequence[str]
    """Files, relative to the step's folder, that later steps read; their hashes decide what is out of date."""
    went_in: str
    """One short phrase for the run's table."""
    came_out: str
    scratch: Sequence[str] = ()
    """Folders, relative to the step's, that resuming needs: deleted once the manifest is written."""
    before: float | None = None
    """Loss before the step, where it has one."""
    after: float | None = None


@dataclass
class RunFolder:
    """The folder of one run."""

    path: Path
    _hashes: dict[str, list] = field(default_factory=dict)

    def step(self, name: str) -> StepFolder:
        """The folder of a step; `name` may hold a slash."""
        return StepFolder(self, self.path / name, name)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process.

        Raises:
            RunError: if another process works in the folder.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / ".lock", "w", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(f"{self.path} is in use by another redwhale process; wait for it, or stop it") from None
            yield

    def file_hash(self, path: Path) -> str:
        """SHA-256 of a file; computed again only when its size or modification time has changed."""
        return self.file_hashes([path])[0]

    def file_hashes(self, paths: Iterable[InputFile]) -> list[str]:
        """`file_hash` of many files, in order; what was computed is written down once, at the end.

        Files of an object store are not read for it: theirs is the store's version with the size.
        """
        known, digests, new = self._hash_cache(), [], False
        for path in paths:
            if isinstance(path, RemoteFile):
                digests.append(f"{path.version}, {path.size} bytes")
                continue
            resolved = Path(path).resolve()
            status = resolved.stat()
            stamp = [status.st_size, status.st_mtime_ns]
            entry = known.get(str(resolved))
            if not entry or entry[:2] != stamp:
                entry = known[str(resolved)] = [*stamp, sha256_file(resolved)]
                new = True
            digests.append(entry[2])
        if new:
            write_json(self.path / ".hashes.json", known)
        return digests

    def _hash_cache(self) -> dict[str, list]:
        path = self.path / ".hashes.json"
        if not self._hashes and path.exists():
            # A damaged cache only costs time.
            with contextlib.suppress(ValueError, TypeError):
                self._hashes = dict(json.loads(path.read_text(encoding="utf-8")))
        return self._hashes


@dataclass
class StepFolder:
    """The folder of one step: done, begun, or absent."""

    run: RunFolder
    path: Path
    name: str

    @property
    def partial(self) -> Path:
        """Where the step works until it is done."""
        return self.path.with_name(self.path.name + ".partial")

    def manifest(self) -> dict[str, Any] | None:
        """The manifest of the finished step, or None; raises RunError if it is damaged."""
        return read_manifest(self.path)

    def require(self) -> dict[str, Any]:
        """The manifest; raises RunError if the step has not been done."""
        manifest = self.manifest()
        if manifest is None:
            raise RunError(f"{self.path} does not exist yet: run the step {self.name!r} first, or 'redwhale run'")
        return manifest

    def is_current(self, digest: str) -> bool:
        """Whether the step is done with this digest and its outputs are still whole.

        Raises:
            RunError: if an output has been changed or deleted behind the manifest's back.
        """
        self._complete(digest)
        manifest = self.manifest()
        if manifest is None or manifest["digest"] != digest:
            return False
        for name, recorded in manifest["outputs"].items():
            path = self.path / name
            size = path.stat().st_size if path.exists() else None
            if size != recorded["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes"
                raise RunError(
                    f"{path} {found}, its manifest says {recorded['bytes']} bytes: it is truncated or was changed; "
                    f"delete {self.path} to make it again"
                )
        return True

    def begin(self, digest: str) -> Path:
        """The partial folder to work in: what an interrupted run with the same digest left, or a new one."""
        started = self.partial / _STARTED
        # A partial folder with a manifest is finished work: it is being redone on purpose, or for another digest.
        if read_manifest(self.partial) is not None or not _has_digest(started, digest):
            if self.partial.exists():
                _set_aside(self.partial)
            self.partial.mkdir(parents=True)
            write_json(started, {"digest": digest})
        return self.partial

    def finish(self, digest: str, config: Any, inputs: Mapping[str, str], result: StepResult, seconds: float) -> None:
        """Write the manifest and give the folder its name."""
        outputs = {}
        for name in sorted(result.outputs):
            path = self.partial / name
            outputs[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        manifest = {
            "step": self.name,
            "digest": digest,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(seconds, 3),
            "config": config,
            "inputs": dict(inputs),
            "outputs": outputs,
            "outputs_digest": digest_of({name: output["sha256"] for name, output in outputs.items()}),
            "went_in": result.went_in,
            "came_out": result.came_out,
            "before": result.before,
            "after": result.after,
            "summary": result.summary,
            "scratch": list(result.scratch),
            "versions": _versions(),
        }
        write_json(self.partial / MANIFEST, manifest)
        self._complete(digest)

    def _complete(self, digest: str) -> None:
        """Give a partial folder that has its manifest its name; every line may be the last before a crash."""
        finished = read_manifest(self.partial)
        if finished is None or finished["digest"] != digest:
            return
        for name in finished.get("scratch", ()):
            shutil.rmtree(self.partial / name, ignore_errors=True)
        (self.partial / _STARTED).unlink(missing_ok=True)
        if self.path.exists():
            _set_aside(self.path)
        self.partial.rename(self.path)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest in a step's folder, or None where there is none; raises RunError if it is damaged."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        missing = sorted(_MANIFEST_KEYS - manifest.keys())
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError) as error:
        raise RunError(f"{path} is damaged ({error}); delete {folder} to redo the step") from None
    if missing:
        raise RunError(f"{path} is damaged (it lacks {', '.join(missing)}); delete {folder} to redo the step")
    return manifest


def _has_digest(started: Path, digest: str) -> bool:
    try:
        return json.loads(started.read_text(encoding="utf-8")) == {"digest": digest}
    except (FileNotFoundError, ValueError):
        return False


def _set_aside(path: Path) -> None:
    """Keep a folder that must make room as `NAME.previous`, in place of what was kept before."""
    previous = path.with_name(path.name + ".previous")
    if previous.exists():
        shutil.rmtree(previous)
    path.rename(previous)


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf-8")).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: complete under its name, or not there."""
    staging = path.with_name(path.name + ".writing")
    with open(staging, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    staging.rename(path)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began
