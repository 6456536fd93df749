"""The conditions of sample.py: image i shows condition i of a list of labels, prompts or vectors, which repeats."""

# K conditions, D numbers of a vector

import csv
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainkit.data.format import NO_LABEL
from trainkit.errors import UserError
from trainkit.options.fields import option

MASK = "mask_image"  # comes with "image"
FLAGS = {  # of each argument of the pipeline
    "class_labels": "class_labels",
    "prompt": "prompts_file",
    "vectors": "vectors_file",
    "image": "conditioning_dir",
    MASK: "mask_dir",
}
ALL, NULL = "all", "null"
SHOWN_CLASSES = 20  # in a message
GUIDANCE = ("guidance_scale", "guidance_interval", "guidance_rescale", "image_noise")


@dataclass
class ConditionOptions:
    """condition: what a conditional pipeline should show; the images cycle through the conditions"""

    class_labels: list[str] | None = option(
        None, "names or ids of classes; all: every class; null: no class", nargs="+"
    )
    prompts_file: str | None = option(None, "text file with one prompt per line; an empty line is no prompt")
    vectors_file: str | None = option(
        None, ".npy (images, numbers), or .csv with one vector per line; a row of nan is no vector"
    )
    conditioning_dir: str | None = option(
        None,
        "folder of images, one per condition: small, grey or incomplete images, edges, label maps or others, as "
        "the model was trained",
    )
    mask_dir: str | None = option(
        None,
        "folder of masks with the names of the images in --conditioning_dir, white where to generate; default: the "
        "transparency of the images",
    )
    image_noise: float = option(
        0.0, "standard deviation of noise to add to small images, against faults in them (pixels are -1 to 1)",
        within="[0, 2]",
    )  # fmt: skip
    guidance_scale: float = option(
        1.0, "guidance scale; 1: no guidance, which halves the time per step", within="[1, inf)"
    )
    guidance_interval: list[float] | None = option(
        None, "noise levels LOW HIGH (sigma) between which to guide; default: all levels", nargs="+", within="[0, inf)"
    )
    guidance_rescale: float = option(
        0.0, "fraction of the contrast added by guidance that is removed again", within="[0, 1]"
    )


class Conditions:
    """The conditions of a folder of samples, in the form that `pipeline` accepts.

    `lists` has one sequence per argument of the pipeline; image i shows entry i of each, and they repeat.
    """

    def __init__(self, options: ConditionOptions, pipeline):
        check_guidance(options)
        kinds = [name for name in pipeline.conditions if name != MASK]
        expected = " and ".join(f"--{FLAGS[name]}" for name in kinds)
        for name, flag in FLAGS.items():
            if name not in pipeline.conditions and getattr(options, flag) is not None:
                raise UserError(f"--{flag}: this pipeline is conditioned by {expected}")
        values = {
            "class_labels": options.class_labels, "prompt": options.prompts_file, "vectors": options.vectors_file,
            "image": options.conditioning_dir,
        }  # fmt: skip
        given = {name: values[name] for name in kinds if values[name] is not None}
        if not given:
            says = "are missing: they set" if len(kinds) > 1 else "is missing: it sets"
            raise UserError(f"{expected} {says} what the images show")
        if options.mask_dir is not None and "image" not in given:
            raise UserError(f"--mask_dir {options.mask_dir} needs --conditioning_dir, the images to fill")
        _check_image_noise(options.image_noise, pipeline)
        # a condition that is not given is null
        self.lists: dict[str, Any] = {name: _read(name, value, options, pipeline) for name, value in given.items()}
        self.guidance: dict[str, Any] = {
            "guidance_scale": options.guidance_scale,
            "guidance_interval": options.guidance_interval,
            "guidance_rescale": options.guidance_rescale,
        }
        if "image" in self.lists:
            self.guidance["image_noise"] = options.image_noise
            pipeline.image_size = self.lists["image"].size
        self._kinds = kinds
        self._names = pipeline.config.id2label or {}
        self._num_classes = pipeline.num_classes if "class_labels" in self.lists else 0

    def __len__(self) -> int:
        """The number of conditions before they repeat."""
        return max(len(values) for values in self.lists.values())

    def for_images(self, images: Sequence[int]) -> list:
        """The conditions of the images with these numbers, as `generate` accepts them."""
        if len(self._kinds) == 1:
            [name] = self._kinds
            return [self._value(name, image) for image in images]
        return [self._together(image) for image in images]

    def _together(self, image: int) -> dict:
        values = {name: self._value(name, image) for name in self.lists}
        return values | values.get("image", {})  # which has the mask too

    def _value(self, name: str, image: int):
        return self.lists[name][image % len(self.lists[name])]

    def settings(self) -> dict:
        """The settings that decide what the images show, for their record."""
        plain = [
            values.digest() if name == "image" else [_plain(value) for value in values]
            for name, values in self.lists.items()
        ]
        content = json.dumps(plain[0] if len(plain) == 1 else plain)
        return {
            "condition": "+".join(self.lists),
            "conditions_sha256": hashlib.sha256(content.encode()).hexdigest(),
            **self.guidance,
        }

    def row(self, image: int) -> dict:
        """The columns of the image's line in metadata.jsonl: label and label_id, text, vector, conditioning_image."""
        row: dict[str, Any] = {}
        for name, values in self.lists.items():
            value = None if name == "image" else self._value(name, image)
            if name == "prompt":
                row |= {"text": value}
            elif name == "vectors":
                row |= {"vector": _plain(value)}
            elif name == "image":
                row |= {"conditioning_image": values.name(image % len(values))}
            else:
                row |= {"label": NULL if value is None else self._names.get(value, str(value)), "label_id": value}
        return row

    def label_ids(self, num_images: int) -> np.ndarray | None:
        """The classes (N,) int64 of images 0 to `num_images` - 1, -1 for the null class; None without classes."""
        if "class_labels" not in self.lists:
            return None
        ids = [NO_LABEL if value is None else value for value in self.lists["class_labels"]]
        return np.resize(np.array(ids, dtype=np.int64), num_images)

    def label_names(self) -> list[str] | None:
        """The names of all classes of the model; None without classes."""
        if "class_labels" not in self.lists:
            return None
        return [self._names.get(label, str(label)) for label in range(self._num_classes)]

    def text(self, image: int) -> str | None:
        """The prompt of an image, if there are prompts."""
        return self._value("prompt", image) if "prompt" in self.lists else None

    def vector(self, image: int) -> np.ndarray | None:
        """The vector of an image, if there are vectors."""
        return self._value("vectors", image) if "vectors" in self.lists else None


