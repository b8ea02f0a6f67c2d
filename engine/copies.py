"""Copies of a finished step on an object store: published from the run folder, fetched by machines that train.

An object store has no rename, so a copy is whole when its `manifest.json` is there: it is deleted first and written
last. Files keep the checksums that the step's manifest has of them, and a fetched file gets its name once they agree.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from ..filtering.storage import RemoteFile, file_system, is_url, network_errors
from .errors import RunError
from .run_folder import MANIFEST, RunFolder, read_manifest, sha256_file, write_json

_CHUNK_BYTES = 8 << 20
_THREADS = 8
_PROGRESS = "uploaded.json"
"""In the folder of whoever publishes: checksums of the files that are already there, by name."""

OnBytes = Callable[[int], object]


def publish(step: Path, url: str, scratch: Path, on_bytes: OnBytes = lambda size: None) -> int:
    """Copy the outputs of a finished step to an address, its manifest last.

    Args:
        step: the step's folder, with its manifest.
        url: such as s3://bucket/solar/pack; what another copy of a step left there goes.
        scratch: folder that remembers what is copied, so that an interrupted call goes on.
        on_bytes: called with the bytes that were copied since the last call; they sum to the outputs' sizes.

    Returns:
        Bytes of all outputs.

    Raises:
        RunError: for a step that is not finished, or an address that cannot be written.
        CorpusError: for an address that no installed package understands.
    """
    manifest = read_manifest(step)
    if manifest is None:
        raise RunError(f"{step} has no {MANIFEST}: run the step first")
    system, root = _place(url)
    progress = scratch / _PROGRESS
    try:
        done = json.loads(progress.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        done = {}
    outputs = manifest["outputs"]
    with _failing(f"cannot write {url!r}"):
        system.invalidate_cache()
        there = {name.removeprefix(f"{root}/"): info["size"] for name, info in _listed(system, root).items()}
        old = _remote_manifest(system, root) if MANIFEST in there else {"outputs": {}}
        if MANIFEST in there:
            system.rm_file(f"{root}/{MANIFEST}")
        for name in sorted(old["outputs"].keys() & there.keys() - outputs.keys()):
            system.rm_file(f"{root}/{name}")

        def copy(name: str) -> str:
            recorded = outputs[name]
            if (done.get(name), there.get(name)) != (recorded["sha256"], recorded["bytes"]):
                system.put_file(str(step / name), f"{root}/{name}")
            on_bytes(recorded["bytes"])
            return name

        for name in _in_threads(copy, outputs):
            done[name] = outputs[name]["sha256"]
            write_json(progress, done)
        system.pipe_file(f"{root}/{MANIFEST}", (step / MANIFEST).read_bytes())
    return sum(recorded["bytes"] for recorded in outputs.values())


def fetch(url: str, folder: Path, on_bytes: OnBytes = lambda size: None) -> dict[str, Any]:
    """Copy what `publish` wrote into a local folder, compare every checksum, and write the manifest last.

    An interrupted call goes on where it stopped, inside of a file too.

    Args:
        url: of a copy.
        folder: made when missing; a step's folder such as runs/solar/pack makes the run go on from there.
        on_bytes: called with the bytes that are there since the last call; they sum to the outputs' sizes.

    Returns:
        The manifest.

    Raises:
        RunError: for a copy that is incomplete or damaged, a folder that holds another step's files, or one that
            another process fetches into.
        CorpusError: for an address that no installed package understands.
    """
    system, root = _place(url)
    with _failing(f"cannot read {url!r}"):
        system.invalidate_cache()
        try:
            manifest = _remote_manifest(system, root)
        except FileNotFoundError:
            raise RunError(f"{url} has no {MANIFEST}: nothing was published there, or not to its end") from None
        here = read_manifest(folder)
        if here is not None and here["outputs"] != manifest["outputs"]:
            raise RunError(f"{folder} holds another {here['step']} than {url}: delete it, or give another folder")

        def copy(name: str) -> None:
            path, recorded = folder / name, manifest["outputs"][name]
            # Without a manifest the file may be of an interrupted copy of something older.
            if _has_size(path, recorded) and (here is not None or sha256_file(path) == recorded["sha256"]):
                on_bytes(recorded["bytes"])
            else:
                _fetch_file(system, f"{root}/{name}", path, recorded, on_bytes)

        with RunFolder(folder).locked():
            for _ in _in_threads(copy, manifest["outputs"]):
                pass
    write_json(folder / MANIFEST, manifest)
    return manifest


def published_files(step: Path, url: str) -> dict[str, RemoteFile]:
    """The outputs of a finished step as `publish` left them at an address, by name.

    Raises:
        RunError: if the copy there is not of what the step's folder holds.
        CorpusError: for an address that no installed package understands.
    """
    manifest = read_manifest(step)
    system, root = _place(url)
    with _failing(f"cannot read {url!r}"):
        try:
            there = _remote_manifest(system, root)
        except FileNotFoundError:
            there = None
    if manifest is None or there is None or there["outputs"] != manifest["outputs"]:
        raise RunError(f"{url} is no copy of {step} as it is now: run `redwhale {step.name}` to publish it")
    return {
        name: RemoteFile(f"{url.rstrip('/')}/{name}", recorded["bytes"], recorded["sha256"])
        for name, recorded in manifest["outputs"].items()
    }


def _fetch_file(system: Any, remote: str, path: Path, recorded: Mapping[str, Any], on_bytes: OnBytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".fetching")
    if partial.exists() and partial.stat().st_size > recorded["bytes"]:
        partial.unlink()
    with open(partial, "ab") as file:
        resumed = file.tell()
        on_bytes(resumed)
        while (begin := file.tell()) < recorded["bytes"]:
            data = system.cat_file(remote, start=begin, end=min(begin + _CHUNK_BYTES, recorded["bytes"]))
            if not data:
                break
            file.write(data)
            on_bytes(len(data))
        file.flush()
        os.fsync(file.fileno())
    if sha256_file(partial) == recorded["sha256"]:
        partial.rename(path)
        return
    on_bytes(-partial.stat().st_size)
    partial.unlink()
    if not resumed:
        raise RunError(f"{remote} does not match its checksum: it is damaged, publish the step again")
    _fetch_file(system, remote, path, recorded, on_bytes)


def _has_size(path: Path, recorded: Mapping[str, Any]) -> bool:
    return path.exists() and path.stat().st_size == recorded["bytes"]


def _place(url: str) -> tuple[Any, str]:
    if not is_url(url):
        raise RunError(f"{url!r} is no address with a scheme, such as s3://bucket/folder")
    system, root = file_system(url)
    return system, root.rstrip("/")


def _listed(system: Any, root: str) -> dict[str, dict[str, Any]]:
    try:
        return system.find(root, detail=True)
    except FileNotFoundError:
        return {}


def _remote_manifest(system: Any, root: str) -> dict[str, Any]:
    try:
        manifest = json.loads(system.cat_file(f"{root}/{MANIFEST}"))
        # Names come from outside: none may lead out of the folder.
        names = [Path(name) for name in manifest["outputs"]]
        if any(name.is_absolute() or ".." in name.parts for name in names):
            raise ValueError("a name leads out of the folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{root}/{MANIFEST} is no manifest of a step ({error})") from None
    return manifest


def _in_threads(function: Callable[[str], Any], names: Mapping[str, Any]) -> Iterator[Any]:
    """Results as they come; after an error nothing new begins."""
    pool = ThreadPoolExecutor(_THREADS)
    try:
        for future in as_completed([pool.submit(function, name) for name in names]):
            yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _failing(what: str) -> Iterator[None]:
    """Errors of the store as one sentence; those of the local disk are told as they are."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise RunError(f"{what}: {error.strerror or error}") from error
    except network_errors() as error:
        raise RunError(f"{what}: {error}") from error
