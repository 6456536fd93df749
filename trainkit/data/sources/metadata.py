"""metadata.csv, .jsonl, .json and .parquet: labels, captions and vectors of the images next to and below them."""

import codecs
import csv
import errno
import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from trainkit.data.account import Account, Kind
from trainkit.data.sources.texts import FALLBACK, NotAClass, caption_text, class_name, marked_encoding
from trainkit.data.sources.vectors import vector_bytes
from trainkit.errors import UserError, one_line

LABELS_NAME = "dataset.json"  # of EDM and StyleGAN: {"labels": [["00000/img00000000.png", 6], ...]}
METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.json", "metadata.parquet", LABELS_NAME)
TABLE_EXTENSIONS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".xlsx", ".parquet")  # named if they are not read
FILE_COLUMNS = (
    "file_name", "filename", "file", "path", "file_path", "filepath", "image_path", "image_file", "image_name",
    "image_file_name", "image_filename", "image", "img",
)  # fmt: skip
CONDITION_FILE_COLUMNS = ("conditioning_file_name", "conditioning_image_file_name")
ID_COLUMNS = ("image_id", "id", "key", "name")  # file names in metadata, but not in tables that hold images
CAPTION_COLUMNS = ("text", "caption", "texts", "captions")
OTHER_CAPTION_COLUMNS = re.compile(
    r"prompts?|descriptions?|sentences?|alt(_text)?|title|(text|caption|prompt)s?_\w+|\w+_(text|caption|prompt)s?"
)
FILE_NAME_ENDING = "_file_name"  # of the columns that `datasets` reads as images
CONDITIONING_COLUMNS = re.compile(r"\w*(condition|control|mask|depth|canny|segmentation|edited|source_image)\w*")
LABEL_COLUMNS = ("label", "class", "class_name", "category", "cls")
READ_BYTES = 2**20


@dataclass(frozen=True)
class ColumnOptions:
    """Which columns of a table hold vectors, captions and images (`SourceOptions`); None: found by their names."""

    vector: str = "vector"
    caption: str | None = None
    image: str | None = None
    has_pairs: bool = False  # whether conditioning images are looked for
    condition: str | None = None  # the column that names them


def refuse_columns(columns: ColumnOptions, what: str) -> None:
    """Raise `UserError` if a column is named for the folder `what`, which has no metadata file.

    `image` is what the column of images is called when `datasets` reads a folder.
    """
    for flag, name, defaults in (
        ("caption_column", columns.caption, (None,)),
        ("image_column", columns.image, (None, "image")),
        ("vector_column", columns.vector, ("vector",)),
        ("conditioning_image_column", columns.condition, (None, "conditioning_image")),
    ):
        if name not in defaults:
            missing = f"{what} has no metadata.csv or metadata.jsonl"
            raise UserError(f"--{flag} {name} is a column of a table, and {missing}: leave it out")


class MetadataRow(NamedTuple):
    """What a row says about the image `name`, as it is written there. `vector`: float32 bytes."""

    name: str
    label: str | None = None
    text: str | None = None
    vector: bytes | None = None
    where: str = ""  # "metadata.csv line 3"
    condition: str | None = None  # the name of the conditioning image, as it is written there


@dataclass(frozen=True)
class TableColumns:
    """The columns of one table by their meaning, under the names that the table has for them."""

    file_name: str | None = None
    label: str | None = None
    captions: tuple[str, ...] = ()  # the first that is not empty counts
    vector: str | None = None
    condition: str | None = None
    unused: tuple[str, ...] = field(default=())


def normal_name(column: str) -> str:
    """A column's name without the differences of case and blanks between programs that write tables."""
    return re.sub(r"[\s-]+", "_", column.strip().casefold())


