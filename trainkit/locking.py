"""A lock on a folder that names the process holding it."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from trainkit.atomic import write_json


@contextlib.contextmanager
def locked(path: Path, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lock file `path`; wait for the process that holds it, after one call of `on_wait(its description)`.

    `path` plus `.json` names the holder: host, process and start.
    """
    lock, info = FileLock(path), path.with_name(f"{path.name}.json")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if on_wait is not None:
            on_wait(holder_of(info))
        lock.acquire()
    try:
        write_holder(info)
        yield
    finally:
        info.unlink(missing_ok=True)
        lock.release()


def write_holder(info: Path) -> None:
    """Write this process's host, id and the time to `info`."""
    write_json(info, {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")})


def holder_of(info: Path) -> str:
    """Describe the process that wrote `info`: 'process 7 on host a since 2025-01-01 12:00:00'."""
    try:
        holder = json.loads(info.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError):
        return "another run"
