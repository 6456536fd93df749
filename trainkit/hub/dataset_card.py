"""README.md of a dataset repository: what the images are, how they were made, how to load them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import DatasetCard, DatasetCardData

from trainkit import __version__
from trainkit.data.format import NO_LABEL, PREPARATION_NAME, REJECTED_NAME, VALIDATION_FOLDER, read_preparation
from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.pairing import pairs_of
from trainkit.sampling.grid import image_grid, save_image
from trainkit.sampling.record import GRID_NAME, METADATA_NAME, RECORD_NAME
from trainkit.terminal import counted

PICTURE_NAME, PICTURE_IMAGES = "contact_sheet.png", 64
LISTED_CLASSES = 200
ARROW_FILES = "data-*.arrow"
LOAD_ARROW = """```python
from datasets import load_from_disk
from huggingface_hub import snapshot_download

folder = snapshot_download("{repo_id}", repo_type="dataset")
images = load_from_disk(folder)
```

`datasets.load_dataset("{repo_id}")` reads the same rows.{pixels}

To train on the images, pass the address, or the folder that `snapshot_download` returned:

```bash
accelerate launch train_unconditional.py --train_data_dir hf://datasets/{repo_id} --output_dir model
```"""
PIXELS = """ `image` has the {bits}-bit samples of an image, row by row:

```python
import numpy as np

image = np.array(images[0]["image"], dtype=np.uint{bits}).reshape({height}, {width}, {channels})
```"""
LOAD_FILES = """```python
from datasets import load_dataset

images = load_dataset("{repo_id}", split="train")
```"""
LOAD_NPZ = """```python
import numpy as np
from huggingface_hub import hf_hub_download

images = np.load(hf_hub_download("{repo_id}", "samples.npz", repo_type="dataset"))["arr_0"]
```"""


def size_category(count: int) -> str:
    """The Hub's word for so many rows: 'n<1K', '1K<n<10K', ..., 'n>1T'."""
    names = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
    if count < 1000:
        return "n<1K"
    number = len(str(count)) - 4  # digits after the first of 1,000
    return f"{names[number]}<n<{names[number + 1]}" if number + 1 < len(names) else "n>1T"


def prepared_dataset_card(folder: Path, repo_id: str, license_name: str | None) -> str:
    """The card of the prepared dataset in `folder`. Raises `UserError` if that is damaged."""
    preparation = json.loads((folder / PREPARATION_NAME).read_text(encoding="utf-8"))
    held_out = read_preparation(folder / VALIDATION_FOLDER) if (folder / VALIDATION_FOLDER).is_dir() else None
    settings, num_images = preparation["settings"], preparation["num_images"]
    total = num_images + (held_out["num_images"] if held_out else 0)
    splits = [{"split": "train", "path": ARROW_FILES}]
    if held_out:
        splits.append({"split": "validation", "path": f"{VALIDATION_FOLDER}/{ARROW_FILES}"})
    data = _card_data(total, license_name, splits, "text" in preparation["columns"])
    name = repo_id.rpartition("/")[2]
    size = f"{settings['height']}x{settings['width']} {settings['image_mode']}"
    held = f", and {held_out['num_images']:,} held out as `{VALIDATION_FOLDER}`" if held_out else ""
    load = LOAD_ARROW.format(repo_id=repo_id, pixels=_pixels(settings))
    parts = [
        f"# {name}",
        f"{num_images:,} images of {size}, {settings['bit_depth']} bits per channel{held}. They were prepared for "
        "training diffusion models.",
        f"![images]({PICTURE_NAME})",
        f"## Load\n\n{load}",
        f"## Content\n\n{_content(preparation)}",
        *_classes(preparation["classes"]),
        f"## Preparation\n\n{_list(_settings(preparation))}",
        f"`{PREPARATION_NAME}` has everything about the preparation, `{REJECTED_NAME}` each file that was not taken "
        f"and why.{'' if license_name else ' The licence of the images is not stated: ask who uploaded them.'}",
    ]
    return _card(data, parts)


