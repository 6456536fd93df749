"""Upsamplers after a model: super-resolution models that enlarge its images, in the same command (Ho et al. 2022)."""

# H/W pixels of the images, h/w those of the images before them

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trainkit.errors import UserError, renamed_flags
from trainkit.options.fields import option
from trainkit.terminal import say

if TYPE_CHECKING:  # they import torch, which --help does not need
    from pipelines.conditional import ConditionalPipeline
    from trainkit.sampling.generate import Pipeline, Upsampler

FLAG, PREFIX = "--upsampler_name_or_path", "upsampler_"
FIX = "train one with train_conditional.py --condition image --condition_from downscale:FACTOR"


@dataclass
class CascadeOptions:
    """upsampling: models that enlarge the images; the other flags take one value for all of them, or one for each"""

    upsampler_name_or_path: list[str] | None = option(
        None,
        "folders or Hub ids of super-resolution models, each for the size of the images before it: 64 to 128 pixels, "
        "then 128 to 256; nothing in them is executed",
        nargs="+",
    )
    upsampler_scheduler: list[str] | None = option(
        None, "schedulers of the upsamplers; default: as for --scheduler", nargs="+"
    )
    upsampler_num_inference_steps: list[int] | None = option(
        None, "scheduler steps of the upsamplers; default: as for --num_inference_steps", nargs="+", within="[1, inf)"
    )
    upsampler_image_noise: list[float] | None = option(
        None,
        "standard deviation of noise to add to the images before an upsampler, against faults in them (pixels are -1 "
        "to 1); default: 0",
        nargs="+", within="[0, 2]",
    )  # fmt: skip
    upsampler_guidance_scale: list[float] | None = option(
        None, "guidance scale of the upsamplers; default: 1, no guidance", nargs="+", within="[1, inf)"
    )


class Given(NamedTuple):
    """What the command line says of one upsampler; None where it says nothing."""

    scheduler: str | None
    steps: int | None
    noise: float | None
    scale: float | None


class Cascade(NamedTuple):
    """The upsamplers of a run in their order."""

    upsamplers: "list[Upsampler]"
    settings: dict  # what the images depend on
    names: dict  # of models and schedulers, for the record


def open_cascade(options: CascadeOptions, pipeline: "Pipeline") -> Cascade:
    """The upsamplers of `options`, each for the images of the one before it; the first for those of `pipeline`.

    Raises:
        UserError: one of them cannot be loaded, is not a super-resolution model, or is for images of another size,
            other channels or other classes.
    """
    names = options.upsampler_name_or_path
    if names is None:
        for field in fields(CascadeOptions):
            if getattr(options, field.name) is not None:
                raise UserError(f"--{field.name} needs {FLAG}, the model to enlarge the images with")
        return Cascade([], {}, {})
    values = [
        _each(options.upsampler_scheduler, "scheduler", len(names)),
        _each(options.upsampler_num_inference_steps, "num_inference_steps", len(names)),
        _each(options.upsampler_image_noise, "image_noise", len(names)),
        _each(options.upsampler_guidance_scale, "guidance_scale", len(names)),
    ]
    opened, settings, chosen, before = [], [], [], pipeline
    for name, *given in zip(names, *values, strict=True):
        upsampler, facts, scheduler_name = _open(name, Given(*given), before)
        _check_conditions(name, upsampler.pipeline, pipeline)
        opened.append(upsampler)
        settings.append(facts)
        chosen.append(scheduler_name)
        before = upsampler.pipeline
    return Cascade(opened, {"upsamplers": settings}, {"upsampler_models": names, "upsampler_scheduler_names": chosen})


def _each(given: list | None, name: str, count: int) -> list:
    """The value of the flag `name` for each of `count` upsamplers, None where it is not given."""
    if given is None:
        return [None] * count
    if len(given) not in (1, count):
        words = " ".join(map(str, given))
        raise UserError(f"--{PREFIX}{name} {words}: give one value, or one for each of the {count} models of {FLAG}")
    return given * count if len(given) == 1 else given


def _open(name: str, given: Given, before: "Pipeline") -> "tuple[Upsampler, dict, str]":
    """An upsampler, what its images depend on, and the name of its scheduler."""
    from trainkit.processes import main_process_first
    from trainkit.sampling.choice import default_steps, named_scheduler
    from trainkit.sampling.generate import Upsampler
    from trainkit.sampling.load import find_pipeline, load_pipeline
    from trainkit.sampling.schedulers import check_steps, describe_scheduler
    from trainkit.sampling.weights import weights_digest

    own = {flag: PREFIX + flag for flag in ("scheduler", "num_inference_steps")}
    with renamed_flags(model_name_or_path=FLAG[2:], **own):
        with main_process_first():
            folder: Path = find_pipeline(name)
        steps = given.steps or default_steps(folder)
        scheduler_name, chosen, why = named_scheduler(folder, given.scheduler, steps)
        check_steps(chosen, steps)
        pipeline: Any = load_pipeline(folder, chosen)
    say(f"{name}: {why.replace('--scheduler', f'--{PREFIX}scheduler')}")
    guidance = {"guidance_scale": given.scale or 1.0, "image_noise": given.noise or 0.0}
    check_upsampler(name, pipeline, before, guidance["image_noise"])
    facts = {"weights_sha256": weights_digest(folder), "scheduler": describe_scheduler(chosen)}
    return Upsampler(pipeline, steps, guidance), facts | {"num_inference_steps": steps} | guidance, scheduler_name


def check_upsampler(name: str, pipeline: "Pipeline", before: "Pipeline", noise: float) -> None:
    """Raise `UserError` unless `pipeline`, called `name`, enlarges the images of `before`."""
    from trainkit.sampling.generate import image_shape

    image_input = getattr(pipeline, "image_input", None)
    if image_input is None or image_input.kind != "downscale":
        kind = "has no small images" if image_input is None else f"makes images from another kind, {image_input.kind}"
        raise UserError(f"{FLAG} {name} is not a super-resolution model (it {kind}): {FIX}")
    (height, width, _), made, factor = image_shape(pipeline), image_shape(before), image_input.factor
    small = height // factor, width // factor, image_input.channels
    if small != made:
        sizes = ["{}x{} pixels (HxW) and {} channels".format(*shape) for shape in (small, made)]
        raise UserError(
            f"{FLAG} {name} enlarges images of {sizes[0]}, but those before it have {sizes[1]}: {FIX} on images of "
            f"{made[0] * factor}x{made[1] * factor} in the same colours"
        )
    if noise > image_input.noise:
        trained = f"was trained with noise of 0 to {image_input.noise:g}"
        raise UserError(f"--{PREFIX}image_noise {noise:g}: {name} {trained}")


def _check_conditions(name: str, upsampler: "ConditionalPipeline", base: "Pipeline") -> None:
    """Raise `UserError` if both take classes or vectors, but not the same ones. Says which conditions are null."""
    shared = set(upsampler.conditions) & set(getattr(base, "conditions", ()))
    different = None
    if "class_labels" in shared:
        classes = [(one.num_classes, one.config.id2label) for one in (upsampler, base)]
        different = "classes" if classes[0] != classes[1] else None
    if "vectors" in shared:
        lengths = [one.vector_embedding.config.vector_length for one in (upsampler, base)]
        different = "vectors" if lengths[0] != lengths[1] else different
    if different:
        raise UserError(f"{FLAG} {name} has other {different} than the first model: train both on the same ones")
    for condition in set(upsampler.conditions) - shared - {"image"}:
        say(f"{name}: samples without {condition}, which the first model does not take")
