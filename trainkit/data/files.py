"""Files of prepared data in a local folder or at an fsspec URL such as s3://bucket/set.

A local file is read by memory map, and renamed when complete. An object store has no rename and needs none: an object
appears only when its upload is complete.
"""

import contextlib
import errno
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from trainkit.atomic import TEMPORARY_PREFIX, replacing
from trainkit.errors import UserError, one_line
from trainkit.packages import load_package

CONNECTIONS = 32  # to an object store at a time: each request takes tens of milliseconds
HEAD_BYTES = 2**16  # of an object, which usually contain its schema


@dataclass(frozen=True)
class RemotePath:
    """A folder or an object at an fsspec URL. It can be pickled; every process opens its own connection."""

    url: str
    storage_options: str = "{}"  # JSON

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(f"{self.url.rstrip('/')}/{name}", self.storage_options)

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return self.url.rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> "RemotePath":
        return RemotePath(self.url.rstrip("/").rpartition("/")[0], self.storage_options)

    @property
    def stem(self) -> str:
        return self.name.rpartition(".")[0] or self.name

    def connect(self) -> tuple[Any, str]:
        """Return the fsspec file system and the path in it. fsspec keeps one connection for the same options."""
        fsspec = load_package("fsspec", self.url)
        try:
            return fsspec.core.url_to_fs(self.url, **json.loads(self.storage_options))
        except ImportError as error:
            raise UserError(f"{self.url}: {one_line(error)} (pip install it)") from None
        except ValueError as error:
            raise UserError(f"{self.url} is not a URL that fsspec knows ({error}); give s3://, gs://, ...") from None


def cache_root(cache_dir: str | None) -> Path:
    """Return the cache folder: `--cache_dir`, else $TRAINKIT_CACHE, else ~/.cache/trainkit."""
    return Path(cache_dir or os.environ.get("TRAINKIT_CACHE") or "~/.cache/trainkit").expanduser()


def location(where: "str | Path | RemotePath", storage_options: str | None = None) -> "Path | RemotePath":
    """Return a path, or for a URL a `RemotePath` with `--storage_options` (JSON). Raises `UserError`."""
    if not isinstance(where, str) or "://" not in where:
        return where if isinstance(where, RemotePath) else Path(where)
    if where.startswith(("file://", "local://")):
        return Path(where.partition("://")[2])
    try:
        options = json.loads(storage_options or "{}")
    except ValueError:
        options = None
    if not isinstance(options, dict):
        example = '\'{"endpoint_url": "https://host:9000"}\''
        raise UserError(f"--storage_options is not a JSON object; write for example {example}")  # it may hold keys
    return RemotePath(where, json.dumps(options, sort_keys=True))


def exists(path: Path | RemotePath) -> bool:
    """Return whether the file or folder exists."""
    if isinstance(path, Path):
        return path.exists()
    with _remote(path) as (fs, key):
        return fs.exists(key)


def size(path: Path | RemotePath) -> int:
    """Return the size in bytes. Raises FileNotFoundError."""
    if isinstance(path, Path):
        return path.stat().st_size
    with _remote(path) as (fs, key):
        return fs.size(key)


def sizes(folder: Path | RemotePath) -> dict[str, int]:
    """Return the names in a folder, in no order, with their sizes in bytes; empty if there is no folder."""
    try:
        if isinstance(folder, Path):
            return _local_sizes(folder)
        with _remote(folder) as (fs, key):
            found = fs.ls(key, detail=True)
    except FileNotFoundError:
        return {}
    prefix = f"{key.rstrip('/')}/"
    named = ((item["name"].rstrip("/"), item["size"] or 0) for item in found)
    return {name.rpartition("/")[2]: size for name, size in named if f"{name}/" != prefix}


def _local_sizes(folder: Path) -> dict[str, int]:
    found = {}
    with os.scandir(folder) as items:
        for item in items:
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile: a temporary file of another process
                found[item.name] = item.stat().st_size
    return found


