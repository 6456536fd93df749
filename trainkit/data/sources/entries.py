"""What is known about an image file before it is opened: size, time, label, caption; kept in a temporary file."""

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, overload

import pyarrow as pa

from trainkit.data.account import Account, Kind
from trainkit.data.pairing import PairSettings, pairs_from_options
from trainkit.data.sources.metadata import TABLE_EXTENSIONS, ColumnOptions
from trainkit.data.sources.rowfile import RowFile
from trainkit.options.data import PairOptions, SourceOptions

IMAGE_EXTENSIONS = frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .webp .bmp .dib .gif .tif .tiff .ppm .pgm .pbm .pnm .jp2 .j2k .avif .tga "
    ".heic .heif".split()  # Pillow reads no HEIF: better rejected by name than passed over in silence
)
FOREIGN_IMAGES = frozenset(".cr2 .cr3 .nef .arw .dng .raf .orf .rw2 .psd .xcf .svg .eps .jxl .exr .hdr".split())
TOP_FOLDER, BELOW_SPLIT = "top_folder", "below_split"  # which folder of a path is its class, if not the parent
MISSING, NOT_A_FILE = -1, -2  # instead of a size

IMAGE, CAPTION, VECTOR, FOLDER, LINKED_FOLDER, UNREAD = range(6)
SIDECARS = {
    ".txt": CAPTION,
    ".caption": CAPTION,
    ".npy": VECTOR,
}  # in any case; of two, the first in this order counts
UNREAD_SIDECARS = (".json", ".cls", ".cap", ".tags", ".xml", ".yaml")  # named if they are named after an image
MASK_ENDINGS = ("-masklabel", "-condlabel")
STANDARD_SIDECARS = (".txt", ".npy")
NO_SIDECAR = NO_CONDITION = (None, None, None)
# Text is kept in bytes, since file names need not be UTF-8; bytes sort as the text does.
ITEM_SCHEMA = pa.schema(
    [("name", pa.binary()), ("kind", pa.int8()), ("size", pa.int64()), ("mtime_ns", pa.int64())]
)  # a folder's name ends in a slash: so names sort as the whole paths do
METADATA_SCHEMA = pa.schema(
    [(name, pa.binary()) for name in ("path", "label", "text", "vector", "where", "condition")]
)
ENTRY_SCHEMA = pa.schema(
    [
        ("path", pa.binary()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("label", pa.binary()),
        ("text", pa.binary()),
        ("caption_size", pa.int64()),
        ("caption_mtime_ns", pa.int64()),
        ("caption_ending", pa.binary()),
        ("vector_size", pa.int64()),
        ("vector_mtime_ns", pa.int64()),
        ("vector_ending", pa.binary()),
        ("vector", pa.binary()),
        ("condition", pa.binary()),
        ("condition_size", pa.int64()),
        ("condition_mtime_ns", pa.int64()),
    ]
)


class Entry(NamedTuple):
    """One image file: path relative to the folder (posix), stat, and what is known about it."""

    path: str
    size: int
    mtime_ns: int
    label: str | None = None
    text: str | None = None
    caption_file: tuple | None = None  # of NAME.txt: size, mtime_ns, and the ending if it is not .txt
    vector_file: tuple | None = None  # the same of NAME.npy
    vector: bytes | None = None  # float32
    condition: tuple | None = None  # path of the conditioning image, size, mtime_ns

    @property
    def identity(self) -> tuple:
        """What changes with the entry; without a conditioning image as it was before there were any."""
        return tuple(self) if self.condition else tuple(self)[:-1]


class Entries(Sequence):
    """A run of a listing's entries, read from its file when asked for."""

    def __init__(self, file: RowFile, folder_labels: str | None, rows: range):
        self._file, self._folder_labels, self._rows = file, folder_labels, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Entry]:
        for row in self._file.rows(self._rows.start, self._rows.stop):
            path, size, mtime_ns, label, text, *sidecars, vector = row[:12]
            path, label, text = decoded(path), decoded(label), decoded(text)
            if self._folder_labels:
                label = folder_class(path.rpartition("/")[0], self._folder_labels) or None
            caption, vector_file = (_sidecar(part) for part in (sidecars[:3], sidecars[3:]))
            condition = None if row[12] is None else (decoded(row[12]), *row[13:])
            yield Entry(path, size, mtime_ns, label, text, caption, vector_file, vector, condition)

    def __getitem__(self, place):
        """An entry, or the list of those in a slice."""
        if isinstance(place, slice):
            return list(self.part(*place.indices(len(self))[:2]))
        return next(iter(self.part(self._rows[place] - self._rows.start, len(self))))

    def part(self, start: int, stop: int) -> "Entries":
        """Entries `start` to `stop` - 1, still in the file."""
        return Entries(self._file, self._folder_labels, self._rows[start:stop])

    def paths(self) -> Iterator[str]:
        return (decoded(row[0]) for row in self._file.rows(self._rows.start, self._rows.stop))


