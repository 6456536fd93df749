"""The image files under a folder, and what is known of them before one is opened: size, time, label, caption.

A folder may hold more files than memory should: they are sorted outside of it and kept in a temporary file.
"""

import errno
import os
import stat
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from trainkit.data.sources.ignored import Ignored
from trainkit.data.sources.metadata import METADATA_NAMES, told_in_folder
from trainkit.data.sources.rowfile import RowFile, sorted_rows
from trainkit.errors import UserError

IMAGE_EXTENSIONS = frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .webp .bmp .dib .gif .tif .tiff .ppm .pgm .pbm .pnm .jp2 .j2k .avif .tga "
    ".heic .heif".split()  # Pillow reads no HEIF: better rejected by name than passed over in silence
)
MISSING, NOT_A_FILE = -1, -2  # in the place of a size

IMAGE, CAPTION, VECTOR, FOLDER, LINKED_FOLDER = range(5)
SIDECARS = {".txt": CAPTION, ".npy": VECTOR}
NOTHING_BESIDE = (None, None)
# Text is kept in bytes, since file names need not be UTF-8; bytes sort as the text does.
ITEM_SCHEMA = pa.schema(
    [("name", pa.binary()), ("kind", pa.int8()), ("size", pa.int64()), ("mtime_ns", pa.int64())]
)  # a folder's name ends in a slash: so names sort as the whole paths do
METADATA_SCHEMA = pa.schema([(name, pa.binary()) for name in ("path", "label", "text", "vector")])
ENTRY_SCHEMA = pa.schema(
    [
        ("path", pa.binary()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("label", pa.binary()),
        ("text", pa.binary()),
        ("caption_size", pa.int64()),
        ("caption_mtime_ns", pa.int64()),
        ("vector_size", pa.int64()),
        ("vector_mtime_ns", pa.int64()),
        ("vector", pa.binary()),
    ]
)


class Entry(NamedTuple):
    """One image file: path relative to the folder (posix), stat, and what is known of it besides the pixels."""

    path: str
    size: int
    mtime_ns: int
    label: str | None = None
    text: str | None = None
    caption_file: tuple[int, int] | None = None  # size and mtime_ns of the NAME.txt beside it
    vector_file: tuple[int, int] | None = None  # the same of NAME.npy
    vector: bytes | None = None  # float32


class Entries(Sequence):
    """A run of a listing's entries, read from its file when asked for."""

    def __init__(self, file: RowFile, folder_labels: bool, rows: range):
        self._file, self._folder_labels, self._rows = file, folder_labels, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Entry]:
        for path, size, mtime_ns, label, text, *beside, vector in self._file.rows(self._rows.start, self._rows.stop):
            path, label, text = _decoded(path), _decoded(label), _decoded(text)
            if self._folder_labels:
                label = path.rpartition("/")[0].rpartition("/")[2]
            caption, vector_file = (None if pair[0] is None else tuple(pair) for pair in (beside[:2], beside[2:]))
            yield Entry(path, size, mtime_ns, label, text, caption, vector_file, vector)

    def __getitem__(self, place):
        """An entry, or the list of those in a slice."""
        if isinstance(place, slice):
            return list(self.part(*place.indices(len(self))[:2]))
        return next(iter(self.part(self._rows[place] - self._rows.start, len(self))))

    def part(self, start: int, stop: int) -> "Entries":
        """Entries `start` to `stop` - 1, still in the file."""
        return Entries(self._file, self._folder_labels, self._rows[start:stop])

    def paths(self) -> Iterator[str]:
        return (_decoded(row[0]) for row in self._file.rows(self._rows.start, self._rows.stop))


class Listing(NamedTuple):
    """What a folder holds; `labels` are the classes named, in no order."""

    entries: Entries
    labels: set[str]
    has_text: bool
    has_vector: bool
    ignored: Ignored


