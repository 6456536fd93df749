"""Errors that a user can fix, reported in one line."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can fix; the message names the flag, the file and the fix in one line."""


def one_line(error: BaseException | str, limit: int = 300) -> str:
    """The message of `error` on one line of at most `limit` characters, or its class name where it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def run_script(main: Callable[[], int | None]) -> None:
    """Call a script's `main` and exit: 0 when done, 1 after one `error:` line for a `UserError`, 130 after Ctrl-C.

    `main` may return an exit status of its own. Everything that is not a `UserError` keeps its traceback: it is a bug.
    """
    try:
        sys.exit(main() or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
