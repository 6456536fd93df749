"""Write a report: OUTPUT/report.html of one run, or a page that compares several."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from trainkit.atomic import write_text
from trainkit.errors import UserError, one_line
from trainkit.report.metrics import METRICS_FILE
from trainkit.report.page import comparison_values, report_values
from trainkit.report.record import write_record
from trainkit.report.summary import read_run

REPORT_NAME = "report.html"
OWN_MARK = '<meta name="generator" content="trainkit">'  # a page without it is not ours to replace


def write_report(folder: Path, record: dict | None = None) -> Path:
    """Write report.html of the run in `folder`; returns its path. With `record`, report.json is written first.

    Raises:
        OSError: it cannot be written.
    """
    if record is not None:
        write_record(folder, record)
    write_text(folder / REPORT_NAME, _rendered("report.html", report_values(read_run(folder))))
    return folder / REPORT_NAME


def write_comparison(folders: Sequence[Path], file: Path) -> None:
    """Write a page that shows the runs in `folders` side by side.

    Raises:
        UserError: `file` is something else's, or cannot be written.
    """
    if file.exists() and not is_own(file):
        raise UserError(f"--output_file {file} exists and is not such a page: choose another name")
    page = _rendered("compare.html", comparison_values([read_run(folder) for folder in folders]))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, page)
    except OSError as error:
        raise UserError(f"--output_file {file} cannot be written: {one_line(error)}") from None


def is_run(folder: Path) -> bool:
    """Whether a training run wrote into `folder`."""
    return (folder / METRICS_FILE).is_file()


def is_own(file: Path) -> bool:
    """Whether `file` is a page that this module wrote."""
    try:
        with file.open(encoding="utf-8") as opened:
            return OWN_MARK in opened.read(1000)
    except (OSError, UnicodeDecodeError):
        return False


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("trainkit.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["own_mark"] = OWN_MARK
    return environment


def _rendered(template: str, values: dict[str, Any]) -> str:
    text = _environment().get_template(template).render(values)
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # names of files may be anything
