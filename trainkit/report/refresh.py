"""After a model was scored: what its folder says of it, card and report, is brought up to date."""

from pathlib import Path

from trainkit.report.card_results import update_card
from trainkit.report.write import is_run, write_report


def refresh(folder: Path) -> None:
    """Write the scores in `folder` into its card and, if a training run wrote into it, its report again.

    Raises:
        OSError: a file cannot be written.
    """
    update_card(folder)
    if is_run(folder):
        write_report(folder)
