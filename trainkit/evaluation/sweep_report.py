"""Where a sweep is written: sampling_table.json and two pictures in a folder."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from trainkit.atomic import replacing, write_json
from trainkit.errors import UserError, one_line
from trainkit.evaluation.candidates import Cell
from trainkit.sampling.grid import image_grid, save_image, to_pil
from trainkit.sampling.table import PICTURE_NAME, STUDENT, TABLE_NAME, TEACHER, read_table

PLOT_NAME, STRIPS = "sampling_plot.png", ".sampling_table"
LABEL_WIDTH = 140  # pixels left of a row of sampling_table.png


def open_table(folder: Path, weights_sha256: str, settings: dict) -> dict:
    """The table in `folder` to go on with, or a new one for these weights and `settings`.

    Raises:
        UserError: it was made of the same weights with other settings, so its rows could not be compared.
    """
    table = read_table(folder, weights_sha256)
    for name, value in settings.items():
        earlier = table["settings"].get(name) if table else value
        if earlier != value:
            raise UserError(
                f"{folder / TABLE_NAME} was made with another {name} ({str(earlier)[:60]} there, {str(value)[:60]} "
                "now): use the same, or delete the file"
            )
    return table or {"weights_sha256": weights_sha256, "settings": settings, "cells": []}


def missing_cells(cells: list[Cell], table: dict) -> list[Cell]:
    done = {(row["scheduler"], row["steps"]) for row in table["cells"]}
    return [cell for cell in cells if cell not in done]


def store_cell(folder: Path, table: dict, row: dict, images: np.ndarray) -> None:
    """Add a row to the table and write it, with its images (N, H, W, C) for the picture."""
    table["cells"] = sorted([*table["cells"], row], key=_place)
    try:
        (folder / STRIPS).mkdir(parents=True, exist_ok=True)
        save_image(to_pil(np.concatenate(list(images), axis=1)), _strip(folder, row))
        write_json(folder / TABLE_NAME, table)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({one_line(error)}): give another --table_dir") from None


def write_pictures(folder: Path, table: dict) -> None:
    """Write sampling_table.png and sampling_plot.png."""
    _write_picture(folder, table, table["settings"]["height_width"][1])
    _write_plot(folder, table)


def _strip(folder: Path, row: dict) -> Path:
    return folder / STRIPS / f"{row['scheduler'].replace('/', '-')}-{row['steps']}.png"


def _place(row: dict) -> tuple:
    """The order of rows: those of a teacher first, the most steps first in the rows of a student."""
    of_teacher = row["scheduler"].startswith(TEACHER)
    return not of_teacher, row["scheduler"], -row["steps"] if row["scheduler"] == STUDENT else row["steps"]


def _write_picture(folder: Path, table: dict, image_width: int) -> None:
    """Rows are (scheduler, steps), columns the same seeds."""
    rows = [row for row in table["cells"] if _strip(folder, row).is_file()]
    strips = [np.asarray(Image.open(_strip(folder, row))) for row in rows]
    strips = [strip.reshape(*strip.shape[:2], -1) for strip in strips]
    if not strips:
        return
    columns = min(strip.shape[1] for strip in strips) // image_width
    images = [image for strip in strips for image in np.split(strip[:, : columns * image_width], columns, axis=1)]
    grid = image_grid(np.stack(images), columns).convert("RGB")
    picture = Image.new("RGB", (grid.width + LABEL_WIDTH, grid.height), "white")
    picture.paste(grid, (LABEL_WIDTH, 0))
    draw, height = ImageDraw.Draw(picture), grid.height / len(rows)
    for number, row in enumerate(rows):
        draw.text((4, (number + 0.5) * height), f"{row['scheduler']}, {row['steps']}", fill="black", anchor="lm")
    save_image(picture, folder / PICTURE_NAME)


def _set_ticks(axis: Any, values: list[float]) -> None:
    """Plain numbers at `values`, as far as there is room, on a logarithmic axis; a linear one for near values."""
    lowest, highest = min(values), max(values)
    if highest < 2 * lowest:
        axis.set_xlim(0.8 * lowest, 1.2 * highest)
        axis.set_xticks(sorted({lowest, highest}) if highest > 1.05 * lowest else [lowest])
        return
    axis.set_xscale("log")
    shown = [values[0]]
    for value in values[1:]:
        if value > shown[-1] * (highest / lowest) ** 0.09:  # else the numbers would overlap
            shown.append(value)
    axis.set_xticks(shown, [f"{value:.3g}" if value < 1000 else f"{value:,.0f}" for value in shown])
    axis.minorticks_off()


def _write_plot(folder: Path, table: dict) -> None:
    """The first metric against steps, and against seconds per 1,000 images."""
    from matplotlib.figure import Figure

    metric = table["settings"]["metrics"][0]
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    for number, (key, label) in enumerate(
        (("steps", "steps"), ("seconds_per_1000_images", "seconds per 1,000 images")), start=1
    ):
        axis = figure.add_subplot(1, 2, number, xlabel=label, ylabel=metric.upper())
        _set_ticks(axis, sorted({row[key] for row in table["cells"]}))
        for name in sorted({row["scheduler"] for row in table["cells"]}):
            rows = sorted((row for row in table["cells"] if row["scheduler"] == name), key=lambda row: row[key])
            errors = [row["scores"].get(f"{metric}_se", 0.0) for row in rows]
            values = [row["scores"][metric] for row in rows]
            axis.errorbar([row[key] for row in rows], values, errors, marker="o", markersize=3, label=name)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    with replacing(folder / PLOT_NAME) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
