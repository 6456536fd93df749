"""Open and read files by path or by URL (s3://, gs://, hf://, memory://, ...).

A `Location` is small, hashable and picklable. An open file belongs to one thread of one process.
"""

import functools
import json
import os
import re
import threading
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from trainkit.data.files import RemotePath, location
from trainkit.errors import UserError, one_line
from trainkit.packages import load_package

KINDS = {
    ".zip": "zip",
    ".tar": "tar",
    ".tar.gz": "tar.gz",
    ".tgz": "tar.gz",
    ".parquet": "parquet",
    ".h5": "hdf5",
    ".hdf5": "hdf5",
}
READ_AHEAD_BYTES = 4 * 2**20  # fetched at once from a remote file: members of an archive are stored in sequence
OPEN_FILES = 16  # kept open by a thread
# What stores call the version of a file; the first one that a store has is used.
VERSION_KEYS = ("ETag", "etag", "blob_id", "md5Hash", "content_md5", "crc32c", "mtime", "LastModified", "updated")


class Location(NamedTuple):
    """A file: local path or URL, and `--storage_options` as JSON text (libraries would change a shared dict)."""

    path: str
    storage_options: str = "{}"
    version: str = ""  # time of change, or etag


class DataFile(NamedTuple):
    """One file that holds images; `name` is its path below what all files have in common."""

    name: str
    size: int
    location: Location

    @property
    def kind(self) -> str | None:
        return kind_of(self.name)

    @property
    def stamp(self) -> str:
        return f"{self.size} {self.location.version}"


def is_url(path: str) -> bool:
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", path) is not None


def kind_of(name: str) -> str | None:
    """zip, tar, tar.gz, parquet, hdf5, or None."""
    return next((kind for ending, kind in KINDS.items() if name.lower().endswith(ending)), None)


def read_storage_options(text: str | None) -> str:
    """`--storage_options` checked, as JSON text. Raises `UserError`."""
    place = location("memory://", text)
    assert isinstance(place, RemotePath)  # as for every URL
    return place.storage_options


def version_of(info: dict) -> str:
    """What a store calls the version of a file; empty if it has none."""
    return next((f"{info[key]}".strip('"') for key in VERSION_KEYS if info.get(key)), "")


def filesystem_of(url: str, storage_options: str, flag: str) -> tuple[Any, str]:
    core = load_package("fsspec.core", f"{flag} {url}")
    try:
        return core.url_to_fs(url, **json.loads(storage_options))
    except ImportError as error:
        raise UserError(f"{flag} {url}: {error}") from None
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{flag} {url} cannot be opened ({reason}); check the address and --storage_options") from None


def open_file(location: Location) -> BinaryIO:
    """A seekable file, for the caller alone. Raises what the file system does."""
    if not is_url(location.path):
        return open(location.path, "rb")
    filesystem, path = filesystem_of(location.path, location.storage_options, "--train_data_dir")
    return filesystem.open(path, "rb", block_size=READ_AHEAD_BYTES)


def read_whole(location: Location) -> bytes:
    if not is_url(location.path):
        return Path(location.path).read_bytes()
    filesystem, path = filesystem_of(location.path, location.storage_options, "--train_data_dir")
    return filesystem.cat_file(path)


def read_range(location: Location, start: int, length: int) -> bytes:
    """`length` bytes from `start`, fewer where the file ends."""
    file = opened(open_file, location)
    file.seek(start)
    return file.read(length)


def opened(function: Any, location: Location) -> Any:
    """`function(location)`, kept by this thread of this process: an open file does not survive a fork."""
    return _opened(function, location, os.getpid(), threading.get_ident())


@functools.lru_cache(maxsize=OPEN_FILES)
def _opened(function: Any, location: Location, process: int, thread: int) -> Any:
    return function(location)
