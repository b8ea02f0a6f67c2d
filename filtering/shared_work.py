"""A work folder for machines that share no file system: each has its own, and files pass through an object store."""

import contextlib
import hashlib
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .errors import CorpusError
from .storage import file_system, network_errors, unreadable
from .work import WorkFolder, temporary_name

_THREADS = 8


class SharedWorkFolder(WorkFolder):
    """The work folder of the process that runs the filter; a worker that it is sent to has a folder of its own.

    Files are written once, and have their names when they are whole, here and on the store. A worker's folder lies
    among its machine's temporary files; `forget` deletes it.

    Args:
        path: of this process.
        url: of the store's folder; what another run left in it goes.

    Raises CorpusError, also from its methods, for a store that cannot be used, and a folder that holds other files.
    """

    def __init__(self, path: Path, url: str, run: str = ""):
        super().__init__(path)
        self.url, self._run = url, run
        self._gathered: set[str] = set()
        self._system, root = file_system(url)
        self._root = root.rstrip("/")

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return _of_this_machine, (self.url, self._run)

    def open(self, fingerprint: dict[str, Any]) -> None:
        """Makes the folder here and on the store; what another run left in either goes."""
        super().open(fingerprint)
        described = (self.path / "run.json").read_bytes()
        with self._store():
            try:
                there = self._system.cat_file(f"{self._root}/run.json")
            except FileNotFoundError:
                there = b""
            if not there.startswith(b'{"format":') and self._listed("*"):
                raise CorpusError(f"exchange = {self.url!r} holds files of something else: name a folder that is empty")
            if there != described:
                self._empty_store()
                self._system.pipe_file(f"{self._root}/run.json", described)
        self._run = hashlib.sha256(self.url.encode() + described).hexdigest()[:16]

    def remove(self) -> None:
        """Deletes the folder and the store's."""
        super().remove()
        with self._store():
            self._empty_store()

    def forget(self) -> None:
        """Deletes the folder of a worker."""
        shutil.rmtree(self.path, ignore_errors=True)

    def find(self, name: str) -> Path | None:
        """Returns the path of a file of the run, fetched where it is not here yet, or None where there is no such."""
        path = self.path / name
        if path.exists():
            return path
        temporary = temporary_name(path)
        try:
            with self._store():
                self._system.get_file(f"{self._root}/{name}", str(temporary))
        except FileNotFoundError:
            temporary.unlink(missing_ok=True)
            return None
        temporary.replace(path)
        return path

    def keep(self, path: Path) -> None:
        """Sends a file to the store."""
        with self._store():
            self._system.put_file(str(path), f"{self._root}/{path.relative_to(self.path).as_posix()}")

    def gather(self, part: str) -> None:
        """Fetches all files of a sub-folder that are not here yet."""
        names = [f"{part}/{name}" for name in self._listed(f"{part}/*")]
        with ThreadPoolExecutor(_THREADS) as pool:
            for _ in pool.map(self.find, names):
                pass
        self._gathered.add(part)

    def shards(self, unit: int) -> list[str]:
        """Names of the shards of a unit that are measured, in order."""
        if "measured" in self._gathered:
            return super().shards(unit)
        return sorted(name.removesuffix(".parquet") for name in self._listed(f"measured/{unit:07d}-*.parquet"))

    def _listed(self, pattern: str) -> list[str]:
        with self._store():
            self._system.invalidate_cache()
            return [name.rpartition("/")[2] for name in self._system.glob(f"{self._root}/{pattern}")]

    def _empty_store(self) -> None:
        self._system.invalidate_cache()
        if self._system.find(self._root):
            self._system.rm(self._root, recursive=True)

    @contextlib.contextmanager
    def _store(self) -> Any:
        """Errors of the store as CorpusError; what is not there is told as it is."""
        try:
            yield
        except FileNotFoundError:
            raise
        except (OSError, *network_errors()) as error:
            if isinstance(error, OSError) and error.filename is not None:
                raise  # of the local disk
            raise unreadable(self.url, error) from error


def _of_this_machine(url: str, run: str) -> SharedWorkFolder:
    # Machines of a cluster that is simulated on one have a folder each too.
    ray = sys.modules.get("ray")
    machine = ray.get_runtime_context().get_node_id() if ray is not None and ray.is_initialized() else "local"
    path = Path(tempfile.gettempdir()) / f"redwhale-{run}-{machine[:16]}"
    folder = SharedWorkFolder(path, url, run)
    folder.make()
    return folder
