"""Progress of a run over all processes: a bar on a terminal, else a line now and then."""

import sys
import threading
import time
from datetime import timedelta

from tqdm.auto import tqdm

from trainkit.errors import UserError
from trainkit.sampling.team import Team

INTERVAL_S = 1.0
LINE_S = 30.0  # seconds between lines where there is no terminal


class Progress:
    """Give signs of life, and on the main process show how many of `num_images` are written, inside a `with` block."""

    def __init__(self, team: Team, num_images: int):
        self._team, self._num_images = team, num_images
        self._ended, self._thread = threading.Event(), threading.Thread(target=self._run, name="progress", daemon=True)
        self._started = self._last_line = time.monotonic()
        is_hidden = not (team.is_main and sys.stderr.isatty())
        self._bar = tqdm(total=num_images, unit="img", desc="sampling", disable=is_hidden)

    def __enter__(self) -> "Progress":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        self._bar.close()

    def _run(self) -> None:
        try:
            while not self._ended.wait(INTERVAL_S):
                self._team.give_sign_of_life()
                if self._team.is_main:
                    self._show(self._team.num_written())
            if self._team.is_main:
                self._bar.update(self._team.num_written() - self._bar.n)
        except UserError:  # no contact; the main thread meets the same error
            pass

    def _show(self, num_written: int) -> None:
        now = time.monotonic()
        if not self._bar.disable:
            self._bar.update(num_written - self._bar.n)
        elif now - self._last_line >= LINE_S:
            self._last_line = now
            print(progress_line(num_written, self._num_images, now - self._started), flush=True)


def progress_line(num_written: int, num_images: int, seconds: float) -> str:
    """'sampling: 1,024 of 50,000 images, 12.3 images/s, 1:06:21 left'."""
    line = f"sampling: {num_written:,} of {num_images:,} images"
    if not num_written:
        return line
    left = timedelta(seconds=round((num_images - num_written) * seconds / num_written))
    return f"{line}, {num_written / seconds:.1f} images/s, {left} left"
