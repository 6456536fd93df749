"""What the files inside an archive, or below a URL, say together: images, their labels, captions and vectors.

The rules are those of a folder of images (class folders, metadata files, NAME.txt, NAME.npy) and of WebDataset
(NAME.cls, NAME.json). A member's path is only a name: nothing is ever written or opened by it.
"""

import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from trainkit.data import faults
from trainkit.data.account import Account, Kind
from trainkit.data.faults import RejectedImage
from trainkit.data.sources.entries import IMAGE_EXTENSIONS, ReadOptions, decoded, encoded, folder_class
from trainkit.data.sources.joining import merged_row
from trainkit.data.sources.metadata import (
    CAPTION_COLUMNS,
    METADATA_NAMES,
    TABLE_EXTENSIONS,
    MetadataRow,
    find_columns,
    read_metadata,
)
from trainkit.data.sources.names import match_names, relative_name
from trainkit.data.sources.texts import NotAClass, caption_text, class_name, read_caption
from trainkit.data.sources.vectors import vector_bytes
from trainkit.errors import UserError

LABEL_KEYS = ("label", "cls", "class")
SAMPLE_EXTENSIONS = (".cls", ".json")  # read while listing: they hold classes
CAPTION_EXTENSIONS = (".txt", ".caption")
CONTENT_EXTENSIONS = (*SAMPLE_EXTENSIONS, *CAPTION_EXTENSIONS, ".npy")


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


def collect(files: Iterable[File], container: int, where: str, options: ReadOptions, account: Account) -> list[Member]:
    """The images among `files`, in the order of their offsets; what happened to the rest is added to `account`.

    Raises `UserError` for metadata that cannot be read, or that names no image.
    """
    images, others, metadata, rejected = {}, {}, [], []
    for file in files:
        path = file.span.path
        name, (stem, extension) = path.rpartition("/")[2], os.path.splitext(path)
        if file.is_damage:
            rejected.append(Member(container, path, file.span, fault=file.fault))
        elif not is_wanted(path):
            continue
        elif extension.lower() in IMAGE_EXTENSIONS:
            if path in images:
                fault = faults.DUPLICATE_NAME, "another file of this name comes later, and counts"
                rejected.append(Member(container, path, images[path].span, fault=fault))
            images[path] = file
        elif name.lower() in METADATA_NAMES and file.content is not None:
            metadata.append(file)
        elif file.fault is None:
            others[stem + extension.lower()] = file
        else:
            account.ignore(path)
    known = images.keys() | others.keys()
    rows = []
    for file in metadata:
        content, path = io.BytesIO(file.content), file.span.path
        read = read_metadata(content, Path(where, path), options.columns, account)
        rows += [row._replace(name=relative_name(row.name, path.rpartition("/")[0])) for row in read]
    about = match_rows(rows, images, known, where, account)
    for path in about.keys() - images.keys():  # another extension, or a row without its file
        if path not in others:
            account.add(Kind.ROW_WITHOUT_IMAGE, f"{about[path].where}: {path}")
        missing = File(Span(path, "missing"), fault=(faults.MISSING, "a metadata file names it, but it is not there"))
        images[path] = others.get(path, missing)
    for ending in _drop_other_parts(images, others):
        account.ignore(ending)
    if about:
        for path in sorted(images.keys() - about.keys()):
            account.add(Kind.IMAGE_WITHOUT_ROW, path)
            del images[path]
    _ignore_others(images, others, account)
    samples = _Samples(options, account)
    found = [_member(container, path, file, about, others, samples) for path, file in images.items()]
    return sorted([*found, *rejected], key=lambda member: (member.span.offset, member.path))


def match_rows(
    rows: list[MetadataRow], images: Iterable[str], known: Iterable[str], where: str, account: Account
) -> dict[str, MetadataRow]:
    """Image -> what metadata says about it, one row each. `known` are all files that a row may name.

    Raises `UserError` if no row names a file that is there, or if two rows contradict each other.
    """
    known = set(known)
    names = {row.name for row in rows}
    unmatched = names - known
    renamed = match_names(sorted(unmatched), images, names & known, IMAGE_EXTENSIONS)
    for name, image in renamed.items():
        account.add(Kind.MATCHED_NAME, f"{name} -> {image}")
    outside = next((name for name in sorted(unmatched - renamed.keys()) if name.startswith("../")), None)
    if outside is not None:
        raise UserError(f"--train_data_dir {where}: metadata names {outside}, which is outside of it")
    if rows and len(unmatched) == len(names) and not renamed:
        raise UserError(
            f"--train_data_dir {where}: metadata names {len(names):,} images and none of them is there (the first is "
            f"{rows[0].name}; there is {next(iter(sorted(images)), 'no image')}): correct file_name"
        )
    groups: dict[str, list[tuple]] = {}
    for row in rows:
        path = renamed.get(row.name, row.name)
        fields = encoded(path), encoded(row.label), encoded(row.text), row.vector, encoded(row.where)
        groups.setdefault(path, []).append(fields)
    merged = {}
    for path, group in groups.items():
        _, label, text, vector, place = merged_row(group, account)
        merged[path] = MetadataRow(path, decoded(label), decoded(text), vector, decoded(place))
    return merged


