"""Errors that a user can fix, reported in one line."""

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

OTHER_PROCESSES_WAIT_S = 15.0  # their starts may differ by seconds


class UserError(Exception):
    """Something the user can fix; the message names the flag, the file and the fix in one line."""


@contextlib.contextmanager
def renamed_flags(**names: str) -> Iterator[None]:
    """Inside the block a `UserError` names other flags: `model_name_or_path="model_dir"` for `--model_dir`."""
    try:
        yield
    except UserError as error:
        message = str(error)
        for known, given in names.items():
            message = re.sub(rf"--{known}\b", f"--{given}", message)
        raise UserError(message) from None


def one_line(error: BaseException | str, limit: int = 300) -> str:
    """The message of `error` on one line of at most `limit` characters, or its class name where it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def run_script(main: Callable[[], int | None]) -> None:
    """Call a script's `main` and exit with its status.

    0    done, or stopped by a signal after a checkpoint was written
    1    a `UserError`, printed as one `error:` line
    130  interrupted by Ctrl-C before the first step, or by a second Ctrl-C

    `main` may return another status. Every other exception keeps its traceback: it is a bug. Printing never ends a
    script: a closed terminal or pipe is replaced by one that drops what is written, and characters that the terminal's
    encoding lacks are escaped.
    """
    _open_standard_descriptors()
    sys.stdout, sys.stderr = SafeStream(sys.stdout), SafeStream(sys.stderr)
    try:
        sys.exit(main() or 0)
    except UserError as error:
        _wait_for_first_process()
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)


def _wait_for_first_process() -> None:
    """Let the first process of a machine report an error alone: the launcher ends the others while they wait here.

    A process that is still running afterwards has an error that the first does not have, and reports it.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(OTHER_PROCESSES_WAIT_S)


def _open_standard_descriptors() -> None:
    """Put the null device at closed descriptors 0 to 2, which the next file to be opened would otherwise take."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # at the lowest free number; workers need it too


class SafeStream:
    """Standard output or error whose failures never reach the program: what cannot be written is dropped."""

    def __init__(self, stream: TextIO | None):
        self._stream: Any = stream  # None if closed: then every call raises AttributeError, which is suppressed
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            with contextlib.suppress(OSError, ValueError):
                reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, disconnected, or None
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError, AttributeError):
            self._drop_buffer()

    def isatty(self) -> bool:
        try:
            return self._stream.isatty()
        except (OSError, ValueError, AttributeError):
            return False

    def _drop_buffer(self) -> None:
        """Send what is buffered and what follows to the null device: the interpreter flushes again at exit."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)
