"""A folder of samples: its images, a record of their settings, the condition of each, and a grid."""

import hashlib
import json
from pathlib import Path

from trainkit.atomic import write_json, write_text
from trainkit.errors import UserError
from trainkit.sampling.arrow import ArrowSamples
from trainkit.sampling.conditions import Conditions
from trainkit.sampling.files import FILE_FORMATS, ImageFiles, Samples
from trainkit.sampling.grid import image_grid, save_image
from trainkit.sampling.npz import NpzSamples

RECORD_NAME, METADATA_NAME, GRID_NAME = "sampling.json", "metadata.jsonl", "grid.png"
UPSAMPLERS = "upsamplers"  # in the record of samples that were enlarged
SPEED = ("images_per_second", "waited_for_noise", "waited_for_writing", "batch_size")  # of the run that was last


def open_samples(
    folder: Path,
    output_format: str,
    image_shape: tuple[int, int, int],
    conditions: Conditions | None,
    settings: dict,
) -> Samples:
    """The samples of a folder in `--output_format`. `settings` are what the images depend on.

    Raises `UserError` for images or conditions that the format cannot hold.
    """
    if output_format == "npz":
        return NpzSamples(folder, image_shape, conditions)
    if output_format == "arrow":
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        return ArrowSamples(folder, image_shape, conditions, digest[:16])
    if output_format == "jpeg" and image_shape[2] == 4:
        raise UserError("--output_format jpeg stores no transparency, which this model generates: use png or webp")
    return ImageFiles(folder, output_format, image_shape)


def read_record(folder: Path, settings: dict, output_format: str) -> dict:
    """The record of the images in `folder`, {} for a new one. Raises `UserError` if format or `settings` differ."""
    path = folder / RECORD_NAME
    if not path.exists():
        if any(any(folder.glob(f"[0-9]*.{extension}")) for extension in FILE_FORMATS.values()):
            raise UserError(f"--output_dir {folder} holds images but no {RECORD_NAME}; use another folder")
        return {}
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"--output_dir {folder}: {RECORD_NAME} is not readable; use another folder") from None
    held_format = earlier.get("output_format", "png")
    if held_format != output_format:
        raise UserError(
            f"--output_dir {folder} holds samples of --output_format {held_format}, not {output_format}; use another "
            "--output_dir for each format"
        )
    for name in dict.fromkeys([UPSAMPLERS, *settings]):
        value = settings.get(name)
        if earlier.get(name) != value:
            difference = f"made with another {name} ({brief(earlier.get(name))} there, {brief(value)} now)"
            if name == "weights_sha256":
                difference = "of another model"
            elif name == UPSAMPLERS:
                difference = "of other upsamplers, or of other settings of these"
            raise UserError(
                f"--output_dir {folder} holds images {difference}; use another --output_dir, or delete this one"
            )
    return earlier


def brief(value) -> str:
    """A setting in a few words, for a message."""
    return str(value.get("class")) if isinstance(value, dict) else str(value)[:60]


def start_record(folder: Path, record: dict, samples: Samples) -> None:
    """Create the folder and write its record, of samples that are not complete."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        samples.clear_temporary()
        write_json(folder / RECORD_NAME, record | {"complete": False})
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be written ({error.strerror}): choose another folder") from None


def write_metadata(folder: Path, samples: Samples, rows: list[dict]) -> None:
    """Write the condition of each image to metadata.jsonl, in the format that `datasets` reads with an imagefolder.

    Where an image is not a file of its own, its line has its `index` instead of a file name.
    """
    names: list[dict] = [{"index": number} for number in range(len(rows))]
    if isinstance(samples, ImageFiles):
        names = [{"file_name": samples.path(number).name} for number in range(len(rows))]
    lines = [json.dumps(name | row) for name, row in zip(names, rows, strict=True)]
    write_text(folder / METADATA_NAME, "\n".join(lines) + "\n")


def write_grid(folder: Path, samples: Samples, rows: list[dict]) -> None:
    """Write the picture of the first images, with the class or caption of each (`rows` of `Conditions`) below it."""
    captions = [str(row.get("label", row.get("text", ""))) for row in rows]
    save_image(image_grid(samples.first(len(rows)), captions=captions if any(captions) else None), folder / GRID_NAME)
