"""Folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Give a staging folder to fill, and let it take the place of `folder`, synced to disk, once the block ends well.

    A crash at any moment leaves the old `folder`, its `.replaced` copy, or the new one, each whole.
    """
    folder = Path(folder)
    staging = folder.with_name(folder.name + ".writing")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        for path in (*staging.iterdir(), staging):
            fsync(path)
    except BaseException:
        # A partial copy of a large model must not keep the disk full.
        shutil.rmtree(staging, ignore_errors=True)
        raise
    replaced = folder.with_name(folder.name + ".replaced")
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)  # left over where an earlier write was killed
        folder.rename(replaced)
    staging.rename(folder)
    fsync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def fsync(path: Path) -> None:
    """Force a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
