"""Files that appear under their name only once they are complete, and where temporary ones belong."""

import contextlib
import json
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TEMPORARY_PREFIX = ".tmp-"
REPLACE_ATTEMPTS, REPLACE_DELAY_S = 40, 0.05


def temporary_folder() -> Path:
    """The folder for large temporary files: $TMPDIR, else /var/tmp, which unlike /tmp is never a part of memory."""
    if "TMPDIR" not in os.environ and os.access("/var/tmp", os.W_OK):
        return Path("/var/tmp")
    return Path(tempfile.gettempdir())


@contextlib.contextmanager
def replacing(path: Path, flush: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; rename it to `path` if the block ends without an error.

    The temporary name keeps the suffix of `path`, which many writers read the format from. Readers see the old file
    or the new one, never a part of one. With `flush` the content is on disk before the rename.
    """
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex[:12]}-{path.name}")
    try:
        yield temporary
        if flush:
            flush_to_disk(temporary)
        _replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """fsync a file or a folder: its content is on the disk afterwards. Windows has this for files only."""
    if sys.platform == "win32" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(new: Path, old: Path) -> None:
    """Rename `new` to `old`. Windows refuses while another process reads `old`, which is over in a moment."""
    for attempt in range(REPLACE_ATTEMPTS if sys.platform == "win32" else 1, 0, -1):
        try:
            os.replace(new, old)
            return
        except PermissionError:
            if attempt == 1:
                raise
            time.sleep(REPLACE_DELAY_S)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, whatever the locale. Undecoded bytes of file names are kept."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")


def write_json(path: Path, content: Any) -> None:
    """Write `content` to `path` as indented ASCII JSON."""
    write_text(path, json.dumps(content, indent=2) + "\n")
