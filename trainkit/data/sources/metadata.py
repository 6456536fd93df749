"""metadata.csv and metadata.jsonl: labels, captions and vectors of the images beside and below them."""

import csv
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from trainkit.data.sources.vectors import vector_bytes
from trainkit.errors import UserError

METADATA_NAMES = ("metadata.csv", "metadata.jsonl")
CAPTION_COLUMNS = ("text", "caption", "texts", "captions")


class Told(NamedTuple):
    """What a line says of the image at `path`, relative to the root. `vector`: float32 bytes."""

    path: str
    label: str | None = None
    text: str | None = None
    vector: bytes | None = None


def told_in_folder(root: Path, metadata_path: str, vector_column: str) -> Iterator[Told]:
    """The lines of a file below `root`. Raises `UserError`."""
    try:
        if (root / metadata_path).is_fifo():  # opening it would wait for ever
            raise OSError(errno.EINVAL, "a pipe")
        with open(root / metadata_path, encoding="utf-8-sig", newline="") as file:
            yield from told_lines(file, metadata_path, root, vector_column)
    except OSError as error:
        raise UserError(f"{root / metadata_path}: {error.strerror}; it must be readable, or moved away") from None


def told_lines(file: TextIO, metadata_path: str, root: Path, vector_column: str) -> Iterator[Told]:
    """The lines of an open file, in their order. Raises `UserError` naming the line."""
    prefix, where = metadata_path.rpartition("/")[0], root / metadata_path
    for line_number, row in _rows(file, where):
        file_name = row.get("file_name")
        if not isinstance(file_name, str) or not file_name:
            raise UserError(f"{where} line {line_number} has no `file_name`; every row must name its image")
        path = os.path.normpath(os.path.join(prefix, file_name)).replace(os.sep, "/")
        if path.startswith(("../", "/")):
            raise UserError(f"{where} line {line_number}: {file_name} is outside of {root}; name files inside it")
        label, text = row.get("label"), next((row[name] for name in CAPTION_COLUMNS if row.get(name)), None)
        label = None if label in (None, "") else str(label)
        yield Told(path, label, caption_lines(text), vector_bytes(row.get(vector_column)))


def caption_lines(value: Any) -> str | None:
    """A caption as it is, or a list of them with one a line; None where there is none."""
    if not isinstance(value, list | tuple):
        return None if value in (None, "") or isinstance(value, dict) else str(value)
    return "\n".join(" ".join(str(caption).split()) for caption in value if caption) or None


def _rows(file: TextIO, where: Path) -> Iterator[tuple[int, dict]]:
    try:
        if where.suffix == ".csv":
            rows = csv.DictReader(file)
            yield from ((rows.line_num, row) for row in rows)
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"line {number} is not an object")
                yield number, row
    except (ValueError, csv.Error) as error:
        raise UserError(f"{where} cannot be read: {' '.join(str(error).split())}") from None
