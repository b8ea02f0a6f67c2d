"""Input files on object stores beside those on disk: S3, Google Cloud Storage, and what else fsspec reads.

Credentials and endpoints are those of the store's own tools: the environment, profiles, roles of the machine. Nothing
of them stands in a recipe.
"""

import io
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from .errors import CorpusError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_BLOCK_BYTES = 8 << 20
_ERRORS = {
    "aiohttp": ("ClientError",),
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "gcsfs.retry": ("HttpError",),
    "google.auth.exceptions": ("GoogleAuthError",),
}
"""By module; what is not imported has raised nothing."""
_PACKAGE_OF = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}


class RemoteStatus(NamedTuple):
    """What `RemoteFile.stat` tells, under the names of `os.stat`."""

    st_size: int


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of an object store as it was listed, with what readers use of `pathlib.Path`; cheap to send to workers.

    `version` is what the store itself tells versions of a file apart by.
    """

    url: str
    size: int
    version: str

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part of its address."""
        return self.url.rpartition("/")[2]

    def stat(self) -> RemoteStatus:
        """Its size."""
        return RemoteStatus(self.size)

    def resolve(self) -> "RemoteFile":
        """Itself."""
        return self

    def open(self, mode: str = "rb") -> BinaryIO:
        """A stream that can seek; its reads raise what `network_errors` lists and OSError."""
        system, path = file_system(self.url)
        # A buffered reader has all that files on disk have, such as `readlines` of about so many bytes.
        return io.BufferedReader(system.open(path, mode, block_size=_BLOCK_BYTES, cache_type="readahead"))


InputFile = Path | RemoteFile


def is_url(name: object) -> bool:
    """Whether a name is an address with a scheme, such as s3://bucket/corpus."""
    return isinstance(name, str) and _URL.match(name) is not None


def version_of(file: InputFile) -> str:
    """What changes when a file does: its time of modification, or the store's version."""
    return file.version if isinstance(file, RemoteFile) else str(file.stat().st_mtime_ns)


def file_system(url: str) -> tuple[Any, str]:
    """Returns the fsspec file system of an address, and the path in it.

    Raises CorpusError for a scheme that nothing reads, and for a missing package.
    """
    scheme = url.partition("://")[0].lower()
    package = _PACKAGE_OF.get(scheme, "fsspec")
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(url)
    except ImportError as error:
        raise CorpusError(f'{scheme}:// needs {package}: pip install "redwhale[cloud]"') from error
    except ValueError as error:
        raise CorpusError(f"cannot read {url!r}: {error}") from error


def find_remote(pattern: str) -> list[RemoteFile]:
    """Returns the file at an address, the files below it, or those that it matches as a glob, sorted by address.

    A glob gives the files below the folders that it matches too. Hidden files are left out. Raises CorpusError when the
    store cannot be read.
    """
    system, path = file_system(pattern)
    try:
        system.invalidate_cache()
        if any(character in path for character in "*?["):
            found = system.glob(path, detail=True)
            for folder in [name for name, info in found.items() if info["type"] == "directory"]:
                found |= system.find(folder, detail=True)
        else:
            found = system.find(path, detail=True)
    except (OSError, *network_errors()) as error:
        raise unreadable(pattern, error) from error
    # No part behind the bucket, the root of a glob or a folder, may be hidden.
    depth = len(re.split(r"[*?\[]", path)[0].rstrip("/").split("/"))
    return [
        RemoteFile(system.unstrip_protocol(name), int(info["size"]), _version(info))
        for name, info in sorted(found.items())
        if info["type"] == "file" and not any(part.startswith(".") for part in name.split("/")[depth:])
    ]


def network_errors() -> tuple[type[Exception], ...]:
    """Errors beside OSError that reading from the stores in use can raise."""
    imported = [(sys.modules[module], names) for module, names in _ERRORS.items() if module in sys.modules]
    return tuple(getattr(module, name) for module, names in imported for name in names)


def unreadable(name: object, error: Exception) -> CorpusError:
    """Returns the error for a file that the system or the network does not give."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return CorpusError(f"cannot read {str(name)!r}: {reason}")


def _version(info: dict[str, Any]) -> str:
    """The entity tag, generation or time of a listed file, whichever its store has."""
    for key in ("ETag", "generation", "etag", "mtime", "created"):
        if info.get(key):
            return f"{key} {info[key]}".replace('"', "")
    return ""
