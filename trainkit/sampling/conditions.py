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

FLAGS = {"class_labels": "class_labels", "prompt": "prompts_file", "vectors": "vectors_file"}
ALL, NULL = "all", "null"


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
    """The conditions of a folder of samples, in the form that `pipeline` accepts."""

    def __init__(self, options: ConditionOptions, pipeline):
        flag = FLAGS[pipeline.condition]
        check_guidance(options)
        for other in set(FLAGS.values()) - {flag}:
            if getattr(options, other) is not None:
                raise UserError(f"--{other}: this pipeline is conditioned by --{flag}")
        self.kind = pipeline.condition
        by_kind: dict[str, tuple[Callable[..., list], Any]] = {
            "class_labels": (_labels, options.class_labels),
            "prompt": (_prompts, options.prompts_file),
            "vectors": (_vectors, options.vectors_file),
        }
        read, given = by_kind[self.kind]
        if given is None:
            raise UserError(f"--{flag} is missing: it sets what the images show")
        self.values = read(given, pipeline)
        self.guidance = {
            "guidance_scale": options.guidance_scale,
            "guidance_interval": options.guidance_interval,
            "guidance_rescale": options.guidance_rescale,
        }
        self._names = pipeline.config.id2label or {}
        self._num_classes = pipeline.num_classes if self.kind == "class_labels" else 0

    def for_images(self, images: Sequence[int]) -> list:
        """The conditions of the images with these numbers."""
        return [self.values[image % len(self.values)] for image in images]

    def settings(self) -> dict:
        """The settings that decide what the images show, for their record."""
        plain = json.dumps([_plain(value) for value in self.values])
        return {
            "condition": self.kind,
            "conditions_sha256": hashlib.sha256(plain.encode()).hexdigest(),
            **self.guidance,
        }

    def row(self, image: int) -> dict:
        """The columns of the image's line in metadata.jsonl: label and label_id, or text, or vector."""
        value = self.for_images([image])[0]
        if self.kind == "prompt":
            return {"text": value}
        if self.kind == "vectors":
            return {"vector": _plain(value)}
        return {"label": NULL if value is None else self._names.get(value, str(value)), "label_id": value}

    def label_ids(self, num_images: int) -> np.ndarray:
        """The classes (N,) int64 of images 0 to `num_images` - 1; -1 for the null class."""
        ids = [NO_LABEL if value is None else value for value in self.values]
        return np.resize(np.array(ids, dtype=np.int64), num_images)

    def label_names(self) -> list[str]:
        """The names of all classes of the model."""
        return [self._names.get(label, str(label)) for label in range(self._num_classes)]


def read_conditions(options: ConditionOptions, pipeline) -> Conditions | None:
    """The conditions of the samples; None for an unconditional pipeline, whose options must not name any."""
    if hasattr(pipeline, "condition"):
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
    for name in (*FLAGS.values(), "guidance_scale", "guidance_interval", "guidance_rescale"):
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
        raise UserError(f"--{error}") from None
    return [None if label == pipeline.num_classes else label for label in ids]


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
