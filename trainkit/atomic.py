"""Files that appear under their name only once they are complete."""

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TEMPORARY_PREFIX = ".tmp-"


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
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, whatever the locale. Undecoded bytes of file names are kept."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")


def write_json(path: Path, content: Any) -> None:
    """Write `content` to `path` as indented ASCII JSON."""
    write_text(path, json.dumps(content, indent=2) + "\n")