def _read(name: str, given, options: ConditionOptions, pipeline) -> Any:
    if name == "image":
        from trainkit.sampling.pictures import Pictures  # late: it imports what decodes images

        return Pictures(given, options.mask_dir, pipeline)
    readers: dict[str, Callable[..., list]] = {"class_labels": _labels, "prompt": _prompts, "vectors": _vectors}
    return readers[name](given, pipeline)


def _check_image_noise(level: float, pipeline) -> None:
    most = 0.0 if pipeline.image_input is None else pipeline.image_input.noise
    if level > most:
        trained = f"was trained with noise of 0 to {most:g}" if most else "takes no noise"
        raise UserError(f"--image_noise {level:g}: this model {trained}")


def read_conditions(options: ConditionOptions, pipeline) -> Conditions | None:
    """The conditions of the samples; None for an unconditional pipeline, whose options must not name any."""
    if hasattr(pipeline, "conditions"):
        return Conditions(options, pipeline)
    _refuse_conditions(options)
    return None


def check_guidance(options: ConditionOptions) -> None:
    """Raise `UserError` for guidance settings outside their ranges."""
    if not 1 <= options.guidance_scale < math.inf:
        raise UserError(f"--guidance_scale {options.guidance_scale} must be at least 1 (no guidance)")
    if not 0 <= options.guidance_rescale <= 1:
        raise UserError(f"--guidance_rescale {options.guidance_rescale} must be 0 to 1")
    interval = options.guidance_interval
    if interval is None:
        return
    if len(interval) != 2 or not 0 <= interval[0] < interval[1]:
        given = " ".join(map(str, interval))
        raise UserError(f"--guidance_interval {given}: give two noise levels, the lower first, such as 0.2 3")


def _refuse_conditions(options: ConditionOptions) -> None:
    """Raise `UserError` if conditions or guidance are given for an unconditional pipeline."""
    neutral = ConditionOptions()
    for name in (*FLAGS.values(), *GUIDANCE):
        if getattr(options, name) != getattr(neutral, name):
            raise UserError(f"--{name}: this pipeline is unconditional; remove the flag")


def _labels(words: list[str], pipeline) -> list[int | None]:
    requested: list[int | str | None] = []
    for word in words:
        named = word in (pipeline.config.id2label or {}).values()
        if word == ALL and not named:
            requested += range(pipeline.num_classes)
        else:
            requested.append(None if word == NULL and not named else word)
    try:
        ids = pipeline.encode_labels(requested).tolist()
    except ValueError as error:
        raise UserError(f"--{error}; {_classes(pipeline)}") from None
    return [None if label == pipeline.num_classes else label for label in ids]


def _classes(pipeline) -> str:
    """The classes of a pipeline in a few words."""
    names = pipeline.config.id2label or {}
    if not names:
        return f"the classes are 0 to {pipeline.num_classes - 1}"
    shown = [names[label] for label in sorted(names)][:SHOWN_CLASSES]
    more = f", ... ({len(names):,} in all)" if len(names) > SHOWN_CLASSES else ""
    return f"the classes are {', '.join(shown)}{more}"


def _prompts(file: str, pipeline) -> list[str]:
    from pipelines.prompts import check_prompts  # late: it imports torch

    try:
        prompts = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts_file {file} cannot be read ({error}); give a text file in UTF-8") from None
    if not prompts:
        raise UserError(f"--prompts_file {file} is empty; write one prompt per line")
    try:
        check_prompts(pipeline.tokenizer, pipeline.text_encoder, prompts, pipeline.config.prompt_length)
    except ValueError as error:
        raise UserError(f"--prompts_file {file}: {error}") from None
    return prompts


def _vectors(name: str, pipeline) -> list[np.ndarray]:
    file = Path(name)
    try:
        vectors = _read_csv(file) if file.suffix == ".csv" else np.load(file, allow_pickle=False)
        vectors = np.asarray(vectors, dtype=np.float32)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"--vectors_file {file} cannot be read ({error}); give a .npy or .csv of numbers") from None
    if vectors.ndim != 2 or len(vectors) == 0:
        raise UserError(f"--vectors_file {file} has shape {vectors.shape}; it must be (vectors, numbers)")
    try:
        pipeline.check_vectors(vectors)
    except ValueError as error:
        raise UserError(f"--vectors_file {file}: {error}") from None
    return list(vectors)


def _read_csv(file: Path) -> list[list[float]]:
    """The rows of numbers in `file`; a first line of words is a header."""
    with file.open(newline="", encoding="utf-8-sig") as lines:
        rows = [row for row in csv.reader(lines) if row]
    try:
        [float(word) for word in rows[0]]
    except (IndexError, ValueError):
        rows = rows[1:]
    return [[float(word) for word in row] for row in rows]


def _plain(value):
    """A condition as JSON; a null vector becomes null."""
    if isinstance(value, np.ndarray):
        return None if np.isnan(value).all() else value.tolist()
    return value
