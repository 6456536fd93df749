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
from trainkit.data.sources.entries import (
    IMAGE_EXTENSIONS,
    UNREAD_SIDECARS,
    ReadOptions,
    count_mask,
    count_unread,
    decoded,
    encoded,
    ignore_file,
    is_mask,
)
from trainkit.data.sources.joining import merged_row
from trainkit.data.sources.member_conditions import take_conditions, with_condition
from trainkit.data.sources.metadata import (
    CAPTION_COLUMNS,
    METADATA_NAMES,
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
    stored: int = 0  # bytes, as stored
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
    """One image to be prepared, in the archive of this number, and what is known about it."""

    container: int
    path: str
    span: Span
    label: str | None = None
    text: str | None = None
    vector: bytes | None = None
    caption: Span | None = None
    vector_file: Span | None = None
    fault: tuple[str, str] | None = None
    condition: Span | None = None

    @property
    def identity(self) -> tuple:
        sidecars = [span and span.stamp for span in (self.caption, self.vector_file)]
        own = self.path, self.span.stamp, self.label, self.text, self.vector, *sidecars, self.fault
        return own if self.condition is None else (*own, self.condition.path, self.condition.stamp)


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
    images: dict[str, File] = {}
    others: dict[str, File] = {}
    metadata, rejected = [], []
    for file in files:
        path = file.span.path
        name, (stem, extension) = path.rpartition("/")[2], os.path.splitext(path)
        account.add(Kind.EXTRA_ITEMS if file.is_damage else Kind.FILES_FOUND)
        if file.is_damage:
            rejected.append(Member(container, path, file.span, fault=file.fault))
        elif not is_wanted(path):
            account.add(Kind.HIDDEN, path)
        elif extension.lower() in IMAGE_EXTENSIONS and is_mask(path):
            count_mask(account, path)
        elif extension.lower() in IMAGE_EXTENSIONS:
            if path in images:
                fault = faults.DUPLICATE_NAME, "another file of this name comes later, and counts"
                rejected.append(Member(container, path, images[path].span, fault=fault))
            images[path] = file
        elif name.lower() in METADATA_NAMES and file.content is not None:
            metadata.append(file)
            account.add(Kind.METADATA_FILES)
        elif file.fault is None:
            if (before := others.get(stem + extension.lower())) is not None:
                account.ignore(before.span.path)
            others[stem + extension.lower()] = file
        else:
            account.ignore(path)
    known = images.keys() | others.keys()
    rows = []
    for file in metadata:
        assert file.content is not None  # as for every file in `metadata`
        content, path = io.BytesIO(file.content), file.span.path
        read = read_metadata(content, Path(where, path), options.columns, account)
        rows += [_relative(row, path.rpartition("/")[0]) for row in read]
    about = match_rows(rows, images, known, where, account)
    for path in about.keys() - images.keys():  # another extension, or a row without its file
        if path not in others:
            account.add(Kind.ROW_WITHOUT_IMAGE, f"{about[path].where}: {path}")
            account.add(Kind.EXTRA_ITEMS)
        missing = File(Span(path, "missing"), fault=(faults.MISSING, "a metadata file names it, but it is not there"))
        images[path] = others.get(path, missing)
    conditions = take_conditions(images, about, options.pairs is not None, where, account)
    _drop_other_parts(images, others, account)
    if about:
        for path in sorted(images.keys() - about.keys()):
            account.add(Kind.IMAGE_WITHOUT_ROW, path)
            del images[path]
    sidecars = _ignore_others(images, others, account)
    samples = _Samples(options, account)
    found = [_member(container, path, file, about, others, samples) for path, file in images.items()]
    found = [with_condition(member, conditions) for member in found]
    samples.count_files(sidecars)
    return sorted([*found, *rejected], key=lambda member: (member.span.offset, member.path))


def _relative(row: MetadataRow, folder: str) -> MetadataRow:
    """A row of metadata in `folder` with names that start from the root."""
    condition = None if row.condition is None else relative_name(row.condition.replace("\\", "/"), folder)
    return row._replace(name=relative_name(row.name, folder), condition=condition)


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
        groups.setdefault(path, []).append((*fields, encoded(row.condition)))
    merged = {}
    for path, group in groups.items():
        _, label, text, vector, place, condition = merged_row(group, account)
        words = decoded(label), decoded(text)
        merged[path] = MetadataRow(path, *words, vector, decoded(place), decoded(condition))
    return merged


def _ignore_others(images: dict[str, File], others: dict[str, File], account: Account) -> int:
    """Count the files that say nothing about an image. Returns the number of those that do."""
    stems, num_sidecars = {os.path.splitext(path)[0] for path in images} | set(images), 0
    for path in sorted(others.keys() - images.keys()):
        stem, extension = os.path.splitext(path)
        if stem in stems and extension in CONTENT_EXTENSIONS:
            num_sidecars += 1
        elif stem in stems and extension in UNREAD_SIDECARS:
            count_unread(account, path)
        else:
            ignore_file(account, path)
    return num_sidecars


def _drop_other_parts(images: dict[str, File], others: dict[str, File], account: Account) -> None:
    """Of a WebDataset sample (KEY.json or KEY.cls, KEY.jpg, KEY.mask.png) the image is the one with the short ending.

    Moves the others from `images` to `account`. Without a KEY.json or KEY.cls, dots are part of names.
    """
    keys = {path.rpartition(".")[0] for path in images}
    for path in list(images):
        folder, slash, name = path.rpartition("/")
        key, dot, ending = name.partition(".")
        key = f"{folder}{slash}{key}"
        is_sample = any(key + extension in others for extension in SAMPLE_EXTENSIONS)
        if "." in ending and is_sample and key in keys:
            del images[path]
            account.add(Kind.SAMPLE_PART, path)
            account.ignore(f".{ending.lower()}")


class _Samples:
    """Reads the .json of WebDataset samples; how their columns are called is found once per set of keys."""

    def __init__(self, options: ReadOptions, account: Account):
        self.options, self.account = options, account
        self._captions: dict[tuple, tuple[str, ...]] = {}
        self._used: dict[str, Kind] = {}

    def use(self, file: File, kind: Kind) -> None:
        self._used[file.span.path] = kind

    def read_json(self, file: File | None) -> dict[str, Any]:
        """The object in NAME.json; an empty one where there is none."""
        try:
            content = None if file is None or file.content is None else json.loads(file.content)
        except ValueError:  # RecursionError is not a ValueError, but content is small
            content = None
        if file is None or not isinstance(content, dict):
            return {}
        self.use(file, Kind.LABEL_FILES)
        return content

    def count_files(self, num_sidecars: int) -> None:
        """Add to the account which of the files about images were used, and how many were not."""
        for kind in self._used.values():
            self.account.add(kind)
        self.account.add(Kind.SIDECAR_NOT_USED, count=num_sidecars - len(self._used))

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
    _, label, text, vector, *_ = about.get(path) or MetadataRow(path)
    sample, number = samples.read_json(others.get(stem + ".json")), others.get(stem + ".cls")
    if label is None:
        label = samples.label(sample, path)
        if number is not None and number.content is not None:
            label = class_name(number.content.decode("utf-8", "replace")) or label
            samples.use(number, Kind.LABEL_FILES)
    sidecars = [others.get(before + extension) for before in (stem, path) for extension in CAPTION_EXTENSIONS]
    caption = next((one for one in sidecars if one is not None), None)
    vector_file = others.get(stem + ".npy")
    if text is None and caption is not None:
        samples.use(caption, Kind.CAPTION_FILES)
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
    elif vector is None and vector_file is not None:
        samples.use(vector_file, Kind.VECTOR_FILES)
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