def list_folder(folder: Path, flag: str, vector_column: str = "vector") -> Listing:
    """Every image file under `folder` (hidden names skipped), sorted by relative path. Opens no image.

    Memory holds the classes, not the files. Raises `UserError` naming `flag`.
    """
    if not folder.exists():
        raise UserError(f"{flag} {folder} does not exist; give a folder of images")
    if not folder.is_dir():
        raise UserError(f"{flag} {folder} is a file; give the folder that holds the images")
    found, seen = _Found([], Ignored()), _Seen()
    file = RowFile(ENTRY_SCHEMA)
    try:
        file.extend(seen.noted(_walk(folder, found)))
    except OSError as error:
        if error.filename is None:
            raise  # of the temporary file
        raise UserError(f"{flag} {error.filename}: {error.strerror}; the folder must be readable") from None
    if found.metadata:
        seen = _Seen()
        told = sorted_rows(_metadata_rows(folder, sorted(found.metadata), vector_column), METADATA_SCHEMA)
        joined = RowFile(ENTRY_SCHEMA)
        joined.extend(seen.noted(_joined(folder, file.rows(0, len(file)), _last_of_each(told), found)))
        file = joined
    if not len(file):
        held = ", ".join(sorted(found.ignored)[:5]) or "nothing"
        raise UserError(f"{flag} {folder} holds no image file ({held} found; wanted: .jpg, .png, .webp, ...)")
    folder_labels = not seen.told_labels and seen.folders_are_classes
    labels = seen.folder_names if folder_labels else seen.told_labels
    entries = Entries(file, folder_labels, range(len(file)))
    return Listing(entries, labels, seen.has_text, seen.has_vector, found.ignored)


class _Found(NamedTuple):
    """What the walk meets besides images."""

    metadata: list[str]
    ignored: Ignored


def _walk(root: Path, found: _Found) -> Iterator[tuple]:
    """Rows of `ENTRY_SCHEMA` for every image file, sorted by path, a folder at a time."""
    seen_links = set()
    pending = [("", _with_sidecars(_sorted_items(str(root), "", found), found))]
    while pending:
        prefix, items = pending[-1]
        if (item := next(items, None)) is None:
            pending.pop()
            continue
        name, kind, *stat = item
        path = prefix + _decoded(name)
        if kind == IMAGE:
            yield (_encoded(path), *stat[:2], None, None, *stat[2:], None)
            continue
        folder = os.path.join(root, path[:-1])
        if kind == LINKED_FOLDER:  # followed once: a link may lead back up
            target = os.path.realpath(folder)
            if target in seen_links or f"{os.path.realpath(os.path.dirname(folder))}/".startswith(f"{target}/"):
                continue
            seen_links.add(target)
        pending.append((path, _with_sidecars(_sorted_items(folder, path, found), found)))


def _sorted_items(folder: str, prefix: str, found: _Found) -> Iterator[tuple]:
    return sorted_rows(_items(folder, prefix, found), ITEM_SCHEMA)


def _items(folder: str, prefix: str, found: _Found) -> Iterator[tuple]:
    """Rows of `ITEM_SCHEMA`, in no order."""
    with os.scandir(folder) as items:
        for item in items:
            name = item.name
            if name.startswith("."):
                continue
            if _is_folder(item):
                yield _encoded(name + "/"), LINKED_FOLDER if item.is_symlink() else FOLDER, 0, 0
                continue
            extension = os.path.splitext(name)[1].lower()
            if extension in IMAGE_EXTENSIONS:
                yield _encoded(name), IMAGE, *_size_and_time(item)
            elif extension in SIDECARS:
                size, mtime_ns = _size_and_time(item)
                if size >= 0:
                    yield _encoded(name), SIDECARS[extension], size, mtime_ns
                else:
                    found.ignored.add(name)
            elif name in METADATA_NAMES:
                found.metadata.append(prefix + name)
            else:
                found.ignored.add(name)


def _is_folder(item: os.DirEntry) -> bool:
    try:
        return item.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:  # a link to itself is one bad file, not the end of the listing
            raise
        return False


def _size_and_time(item: os.DirEntry | Path) -> tuple[int, int]:
    """Bytes and mtime_ns of a file; `MISSING` or `NOT_A_FILE` with 0 where there is none to be read."""
    try:
        found = item.stat()
    except (OSError, ValueError):
        return MISSING, 0  # the decoder will say what is wrong with it
    if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for ever, and a device may have no end
        return NOT_A_FILE, 0
    return found.st_size, found.st_mtime_ns


