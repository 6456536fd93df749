"""Put together what a walk through a folder found and what its metadata files say, in the order of the paths."""

from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path

import pyarrow as pa

from trainkit.data.account import Account, Kind
from trainkit.data.sources.entries import (
    IMAGE_EXTENSIONS,
    METADATA_SCHEMA,
    MISSING,
    NO_CONDITION,
    NO_SIDECAR,
    STANDARD_SIDECARS,
    Found,
    ReadOptions,
    decoded,
    encoded,
    size_and_time,
)
from trainkit.data.sources.metadata import ColumnOptions, read_folder_metadata
from trainkit.data.sources.names import match_names, relative_name
from trainkit.data.sources.rowfile import BATCH_ROWS, RowFile, sorted_rows
from trainkit.errors import UserError

PATH_SCHEMA = pa.schema([("path", pa.binary())])


def with_metadata(
    root: Path, file: RowFile, found: Found, options: ReadOptions, keep: Callable[[bytes], bool] | None, flag: str
) -> Iterator[tuple]:
    """The rows of `file` that belong to the split, with what the metadata files say about them."""
    keep = keep or (lambda path: True)
    rows = file.rows(0, len(file))
    if not found.metadata:
        yield from (row for row in rows if keep(row[0]))
        return
    renamed = _renamed(root, file, found, options, flag)
    account = found.account
    conditions = RowFile(PATH_SCHEMA)
    read = _noted(_metadata_rows(root, found, options.columns, account, renamed), conditions)
    named = sorted_rows(read, METADATA_SCHEMA)
    merged = _merged(_of_split(named, keep, account), account)
    first = next(merged, None)  # now all metadata is read
    kept = (row for row in rows if keep(row[0]))
    if first is None:
        yield from kept
        return
    _refuse_outside(root, conditions, flag)
    used = (path for (path,) in sorted_rows(conditions.rows(0, len(conditions)), PATH_SCHEMA))
    yield from _joined(root, kept, chain([first], merged), found, used)


def _noted(rows: Iterator[tuple], conditions: RowFile) -> Iterator[tuple]:
    """`rows` of `METADATA_SCHEMA`; the conditioning images that they name are added to `conditions`."""
    while batch := list(islice(rows, BATCH_ROWS)):
        conditions.extend((row[-1],) for row in batch if row[-1] is not None)
        yield from batch


def _refuse_outside(root: Path, conditions: RowFile, flag: str) -> None:
    """Raise `UserError` for a conditioning image outside of `root`, or if none of them is there."""
    first, is_one_there = None, False
    for path in (decoded(path) for (path,) in conditions.rows(0, len(conditions))):
        if _leads_out(path):
            raise UserError(
                f"{flag} {root}: metadata names the conditioning image {path}, which is outside of it; name files "
                "inside it, or give --conditioning_data_dir"
            )
        first = first or path
        is_one_there = is_one_there or size_and_time(root / path)[0] >= 0
    if first is not None and not is_one_there:
        raise UserError(
            f"{flag} {root}: none of the conditioning images that metadata names is there (the first is {first}): "
            "correct their names, or give --conditioning_data_dir"
        )


def _of_split(rows: Iterator[tuple], keep: Callable[[bytes], bool], account: Account) -> Iterator[tuple]:
    for row in rows:
        if keep(row[0]):
            yield row
        else:
            account.add(Kind.OTHER_SPLIT_ROWS, f"{decoded(row[4])}: {decoded(row[0])}")


def _metadata_rows(
    root: Path, found: Found, columns: ColumnOptions, account: Account, renamed: dict[str, str]
) -> Iterator[tuple]:
    """Rows of `METADATA_SCHEMA` from every metadata file, under the names of the images in `renamed`."""
    for metadata_path in sorted(found.metadata):
        prefix = metadata_path.rpartition("/")[0]
        for row in read_folder_metadata(root, metadata_path, columns, account):
            path = relative_name(row.name, prefix)
            path = renamed.get(path, path)
            condition = None if row.condition is None else relative_name(row.condition.replace("\\", "/"), prefix)
            known = encoded(row.label), encoded(row.text), row.vector, encoded(row.where), encoded(condition)
            yield (encoded(path), *known)


def _renamed(root: Path, file: RowFile, found: Found, options: ReadOptions, flag: str) -> dict[str, str]:
    """name in metadata -> image, for names that no image has exactly. Raises `UserError` if no row has an image."""
    named = sorted_rows(_metadata_rows(root, found, options.columns, Account(), {}), METADATA_SCHEMA)
    rows = file.rows(0, len(file))
    row, unmatched, used, total = next(rows, None), [], set(), 0
    last = None
    for path, *_ in named:
        if path == last:
            continue
        last, total = path, total + 1
        while row is not None and row[0] < path:
            row = next(rows, None)
        if row is not None and row[0] == path:
            used.add(decoded(path))
        elif size_and_time(root / decoded(path))[0] >= 0 and not _leads_out(decoded(path)):
            used.add(decoded(path))  # an image of another extension
        else:
            unmatched.append(decoded(path))
    if not unmatched:
        return {}
    images = (decoded(row[0]) for row in file.rows(0, len(file)))
    renamed = match_names(unmatched, images, used, IMAGE_EXTENSIONS)
    for name, image in renamed.items():
        found.account.add(Kind.MATCHED_NAME, f"{name} -> {image}")
    outside = next((name for name in unmatched if name not in renamed and name.startswith("../")), None)
    if outside is not None:
        raise UserError(f"{flag} {root}: metadata names {outside}, which is outside of it; name files inside it")
    if total == len(unmatched) and not renamed and len(file):
        first = decoded(next(file.rows(0, 1))[0])
        raise UserError(
            f"{flag} {root}: {', '.join(found.metadata[:3])} names {total:,} images and none of them is there (the "
            f"first is {unmatched[0]}; an image that is there is {first}): correct file_name, or move the file away"
        )
    return renamed


