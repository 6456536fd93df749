"""What a visitor asks for, checked: every mistake is a `UserError` of one line that names the field."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipelines.prompts import check_prompts
from trainkit.app.models import AppModel
from trainkit.app.pictures import Upload, picture_name, read_uploads
from trainkit.errors import UserError
from trainkit.sampling.conditions import ALL, NULL
from trainkit.sampling.generate import Pipeline

MAX_IMAGES = 64
MAX_SEED = 2**32 - 1
MAX_GUIDANCE = 20.0


@dataclass(frozen=True)
class Setting:
    """One side of the page: a model and how to sample it."""

    model: AppModel
    scheduler: str
    steps: int
    guidance_scale: float = 1.0


@dataclass(frozen=True)
class Request:
    """What both sides show. Image i has seed `seed` + i and condition i of those given, which repeat."""

    seed: int
    num_images: int
    classes: tuple[str, ...] = ()  # names or numbers; none: all classes
    vectors: str = ""  # a vector per line
    prompts: str = ""  # a prompt per line
    picture: Upload | None = None  # for models that are conditioned on images
    mask: Upload | None = None  # white where to generate
    fits: bool = True  # whether picture and mask are scaled and cropped to the size of training
    image_noise: float = 0.0  # in a small image


@dataclass(frozen=True)
class Job:
    """A checked request: images to make with `pipeline`, which belongs to this job alone."""

    name: str  # for files: the model, the scheduler and the steps
    title: str
    pipeline: Pipeline
    steps: int
    seeds: list[int]
    conditions: list[dict] | None  # arguments of the pipeline, per seed; None for an unconditional model
    captions: list[str]  # what each image shows; empty strings without a condition
    guidance: dict


def make_job(setting: Setting, request: Request) -> Job:
    """Check everything that a visitor can set.

    Raises:
        UserError: one of the values is wrong; the message names its field.
    """
    count, seed = _whole(request.num_images, "Images", 1, MAX_IMAGES), _whole(request.seed, "Seed", 0, MAX_SEED)
    steps = _whole(setting.steps, "Steps", 1, math.inf)
    pipeline = setting.model.pipeline_with(setting.scheduler, steps)
    seeds = [seed + index for index in range(count)]
    of_model = re.sub(r"[^\w.-]+", "-", setting.model.name)
    about = f"{of_model}-{setting.scheduler}-{steps}", f"{setting.scheduler}, {steps} step{'s' * (steps > 1)}"
    if not setting.model.is_conditional:
        return Job(*about, pipeline, steps, seeds, None, [""] * count, {})
    scale = float(setting.guidance_scale)
    if not 1 <= scale <= MAX_GUIDANCE:
        raise UserError(f"Guidance {setting.guidance_scale:g} must be 1 (none) to {MAX_GUIDANCE:g}")
    conditions, captions = _conditions(setting.model, request, count)
    guidance = {"guidance_scale": scale}
    name, title = about[0] + f"-guidance-{scale:g}", about[1] + f", guidance {scale:g}"
    if setting.model.image_input is not None:
        conditions = _add_picture(setting.model, request, conditions, pipeline)
        guidance["image_noise"] = _image_noise(setting.model, request)
    return Job(name, title, pipeline, steps, seeds, conditions, captions, guidance)


def _conditions(model: AppModel, request: Request, count: int) -> tuple[list[dict], list[str]]:
    """The conditions besides an image, as arguments of the pipeline, and what they show, of `count` images.

    Each kind of condition repeats by itself.
    """
    readers: dict[str, Callable] = {"class_labels": _classes, "vectors": _vectors, "prompt": _prompts}
    read = {name: readers[name](model, request) for name in model.conditions}
    rows = [{name: values[index % len(values)] for name, (values, _) in read.items()} for index in range(count)]
    captions = [", ".join(shown[index % len(shown)] for _, shown in read.values()) for index in range(count)]
    return rows, captions


def _add_picture(model: AppModel, request: Request, rows: list[dict], pipeline: Pipeline) -> list[dict]:
    """`rows` of arguments of the pipeline, with those of the picture; `pipeline` gets the size of the result.

    A model with another condition too accepts that one alone.
    """
    if request.picture is None:
        if not model.conditions:
            raise UserError(f"Image is empty: upload one ({picture_name(model)})")
        return rows
    given, size = read_uploads(model, request.picture, request.mask, request.fits)
    pipeline.image_size = size
    return [row | given for row in rows]


def _image_noise(model: AppModel, request: Request) -> float:
    most = 0.0 if model.image_input is None else model.image_input.noise
    if most and not 0 <= request.image_noise <= most:
        raise UserError(f"Noise {request.image_noise:g}: {model.name} was trained with noise of 0 to {most:g}")
    return float(request.image_noise) if most else 0.0


def _whole(value: float | None, field: str, low: int, high: float) -> int:
    if value is None or not math.isfinite(value) or value != int(value) or not low <= value <= high:
        end = f"{low} to {high:,}" if math.isfinite(high) else f"at least {low}"
        raise UserError(f"{field} {'is empty' if value is None else f'{value:g}'}: give a whole number, {end}")
    return int(value)


def _classes(model: AppModel, request: Request) -> tuple[list[int | None], list[str]]:
    names = model.class_names
    requested: list[str | int | None] = []
    for word in request.classes or (ALL,):
        if word in (ALL, NULL) and word not in names:
            requested += range(len(names)) if word == ALL else [None]
        else:
            requested.append(word)
    ids = _checked("Classes", model.pipeline.encode_labels, requested).tolist()
    values = [None if label == len(names) else label for label in ids]
    return values, ["no class" if value is None else names[value] for value in values]


def _vectors(model: AppModel, request: Request) -> tuple[list, list[str]]:
    lines = [line.strip() for line in request.vectors.splitlines() if line.strip()]
    if not lines:
        raise UserError(f"Vector: empty; give {model.vector_length} numbers, such as {example_vector(model)}")
    rows = [None if line == NULL else [_number(word) for word in _words(line)] for line in lines]
    return list(_checked("Vector", model.pipeline.check_vectors, rows).cpu().numpy()), lines


def _words(line: str) -> list[str]:
    return line.strip("[]() ").replace(",", " ").replace(";", " ").split()


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise UserError(f"Vector: {word[:40]!r} is not a number") from None


def class_choices(models: Sequence[AppModel]) -> list[tuple[str, str]]:
    """(text, value) of each choice of classes: the names that the models have, then all and none."""
    names = list(dict.fromkeys(name for model in models for name in model.class_names))
    special = [("all classes", ALL), ("no class", NULL)]
    return [(name, name) for name in names] + [choice for choice in special if choice[1] not in names]


def example_vector(model: AppModel) -> str:
    """The mean of the training vectors: always a vector that the model can show."""
    return ", ".join(f"{number:.3g}" for number in model.pipeline.vector_embedding.mean.tolist())


def _prompts(model: AppModel, request: Request) -> tuple[list[str], list[str]]:
    prompts = [line.strip() for line in request.prompts.splitlines() if line.strip()] or [""]
    parts = model.pipeline
    _checked("Prompt", check_prompts, parts.tokenizer, parts.text_encoder, prompts, parts.config.prompt_length)
    return prompts, [prompt or "no prompt" for prompt in prompts]


def _checked(field: str, function: Callable, *arguments):
    """The result of `function`, whose `ValueError` becomes a `UserError` that names the field of the page."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise UserError(f"{field}: {str(error).partition(': ')[2] or error}") from None
