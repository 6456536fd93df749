"""The image files under a folder, and what is known of them before one is opened: size, time, label, caption.

A folder may hold more files than memory should: they are sorted outside of it and kept in a temporary file.
"""

import errno
import os
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from trainkit.data.account import Account, Kind
from trainkit.data.sources.entries import (
    CAPTION,
    ENTRY_SCHEMA,
    FOLDER,
    IMAGE,
    IMAGE_EXTENSIONS,
    ITEM_SCHEMA,
    LINKED_FOLDER,
    NOTHING_BESIDE,
    SIDECARS,
    VECTOR,
    Entries,
    Found,
    ReadOptions,
    decoded,
    encoded,
    folder_class,
    size_and_time,
)
from trainkit.data.sources.joining import with_metadata
from trainkit.data.sources.metadata import METADATA_NAMES, TABLE_EXTENSIONS
from trainkit.data.sources.rowfile import RowFile, sorted_rows
from trainkit.data.sources.splits import choose_split, readme_data_files
from trainkit.errors import UserError


class Listing(NamedTuple):
    """What a folder holds; `labels` are the classes named, in no order."""

    entries: Entries
    labels: set[str]
    has_text: bool
    has_vector: bool
    account: Account


def list_folder(folder: Path, flag: str, options: ReadOptions) -> Listing:
    """Every image file under `folder` (hidden names skipped), sorted by relative path. Opens no image.

    Memory holds the classes, not the files. Raises `UserError` naming `flag`.
    """
    if not folder.exists():
        raise UserError(f"{flag} {folder} does not exist; give a folder of images")
    if not folder.is_dir():
        raise UserError(f"{flag} {folder} is a file; give the folder that holds the images")
    found = Found([], Account())
    file = RowFile(ENTRY_SCHEMA)
    try:
        file.extend(_walk(folder, found))
    except OSError as error:
        if error.filename is None:
            raise  # of the temporary file
        raise UserError(f"{flag} {error.filename}: {error.strerror}; the folder must be readable") from None
    rule = _split_rule(folder, file, options, found.account, flag)
    seen, listed = _Seen(options.label_from), file
    if rule is None and not found.metadata:
        deque(seen.noted(file.rows(0, len(file))), maxlen=0)
    else:
        listed = RowFile(ENTRY_SCHEMA)
        listed.extend(seen.noted(with_metadata(folder, file, found, options, rule, flag)))
    if not len(listed):
        held = ", ".join(sorted(found.account.ignored)[:5]) or "nothing"
        raise UserError(f"{flag} {folder} holds no image file ({held} found; wanted: .jpg, .png, .webp, ...)")
    found.account.add(Kind.CAPTION_FILES, count=seen.caption_files)
    folder_labels = not seen.named_labels and seen.folders_are_classes
    labels = seen.folder_names if folder_labels else seen.named_labels
    entries = Entries(listed, options.label_from if folder_labels else None, range(len(listed)))
    return Listing(entries, labels, seen.has_text, seen.has_vector, found.account)


def _split_rule(
    folder: Path, file: RowFile, options: ReadOptions, account: Account, flag: str
) -> Callable[[bytes], bool] | None:
    """Whether to keep an image of this path; None to keep all."""

    def paths() -> Iterator[str]:
        return (decoded(row[0]) for row in file.rows(0, len(file)))

    patterns = readme_data_files(folder, options.config)
    rule = choose_split(paths, options.split, str(folder), account, flag, patterns=patterns, are_images=True)
    return None if rule is None else lambda path: rule(decoded(path)) == options.split


def _walk(root: Path, found: Found) -> Iterator[tuple]:
    """Rows of `ENTRY_SCHEMA` for every image file, sorted by path, a folder at a time."""
    seen_links = set()
    pending = [("", _with_sidecars(_sorted_items(str(root), "", found), found))]
    while pending:
        prefix, items = pending[-1]
        if (item := next(items, None)) is None:
            pending.pop()
            continue
        name, kind, *stat = item
        path = prefix + decoded(name)
        if kind == IMAGE:
            yield (encoded(path), *stat[:2], None, None, *stat[2:], None)
            continue
        folder = os.path.join(root, path[:-1])
        if kind == LINKED_FOLDER:  # followed once: a link may lead back up
            target = os.path.realpath(folder)
            if target in seen_links or f"{os.path.realpath(os.path.dirname(folder))}/".startswith(f"{target}/"):
                continue
            seen_links.add(target)
        pending.append((path, _with_sidecars(_sorted_items(folder, path, found), found)))


def _sorted_items(folder: str, prefix: str, found: Found) -> Iterator[tuple]:
    return sorted_rows(_items(folder, prefix, found), ITEM_SCHEMA)


