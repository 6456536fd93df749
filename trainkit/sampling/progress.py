"""Signs of life and progress of a run over all processes."""

import threading

from trainkit import terminal
from trainkit.errors import UserError
from trainkit.sampling.team import Team

INTERVAL_S = 1.0


class Progress:
    """Give signs of life, and on the main process show how many of `num_images` are written, inside a `with` block."""

    def __init__(self, team: Team, num_images: int):
        self._team = team
        self._ended, self._thread = threading.Event(), threading.Thread(target=self._run, name="progress", daemon=True)
        self._shown = terminal.Progress("sampling", num_images, "images", hidden=not team.is_main)

    def __enter__(self) -> "Progress":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        self._shown.close()

    def _run(self) -> None:
        try:
            while not self._ended.wait(INTERVAL_S):
                self._team.give_sign_of_life()
                if self._team.is_main:
                    self._shown.update(self._team.num_written())
            if self._team.is_main:
                self._shown.update(self._team.num_written())
        except UserError:  # no contact; the main thread meets the same error
            pass
