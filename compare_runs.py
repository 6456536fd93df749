#!/usr/bin/env python
"""Show training runs side by side in one page, or write the report of a run again.

    python compare_runs.py ddpm-a ddpm-b ddpm-c --output_file compare.html

    # report.html of one run, with what was measured since the training
    python compare_runs.py ddpm-a

The page is one file that loads nothing: curves over each other, settings that differ, the latest samples.
"""

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

from trainkit.errors import UserError, one_line, run_script
from trainkit.options.fields import option
from trainkit.options.parsing import parse_options


@dataclass
class Options:
    """comparison: the page, after the folders of the runs"""

    output_file: str | None = option(None, "page to write; default, for a single run: report.html in its folder")


def compare(folders: list[Path], options: Options) -> Path:
    """Write the page and return its path."""
    from trainkit.report.refresh import refresh  # --help needs none of this
    from trainkit.report.write import REPORT_NAME, is_run, write_comparison

    if not folders:
        raise UserError("no run is given: python compare_runs.py RUN [RUN ...] --output_file compare.html")
    for folder in folders:
        if not is_run(folder):
            raise UserError(f"{folder} is not the --output_dir of a training run: it has no metrics.jsonl")
    if options.output_file is not None:
        file = Path(options.output_file)
        if file.is_dir():
            raise UserError(f"--output_file {file} is a folder: give the name of an HTML file")
        write_comparison(folders, file)
        return file
    if len(folders) > 1:
        raise UserError(f"--output_file is missing: give the page for these {len(folders)} runs a name")
    try:
        refresh(folders[0])
    except OSError as error:
        raise UserError(f"{folders[0]} cannot be written ({one_line(error)}): give --output_file") from None
    return folders[0] / REPORT_NAME


def main() -> None:
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), sys.argv[1:]))
    options = parse_options(Options, __doc__, sys.argv[1 + len(words) :])
    print(f"wrote {compare([Path(word) for word in words], options)}")


if __name__ == "__main__":
    run_script(main)
