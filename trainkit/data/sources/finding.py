"""Find the archives, tables or images that a path, a pattern or a URL names."""

import errno
import itertools
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from trainkit.data.account import Account
from trainkit.data.sources.entries import IMAGE_EXTENSIONS, ReadOptions
from trainkit.data.sources.locations import (
    KINDS,
    DataFile,
    Location,
    filesystem_of,
    is_url,
    kind_of,
    read_whole,
    version_of,
)
from trainkit.data.sources.metadata import METADATA_NAMES
from trainkit.data.sources.splits import choose_split, data_files_of
from trainkit.errors import UserError, one_line

LFS_POINTER, MAX_POINTER_BYTES = b"version https://git-lfs", 1024
MAX_STRAY_IMAGES = 20  # previews and assets next to tables
MAX_NEXT_TO_ARCHIVES = 3
ENOUGH_IMAGES = 1000  # without a table or archive among them, it is a folder of images
MAX_BRACE_NAMES = 1_000_000


class FoundFiles(NamedTuple):
    """Data files, and what is next to them in their folder.

    `prefix`: path from the folder to what the names of all files start from; None for files given one by one.
    `readme`: the text of the folder's README.md. `tables`: of the samples in archives, not read.
    """

    files: list[DataFile]
    prefix: str | None = None
    readme: str | None = None
    metadata: tuple[Path, ...] = ()
    images: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()

    def without_tables_of_archives(self) -> "FoundFiles":
        """img2dataset writes 00000.parquet next to 00000.tar: what the samples in it hold too."""
        stems = {os.path.splitext(file.name)[0] for file in self.files if file.kind == "tar"}
        tables = {
            file.name for file in self.files if file.kind == "parquet" and os.path.splitext(file.name)[0] in stems
        }
        files = [file for file in self.files if file.name not in tables]
        return self._replace(files=files, tables=tuple(sorted(tables)))

    def of_split(
        self, options: ReadOptions, given: str, account: Account, are_images: bool
    ) -> tuple[list[DataFile], bool]:
        """The files of `--dataset_split`, and whether their names say so; else all files. Raises `UserError`."""
        patterns = (
            None
            if self.readme is None
            else data_files_of(self.readme, options.config, f"{given.rstrip('/')}/README.md")
        )
        prefix = self.prefix or ""
        rule = choose_split(
            lambda: (prefix + file.name for file in self.files), options.split, given, account,
            patterns=patterns, are_images=are_images, are_given=self.prefix is None,
            may_be_unsplit=self.files[0].kind not in (None, "parquet"),  # archives and HDF5 files have splits inside
        )  # fmt: skip
        if rule is None:
            return self.files, False
        return [file for file in self.files if rule(prefix + file.name) == options.split], True


def find_files(given: str, storage_options: str, flag: str) -> FoundFiles | None:
    """What `given` names: one file, several (braces, `*`), or all in a folder, sorted by name.

    None for a local folder of images. A remote folder of images gives its files. Raises `UserError` naming `flag`.
    """
    if given.startswith("file://"):
        given = given.removeprefix("file://")
    names = [given] if not is_url(given) and os.path.exists(given) else expand_braces(given)
    found: FoundFiles | None = None
    try:
        if is_url(given):
            found = _find_remote(names, storage_options, flag)
        elif len(names) == 1 and os.path.isdir(given):
            found = _find_local(Path(given), storage_options, flag)
        elif len(names) > 1 or any(sign in given for sign in "*?[") or kind_of(given):
            files = _local_files(names, storage_options, flag)
            folders = sorted({Path(file.location.path).parent for file in files})
            found = FoundFiles(files, metadata=_metadata_in(folders) if len(folders) == 1 else ())
    except OSError as error:
        raise UserError(f"{flag} {error.filename or given}: {error.strerror or error}; it must be readable") from None
    found = found and found.without_tables_of_archives()
    kinds = {file.kind for file in found.files if file.kind is not None} if found else set()
    if len(kinds) > 1 and not kinds <= {"zip", "tar", "tar.gz"}:
        raise UserError(f"{flag} {given} holds {' and '.join(sorted(kinds))} files; give one kind, as in '*.parquet'")
    return found


