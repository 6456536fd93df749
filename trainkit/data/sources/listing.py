"""The image files under a folder, and what is known of them before one is opened: size, time, label, caption.

A folder may hold more files than memory should: they are sorted outside of it and kept in a temporary file.
"""

import errno
import os
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from trainkit.data.account import Account, Kind
from trainkit.data.sources.classes import FolderClasses
from trainkit.data.sources.condition_folder import FLAG as CONDITION_FLAG
from trainkit.data.sources.condition_folder import (
    check_condition_folder,
    count_others,
    refuse_no_match,
    with_conditions,
)
from trainkit.data.sources.entries import (
    CAPTION,
    ENTRY_SCHEMA,
    FOLDER,
    IMAGE,
    IMAGE_EXTENSIONS,
    ITEM_SCHEMA,
    LINKED_FOLDER,
    NO_CONDITION,
    NO_SIDECAR,
    SIDECARS,
    UNREAD,
    UNREAD_SIDECARS,
    VECTOR,
    Entries,
    Found,
    ReadOptions,
    count_mask,
    count_unread,
    decoded,
    encoded,
    ignore_file,
    is_mask,
    size_and_time,
)
from trainkit.data.sources.joining import with_metadata
from trainkit.data.sources.metadata import METADATA_NAMES, refuse_columns
from trainkit.data.sources.rowfile import RowFile, sorted_rows
from trainkit.data.sources.splits import choose_split, readme_data_files
from trainkit.errors import UserError

SIDECAR_ORDER = (*SIDECARS, *UNREAD_SIDECARS)
UNUSED, OF_AN_IMAGE, USED = range(3)


class Listing(NamedTuple):
    """What a folder holds; `labels` are the classes named, in no order."""

    entries: Entries
    labels: set[str]
    has_text: bool
    has_vector: bool
    vector_files: int
    has_pairs: bool
    account: Account


def list_folder(folder: Path, flag: str, options: ReadOptions) -> Listing:
    """Every image file under `folder` except hidden ones, sorted by relative path. Opens no image.

    Memory holds the classes, not the files. Raises `UserError` naming `flag`.
    """
    if not folder.exists():
        raise UserError(f"{flag} {folder} does not exist; give a folder of images")
    if not folder.is_dir():
        raise UserError(f"{flag} {folder} is a file; give the folder that holds the images")
    found, file = _walked(folder, flag)
    if not found.metadata:
        refuse_columns(options.columns, f"{flag} {folder}")
    rule = _split_rule(folder, file, options, found.account, flag)
    seen, listed = _Seen(options.label_from), file
    if rule is None and not found.metadata and options.conditioning_dir is None:
        deque(seen.noted(file.rows(0, len(file))), maxlen=0)
    else:
        listed = RowFile(ENTRY_SCHEMA)
        rows = with_metadata(folder, file, found, options, rule, flag)
        if options.conditioning_dir is not None:
            rows = _paired(rows, options.conditioning_dir, folder, found.account, flag)
        listed.extend(seen.noted(rows))
    if not len(listed):
        held = ", ".join(sorted(found.account.ignored)[:5]) or "nothing"
        fix = "; convert the images to JPEG or PNG" if Kind.FOREIGN_IMAGE in found.account.counts else ""
        raise UserError(f"{flag} {folder} holds no image file ({held} found; wanted: .jpg, .png, .webp, ...){fix}")
    if options.conditioning_dir is not None and not seen.has_pairs:
        refuse_no_match(options.conditioning_dir, decoded(next(listed.rows(0, 1))[0]), found.account)
    seen.count(found)
    folder_labels = not seen.named_labels and seen.folders.are_classes
    labels = seen.folders.names if folder_labels else seen.named_labels
    entries = Entries(listed, seen.folders.rule if folder_labels else None, range(len(listed)))
    has_what = seen.has_text, seen.has_vector, seen.vector_files, seen.has_pairs
    return Listing(entries, labels, *has_what, found.account)


