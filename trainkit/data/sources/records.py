"""What every source of images is made of: records, work units, and how a listing is cut into them.

A source lists itself without opening an image, cuts that listing into work units, and gives a small picklable
`reader` with which any process names a unit's items and turns them into `Record`s.
"""

import hashlib
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from trainkit.data.account import Account, Kind
from trainkit.data.faults import RejectedImage

UNIT_ITEMS = 2048  # mean length of a work unit


class HasPath(Protocol):
    """An entry of a listing, sorted by `path`."""

    @property
    def path(self) -> str: ...


T = TypeVar("T", bound=HasPath)


class Record(NamedTuple):
    """One image on its way to the decoder. `image`: path, bytes, or None where the source holds no image.

    As an array it is (height, width, channels), uint8 or uint16, or floats in [0, 1]. `condition` is the conditioning
    image, if there is one; as a label map it is an array (height, width, 1) of any whole numbers.
    """

    image: Path | bytes | np.ndarray | None
    label: int
    text: str | None
    vector: np.ndarray | None = None  # float32
    notes: tuple[Kind, ...] = ()  # what reading it showed, for the account
    condition: Path | bytes | np.ndarray | None = None


class Unit(NamedTuple):
    """A run of items that becomes one shard; `identity` changes whenever one of its items does."""

    identity: str
    items: Sequence


def first_length(vectors: Iterable[Callable[[], np.ndarray | None] | None]) -> int | None:
    """Length of the first vector that can be read: the others must be like it.

    None where nothing has a vector, 0 where no vector can be read.
    """
    length = None
    for read in vectors:
        if read is None:
            continue
        try:
            vector = read()
        except RejectedImage:
            length = 0
            continue
        if vector is not None:
            if len(vector):
                return len(vector)
            length = 0
    return length


def cut_by_name(entries: list[T], mean: int) -> Iterator[list[T]]:
    """The runs of `cuts`, as lists."""
    return (entries[start:stop] for start, stop in cuts((entry.path for entry in entries), mean))


def cuts(paths: Iterable[str], mean: int) -> Iterator[tuple[int, int]]:
    """Cut a sorted listing into runs of about `mean`, of at least half and at most four times as many: (start, stop).

    A run ends where a hash of the path says so, not at a count: an added file changes its own run, no other.
    """
    start, stop = 0, 0
    for stop, path in enumerate(paths, 1):
        count = stop - start
        if count < mean // 2:
            continue
        path_hash = hashlib.blake2b(path_bytes(path), digest_size=8).digest()
        if count == 4 * mean or int.from_bytes(path_hash, "little") % (mean - mean // 2) == 0:
            yield start, stop
            start = stop
    if start < stop:
        yield start, stop


def sorted_labels(names: set[str], account: Account | None = None) -> list[str]:
    """Class names by number if all are whole numbers (7 after 07), else by name: a function of the names alone.

    Differences to `datasets`, which sorts by name, are added to `account`, as are names that look the same or are the
    same number.
    """
    by_name = sorted(names)
    try:
        ordered = sorted(by_name, key=lambda name: (int(name), name))
    except ValueError:
        ordered = by_name
    if account is not None:
        if ordered != by_name:
            here, there = (", ".join(order[:4]) for order in (ordered, by_name))
            account.add(Kind.CLASS_ORDER, f"{here}, ... here, {there}, ... there")
        seen: dict[str, str] = {}
        for name in by_name:
            key = str(int(name)) if name.isdecimal() else unicodedata.normalize("NFC", name)
            if (other := seen.setdefault(key, name)) != name:
                account.add(Kind.SIMILAR_NAMES, f"{ascii(other)} and {ascii(name)}")
    return ordered


def digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def path_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")  # file names need not be UTF-8
