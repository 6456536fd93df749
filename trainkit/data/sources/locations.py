"""Files by path or by URL (s3://, gs://, hf://, memory://, ...): found, opened, read by a range of bytes.

A location is small, hashable and picklable; whatever is open belongs to one thread of one process.
"""

import errno
import functools
import itertools
import json
import os
import re
import threading
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from trainkit.data.files import location
from trainkit.data.sources.entries import IMAGE_EXTENSIONS, ReadOptions
from trainkit.data.sources.metadata import METADATA_NAMES
from trainkit.data.sources.splits import readme_data_files
from trainkit.errors import UserError
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
READ_AHEAD_BYTES = 4 * 2**20  # fetched at once from a remote file: members of an archive lie side by side
LFS_POINTER = b"version https://git-lfs"
MOST_STRAY_IMAGES = 20  # previews and assets next to tables
MOST_BESIDE_ARCHIVES = 3
ENOUGH_IMAGES = 1000  # without a table or archive among them, it is a folder of images
OPEN_FILES = 16  # kept open by a thread
MAX_BRACE_NAMES = 1_000_000
# What stores call the mark of a file's version; the first one that a store has is taken.
VERSION_KEYS = ("ETag", "etag", "blob_id", "md5Hash", "content_md5", "crc32c", "mtime", "LastModified", "updated")


class Location(NamedTuple):
    """A file: local path or URL, `--storage_options` as JSON (parsed anew at every use: libraries change theirs)."""

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
    return location("memory://", text).storage_options


class FoundFiles(NamedTuple):
    """Data files, and what lies beside them in their folder: metadata files and stray images."""

    files: list[DataFile]
    folder: Path | None = None
    metadata: tuple[Path, ...] = ()
    images: tuple[str, ...] = ()

    def patterns(self, options: ReadOptions) -> dict[str, list[str]] | None:
        """The files of each split by the README of the folder, if it says so."""
        return None if self.folder is None else readme_data_files(self.folder, options.config)


def find_files(given: str, storage_options: str, flag: str) -> FoundFiles | None:
    """What `given` names: one file, several (braces, `*`), or all in a folder, sorted by name.

    None for a local folder of images. A remote folder of images gives its files. Raises `UserError` naming `flag`.
    """
    if given.startswith("file://"):
        given = given.removeprefix("file://")
    names = [given] if not is_url(given) and os.path.exists(given) else expand_braces(given)
    try:
        if is_url(given):
            found = FoundFiles(_find_remote(names, storage_options, flag))
        elif len(names) == 1 and os.path.isdir(given):
            found = _find_local(Path(given), storage_options, flag)
        elif len(names) > 1 or any(sign in given for sign in "*?[") or kind_of(given):
            files = _local_files(names, storage_options, flag)
            folders = sorted({Path(file.location.path).parent for file in files})
            found = FoundFiles(files, metadata=_metadata_in(folders) if len(folders) == 1 else ())
        else:
            found = None
    except OSError as error:
        raise UserError(f"{flag} {error.filename or given}: {error.strerror or error}; it must be readable") from None
    kinds = {file.kind for file in found.files} - {None} if found else set()
    if len(kinds) > 1 and not kinds <= {"zip", "tar", "tar.gz"}:
        raise UserError(f"{flag} {given} holds {' and '.join(sorted(kinds))} files; give one kind, as in '*.parquet'")
    return found


def expand_braces(pattern: str) -> list[str]:
    """`a-{000..002}.tar` -> three names, `{a,b}.zip` -> two. Raises `UserError` where there are too many."""
    parts = re.split(r"\{(\d+\.\.\d+|[^{}]*,[^{}]*)\}", pattern)
    choices, count = [], 1
    for position, part in enumerate(parts):
        if position % 2 == 0:
            choices.append([part])
            continue
        first, dots, last = part.partition("..")
        if dots and first.isdigit() and last.isdigit():
            width = len(first) if first.startswith("0") else 0
            choices.append(f"{number:0{width}d}" for number in range(int(first), int(last) + 1))
            count *= max(0, int(last) - int(first) + 1)
        else:
            choices.append(part.split(","))
            count *= len(choices[-1])
    if not 0 < count <= MAX_BRACE_NAMES:
        raise UserError(f"--train_data_dir {pattern} stands for {count:,} files; give 1 to {MAX_BRACE_NAMES:,}")
    return ["".join(name) for name in itertools.product(*choices)]


def _local_files(names: list[str], storage_options: str, flag: str) -> list[DataFile]:
    paths = []
    for name in names:
        parent = Path(name).parent
        found = [Path(name)] if os.path.exists(name) else sorted(_glob(parent, Path(name).name))
        if not found:
            raise UserError(f"{flag} {name} does not exist; give files that do, or a folder of images")
        paths += found
    unknown = next((path for path in paths if kind_of(path.name) is None), None)
    if unknown:
        raise UserError(f"{flag} {unknown} is none of {', '.join(KINDS)}; give such files, or a folder of images")
    _refuse_pointers(paths, flag)
    return _named([(path.absolute().as_posix(), *_local_stamp(path)) for path in paths], storage_options)


def _glob(folder: Path, pattern: str) -> list[Path]:
    if any(sign in str(folder) for sign in "*?["):
        return [path for above in _glob(folder.parent, folder.name) for path in above.glob(pattern)]
    return list(folder.glob(pattern))