def samples_card(folder: Path, repo_id: str, license_name: str | None) -> str:
    """The card of a set of samples that sample.py wrote to `folder`."""
    record = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
    output_format, count = record.get("output_format", "png"), record["num_images"]
    ending = {"jpeg": "jpg"}.get(output_format, output_format)
    load, paths = LOAD_FILES, [METADATA_NAME, f"[0-9]*.{ending}"]
    splits: list[dict[str, Any]] = [{"split": "train", "path": paths}]
    if output_format == "arrow":
        load, splits = LOAD_ARROW, [{"split": "train", "path": ARROW_FILES}]
    elif output_format == "npz":
        load, splits = LOAD_NPZ, []
    height, width = record["height_width"]
    channels = record.get("channels", 3)
    pixels = PIXELS.format(bits=8, height=height, width=width, channels=channels)
    names = ("model", "scheduler_name", "num_inference_steps", "seed", "guidance_scale", "mixed_precision")
    settings = {each: record[each] for each in names if record.get(each) is not None}
    parts = [
        f"# {repo_id.rpartition('/')[2]}",
        f"{count:,} images of {height}x{width}, generated by a diffusion model.",
        f"![images]({GRID_NAME})",
        f"## Load\n\n{load.format(repo_id=repo_id, pixels=pixels)}",
        f"## Settings\n\nImage i has the seed `seed + i`, whatever the batch size.\n\n{_list(settings)}",
        f"`{METADATA_NAME}` has the seed and condition of each image, `{RECORD_NAME}` everything about the run.",
    ]
    return _card(_card_data(count, license_name, splits, False, ["synthetic"]), parts)


def write_picture(folder: Path, path: Path) -> None:
    """Write a grid of up to 64 images of the prepared dataset in `folder`, the same each time."""
    images = PreparedImages(folder)
    generator = np.random.default_rng(0)
    chosen = np.sort(generator.choice(len(images), min(len(images), PICTURE_IMAGES), replace=False))
    pixels = images.gather(chosen)
    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    save_image(image_grid(pixels, padding=3, background="grey"), path)


def _card_data(
    count: int, license_name: str | None, splits: list, has_text: bool, tags: list[str] | None = None
) -> DatasetCardData:
    tasks = ["unconditional-image-generation", *(["text-to-image"] if has_text else [])]
    configs: dict[str, Any] = {"configs": [{"config_name": "default", "data_files": splits}]} if splits else {}
    return DatasetCardData(
        license=license_name,
        size_categories=[size_category(count)],
        task_categories=tasks,
        tags=["trainkit", "diffusion", *(tags or [])],
        **configs,
    )


def _card(data: DatasetCardData, parts: list[str]) -> str:
    body = "\n\n".join(part.strip("\n") for part in parts if part)
    return str(DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n"))


def _pixels(settings: dict) -> str:
    if settings.get("storage", "pixels") != "pixels" or settings["resize_mode"] == "random_crop":
        return ""
    channels = len(settings["image_mode"]) if settings["image_mode"] != "L" else 1
    return PIXELS.format(
        bits=settings["bit_depth"], height=settings["height"], width=settings["width"], channels=channels
    )


def _content(preparation: dict) -> str:
    about = {"columns": ", ".join(f"`{name}`" for name in preparation["columns"])}
    if pixels := preparation.get("pixels"):
        about["mean, std"] = f"{pixels['mean']}, {pixels['std']} (samples in 0..1)"
    num_bytes = sum(shard["num_bytes"] for shard in preparation["shards"])
    about["files"] = f"{counted(len(preparation['shards']), 'Arrow file')}, {num_bytes / 1e6:,.1f} MB"
    if (pairs := pairs_of(preparation)) is not None:
        about["conditioning images"] = f"{pairs}, stored as the images are"
    rejected = preparation["rejected"]
    about["rejected"] = ", ".join(f"{count:,} {fault}" for fault, count in rejected.items()) or "none"
    return _list(about)


def _classes(classes: dict[str, int]) -> list[str]:
    if not classes:
        return []
    rows = [f"| {name.replace('|', '/')} | {count:,} |" for name, count in list(classes.items())[:LISTED_CLASSES]]
    more = f"\n\n{len(classes) - LISTED_CLASSES:,} more classes are in `dataset_info.json`."
    table = "\n".join(["| class | images |", "|---|---|", *rows])
    return [f"## Classes\n\nLabel {NO_LABEL}: no class.\n\n{table}{more if len(classes) > LISTED_CLASSES else ''}"]


def _settings(preparation: dict) -> dict:
    filters = preparation.get("filters", {})
    versions = ", ".join(f"{name} {number}" for name, number in preparation["versions"].items())
    about = {"source": preparation["source"]["name"], **preparation["settings"], **filters}
    return about | {"fingerprint": preparation["fingerprint"], "made with": versions or f"trainkit {__version__}"}


def _list(about: dict) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in about.items() if value is not None)
