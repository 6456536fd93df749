"""The image files under a folder, and what is known of them before one is opened: size, time, label, caption."""

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

from trainkit.data.vectors import vector_bytes
from trainkit.errors import UserError

IMAGE_EXTENSIONS = frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .webp .bmp .dib .gif .tif .tiff .ppm .pgm .pbm .pnm .jp2 .j2k .avif .tga "
    ".heic .heif".split()  # Pillow reads no HEIF: better rejected by name than passed over in silence
)
SIDECAR_EXTENSIONS = (".txt", ".npy")
METADATA_NAMES = ("metadata.csv", "metadata.jsonl")
CAPTION_COLUMNS = ("text", "caption")
NOTHING_TOLD = (None, None, None)  # label, text, vector


class Entry(NamedTuple):
    """One image file: path relative to the folder (posix), stat, and what is known of it besides the pixels."""

    path: str
    size: int
    mtime_ns: int
    label: str | None = None
    text: str | None = None
    caption_file: tuple[int, int] | None = None  # size and mtime_ns of the NAME.txt beside it
    vector: bytes | None = None  # float32
    vector_file: tuple[int, int] | None = None  # the same as caption_file, of NAME.npy


def list_folder(folder: Path, flag: str, vector_column: str = "vector") -> list[Entry]:
    """Every image file under `folder` (hidden names skipped), sorted by relative path. Opens no image.

    Raises `UserError` naming `flag`.
    """
    if not folder.exists():
        raise UserError(f"{flag} {folder} does not exist; give a folder of images")
    if not folder.is_dir():
        raise UserError(f"{flag} {folder} is a file; give the folder that holds the images")
    try:
        files = _scan(folder)
    except OSError as error:
        raise UserError(f"{flag} {error.filename}: {error.strerror}; the folder must be readable") from None
    metadata = {}
    for path in sorted(files.metadata):
        metadata.update(_read_metadata(folder, path, vector_column))
    if not files.images and not metadata:
        held = ", ".join(sorted(files.other_extensions)[:5]) or "nothing"
        raise UserError(f"{flag} {folder} holds no image file ({held} found; wanted: .jpg, .png, .webp, ...)")
    for path in metadata.keys() - files.images.keys():  # another extension, or a row without its file
        files.images[path] = _stat_or_missing(folder / path)
    told_labels = any(label is not None for label, _, _ in metadata.values())
    folder_labels = {} if told_labels else class_folders(files.images)
    entries = []
    for path in sorted(files.images):
        size, mtime_ns = files.images[path]
        label, text, vector = metadata.get(path, NOTHING_TOLD)
        label = folder_labels.get(path.rpartition("/")[0]) if label is None else label
        stem = path.rpartition(".")[0]
        caption_file = files.captions.get(stem) if text is None else None
        vector_file = files.vectors.get(stem) if vector is None else None
        entries.append(Entry(path, size, mtime_ns, label, text, caption_file, vector, vector_file))
    return entries


class _Files(NamedTuple):
    images: dict[str, tuple[int, int]]  # relative path -> size, mtime_ns
    captions: dict[str, tuple[int, int]]  # the same of NAME.txt, without its extension
    vectors: dict[str, tuple[int, int]]  # the same of NAME.npy
    metadata: list[str]
    other_extensions: set[str]


def _scan(root: Path) -> _Files:
    files = _Files({}, {}, {}, [], set())
    pending, seen_links = [("", str(root))], set()
    while pending:
        prefix, folder = pending.pop()
        with os.scandir(folder) as found:
            for item in found:
                name = item.name
                if name.startswith("."):
                    continue
                if item.is_dir():
                    if item.is_symlink():  # followed once: a link may lead back up
                        target = os.path.realpath(item.path)
                        if target in seen_links or f"{os.path.realpath(folder)}/".startswith(f"{target}/"):
                            continue
                        seen_links.add(target)
                    pending.append((f"{prefix}{name}/", item.path))
                    continue
                stem, extension = os.path.splitext(name)
                extension = extension.lower()
                if extension in IMAGE_EXTENSIONS or extension in SIDECAR_EXTENSIONS:
                    try:
                        stat = item.stat()
                    except FileNotFoundError:  # a dangling link
                        files.images.update({prefix + name: (-1, 0)} if extension in IMAGE_EXTENSIONS else {})
                        continue
                    if extension in SIDECAR_EXTENSIONS:
                        beside = files.captions if extension == ".txt" else files.vectors
                        beside[prefix + stem] = stat.st_size, stat.st_mtime_ns
                    else:
                        files.images[prefix + name] = stat.st_size, stat.st_mtime_ns
                elif name in METADATA_NAMES:
                    files.metadata.append(prefix + name)
                else:
                    files.other_extensions.add(extension or name)
    return files


def _stat_or_missing(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError:
        return -1, 0  # the decoder will say what is wrong with it
    return stat.st_size, stat.st_mtime_ns


def class_folders(images: dict) -> dict[str, str]:
    """Folder -> its own name as a class: where every image lies equally deep and there are several names."""
    folders = {path.rpartition("/")[0] for path in images}
    names = {folder.rpartition("/")[2] for folder in folders}
    depths = {folder.count("/") for folder in folders}
    if "" in folders or len(depths) > 1 or len(names) < 2:
        return {}
    return {folder: folder.rpartition("/")[2] for folder in folders}


def _read_metadata(root: Path, metadata_path: str, vector_column: str) -> dict[str, tuple]:
    """Relative path of an image -> (label, text, vector), from one metadata.csv or metadata.jsonl."""
    try:
        with open(root / metadata_path, encoding="utf-8-sig", newline="") as file:
            return told_by_metadata(file, metadata_path, root, vector_column)
    except OSError as error:
        raise UserError(f"{root / metadata_path}: {error.strerror}; it must be readable, or moved away") from None


def told_by_metadata(file: TextIO, metadata_path: str, root: Path, vector_column: str) -> dict[str, tuple]:
    """Path below `root` of an image -> (label, text, vector), from an open metadata.csv or metadata.jsonl."""
    prefix, where = metadata_path.rpartition("/")[0], root / metadata_path
    found = {}
    for line_number, row in _rows(file, where):
        file_name = row.get("file_name")
        if not isinstance(file_name, str) or not file_name:
            raise UserError(f"{where} line {line_number} has no `file_name`; every row must name its image")
        path = os.path.normpath(os.path.join(prefix, file_name)).replace(os.sep, "/")
        if path.startswith(("../", "/")):
            raise UserError(f"{where} line {line_number}: {file_name} is outside of {root}; name files inside it")
        label, text = row.get("label"), next((row[name] for name in CAPTION_COLUMNS if row.get(name)), None)
        label, text = None if label in (None, "") else str(label), None if text is None else str(text)
        found[path] = label, text, vector_bytes(row.get(vector_column))
    return found


def _rows(file: TextIO, where: Path) -> Iterator[tuple[int, dict]]:
    try:
        if where.suffix == ".csv":
            rows = csv.DictReader(file)
            yield from ((rows.line_num, row) for row in rows)
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"line {number} is not an object")
                yield number, row
    except (ValueError, csv.Error) as error:
        raise UserError(f"{where} cannot be read: {' '.join(str(error).split())}") from None