def _find_local(folder: Path, storage_options: str, flag: str) -> FoundFiles | None:
    """The archives or tables of a folder; None if it holds images instead.

    A few pictures beside tables or archives (previews, assets) are not the dataset. Raises `UserError` for many of
    both, since either reading would lose the other.
    """
    found, images = [], []
    for above, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = [name for name in sorted(names) if name[0] != "."]
        images += [Path(above, name) for name in names if os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS]
        found += [Path(above, name) for name in names if kind_of(name) and name not in METADATA_NAMES]
        if len(images) > MOST_STRAY_IMAGES and (found or len(images) > ENOUGH_IMAGES):
            break
    if not found:
        return None
    are_tables = kind_of(found[0].name) in ("parquet", "hdf5")
    if len(images) > (MOST_STRAY_IMAGES if are_tables else max(MOST_BESIDE_ARCHIVES, len(found))):
        raise UserError(
            f"{flag} {folder} holds many image files and {found[0].relative_to(folder)} too: give the image folder or "
            "these files alone, and move the others away"
        )
    _refuse_pointers(found, flag)
    described = [(path.absolute().as_posix(), *_local_stamp(path)) for path in sorted(found)]
    files = _named(described, storage_options)
    start = Path(described[0][0].removesuffix(files[0].name))
    stray = tuple(path.relative_to(folder).as_posix() for path in images)
    return FoundFiles(files, start, _metadata_in(sorted({folder, *(path.parent for path in found)})), stray)


def _refuse_pointers(paths: list[Path], flag: str) -> None:
    """A clone without git-lfs holds small text files under the names of the data."""
    for path in paths:
        if path.is_file() and path.stat().st_size < 1024 and path.read_bytes().startswith(LFS_POINTER):
            raise UserError(f"{flag} {path} is a git-lfs pointer, not the file itself: run `git lfs pull` there")


def _metadata_in(folders: list[Path]) -> tuple[Path, ...]:
    return tuple(path for folder in folders for name in METADATA_NAMES if (path := Path(folder, name)).is_file())


def _local_stamp(path: Path) -> tuple[int, str]:
    stat = path.stat()
    if path.is_fifo():
        raise OSError(errno.EINVAL, "a pipe, which cannot be read twice", str(path))
    return stat.st_size, str(stat.st_mtime_ns)


def _find_remote(names: list[str], storage_options: str, flag: str) -> list[DataFile]:
    filesystem, _ = _filesystem(names[0], storage_options, flag)
    filesystem.invalidate_cache()  # fsspec keeps listings for the life of the process
    found = {}
    try:
        for name in names:
            path = filesystem._strip_protocol(name)
            if any(sign in path for sign in "*?["):
                matches = filesystem.glob(path, detail=True)
            elif filesystem.isdir(path) and not kind_of(path):
                matches = filesystem.find(path, detail=True)
            else:
                matches = {path: filesystem.info(path)}
            if not matches:
                raise FileNotFoundError
            found |= {path: info for path, info in matches.items() if info.get("type") != "directory"}
    except FileNotFoundError:
        raise UserError(f"{flag} {name} does not exist; check the address and --storage_options") from None
    except Exception as error:  # each store raises its own
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"{flag} {name} cannot be read ({reason}); check --storage_options and the network") from None
    described = [
        (filesystem.unstrip_protocol(path), info.get("size") or 0, version_of(info)) for path, info in found.items()
    ]
    files = _named(sorted(described), storage_options)
    if any(_is_image(file.name) for file in files):
        return files
    return [file for file in files if file.kind and not _is_hidden(file.name) and not _is_metadata(file.name)]


def version_of(info: dict) -> str:
    """The mark by which a store tells versions of a file apart."""
    return next((f"{info[key]}".strip('"') for key in VERSION_KEYS if info.get(key)), "")


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS and not _is_hidden(name)


def _is_metadata(name: str) -> bool:
    return name.rpartition("/")[2] in METADATA_NAMES


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _named(described: list[tuple[str, int, str]], storage_options: str) -> list[DataFile]:
    """`described`: address, size, version."""
    folders = {address.rpartition("/")[0] for address, _, _ in described}
    common = os.path.commonprefix([folder + "/" for folder in folders]) if folders else ""
    start = common.rfind("/") + 1
    return [
        DataFile(path[start:], size, Location(path, storage_options, version)) for path, size, version in described
    ]


def _filesystem(url: str, storage_options: str, flag: str) -> tuple[Any, str]:
    core = load_package("fsspec.core", f"{flag} {url}")
    try:
        return core.url_to_fs(url, **json.loads(storage_options))
    except ImportError as error:
        raise UserError(f"{flag} {url}: {error}") from None
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"{flag} {url} cannot be opened ({reason}); check the address and --storage_options") from None


def open_file(location: Location) -> BinaryIO:
    """A seekable file, for the caller alone. Raises what the file system does."""
    if not is_url(location.path):
        return open(location.path, "rb")
    filesystem, path = _filesystem(location.path, location.storage_options, "--train_data_dir")
    return filesystem.open(path, "rb", block_size=READ_AHEAD_BYTES)


def read_whole(location: Location) -> bytes:
    if not is_url(location.path):
        return Path(location.path).read_bytes()
    filesystem, path = _filesystem(location.path, location.storage_options, "--train_data_dir")
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