def find_columns(names: Iterable[str], options: ColumnOptions, account: Account, where: str) -> TableColumns:
    """What the columns of a table hold. What is not used, or read under another name, is added to `account`.

    Raises `UserError` for a column that a flag names and that is not there.
    """
    names = [name for name in names if isinstance(name, str)]
    by_name, shown = dict[str, str](), ", ".join(filter(str.strip, names))
    for name in names:
        by_name.setdefault(normal_name(name), name)
    if options.image is not None and options.image not in names:
        raise UserError(f"--image_column {options.image} is not in {where}; it has {shown}")
    if options.has_pairs and options.condition is not None and options.condition not in names:
        raise UserError(f"--conditioning_image_column {options.condition} is not in {where}; it has {shown}")
    condition = options.condition or next((by_name[name] for name in CONDITION_FILE_COLUMNS if name in by_name), None)
    condition = condition if options.has_pairs and condition != options.image else None
    others = {key: name for key, name in by_name.items() if name != condition}
    file_name = options.image or _file_column(others, where)
    label = next((by_name[name] for name in LABEL_COLUMNS if name in by_name), None)
    vector = next((name for name in (options.vector, by_name.get(normal_name(options.vector))) if name in names), None)
    captions = [by_name[name] for name in CAPTION_COLUMNS if name in by_name]
    unclear = []
    if options.caption is not None:
        if options.caption not in names:
            raise UserError(f"--caption_column {options.caption} is not in {where}; it has {shown}")
        captions = [options.caption]
    elif not captions:
        unclear = [name for key, name in by_name.items() if OTHER_CAPTION_COLUMNS.fullmatch(key)]
        captions, unclear = (unclear, []) if len(unclear) == 1 else ([], unclear)
    read = {file_name, label, vector, condition, *captions}
    unused = tuple(name for name in names if name not in read)
    if any(not name.strip() for name in unused):
        account.add(Kind.COLUMN_NOT_USED, f"a column without a name of {where}")
    for name in filter(str.strip, unused):
        hint = f" (for captions: --caption_column {name})" if name in unclear else ""
        if CONDITIONING_COLUMNS.fullmatch(normal_name(name)):
            hint = f" (for --condition image: --conditioning_image_column {name})"
        account.add(Kind.COLUMN_NOT_USED, f"{name} of {where}{hint}")
    standard = {"file_name", "label", options.vector, options.caption, options.image, condition, *CAPTION_COLUMNS}
    for name in sorted(name for name in read - standard if name is not None):
        meaning = {file_name: "file_name", label: "label"}.get(name, "captions")
        account.add(Kind.COLUMN_ALIAS, f"{name.strip()} as {meaning} in {where}")
    return TableColumns(file_name, label, tuple(captions), vector, condition, unused)


def _file_column(by_name: dict[str, str], where: str) -> str | None:
    """The column of file names: one of `FILE_COLUMNS`, the only one that ends in _file_name, or one of `ID_COLUMNS`.

    Raises `UserError` if several end in _file_name.
    """
    if found := [by_name[name] for name in FILE_COLUMNS if name in by_name]:
        return found[0]
    ending = [
        column
        for name, column in by_name.items()
        if name.endswith(FILE_NAME_ENDING) and name not in CONDITION_FILE_COLUMNS
    ]
    if len(ending) > 1:
        raise UserError(f"{where} names several images per row ({', '.join(ending)}): choose one with --image_column")
    return next(iter(ending or [by_name[name] for name in ID_COLUMNS if name in by_name]), None)


def read_folder_metadata(
    root: Path, metadata_path: str, options: ColumnOptions, account: Account
) -> Iterator[MetadataRow]:
    """The rows of a metadata file below `root`. Raises `UserError`."""
    where = root / metadata_path
    try:
        if where.is_fifo():  # opening it would block
            raise OSError(errno.EINVAL, "a pipe")
        if where.is_dir():
            raise OSError(errno.EISDIR, "a folder")
        with open(where, "rb") as file:
            yield from read_metadata(file, where, options, account)
    except OSError as error:
        raise UserError(f"{where}: {error.strerror or error}; it must be readable, or moved away") from None


def read_metadata(file: BinaryIO, where: Path, options: ColumnOptions, account: Account) -> Iterator[MetadataRow]:
    """The rows of an open metadata file, in their order. Raises `UserError` naming the line."""
    columns_of: dict[tuple, TableColumns] = {}
    is_csv, name, number = where.suffix.lower() == ".csv", where.name, None
    for number, row in _rows(file, where, account):
        keys = tuple(row)
        if keys not in columns_of:
            known = {key for seen in columns_of for key in seen}
            columns_of[keys] = find_columns(keys, options, account if set(keys) - known else Account(), name)
        columns = columns_of[keys]
        file_name = _file_name(row.get(columns.file_name))
        if not file_name:
            raise UserError(
                f"{where} line {number} has no `file_name`; every row must name its image (columns: "
                f"{', '.join(str(key).strip() for key in keys)})"
            )
        label, here = None, f"{name} line {number}"
        try:
            label = class_name(row.get(columns.label), is_csv)
        except NotAClass as error:
            account.add(Kind.LABEL_NOT_A_CLASS, f"{here}: {error}")
        values = (caption_text(row[column], is_csv) for column in columns.captions)
        text = next((value for value in values if value), None)
        if columns.captions and not (text or "").strip():
            account.add(Kind.EMPTY_CAPTION, here)
            text = None
        condition = _file_name(row.get(columns.condition)) or None
        yield MetadataRow(file_name, label, text, vector_bytes(row.get(columns.vector)), here, condition)
    if number is None:
        account.add(Kind.NO_ROWS, name)


