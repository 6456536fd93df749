"""sampling_table.json of a model's folder: quality and time of its schedulers, and the lines that show it."""

import json
from collections.abc import Iterable
from pathlib import Path

from trainkit.errors import UserError
from trainkit.sampling.catalogue import CATALOGUE

TABLE_NAME, PICTURE_NAME = "sampling_table.json", "sampling_table.png"
STUDENT, TEACHER = "student", "teacher/"  # names of rows of a few-step student: itself, and its teacher's schedulers


def read_table(folder: Path, weights_sha256: str | None = None) -> dict:
    """The table of a model, {} if it has none, or one of other weights than `weights_sha256`.

    Raises:
        UserError: the file is not readable.
    """
    file = folder / TABLE_NAME
    if not file.is_file():
        return {}
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        known = [(cell["scheduler"], cell["steps"], cell["calls"], cell["scores"]) for cell in table["cells"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{file} is not a readable table: delete it, or repeat evaluate_samples.py --sweep") from None
    if weights_sha256 is not None and table.get("weights_sha256") != weights_sha256:
        return {}
    return table if known else {}


def list_lines(bundle: Iterable[str], table: dict, stock: bool) -> list[str]:
    """What `sample.py --list_schedulers` prints: a line per scheduler, and one per row of the table.

    For a `stock` model (`is_stock_pipeline`) they say which schedulers DDPMPipeline runs.
    """
    rows = table.get("cells", [])
    names = [*bundle, *(row["scheduler"] for row in rows)]  # the rows of a few-step student have names of their own
    cells = {name: [cell for cell in rows if cell["scheduler"] == name] for name in names}
    metric = table["settings"]["metrics"][0] if table else ""
    lines = []
    for name in cells:
        facts = CATALOGUE.get(name)
        if facts is None:
            lines.append(f"{name:14} {_describe_row(name)}")
        else:
            runs = "runs in DDPMPipeline, " if facts.in_stock_pipeline else "not in DDPMPipeline, "
            noise = "stochastic" if facts.stochastic else "deterministic"
            calls = ", 2 UNet calls per step" if facts.doubles_calls else ""
            known = f"{facts.method}, order {facts.order}, {noise}, {runs if stock else ''}steps: {facts.steps}{calls}"
            lines.append(f"{name:14} {known}")
        lines += [
            f"    {cell['steps']:5} steps  {score_text(cell, metric)}  {time_text(cell)}" for cell in cells[name]
        ]
    return lines


def _describe_row(name: str) -> str:
    if name == STUDENT:
        return "this student, or that of as many steps under stages/"
    return "a scheduler of its teacher" if name.startswith(TEACHER) else "the scheduler of this folder"


def table_lines(table: dict) -> list[str]:
    """The table in Markdown, best first."""
    metrics = table["settings"]["metrics"]
    stock = any(row["in_stock_pipeline"] is not None for row in table["cells"])
    columns = ["scheduler", "steps", "UNet calls", "order", "stochastic"] + ["in DDPMPipeline"] * stock
    columns += [metric.upper() for metric in metrics] + ["s per 1,000 images"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    words = {True: "yes", False: "no", None: "?"}
    for row in sorted(table["cells"], key=lambda cell: cell["scores"][metrics[0]]):
        values = [row["scheduler"], row["steps"], row["calls"], row["order"] or "?"]
        values += [words[row["stochastic"]]] + [words[row["in_stock_pipeline"]]] * stock
        values += [score_text(row, metric).partition(" ")[2] for metric in metrics]
        lines.append("| " + " | ".join(map(str, [*values, f"{row['seconds_per_1000_images']:.3g}"])) + " |")
    return lines


def score_text(cell: dict, metric: str) -> str:
    """`KID 0.0123 +- 0.0012`."""
    error = cell["scores"].get(f"{metric}_se")
    return f"{metric.upper()} {cell['scores'][metric]:.4g}" + ("" if error is None else f" +- {error:.2g}")


def time_text(cell: dict) -> str:
    return f"{cell['seconds_per_1000_images']:.3g} s per 1,000 images"