@dataclass(frozen=True)
class ReadOptions:
    """How a source is read (`SourceOptions`)."""

    columns: ColumnOptions = ColumnOptions()
    split: str = "train"
    config: str | None = None
    label_from: str = "parent_folder"
    pairs: PairSettings | None = None  # None: conditioning images are not read
    conditioning_dir: str | None = None

    @classmethod
    def of(cls, options: SourceOptions) -> "ReadOptions":
        pairs, folder, column = pairs_from_options(options), None, None
        if pairs is not None and isinstance(options, PairOptions):
            folder, column = options.conditioning_data_dir, options.conditioning_image_column
            folder = folder and folder.removeprefix("file://")
        columns = ColumnOptions(
            options.vector_column,
            options.caption_column,
            options.image_column,
            has_pairs=pairs is not None and folder is None,
            condition=column,
        )
        return cls(columns, options.dataset_split, options.dataset_config_name, options.label_from, pairs, folder)


@dataclass
class Found:
    """What the walk meets besides images. `num_sidecars`: caption and vector files of images."""

    metadata: list[str]
    account: Account
    num_sidecars: int = 0


def size_and_time(item: os.DirEntry | Path) -> tuple[int, int]:
    """Bytes and mtime_ns of a file; `MISSING` or `NOT_A_FILE` with 0 where there is none to be read."""
    try:
        found = item.stat()
    except (OSError, ValueError):
        return MISSING, 0  # the decoder will say what is wrong with it
    if not stat.S_ISREG(found.st_mode):  # opening a pipe would block, and a device may have no end
        return NOT_A_FILE, 0
    return found.st_size, found.st_mtime_ns


def _sidecar(part: Sequence) -> tuple | None:
    """As `Entry` has it: (size, mtime_ns), and the ending unless it is the standard one."""
    size, mtime_ns, ending = part
    if size is None:
        return None
    ending = decoded(ending)
    return (size, mtime_ns) if ending in STANDARD_SIDECARS else (size, mtime_ns, ending)


def sidecar_path(path: Path, file: tuple, standard: str) -> Path:
    """The caption or vector file of the image at `path`, from its `Entry`."""
    return path.with_suffix(file[2] if len(file) > 2 else standard)


def folder_class(folder: str, label_from: str) -> str:
    """The class that a relative folder stands for: its own name, or that of the folder at the top or in a split."""
    top, _, below = folder.partition("/")
    name = folder.rpartition("/")[2]
    if label_from in (TOP_FOLDER, BELOW_SPLIT):
        name = top if label_from == TOP_FOLDER else below.partition("/")[0]
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # an ASCII locale does not decode it


def is_mask(path: str) -> bool:
    """Whether an image file belongs to another image: OneTrainer names them NAME-masklabel.png."""
    return os.path.splitext(path)[0].endswith(MASK_ENDINGS)


def count_mask(account: Account, path: str) -> None:
    account.add(Kind.MASK, path)
    account.ignore(path)


def count_unread(account: Account, path: str) -> None:
    """Count a file that is named after an image and not read."""
    account.add(Kind.SIDECAR_NOT_READ, path)
    account.ignore(path)


def ignore_file(account: Account, path: str) -> None:
    """Count a file that is not used, and name it if it looks like a table or an image."""
    extension = os.path.splitext(path)[1].lower()
    if extension in TABLE_EXTENSIONS:
        account.add(Kind.TABLE_NOT_READ, path)
    elif extension in FOREIGN_IMAGES:
        account.add(Kind.FOREIGN_IMAGE, path)
    account.ignore(path)


@overload
def encoded(text: str) -> bytes: ...


@overload
def encoded(text: None) -> None: ...


def encoded(text: str | None) -> bytes | None:
    return None if text is None else text.encode("utf-8", "surrogatepass")


@overload
def decoded(text: bytes) -> str: ...


@overload
def decoded(text: None) -> None: ...


def decoded(text: bytes | None) -> str | None:
    return None if text is None else text.decode("utf-8", "surrogatepass")
