"""What the files inside an archive, or below a URL, say together: images, their labels, captions and vectors.

The rules are those of a folder of images (class folders, metadata files, NAME.txt, NAME.npy) and of WebDataset
(NAME.cls, NAME.json). A member's path is only a name: nothing is ever written or opened by it.
"""

import io
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from trainkit.data.sources.ignored import Ignored
from trainkit.data.sources.listing import IMAGE_EXTENSIONS
from trainkit.data.sources.metadata import CAPTION_COLUMNS, METADATA_NAMES, Told, caption_lines, told_lines
from trainkit.data.sources.vectors import vector_bytes

LABEL_KEYS = ("label", "cls", "class")
SAMPLE_EXTENSIONS = (".cls", ".json")  # read while listing: they hold classes
CONTENT_EXTENSIONS = (*SAMPLE_EXTENSIONS, ".txt", ".npy")


class Span(NamedTuple):
    """Where the bytes of one file are. `stamp` tells one version of it from another."""

    path: str
    stamp: str
    offset: int = 0
    stored: int = 0  # bytes, as they lie there
    size: int = 0  # bytes, unpacked
    method: int | None = None  # how they are packed, of a .zip
    crc: int | None = None


class File(NamedTuple):
    """One file inside. `fault` (class and message): why it cannot be read, known beforehand."""

    span: Span
    content: bytes | None = None
    fault: tuple[str, str] | None = None
    is_damage: bool = False  # no file, but the place where the archive breaks off


class Member(NamedTuple):
    """One image to be prepared, in the archive of this number, and what is known of it besides the pixels."""

    container: int
    path: str
    span: Span
    label: str | None = None
    text: str | None = None
    vector: bytes | None = None
    caption: Span | None = None
    vector_file: Span | None = None
    fault: tuple[str, str] | None = None

    @property
    def identity(self) -> tuple:
        beside = [span and span.stamp for span in (self.caption, self.vector_file)]
        return self.path, self.span.stamp, self.label, self.text, self.vector, *beside, self.fault


def clean_path(path: str) -> str:
    """A member's path without what leads elsewhere: `./a/1.png` and `/../a/1.png` are `a/1.png`."""
    return "/".join(part for part in path.split("/") if part not in ("", ".", ".."))


def is_wanted(path: str) -> bool:
    """Whether a member may say something; hidden ones and what macOS adds do not."""
    return not any(part.startswith(".") or part == "__MACOSX" for part in path.split("/"))


def collect(files: Iterable[File], container: int, where: str, vector_column: str, ignored: Ignored) -> list[Member]:
    """The images among `files`, in the order of their offsets; the rest is added to `ignored`.

    Raises `UserError` for metadata that cannot be read.
    """
    images, others, metadata, rejected = {}, {}, [], []
    for file in files:
        path = file.span.path
        stem, extension = os.path.splitext(path)
        if file.is_damage:
            rejected.append(Member(container, path, file.span, fault=file.fault))
        elif not is_wanted(path):
            continue
        elif extension.lower() in IMAGE_EXTENSIONS:
            if path in images:
                fault = "duplicate_name", "another file of this name comes later, and counts"
                rejected.append(Member(container, path, images[path].span, fault=fault))
            images[path] = file
        elif path.rpartition("/")[2] in METADATA_NAMES and file.content is not None:
            metadata.append(file)
        elif file.fault is None:
            others[stem + extension.lower()] = file
        else:
            ignored.add(path)
    told = {}
    for file in metadata:
        text = io.TextIOWrapper(io.BytesIO(file.content), encoding="utf-8-sig", newline="")
        told |= {line.path: line for line in told_lines(text, file.span.path, Path(where), vector_column)}
    for path in told.keys() - images.keys():  # another extension, or a row without its file
        missing = File(Span(path, "missing"), fault=("missing", "a metadata file names it, but it is not there"))
        images[path] = others.get(path, missing)
    ignored.update(_drop_other_parts(images, others))
    stems = {os.path.splitext(path)[0] for path in images}
    for path in others.keys() - images.keys():
        stem, extension = os.path.splitext(path)
        if extension not in CONTENT_EXTENSIONS or stem not in stems:
            ignored.add(path)
    found = [_member(container, path, file, told, others, vector_column) for path, file in images.items()]
    return sorted([*found, *rejected], key=lambda member: (member.span.offset, member.path))


def class_folders(paths: Iterable[str]) -> dict[str, str]:
    """Folder -> its own name as a class: where every image lies equally deep and there are several names."""
    folders = {path.rpartition("/")[0] for path in paths}
    names = {folder.rpartition("/")[2] for folder in folders}
    depths = {folder.count("/") for folder in folders}
    if "" in folders or len(depths) > 1 or len(names) < 2:
        return {}
    return {folder: folder.rpartition("/")[2] for folder in folders}


def _drop_other_parts(images: dict[str, File], others: dict[str, File]) -> list[str]:
    """Of a WebDataset sample (KEY.cls, KEY.jpg, KEY.mask.png) the image is the one whose ending is one word.

    Takes the others out of `images`, and returns their endings.
    """
    dropped = []
    if not any(path.endswith(SAMPLE_EXTENSIONS) for path in others):
        return dropped
    keys = {path.rpartition(".")[0] for path in images}
    for path in list(images):
        folder, slash, name = path.rpartition("/")
        key, dot, ending = name.partition(".")
        if "." in ending and f"{folder}{slash}{key}" in keys:
            del images[path]
            dropped.append(f".{ending.lower()}")
    return dropped


def _member(container: int, path: str, file: File, told: dict, others: dict[str, File], vector_column: str) -> Member:
    stem = path.rpartition(".")[0]
    _, label, text, vector = told.get(path) or Told(path)
    sample = _json_object(others.get(stem + ".json"))
    if label is None:
        label = _first(sample, LABEL_KEYS)
        if (number := others.get(stem + ".cls")) is not None and number.content is not None:
            label = number.content.decode("utf-8", "replace").strip() or label
    caption, vector_file = (others.get(stem + extension) for extension in (".txt", ".npy"))
    if text is None and caption is None:
        text = caption_lines(next((sample[name] for name in CAPTION_COLUMNS if sample.get(name)), None))
    if text is None and caption is not None and caption.content is not None:
        text, caption = caption.content.decode("utf-8", "replace").strip(), None
    if vector is None and vector_file is None:
        vector = vector_bytes(sample.get(vector_column))
    return Member(
        container,
        path,
        file.span,
        label,
        text,
        vector,
        caption.span if caption is not None and text is None else None,
        vector_file.span if vector_file is not None and vector is None else None,
        file.fault,
    )


def _json_object(file: File | None) -> dict[str, Any]:
    try:
        content = {} if file is None or file.content is None else json.loads(file.content)
    except ValueError:  # RecursionError is no ValueError, but content is small
        return {}
    return content if isinstance(content, dict) else {}


def _first(sample: dict[str, Any], keys: tuple[str, ...]) -> str | None:
    values = (sample.get(key) for key in keys)
    return next(
        (str(value) for value in values if value not in (None, "") and not isinstance(value, dict | list)), None
    )
