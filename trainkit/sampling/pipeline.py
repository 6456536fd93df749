"""Build the pipeline of a trained UNet, and write the folder that `DiffusionPipeline.from_pretrained` loads."""

import copy
import os
import shutil
from pathlib import Path

from diffusers import AutoencoderKL, DDPMPipeline, SchedulerMixin, UNet2DConditionModel, UNet2DModel
from torch import nn

from pipelines.conditional import ConditionalPipeline
from pipelines.unconditional import UnconditionalPipeline
from pipelines.vector_embedding import VectorEmbedding
from trainkit.atomic import TEMPORARY_PREFIX, write_text
from trainkit.diffusion.few_step import is_few_step
from trainkit.diffusion.noise_schedule import NoiseScheduler
from trainkit.sampling.catalogue import DEFAULT_SCHEDULER
from trainkit.sampling.generate import Pipeline
from trainkit.sampling.schedulers import default_scheduler, save_bundle, scheduler_bundle

# Everything that a saved pipeline can contain. Nothing else is pushed to the Hub.
PIPELINE_PARTS = (
    "conditional.py", "guidance.py", "labels_and_vectors.py", "prompts.py", "unconditional.py", "vector_embedding",
    "text_encoder", "tokenizer", "vae", "guidance_unet", "guidance_vector_embedding", "image_input",
    "model_index.json", "unet", "scheduler", "schedulers", "README.md", "samples.png",
)  # fmt: skip
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin")


def conditional_pipeline(
    unet: UNet2DModel | UNet2DConditionModel, noise_scheduler: NoiseScheduler, **components
) -> ConditionalPipeline:
    """A ConditionalPipeline of a UNet in training. It shares the weights of `unet`, which is not changed.

    A VectorEmbedding that training stored in `unet.class_embedding` becomes the pipeline's `vector_embedding`, and the
    pipeline's UNet is then a stock one whose class_labels are the embedding's output. `components` are the pipeline's
    other arguments.
    """
    unet, embedding = _split_vector_embedding(unet)
    return ConditionalPipeline(unet, noise_scheduler, **({"vector_embedding": embedding} | components))


def unconditional_pipeline(
    unet: UNet2DModel, noise_scheduler: NoiseScheduler | SchedulerMixin, vae: AutoencoderKL | None = None
) -> DDPMPipeline | UnconditionalPipeline:
    """The pipeline of a UNet without a condition: a stock one for pixels, our own for the latents of `vae`."""
    return DDPMPipeline(unet, noise_scheduler) if vae is None else UnconditionalPipeline(unet, noise_scheduler, vae)


def _split_vector_embedding(unet: nn.Module) -> tuple[nn.Module, VectorEmbedding | None]:
    embedding = getattr(unet, "class_embedding", None)
    if not isinstance(embedding, VectorEmbedding):
        return unet, None
    stock = copy.copy(unet)
    stock._modules = unet._modules | {"class_embedding": nn.Identity()}
    stock.__dict__.pop("forward", None)  # that of add_augmentation_input is bound to `unet`
    return stock, embedding


def use_default_scheduler(pipeline: Pipeline) -> Pipeline:
    """Replace the training noise schedule by its default solver, except for a few-step student; returns `pipeline`."""
    if not is_few_step(pipeline.scheduler):
        pipeline.scheduler = default_scheduler(pipeline.scheduler)
    return pipeline


def scheduler_name(pipeline: Pipeline) -> str:
    """The name of the scheduler that `use_default_scheduler` leaves: in the catalogue, or the class of a student's."""
    own = pipeline.scheduler
    return f"the student's {type(own).__name__}" if is_few_step(own) else DEFAULT_SCHEDULER


def save_pipeline(folder: Path, pipeline: Pipeline, card: str) -> None:
    """Save `pipeline` with its schedulers, its code if it is our own, and README.md (`card`).

    `pipeline.scheduler` is the noise schedule of training. The saved folder gets the default solver as `scheduler/`
    and all that fit as `schedulers/<name>/`. A few-step student has only its own. Everything is
    staged, then renamed part by part: a kill leaves the old part or the new one. Other files in `folder` are kept.
    """
    staging = folder / f"{TEMPORARY_PREFIX}pipeline"
    shutil.rmtree(staging, ignore_errors=True)
    noise_scheduler, few_step = pipeline.scheduler, is_few_step(pipeline.scheduler)
    bundle = {} if few_step else scheduler_bundle(noise_scheduler)
    try:
        use_default_scheduler(pipeline)
        pipeline.save_pretrained(staging)
        if isinstance(pipeline, DDPMPipeline) and not few_step:
            UnconditionalPipeline.save_source(staging)
    finally:
        pipeline.scheduler = noise_scheduler
    if not few_step:
        save_bundle(staging, bundle)
    write_text(staging / "README.md", card)
    for name in PIPELINE_PARTS:
        if (staging / name).exists():
            _replace_part(staging / name, folder / name)
    shutil.rmtree(staging)


def _replace_part(new: Path, target: Path) -> None:
    """Rename `new`, in a staging folder on the same disk, to `target`. The old part goes into the staging folder."""
    if new.is_file() or not target.exists():
        os.replace(new, target)
        return
    _keep_other_files(target, new)
    old = new.with_name(f"{new.name}.old")
    target.rename(old)
    new.rename(target)


def _keep_other_files(old: Path, new: Path) -> None:
    """Copy the files of `old` that `new` does not have, for example a user's notes, but no old weights."""
    for path in old.rglob("*"):
        kept = new / path.relative_to(old)
        if path.is_file() and not kept.exists() and not any(path.match(pattern) for pattern in WEIGHTS):
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, kept)