def read_text(path: Path | RemotePath) -> str:
    """Read UTF-8 text. Raises OSError, for example FileNotFoundError."""
    if isinstance(path, Path):
        return path.read_text(encoding="utf-8")
    with _remote(path) as (fs, key):
        return fs.cat_file(key).decode("utf-8")


def open_stream(path: Path | RemotePath) -> pa.RecordBatchStreamReader:
    """Open an Arrow stream, mapped into memory or fetched whole. Raises OSError or pa.ArrowInvalid."""
    if isinstance(path, Path):
        return pa.ipc.open_stream(pa.memory_map(str(path)))
    with _remote(path) as (fs, key):
        return pa.ipc.open_stream(fs.cat_file(key))


def read_schema(path: Path | RemotePath) -> pa.Schema:
    """Read the schema of an Arrow stream, and no more of the file."""
    if isinstance(path, RemotePath):
        with _remote(path) as (fs, key):
            head = fs.cat_file(key, 0, HEAD_BYTES)
        with contextlib.suppress(OSError, pa.ArrowInvalid):  # the schema is longer: it lists many rejected files
            return pa.ipc.read_schema(pa.py_buffer(head))
    with open_stream(path) as stream:
        return stream.schema


def for_each(function: Callable, paths: Sequence[Path | RemotePath]) -> Iterator:
    """`map`, with many requests at a time if the paths are remote."""
    if not paths or isinstance(paths[0], Path):
        yield from map(function, paths)
        return
    with ThreadPoolExecutor(CONNECTIONS) as threads:
        yield from threads.map(function, paths)


@contextlib.contextmanager
def written(path: Path | RemotePath) -> Iterator[Path]:
    """Yield a local file to write, which appears at `path` when complete."""
    if isinstance(path, Path):
        with replacing(path) as temporary:
            yield temporary
        return
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder, path.name)
        yield temporary
        with _remote(path) as (fs, key):
            fs.put_file(str(temporary), key)


def fetch(path: RemotePath, copy: Path) -> None:
    """Copy an object to a local file."""
    with written(copy) as temporary, _remote(path) as (fs, key):
        fs.get_file(key, str(temporary))


def is_temporary(name: str) -> bool:
    """Return whether the name is one of `written` for an unfinished file, which a killed process leaves behind."""
    return re.fullmatch(rf"{re.escape(TEMPORARY_PREFIX)}[0-9a-f]{{12}}-.+", name) is not None


def write_text(path: Path | RemotePath, content: str) -> None:
    with written(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


def write_json(path: Path | RemotePath, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=True) + "\n")


def make_folder(folder: Path | RemotePath) -> None:
    """Create a folder; an object store has no folders."""
    if isinstance(folder, Path):
        folder.mkdir(parents=True, exist_ok=True)


def delete(path: Path | RemotePath) -> None:
    """Delete a file if it exists."""
    if isinstance(path, Path):
        path.unlink(missing_ok=True)
        return
    with contextlib.suppress(FileNotFoundError), _remote(path) as (fs, key):
        fs.rm_file(key)


def remove_empty_folder(folder: Path | RemotePath) -> None:
    """Remove a folder if it exists and is empty."""
    if isinstance(folder, Path):
        with contextlib.suppress(OSError):
            folder.rmdir()
    elif not sizes(folder):
        with contextlib.suppress(FileNotFoundError), _remote(folder) as (fs, key):
            fs.rm(key, recursive=True)


@contextlib.contextmanager
def _remote(path: RemotePath) -> Iterator[tuple[Any, str]]:
    """Yield the file system, without cached listings, and the key; its errors become OSErrors with the path."""
    fs, key = path.connect()
    fs.invalidate_cache()
    try:
        yield fs, key
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, one_line(error), str(path)) from None
    except pa.ArrowException:
        raise
    except Exception as error:  # of botocore, aiohttp, ...
        reason = one_line(error)
        raise OSError(errno.EIO, reason, str(path)) from None