def _items(folder: str, prefix: str, found: Found) -> Iterator[tuple]:
    """Rows of `ITEM_SCHEMA`, in no order."""
    with os.scandir(folder) as items:
        for item in items:
            name = item.name
            if name.startswith("."):
                continue
            if _is_folder(item):
                yield encoded(name + "/"), LINKED_FOLDER if item.is_symlink() else FOLDER, 0, 0
                continue
            extension = os.path.splitext(name)[1].lower()
            if extension in IMAGE_EXTENSIONS:
                yield encoded(name), IMAGE, *size_and_time(item)
            elif extension in SIDECARS:
                size, mtime_ns = size_and_time(item)
                if size >= 0:
                    yield encoded(name), SIDECARS[extension], size, mtime_ns
                else:
                    found.account.ignore(name)
            elif name.lower() in METADATA_NAMES:
                found.metadata.append(prefix + name)
            else:
                if extension in TABLE_EXTENSIONS:
                    found.account.add(Kind.TABLE_NOT_READ, prefix + name)
                found.account.ignore(name)


def _is_folder(item: os.DirEntry) -> bool:
    try:
        return item.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:  # a link to itself is one bad file, not the end of the listing
            raise
        return False


def _with_sidecars(items: Iterator[tuple], found: Found) -> Iterator[tuple]:
    """The images and folders of one folder, in order, each image with its caption and vector file.

    These are NAME.txt or NAME.png.txt of NAME.png, and so on. An image waits until none can follow: names that begin
    with the same "NAME." are neighbours.
    """
    waiting, beside = deque(), {}

    def settled(key: bytes) -> Iterator[tuple]:
        while waiting and not (waiting[0][1] == IMAGE and key.startswith(_stem(waiting[0][0]))):
            item = waiting.popleft()
            yield (
                *item,
                *(_take_sidecars(item[0], beside) if item[1] == IMAGE else (*NOTHING_BESIDE, *NOTHING_BESIDE)),
            )
        if not waiting and beside:
            for stem in [stem for stem in beside if not key.startswith(stem)]:
                for name, _, is_used in beside.pop(stem).values():
                    if not is_used:
                        found.account.ignore(decoded(name))

    for item in items:
        yield from settled(item[0])
        if item[1] in SIDECARS.values():
            name, _, size, mtime_ns = item
            ending = name[name.rfind(b".") :]
            of_stem = beside.setdefault(_stem(name), {})
            rank = list(SIDECARS).index(decoded(ending).lower()), ending.lower() != ending, ending
            of_stem[rank] = [name, (size, mtime_ns, ending), False]
        else:
            waiting.append(item)
    yield from settled(b"")


def _take_sidecars(name: bytes, beside: dict) -> tuple:
    """Size, mtime_ns and ending of the caption file and of the vector file of an image; marks them as used."""
    taken = []
    for kind in (CAPTION, VECTOR):
        found = NOTHING_BESIDE
        for stem, before in ((_stem(name), b""), (name + b".", name[name.rfind(b".") :])):
            ranks = sorted(rank for rank in beside.get(stem, ()) if SIDECARS[list(SIDECARS)[rank[0]]] == kind)
            if ranks:
                entry = beside[stem][ranks[0]]
                entry[2] = True
                size, mtime_ns, ending = entry[1]
                found = size, mtime_ns, before + ending
                break
        taken += found
    return tuple(taken)


def _stem(name: bytes) -> bytes:
    return name[: name.rfind(b".") + 1]


class _Seen:
    """What is learnt from all rows while they pass by."""

    def __init__(self, label_from: str):
        self.named_labels, self.folder_names = set(), set()
        self.has_text, self.has_vector, self.caption_files = False, False, 0
        self._label_from, self._depth, self._uneven, self._last = label_from, None, False, None

    @property
    def folders_are_classes(self) -> bool:
        """Whether the folders of the images are their classes: several names, for parent folders at one depth."""
        return not self._uneven and len(self.folder_names) > 1

    def noted(self, rows: Iterator[tuple]) -> Iterator[tuple]:
        for row in rows:
            path, label, text, caption_size, vector_size, vector = row[0], row[3], row[4], row[5], row[8], row[11]
            if label is not None:
                self.named_labels.add(decoded(label))
            self.caption_files += caption_size is not None
            self.has_text = self.has_text or text is not None or caption_size is not None
            self.has_vector = self.has_vector or vector is not None or vector_size is not None
            folder = path.rpartition(b"/")[0]
            if folder != self._last:
                self._note_folder(folder)
            yield row

    def _note_folder(self, folder: bytes) -> None:
        self._last = folder
        depth = folder.count(b"/")
        if self._label_from == "top_folder":
            self._uneven = self._uneven or not folder
        else:
            self._uneven = self._uneven or not folder or self._depth not in (None, depth)
            self._uneven = self._uneven or self._label_from == "none"
        self._depth = depth
        if self._uneven:
            self.folder_names.clear()
        else:
            self.folder_names.add(folder_class(decoded(folder), self._label_from))