def _ignore_others(images: dict[str, File], others: dict[str, File], account: Account) -> None:
    stems = {os.path.splitext(path)[0] for path in images} | set(images)
    for path in others.keys() - images.keys():
        stem, extension = os.path.splitext(path)
        if extension not in CONTENT_EXTENSIONS or stem not in stems:
            account.ignore(path)
            if extension in TABLE_EXTENSIONS:
                account.add(Kind.TABLE_NOT_READ, path)


def class_folders(paths: Iterable[str], label_from: str) -> dict[str, str]:
    """Folder -> its class, if every image is in a folder, all equally deep, and there are several names."""
    folders = {path.rpartition("/")[0] for path in paths}
    classes = {folder: folder_class(folder, label_from) for folder in folders}
    is_uneven = label_from == "parent_folder" and len({folder.count("/") for folder in folders}) > 1
    return {} if "" in folders or is_uneven or label_from == "none" or len(set(classes.values())) < 2 else classes


def _drop_other_parts(images: dict[str, File], others: dict[str, File]) -> list[str]:
    """Of a WebDataset sample (KEY.json or KEY.cls, KEY.jpg, KEY.mask.png) the image is the one with the short ending.

    Removes the others from `images`, and returns their endings. Without a KEY.json or KEY.cls, dots are part of names.
    """
    dropped = []
    keys = {path.rpartition(".")[0] for path in images}
    for path in list(images):
        folder, slash, name = path.rpartition("/")
        key, dot, ending = name.partition(".")
        key = f"{folder}{slash}{key}"
        is_sample = any(key + extension in others for extension in SAMPLE_EXTENSIONS)
        if "." in ending and is_sample and key in keys:
            del images[path]
            dropped.append(f".{ending.lower()}")
    return dropped


class _Samples:
    """Reads the .json of WebDataset samples; how their columns are called is found once per set of keys."""

    def __init__(self, options: ReadOptions, account: Account):
        self.options, self.account = options, account
        self._captions: dict[tuple, tuple[str, ...]] = {}

    def captions(self, sample: dict[str, Any]) -> Iterator[Any]:
        keys = tuple(sample)
        if keys not in self._captions:
            account = Account()
            try:
                columns = find_columns(keys, self.options.columns, account, "NAME.json")
            except UserError:  # --caption_column is in other files
                self._captions[keys] = ()
            else:
                self._captions[keys] = columns.captions
                if alias := [name for name in columns.captions if name not in CAPTION_COLUMNS]:
                    self.account.add(Kind.COLUMN_ALIAS, f"{alias[0]} as captions in NAME.json")
        return (sample[name] for name in self._captions[keys])

    def label(self, sample: dict[str, Any], path: str) -> str | None:
        for key in LABEL_KEYS:
            try:
                if (name := class_name(sample.get(key))) is not None:
                    return name
            except NotAClass as error:
                self.account.add(Kind.LABEL_NOT_A_CLASS, f"{path}: {error}")
        return None


def _member(
    container: int,
    path: str,
    file: File,
    about: dict[str, MetadataRow],
    others: dict[str, File],
    samples: _Samples,
) -> Member:
    stem = path.rpartition(".")[0]
    _, label, text, vector, _ = about.get(path) or MetadataRow(path)
    sample = _json_object(others.get(stem + ".json"))
    if label is None:
        label = samples.label(sample, path)
        if (number := others.get(stem + ".cls")) is not None and number.content is not None:
            label = class_name(number.content.decode("utf-8", "replace")) or label
    beside = [others.get(before + extension) for before in (stem, path) for extension in CAPTION_EXTENSIONS]
    caption = next((one for one in beside if one is not None), None)
    vector_file = others.get(stem + ".npy")
    samples.account.add(Kind.CAPTION_FILES, count=int(caption is not None and text is None))
    if text is None and caption is None:
        text = next((found for value in samples.captions(sample) if (found := caption_text(value))), None)
    if text is None and caption is not None and caption.content is not None:
        try:
            text, notes = read_caption(caption.content, caption.span.path)
        except RejectedImage as rejection:
            return Member(container, path, file.span, label, fault=(rejection.fault, str(rejection)))
        for kind in notes:
            samples.account.add(kind, caption.span.path)
        caption = None
    if vector is None and vector_file is None:
        vector = vector_bytes(sample.get(samples.options.columns.vector))
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
