"""What a script prints: a line in place on a terminal, complete lines in a log file, and little with --quiet."""

import contextlib
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from datetime import timedelta
from typing import Any, Protocol

from trainkit.errors import one_line

NAME_WIDTH = 12  # of the subjects of a summary
FALLBACK_SIZE: dict[str, Any] = {"ncols": 100, "nrows": 20}  # of a terminal that does not know it


class PrintOptions(Protocol):
    """The options that decide what is printed: those of `TerminalOptions`."""

    quiet: bool
    log_interval_s: float


_settings: dict[str, Any] = {"quiet": False, "interval_s": 30.0}  # of this process


def set_output(options: PrintOptions) -> None:
    """Take `--quiet` and `--log_interval_s` for everything that this process prints from here on."""
    _settings.update(quiet=options.quiet, interval_s=options.log_interval_s)
    if options.quiet or not sys.stderr.isatty():  # read when the libraries are imported, after this
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # of transformers too
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def say(text: str) -> None:
    """Print information, on the first process of each machine; nothing with `--quiet`."""
    if not _settings["quiet"]:
        tell(text)


def tell(text: str) -> None:
    """Print a result, on the first process of each machine, also with `--quiet`."""
    if is_first_process():
        _print(text)


def counted(count: int, noun: str, ending: str = "s") -> str:
    """'1 step', or '1,000 steps'."""
    return f"{count:,} {noun}" + ("" if count == 1 else ending)


def warn(text: str) -> None:
    """Print `WARNING: text`, on every process that calls this, also with `--quiet`."""
    _print(f"WARNING: {text}")


@contextlib.contextmanager
def only_warn(what: str) -> Iterator[None]:
    """Print one line that begins with `what` if the block fails, whatever the error: for what nothing depends on."""
    try:
        yield
    except Exception as error:
        warn(f"{what}: {one_line(error)}")


def is_first_process() -> bool:
    """Whether this is the first process of its machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _print(text: str) -> None:
    from tqdm import tqdm

    tqdm.write(text, file=sys.stdout)  # above a bar, if there is one
    sys.stdout.flush()


def _has_size() -> bool:
    """Whether the terminal of standard error knows its size; those of some job systems say 0."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError, AttributeError):
        return False


def format_seconds(seconds: float) -> str:
    """'2.3 s', '0:03:12', or '2 days, 1:00:00'."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    return str(timedelta(seconds=round(seconds)))


class Progress:
    """The progress of long work, inside a `with` block or until `close`.

    On a terminal (standard error) it is a bar on one line. Elsewhere it is a complete line for the first `update`,
    and then one every `--log_interval_s` seconds. Only the first process of a machine shows it; `hidden` and `--quiet`
    hide it.
    """

    def __init__(self, name: str, total: int, unit: str, done: int = 0, hidden: bool = False):
        self.name, self.total, self.unit, self.done = name, total, unit, done
        self._started, self._first = time.monotonic(), done
        self._last_line: float | None = None
        self._hidden = hidden or _settings["quiet"] or not is_first_process()
        self._bar: Any = None
        if not self._hidden and sys.stderr is not None and sys.stderr.isatty():
            from tqdm import tqdm

            size = {"dynamic_ncols": True} if _has_size() else FALLBACK_SIZE
            shape = "{percentage:3.0f}%|{bar:16}| {desc}"
            self._bar = tqdm(total=total, initial=done, desc=name, bar_format=shape, **size)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def advance(self, count: int = 1) -> None:
        """`count` more are done."""
        self.update(self.done + count)

    def update(self, done: int, details: str | None = None, left_s: float | None = None) -> None:
        """`done` of all are done. `details` and `left_s` (seconds) replace the speed and the time left at it."""
        self.done, now = done, time.monotonic()
        if self._hidden:
            return
        if self._bar is not None:
            self._bar.set_description_str(self.line(details, left_s, percent=False), refresh=False)
            self._bar.update(done - self._bar.n)
        elif self._is_due(now, details):
            self._last_line = now
            _print(self.line(details, left_s))

    def _is_due(self, now: float, details: str | None) -> bool:
        """Whether a line is printed: the first that tells more than a number, the last, and one per interval."""
        if now - (self._last_line or self._started) >= _settings["interval_s"]:
            return True
        first = self._last_line is None and self.done > self._first
        return details != "" and (first or (details is not None and self.done == self.total))

    def count(self, batches: Iterable[Sized]) -> Iterator:
        """Yield `batches`; the items of each are done once the next one is asked for."""
        for batch in batches:
            yield batch
            self.advance(len(batch))

    def line(self, details: str | None = None, left_s: float | None = None, percent: bool = True) -> str:
        """'sampling: 1,024 of 50,000 images (2.0%), 12.3 images/s, 1:06:21 left'."""
        seconds, made = time.monotonic() - self._started, self.done - self._first
        parts = [f"{self.name}: {self.done:,} of {self.total:,} {self.unit}"]
        if percent and self.total:
            parts[0] += f" ({self.done / self.total:.1%})"
        if details is None and made > 0 and seconds > 0:
            details = f"{made / seconds:.3g} {self.unit}/s"
            left_s = (self.total - self.done) * seconds / made
        parts += [details] if details else []
        parts += [f"{format_seconds(left_s)} left"] if left_s is not None else []
        return ", ".join(parts)

    def close(self) -> None:
        """Leave the bar as it is and end its line."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()
