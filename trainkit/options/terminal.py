"""Options of what a script prints."""

from dataclasses import dataclass

from trainkit.options.fields import option


@dataclass
class TerminalOptions:
    """terminal: what is printed"""

    quiet: bool = option(False, "print warnings, errors and the last line only")
    log_interval_s: float = option(
        30.0, "seconds between progress lines where standard error is not a terminal, such as in a log file",
        within="[0, inf)",
    )  # fmt: skip
