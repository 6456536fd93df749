"""Match the images of a folder with the files of `--conditioning_data_dir`: the same path without its suffix.

Both may be more than memory should hold: they are sorted outside of it, as the listing is.
"""

from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import pyarrow as pa

from trainkit.data.account import Account, Kind
from trainkit.data.sources.entries import ENTRY_SCHEMA, NO_CONDITION, Found, decoded
from trainkit.data.sources.rowfile import sorted_rows
from trainkit.errors import UserError

FLAG = "--conditioning_data_dir"
KEYED_ENTRY = pa.schema([("key", pa.binary()), *ENTRY_SCHEMA])
KEYED_FILE = pa.schema([("key", pa.binary()), *list(ENTRY_SCHEMA)[:3]])


def check_condition_folder(given: str, images: Path, flag: str) -> Path:
    """The folder of the conditioning images of those in `images`. Raises `UserError` if it cannot be one."""
    folder = Path(given)
    if not folder.is_dir():
        raise UserError(f"{FLAG} {given} is not a folder: give one with a conditioning image for each image")
    if folder.resolve().is_relative_to(images.resolve()):
        raise UserError(
            f"{FLAG} {given} is inside {flag} {images}, so that its images would be trained on: move it elsewhere, or "
            "give the folder of the images alone"
        )
    return folder


def with_conditions(rows: Iterator[tuple], walked: Iterator[tuple], account: Account) -> Iterator[tuple]:
    """`rows` of `ENTRY_SCHEMA`, sorted by path, with the conditioning image of each from `walked`, rows of the same.

    Of several files that fit, the one with the image's own suffix is taken, else the first. The others are counted.
    """
    files = sorted_rows(((_key(row[0]), *row[:3]) for row in walked), KEYED_FILE)
    entries = sorted_rows(((_key(row[0]), *row) for row in rows), KEYED_ENTRY)
    return sorted_rows(_matched(entries, files, account), ENTRY_SCHEMA)


def _matched(entries: Iterator[tuple], files: Iterator[tuple], account: Account) -> Iterator[tuple]:
    groups = ((key, [row[1:] for row in rows]) for key, rows in groupby(files, itemgetter(0)))
    group = next(groups, None)
    for key, of_key in groupby(entries, itemgetter(0)):
        while group is not None and group[0] < key:
            _count(group[1], set(), account)
            group = next(groups, None)
        found, used = [], set()
        if group is not None and group[0] == key:
            found, group = group[1], next(groups, None)
        for _, *entry in of_key:
            suffix = entry[0][len(key) :]
            condition = next((file for file in found if file[0].endswith(suffix)), found[0] if found else None)
            used.add(condition)
            yield (*entry[:-3], *(condition or NO_CONDITION))
        _count(found, used, account)
    while group is not None:
        _count(group[1], set(), account)
        group = next(groups, None)


def _count(files: list[tuple], used: set, account: Account) -> None:
    for file in files:
        if file in used:
            account.add(Kind.CONDITION_FILES)
        else:
            account.add(Kind.CONDITION_NOT_USED, decoded(file[0]))


def count_others(found: Found, account: Account) -> None:
    """Add what was found in the folder besides its images to `account`: nothing of it is read."""
    for path in found.metadata:
        found.account.move(Kind.METADATA_FILES, Kind.TABLE_NOT_READ, 1)
        found.account.ignore(path)
    found.account.add(Kind.SIDECAR_NOT_USED, count=found.num_sidecars)
    account.merge(found.account)


def refuse_no_match(given: str, first: str, account: Account) -> None:
    """Raise `UserError`: no image, the `first` of which is given, has a conditioning image."""
    there = account.examples.get(Kind.CONDITION_NOT_USED)
    raise UserError(
        f"{FLAG} {given} holds no conditioning image of any image: wanted is {first} with any image suffix, and there "
        f"is {there[0] if there else 'no image file'}; give a folder with the same names and subfolders"
    )


def _key(path: bytes) -> bytes:
    """The path without its suffix."""
    start = path.rfind(b"/") + 1
    end = path.rfind(b".")
    return path[:end] if end > start else path