def _with_sidecars(items: Iterator[tuple], found: _Found) -> Iterator[tuple]:
    """The images and folders of one folder, in order, each image with size and mtime_ns of its NAME.txt and NAME.npy.

    An image waits until none can follow: names that begin with the same "NAME." are neighbours.
    """
    waiting, beside, used = deque(), {}, set()

    def settled(key: bytes) -> Iterator[tuple]:
        while waiting and not (waiting[0][1] == IMAGE and key.startswith(_stem(waiting[0][0]))):
            item = waiting.popleft()
            told = beside.get(_stem(item[0]), {}) if item[1] == IMAGE else {}
            if told:
                used.add(_stem(item[0]))
            yield (*item, *told.get(CAPTION, NOTHING_BESIDE), *told.get(VECTOR, NOTHING_BESIDE))
        if not waiting and beside:
            for stem in [stem for stem in beside if not key.startswith(stem)]:
                told = beside.pop(stem)
                if stem not in used:
                    for extension in (extension for extension, kind in SIDECARS.items() if kind in told):
                        found.ignored.add(_decoded(stem[:-1]) + extension)
                used.discard(stem)

    for item in items:
        yield from settled(item[0])
        if item[1] in SIDECARS.values():
            beside.setdefault(_stem(item[0]), {})[item[1]] = item[2:]
        else:
            waiting.append(item)
    yield from settled(b"")


def _stem(name: bytes) -> bytes:
    return name[: name.rfind(b".") + 1]


def _last_of_each(rows: Iterator[tuple]) -> Iterator[tuple]:
    """Of rows that begin alike, the last."""
    last = next(rows, None)
    for row in rows:
        if row[0] != last[0]:
            yield last
        last = row
    if last is not None:
        yield last


def _joined(root: Path, rows: Iterator[tuple], told: Iterator[tuple], found: _Found) -> Iterator[tuple]:
    """The sorted rows with what the sorted metadata tells of them, and a row for each file that only it names."""
    row, tells = next(rows, None), next(told, None)
    while row is not None or tells is not None:
        if tells is None or (row is not None and row[0] < tells[0]):
            yield row
            row = next(rows, None)
            continue
        path, label, text, vector = tells
        if row is None or tells[0] < row[0]:  # another extension, or a row without its file
            named = root / _decoded(path)
            beside = [_found_stat(named.with_suffix(extension), found) for extension in SIDECARS]
            caption, vector_file = (NOTHING_BESIDE if pair[0] < 0 else pair for pair in beside)
            stat_told = _found_stat(named, found)
        else:
            stat_told, caption, vector_file = row[1:3], row[5:7], row[7:9]
            row = next(rows, None)
        caption = caption if text is None else NOTHING_BESIDE
        vector_file = vector_file if vector is None else NOTHING_BESIDE
        yield (path, *stat_told, label, text, *caption, *vector_file, vector)
        tells = next(told, None)


def _found_stat(path: Path, found: _Found) -> tuple[int, int]:
    """`_size_and_time` of a file that metadata names: if the walk passed it over, it is not ignored after all."""
    size, mtime_ns = _size_and_time(path)
    if size >= 0 and path.suffix.lower() not in IMAGE_EXTENSIONS:
        found.ignored.take(path.name)
    return size, mtime_ns


class _Seen:
    """What is learnt of all the rows while they pass by."""

    def __init__(self):
        self.told_labels, self.folder_names = set(), set()
        self.has_text, self.has_vector = False, False
        self._depth, self._uneven, self._last = None, False, None

    @property
    def folders_are_classes(self) -> bool:
        """Whether every image lies equally deep, in folders of several names."""
        return not self._uneven and len(self.folder_names) > 1

    def noted(self, rows: Iterator[tuple]) -> Iterator[tuple]:
        for row in rows:
            path, _, _, label, text, caption_size, _, vector_size, _, vector = row
            if label is not None:
                self.told_labels.add(_decoded(label))
            self.has_text = self.has_text or text is not None or caption_size is not None
            self.has_vector = self.has_vector or vector is not None or vector_size is not None
            folder = path.rpartition(b"/")[0]
            if folder != self._last:
                self._note_folder(folder)
            yield row

    def _note_folder(self, folder: bytes) -> None:
        depth = folder.count(b"/")
        self._uneven = self._uneven or not folder or self._depth not in (None, depth)
        self._depth, self._last = depth, folder
        if self._uneven:
            self.folder_names.clear()
        else:
            self.folder_names.add(_decoded(folder.rpartition(b"/")[2]))


def _encoded(text: str | None) -> bytes | None:
    return None if text is None else text.encode("utf-8", "surrogatepass")


def _decoded(text: bytes | None) -> str | None:
    return None if text is None else text.decode("utf-8", "surrogatepass")


def _metadata_rows(root: Path, metadata_paths: list[str], vector_column: str) -> Iterator[tuple]:
    """Rows of `METADATA_SCHEMA` from every metadata.csv and metadata.jsonl."""
    for metadata_path in metadata_paths:
        for path, label, text, vector in told_in_folder(root, metadata_path, vector_column):
            yield _encoded(path), _encoded(label), _encoded(text), vector
