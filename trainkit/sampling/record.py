"""A folder of samples: its images, a record of their settings, the condition of each, and a grid."""

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

from trainkit.atomic import write_json, write_text
from trainkit.errors import UserError
from trainkit.sampling.grid import image_grid, save_image

RECORD_NAME, METADATA_NAME, GRID_NAME = "sampling.json", "metadata.jsonl", "grid.png"


def image_path(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.png"


def read_record(folder: Path, settings: dict) -> dict:
    """The record of the images in `folder`, {} for a new one. Raises `UserError` if their `settings` differ."""
    path = folder / RECORD_NAME
    if not path.exists():
        if any(folder.glob("[0-9]*.png")):
            raise UserError(f"--output_dir {folder} holds images but no {RECORD_NAME}; use another folder")
        return {}
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"--output_dir {folder}: {RECORD_NAME} is not readable; use another folder") from None
    for name, value in settings.items():
        if earlier.get(name) != value:
            difference = f"made with another {name} ({brief(earlier.get(name))} there, {brief(value)} now)"
            if name == "weights_sha256":
                difference = "of another model"
            raise UserError(
                f"--output_dir {folder} holds images {difference}; use another --output_dir, or delete this one"
            )
    return earlier


def brief(value) -> str:
    """A setting in a few words, for a message."""
    return str(value.get("class")) if isinstance(value, dict) else str(value)[:60]


def start_record(folder: Path, record: dict) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".tmp-*.png"):
            leftover.unlink()
        write_json(folder / RECORD_NAME, record | {"complete": False})
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be written ({error.strerror}): choose another folder") from None


def write_metadata(folder: Path, rows: list[dict]) -> None:
    """Write the condition of each image to metadata.jsonl, in the format that `datasets` reads with an imagefolder."""
    lines = [json.dumps({"file_name": image_path(folder, index).name} | row) for index, row in enumerate(rows)]
    write_text(folder / METADATA_NAME, "\n".join(lines) + "\n")


def write_grid(folder: Path, count: int) -> None:
    images = [np.asarray(Image.open(image_path(folder, index))) for index in range(count)]
    save_image(image_grid(np.stack([image.reshape(*image.shape[:2], -1) for image in images])), folder / GRID_NAME)


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "diffusers", "accelerate")}