def _walked(folder: Path, flag: str) -> tuple[Found, RowFile]:
    """The image files under `folder`, rows of `ENTRY_SCHEMA`, and what is found besides. Raises `UserError`."""
    found = Found([], Account())
    file = RowFile(ENTRY_SCHEMA)
    try:
        file.extend(_walk(folder, found))
    except OSError as error:
        if error.filename is None:
            raise  # of the temporary file
        raise UserError(f"{flag} {error.filename}: {error.strerror}; the folder must be readable") from None
    return found, file


def _paired(rows: Iterator[tuple], given: str, images: Path, account: Account, flag: str) -> Iterator[tuple]:
    """`rows` with the conditioning images of `--conditioning_data_dir`. Raises `UserError`."""
    found, file = _walked(check_condition_folder(given, images, flag), CONDITION_FLAG)
    count_others(found, account)
    return with_conditions(rows, file.rows(0, len(file)), account)


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
    pending = [("", _with_sidecars(_sorted_items(str(root), "", found), "", found))]
    while pending:
        prefix, items = pending[-1]
        if (item := next(items, None)) is None:
            pending.pop()
            continue
        name, kind, *stat = item
        path = prefix + decoded(name)
        if kind == IMAGE:
            yield (encoded(path), *stat[:2], None, None, *stat[2:], None, *NO_CONDITION)
            continue
        folder = os.path.join(root, path[:-1])
        if kind == LINKED_FOLDER:  # followed once: a link may lead back up
            target = os.path.realpath(folder)
            if target in seen_links or _is_walked(target, folder, os.path.realpath(root)):
                found.account.add(Kind.LINK_NOT_FOLLOWED, path[:-1])
                continue
            seen_links.add(target)
        pending.append((path, _with_sidecars(_sorted_items(folder, path, found), path, found)))


def _is_walked(target: str, link: str, root: str) -> bool:
    """Whether the walk reads the target of a linked folder anyway: it is above the link, or elsewhere in `root`."""
    if f"{os.path.realpath(os.path.dirname(link))}/".startswith(f"{target}/"):
        return True
    return target.startswith(f"{root}/") and "/." not in target[len(root) :]


def _sorted_items(folder: str, prefix: str, found: Found) -> Iterator[tuple]:
    return sorted_rows(_items(folder, prefix, found), ITEM_SCHEMA)


def _items(folder: str, prefix: str, found: Found) -> Iterator[tuple]:
    """Rows of `ITEM_SCHEMA`, in no order."""
    with os.scandir(folder) as items:
        for item in items:
            name, is_hidden, is_folder = item.name, item.name.startswith("."), _is_folder(item)
            if not is_folder:
                found.account.add(Kind.FILES_FOUND)
            if is_hidden:
                found.account.add(Kind.HIDDEN, prefix + name, count=int(not is_folder))
                continue
            if is_folder:
                yield encoded(name + "/"), LINKED_FOLDER if item.is_symlink() else FOLDER, 0, 0
                continue
            extension = os.path.splitext(name)[1].lower()
            if name.lower() in METADATA_NAMES:
                found.metadata.append(prefix + name)
                found.account.add(Kind.METADATA_FILES)
            elif extension in IMAGE_EXTENSIONS and is_mask(name):
                count_mask(found.account, prefix + name)
            elif extension in IMAGE_EXTENSIONS:
                yield encoded(name), IMAGE, *size_and_time(item)
            elif extension in (*SIDECARS, *UNREAD_SIDECARS):
                size, mtime_ns = size_and_time(item)
                if size >= 0:
                    yield encoded(name), SIDECARS.get(extension, UNREAD), size, mtime_ns
                else:
                    found.account.ignore(name)
            else:
                ignore_file(found.account, prefix + name)


def _is_folder(item: os.DirEntry) -> bool:
    try:
        return item.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:  # a link to itself is one bad file, not the end of the listing
            raise
        return False