def expand_braces(pattern: str) -> list[str]:
    """`a-{000..002}.tar` -> three names, `{a,b}.zip` -> two. Raises `UserError` where there are too many."""
    parts = re.split(r"\{(\d+\.\.\d+|[^{}]*,[^{}]*)\}", pattern)
    choices: list[Iterable[str]] = []
    count = 1
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
            words = part.split(",")
            choices.append(words)
            count *= len(words)
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

    A few images next to tables or archives (previews, assets) are not the dataset. Raises `UserError` for many.
    """
    found, images = [], []
    for above, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = [name for name in sorted(names) if name[0] != "."]
        images += [Path(above, name) for name in names if os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS]
        found += [Path(above, name) for name in names if kind_of(name) and name not in METADATA_NAMES]
        if len(images) > MAX_STRAY_IMAGES and (found or len(images) > ENOUGH_IMAGES):
            break
    if not found:
        return None
    stray = tuple(path.relative_to(folder).as_posix() for path in images)
    _refuse_mixture([path.relative_to(folder).as_posix() for path in found], stray, f"{flag} {folder}")
    _refuse_pointers(found, flag)
    described = [(path.absolute().as_posix(), *_local_stamp(path)) for path in sorted(found)]
    files, readme = _named(described, storage_options), folder / "README.md"
    return FoundFiles(
        files,
        sorted(found)[0].relative_to(folder).as_posix().removesuffix(files[0].name),
        readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else None,
        _metadata_in(sorted({folder, *(path.parent for path in found)})),
        stray,
    )


def _refuse_mixture(found: list[str], images: Sequence[str], what: str) -> None:
    """Raises `UserError` for many images next to tables or archives: either reading would lose the other."""
    are_tables = kind_of(found[0]) in ("parquet", "hdf5")
    if len(images) > (MAX_STRAY_IMAGES if are_tables else max(MAX_NEXT_TO_ARCHIVES, len(found))):
        hint = "; a table that lists the images is read as metadata.parquet" if are_tables else ""
        raise UserError(
            f"{what} holds many image files and {found[0]} too: give the image folder or these files alone, and move "
            f"the others away{hint}"
        )


def _refuse_pointers(paths: list[Path], flag: str) -> None:
    """A clone without git-lfs holds small text files under the names of the data."""
    for path in paths:
        if path.is_file() and path.stat().st_size < MAX_POINTER_BYTES and path.read_bytes().startswith(LFS_POINTER):
            raise UserError(f"{flag} {path} is a git-lfs pointer, not the file itself: run `git lfs pull` there")


def _metadata_in(folders: list[Path]) -> tuple[Path, ...]:
    return tuple(path for folder in folders for name in METADATA_NAMES if (path := Path(folder, name)).is_file())


def _local_stamp(path: Path) -> tuple[int, str]:
    stat = path.stat()
    if path.is_fifo():
        raise OSError(errno.EINVAL, "a pipe, which cannot be read twice", str(path))
    return stat.st_size, str(stat.st_mtime_ns)


def _find_remote(names: list[str], storage_options: str, flag: str) -> FoundFiles:
    """What URLs name. Raises `UserError`."""
    filesystem, _ = filesystem_of(names[0], storage_options, flag)
    filesystem.invalidate_cache()  # fsspec keeps listings for the life of the process
    found: dict[str, dict] = {}
    folder = None
    try:
        for name in names:
            path = filesystem._strip_protocol(name)
            if any(sign in path for sign in "*?["):
                matches = filesystem.glob(path, detail=True)
            elif filesystem.isdir(path) and not kind_of(path):
                folder = path if len(names) == 1 else None
                matches = filesystem.find(path, detail=True)
            else:
                matches = {path: filesystem.info(path)}
            if not matches:
                raise FileNotFoundError
            found |= {path: info for path, info in matches.items() if info.get("type") != "directory"}
    except FileNotFoundError:
        raise UserError(f"{flag} {name} does not exist; check the address and --storage_options") from None
    except Exception as error:  # each store raises its own
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{flag} {name} cannot be read ({reason}); check --storage_options and the network") from None
    described = [
        (filesystem.unstrip_protocol(path), info.get("size") or 0, version_of(info)) for path, info in found.items()
    ]
    address = None if folder is None else filesystem.unstrip_protocol(folder)
    return _sort_remote(sorted(described), storage_options, address, f"{flag} {names[0]}")


def _sort_remote(
    described: list[tuple[str, int, str]], storage_options: str, folder: str | None, what: str
) -> FoundFiles:
    """The images, archives or tables among the files of a store, as `_find_local` sorts those of a folder."""
    every = _named(described, storage_options)
    readme = next((read_whole(file.location) for file in every if file.name == "README.md"), None)
    found = [file for file in every if file.kind and not _is_hidden(file.name) and not _is_metadata(file.name)]
    images = tuple(file.name for file in every if _is_image(file.name))
    if not found or folder is None and images:
        return FoundFiles(every if images else [], "", _text(readme))
    _refuse_mixture([file.name for file in found], images, what)
    addresses = {file.location.path for file in found}
    files = _named([entry for entry in described if entry[0] in addresses], storage_options)
    for file in files:
        if file.size < MAX_POINTER_BYTES and read_whole(file.location).startswith(LFS_POINTER):
            raise UserError(f"{what}: {file.name} is a git-lfs pointer, not the file itself: upload the data")
    prefix = None if folder is None else found[0].name.removesuffix(files[0].name)
    return FoundFiles(files, prefix, _text(readme), (), images)


def _text(content: bytes | None) -> str | None:
    return None if content is None else content.decode("utf-8", "replace")


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