def _file_name(value: Any) -> str:
    """The name in a cell: a string, a whole number (an id), or a struct with a `path`, as `datasets` writes images."""
    if isinstance(value, dict):
        value = value.get("path")
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    return value.strip() if isinstance(value, str) else ""


def _rows(file: BinaryIO, where: Path, account: Account) -> Iterator[tuple[int, dict]]:
    suffix = where.suffix.lower()
    try:
        if suffix == ".parquet":
            yield from _parquet_rows(file)
            return
        lines = _text_lines(file, where, account)
        if suffix == ".csv":
            yield from _csv_rows(lines)
        elif where.name.lower() == LABELS_NAME:
            yield from _label_rows(json.load(lines))
        elif suffix == ".json":
            yield from _json_rows(json.load(lines))
        else:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _object(json.loads(line), number)
    except (ValueError, csv.Error) as error:
        raise UserError(f"{where} cannot be read: {one_line(error)}") from None


def _object(value: Any, number: int) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"line {number} is not an object")
    return value


def _label_rows(content: Any) -> Iterator[tuple[int, dict]]:
    """The labels of a dataset.json: a class or a vector per image; none where it holds something else."""
    labels = content.get("labels") if isinstance(content, dict) else None
    if isinstance(labels, dict):
        labels = [list(pair) for pair in labels.items()]
    for number, entry in enumerate(labels or (), 1):
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
            raise ValueError(f"entry {number} of `labels` is not a pair of file name and label")
        yield number, {"file_name": entry[0], "vector" if isinstance(entry[1], list) else "label": entry[1]}


def _json_rows(content: Any) -> Iterator[tuple[int, dict]]:
    """A list of objects, the captions of COCO, or an object from file names to captions or objects."""
    if isinstance(content, dict) and isinstance(content.get("images"), list):
        content = _coco_rows(content)
    elif isinstance(content, dict):
        content = [
            {"file_name": name} | (value if isinstance(value, dict) else {"text": value})
            for name, value in content.items()
        ]
    if not isinstance(content, list):
        raise ValueError("it is not a list of objects")
    yield from ((number, _object(value, number)) for number, value in enumerate(content, 1))


def _coco_rows(content: dict) -> list[dict]:
    """A row per image of a COCO file, with the captions of its annotations. Categories are not read."""
    captions: dict[Any, list] = {}
    for annotation in content.get("annotations") or ():
        if "caption" in annotation:
            captions.setdefault(annotation.get("image_id"), []).append(annotation["caption"])
    images = (_object(image, number) for number, image in enumerate(content["images"], 1))
    return [{"file_name": image.get("file_name"), "text": captions.get(image.get("id"))} for image in images]


def _csv_rows(lines: io.TextIOWrapper) -> Iterator[tuple[int, dict]]:
    """The rows of a CSV file whose separator is a comma, a semicolon or a tab, whichever the header has most of."""
    header = lines.readline()
    while header and not header.strip():
        header = lines.readline()
    separator = max(",;\t", key=header.count)
    spaced = re.search(re.escape(separator) + r" +\S", header) is not None  # "a, b": blanks belong to the separator
    names = next(csv.reader([header], delimiter=separator, skipinitialspace=spaced), [])
    rows = csv.DictReader(lines, names, delimiter=separator, skipinitialspace=spaced)
    for row in rows:
        row.pop(None, None)  # further cells than the header has
        yield rows.line_num + 1, row


def _parquet_rows(file: BinaryIO) -> Iterator[tuple[int, dict]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        number = 0
        for batch in pq.ParquetFile(file).iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except pa.ArrowException as error:
        raise ValueError(one_line(error)) from None


def _text_lines(file: BinaryIO, where: Path, account: Account) -> io.TextIOWrapper:
    """The file as text: by its byte order mark, else UTF-8, else cp1252, which is added to `account`."""
    encoding = marked_encoding(file.read(64))
    file.seek(0)
    if encoding is None:
        decoder, encoding = codecs.getincrementaldecoder("utf-8")(), "utf-8"
        try:
            while block := file.read(READ_BYTES):
                decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            encoding = FALLBACK
            account.add(Kind.FALLBACK_ENCODING, where.name)
        file.seek(0)
    return io.TextIOWrapper(file, encoding=encoding, newline="")