def _leads_out(path: str) -> bool:
    return path.startswith(("../", "/")) or path == ".."


def _merged(rows: Iterator[tuple], account: Account) -> Iterator[tuple]:
    """One row per image: captions of several rows are put together. Raises `UserError` for contradicting rows."""
    group: list[tuple] = []
    for row in rows:
        if group and row[0] != group[0][0]:
            yield merged_row(group, account)
            group = []
        group.append(row)
    if group:
        yield merged_row(group, account)


def merged_row(group: list[tuple], account: Account) -> tuple:
    """The rows of `METADATA_SCHEMA` about one image as one. Raises `UserError` if they contradict."""
    account.add(Kind.METADATA_ROWS, count=len(group))
    path, label, text, vector, where, condition = group[0]
    captions = [] if text is None else text.split(b"\n")
    for row in group[1:]:
        for number, before, what in (
            (1, label, "labels"), (3, vector, "vectors"), (5, condition, "conditioning images")
        ):  # fmt: skip
            if row[number] is not None and before not in (None, row[number]):
                values = f" ({decoded(label)} and {decoded(row[1])})" if number == 1 else ""
                raise UserError(
                    f"{decoded(where)} and {decoded(row[4])} give {decoded(path)} different {what}{values}: keep one "
                    "row per image"
                )
        label, vector, condition = (
            before if row[number] is None else row[number]
            for number, before in ((1, label), (3, vector), (5, condition))
        )
        further = [line for line in (row[2] or b"").split(b"\n") if line and line not in captions]
        kind = Kind.MERGED_ROW if further else Kind.DUPLICATE_ROW
        account.add(kind, f"{decoded(row[4])}: {decoded(path)}")
        captions += further
    return path, label, b"\n".join(captions) if captions else None, vector, where, condition


def _joined(
    root: Path, rows: Iterator[tuple], named: Iterator[tuple], found: Found, conditions: Iterator[bytes]
) -> Iterator[tuple]:
    """The images that metadata lists, sorted, with what it says about them, as `datasets` reads them.

    A row without its image becomes an entry of size `MISSING`, which is rejected by name later. Images without a row
    are added to the account, as are those that are the conditioning image (`conditions`, sorted) of another.
    """
    row, about, used = next(rows, None), next(named, None), next(conditions, None)
    while row is not None or about is not None:
        if about is None or (row is not None and row[0] < about[0]):
            assert row is not None  # one of the two is left
            while used is not None and used < row[0]:
                used = next(conditions, None)
            if used == row[0]:
                found.account.add(Kind.CONDITION_FILES)
            else:
                found.account.add(Kind.IMAGE_WITHOUT_ROW, decoded(row[0]))
            row = next(rows, None)
            continue
        path, label, text, vector, where, condition = about
        if row is None or about[0] < row[0]:  # another extension, or a row without its file
            stat, caption, vector_file = _found_entry(root / decoded(path), found)
            if stat[0] == MISSING:
                found.account.add(Kind.ROW_WITHOUT_IMAGE, f"{decoded(where)}: {decoded(path)}")
        else:
            stat, caption, vector_file = row[1:3], row[5:8], row[8:11]
            row = next(rows, None)
        caption = caption if text is None else NO_SIDECAR
        vector_file = vector_file if vector is None else NO_SIDECAR
        pair = NO_CONDITION if condition is None else (condition, *size_and_time(root / decoded(condition)))
        yield (path, *stat, label, text, *caption, *vector_file, vector, *pair)
        about = next(named, None)


def _found_entry(path: Path, found: Found) -> tuple[tuple, tuple, tuple]:
    """Stat, caption file and vector file of a file that metadata names although its extension is not an image's."""
    size, mtime_ns = size_and_time(path)
    is_listed = size >= 0 and path.suffix.lower() not in IMAGE_EXTENSIONS
    if not is_listed:  # a missing file, or a hidden one
        found.account.add(Kind.EXTRA_ITEMS)
        return (size, mtime_ns), NO_SIDECAR, NO_SIDECAR
    found.account.unignore(path.name)
    sidecars: list[tuple] = []
    for extension in STANDARD_SIDECARS:
        found_sidecar = size_and_time(path.with_suffix(extension))
        if found_sidecar[0] >= 0:
            found.account.unignore(f"_{extension}")
            found.num_sidecars += 1
        sidecars.append(NO_SIDECAR if found_sidecar[0] < 0 else (*found_sidecar, extension.encode()))
    return (size, mtime_ns), sidecars[0], sidecars[1]
