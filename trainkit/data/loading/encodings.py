"""The cached outputs of a frozen network for a prepared dataset: rows of float16 numbers in Arrow files.

A cache is a folder of units. A unit is a pure function from its rows to one file, which appears under its name when
complete. So a killed run continues where it stopped, and any number of processes can work on one folder, each on
units that no other works on. The result does not depend on their number.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterable
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout

from trainkit.data.files import is_temporary, open_stream, read_schema, read_text, sizes, write_json, written
from trainkit.errors import UserError

COMPLETE_NAME, LOCKS_FOLDER = "encodings.json", "locks"
SCHEMA = pa.schema([("values", pa.large_list(pa.float16()))])
SUMMARY_KEY = b"told"  # the name in existing caches
POLL_S = 0.2


def unit_name(number: int) -> str:
    return f"unit-{number:06d}.arrow"


def make_units(
    folder: Path, names: list[str], make: Callable[[int], None], first: int = 0, on_done: Callable[[int], object] = int
) -> None:
    """Call `make(number)` for each of `names` that is not in `folder`, and share the work with other processes.

    `make` writes `folder / names[number]` by `written`. This process starts at number `first`, so processes seldom
    compete for a unit. `on_done(number)` is called for each that exists. Returns when all exist, whichever process
    made them. Raises `UserError` if the folder cannot be written.
    """
    present = sizes(folder)
    if all(name in present for name in names):  # perhaps a cache that only another user can write
        for number in range(len(names)):
            on_done(number)
        return
    locks = folder / LOCKS_FOLDER
    missing = [*range(first, len(names)), *range(first)]
    try:
        locks.mkdir(parents=True, exist_ok=True)
        while missing:
            left, present = [], sizes(folder)
            for number in missing:
                name = names[number]
                if name in present or _make_alone(folder / name, locks / f"{name}.lock", make, number):
                    on_done(number)
                else:
                    left.append(number)
            if len(left) == len(missing):
                time.sleep(POLL_S)  # other processes work on all remaining units
            missing = left
        shutil.rmtree(locks, ignore_errors=True)
        for name in sizes(folder):
            # of a killed process; one that is ahead may be writing the file that marks completeness
            if is_temporary(name) and not name.endswith(COMPLETE_NAME):
                (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"--cache_dir: {folder} cannot be written ({error.strerror or error}); free space there or give another "
            "folder: finished work is kept, and the same command continues it"
        ) from None


def _make_alone(path: Path, lock_path: Path, make: Callable[[int], None], number: int) -> bool:
    """Make a unit; returns False if another process is making it."""
    lock = FileLock(lock_path, timeout=0)
    try:
        lock.acquire()
    except (Timeout, FileNotFoundError):  # the latter if all is done and another process deleted the locks
        return False
    try:
        if not path.is_file():
            make(number)
    finally:
        lock.release()
    return True


def write_rows(path: Path, batches: Iterable[list[np.ndarray]], summary: dict | None = None) -> None:
    """Write float arrays (any shape, flattened) as rows of float16, one record batch for each of `batches`.

    `unit_summary` returns the `summary` again. Raises `ValueError` for a number that float16 cannot hold.
    """
    schema = SCHEMA.with_metadata({SUMMARY_KEY: json.dumps(summary or {})})
    with written(path) as temporary, pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_stream(file, schema) as out:
        for rows in batches:
            with np.errstate(over="ignore"):
                flat = [np.asarray(row).astype(np.float16).reshape(-1) for row in rows]
            values = np.concatenate(flat)
            if not np.isfinite(values).all():
                raise ValueError("a number that is not finite, or beyond 65,504")
            offsets = pa.array(list(accumulate(map(len, flat), initial=0)), pa.int64())
            column = pa.LargeListArray.from_arrays(offsets, pa.array(values))
            out.write_batch(pa.record_batch([column], schema=schema))


def unit_summary(path: Path) -> dict:
    """Return the summary that `write_rows` was given."""
    return json.loads(read_schema(path).metadata[SUMMARY_KEY])


class Rows:
    """The rows of the units in `folder` by number, mapped into memory when first used.

    A unit holds `rows_per_unit` of the `num_rows`, the last one the remaining rows.
    """

    def __init__(self, folder: Path, num_rows: int, rows_per_unit: int):
        self.folder, self.num_rows, self.rows_per_unit = folder, num_rows, rows_per_unit
        self._open: dict[int, tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]] = {}

    @property
    def unit_names(self) -> list[str]:
        return [unit_name(number) for number in range(-(-self.num_rows // self.rows_per_unit))]

    def unit_rows(self, number: int) -> range:
        start = number * self.rows_per_unit
        return range(start, min(start + self.rows_per_unit, self.num_rows))

    def __getitem__(self, row: int) -> np.ndarray:
        """Return row `row`, flat float16: a view of the file."""
        number, place = divmod(row, self.rows_per_unit)
        starts, values, offsets = self._open.get(number) or self._open_unit(number)
        batch = int(np.searchsorted(starts, place, side="right")) - 1
        place -= int(starts[batch])
        return values[batch][offsets[batch][place] : offsets[batch][place + 1]]

    def longest(self) -> int:
        """Return the length of the longest row. This reads the offsets of all units, so call it once."""
        longest = 0
        for number in range(len(self.unit_names)):
            opened = self._open.get(number) or self._open_unit(number)
            longest = max(longest, *(int(np.diff(offsets).max()) for offsets in opened[2]))
        return longest

    def _open_unit(self, number: int) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
        path = self.folder / unit_name(number)
        try:
            columns = [batch.column("values") for batch in open_stream(path)]
        except (OSError, pa.ArrowException) as error:
            raise _broken(path, " ".join(str(error).split())) from None
        if sum(map(len, columns)) != len(self.unit_rows(number)):
            raise _broken(path, f"it should hold {len(self.unit_rows(number))} rows")
        starts = np.array(list(accumulate((len(column) for column in columns[:-1]), initial=0)))
        values = [np.frombuffer(column.values.buffers()[1], dtype=np.float16) for column in columns]
        offsets = [np.frombuffer(column.buffers()[1], dtype=np.int64) for column in columns]
        opened = self._open[number] = starts, values, offsets  # two threads may both do this, with the same result
        return opened


def read_complete(folder: Path) -> dict | None:
    """Return the summary of a finished cache; None if it is not finished."""
    try:
        return json.loads(read_text(folder / COMPLETE_NAME))
    except (OSError, ValueError):
        return None


def write_complete(folder: Path, summary: dict) -> None:
    """Mark `folder` as finished. Every process that finds all units may write the same file."""
    write_json(folder / COMPLETE_NAME, summary)


def _broken(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is damaged ({reason}); delete it and start again, which computes only this file")