def _with_sidecars(items: Iterator[tuple], prefix: str, found: Found) -> Iterator[tuple]:
    """The images and folders of one folder, in order, each image with its caption and vector file.

    These are NAME.txt or NAME.png.txt of NAME.png, and so on. An image waits until none can follow: names that begin
    with the same "NAME." are neighbours.
    """
    waiting: deque[tuple] = deque()
    sidecars: dict[bytes, dict[tuple, list]] = {}

    def settled(key: bytes) -> Iterator[tuple]:
        while waiting and not (waiting[0][1] == IMAGE and key.startswith(_stem(waiting[0][0]))):
            item = waiting.popleft()
            yield (
                *item,
                *(_take_sidecars(item[0], sidecars) if item[1] == IMAGE else (*NO_SIDECAR, *NO_SIDECAR)),
            )
        if not waiting and sidecars:
            for stem in [stem for stem in sidecars if not key.startswith(stem)]:
                for name, _, use in sidecars.pop(stem).values():
                    found.num_sidecars += use == USED
                    _count_unused(found.account, prefix + decoded(name), use)

    for item in items:
        yield from settled(item[0])
        if item[1] in (*SIDECARS.values(), UNREAD):
            name, _, size, mtime_ns = item
            ending = name[name.rfind(b".") :]
            of_stem = sidecars.setdefault(_stem(name), {})
            rank = SIDECAR_ORDER.index(decoded(ending).lower()), ending.lower() != ending, ending
            of_stem[rank] = [name, (size, mtime_ns, ending), UNUSED]
        else:
            waiting.append(item)
    yield from settled(b"")


def _count_unused(account: Account, path: str, use: int) -> None:
    if use == OF_AN_IMAGE:
        count_unread(account, path)
    elif use == UNUSED:
        ignore_file(account, path)


def _take_sidecars(name: bytes, sidecars: dict) -> tuple:
    """Size, mtime_ns and ending of the caption file and of the vector file of an image; marks them as used."""
    used_sidecars: list[Any] = []
    for stem in (_stem(name), name + b"."):
        for entry in sidecars.get(stem, {}).values():
            entry[2] = max(entry[2], OF_AN_IMAGE)
    for kind in (CAPTION, VECTOR):
        found = NO_SIDECAR
        for stem, before in ((_stem(name), b""), (name + b".", name[name.rfind(b".") :])):
            ranks = sorted(rank for rank in sidecars.get(stem, ()) if SIDECARS.get(SIDECAR_ORDER[rank[0]]) == kind)
            if ranks:
                entry = sidecars[stem][ranks[0]]
                entry[2] = USED
                size, mtime_ns, ending = entry[1]
                found = size, mtime_ns, before + ending
                break
        used_sidecars += found
    return tuple(used_sidecars)


def _stem(name: bytes) -> bytes:
    return name[: name.rfind(b".") + 1]


class _Seen:
    """What is learnt from all rows while they pass by."""

    def __init__(self, label_from: str):
        self.named_labels: set[str] = set()
        self.folders = FolderClasses(label_from)
        self.has_text, self.has_vector, self.caption_files, self.vector_files = False, False, 0, 0
        self.has_pairs = False

    def noted(self, rows: Iterator[tuple]) -> Iterator[tuple]:
        for row in rows:
            path, label, text, caption_size, vector_size, vector = row[0], row[3], row[4], row[5], row[8], row[11]
            if label is not None:
                self.named_labels.add(decoded(label))
            self.caption_files += caption_size is not None
            self.vector_files += vector_size is not None
            self.has_text = self.has_text or text is not None or caption_size is not None
            self.has_vector = self.has_vector or vector is not None or vector_size is not None
            self.has_pairs = self.has_pairs or row[12] is not None
            self.folders.note(decoded(path))
            yield row

    def count(self, found: Found) -> None:
        """Add what the rows use of the sidecar files, and why folders are not classes, to the account."""
        account = found.account
        account.add(Kind.CAPTION_FILES, count=self.caption_files)
        account.add(Kind.VECTOR_FILES, count=self.vector_files)
        num_unused = found.num_sidecars - self.caption_files - self.vector_files
        account.add(Kind.SIDECAR_NOT_USED, count=num_unused)
        account.add(Kind.SHARED_SIDECAR, count=-num_unused)
        if not self.named_labels:
            self.folders.count(account)
