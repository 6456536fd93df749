"""Save a conditional pipeline with the code it needs, and sample it."""

# N images, B batch, H/W pixels, C channels

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel, UNet2DModel
from torch import nn

from pipelines.conditional import ConditionalPipeline
from pipelines.vector_embedding import VectorEmbedding
from trainkit.sampling.generate import image_size, limited_batch_size, seeded_generators, to_uint8
from trainkit.sampling.pipeline import PIPELINE_FILES, replace_part
from trainkit.sampling.schedulers import DEFAULT_SCHEDULER, check_steps, save_bundle, scheduler_bundle

# What the saved folder consists of, where its kind has it, and all that is ever pushed to the Hub.
CONDITIONAL_PIPELINE_FILES = (
    "conditional.py", "vector_embedding", "text_encoder", "tokenizer", "vae", "guidance_unet",
    "guidance_vector_embedding", *PIPELINE_FILES,
)  # fmt: skip


@contextmanager
def stock_unet(unet: UNet2DModel | UNet2DConditionModel) -> Iterator[VectorEmbedding | None]:
    """Yield the VectorEmbedding that training put into `unet`, taken out for the while; None where there is none.

    Inside, `unet` is what anybody loads: one whose class_labels are the embedding's output.
    """
    embedding = getattr(unet, "class_embedding", None)
    if not isinstance(embedding, VectorEmbedding):
        yield None
        return
    unet.class_embedding = nn.Identity()
    try:
        yield embedding
    finally:
        unet.class_embedding = embedding


def save_conditional_pipeline(
    folder: Path,
    unet: UNet2DModel | UNet2DConditionModel,
    noise_scheduler: DDPMScheduler,
    card: str,
    *,
    id2label: dict[int, str] | None = None,
    vector_embedding: VectorEmbedding | None = None,
    text_encoder: nn.Module | None = None,
    tokenizer=None,
    vae: AutoencoderKL | None = None,
    prompt_length: int | None = None,
) -> None:
    """Save a ConditionalPipeline with its schedulers, its code and README.md: staged, then renamed part by part.

    A VectorEmbedding in the place of `unet.class_embedding` is split off. `prompt_length` is the number of tokens that
    prompts were padded to in training. The folder may hold other files and an earlier save.
    """
    staging = folder / ".tmp-pipeline"
    shutil.rmtree(staging, ignore_errors=True)
    bundle = scheduler_bundle(noise_scheduler)
    with stock_unet(unet) as inside:
        ConditionalPipeline(
            unet=unet,
            scheduler=bundle[DEFAULT_SCHEDULER],
            vector_embedding=vector_embedding or inside,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            vae=vae,
            id2label=id2label,
            prompt_length=prompt_length,
        ).save_pretrained(staging)
    save_bundle(staging, bundle)
    (staging / "README.md").write_text(card)
    for name in CONDITIONAL_PIPELINE_FILES:
        if (staging / name).exists():
            replace_part(staging / name, folder / name)
    shutil.rmtree(staging)


def generate_conditional(
    pipeline: ConditionalPipeline,
    conditions: Sequence,
    seeds: Sequence[int],
    num_inference_steps: int,
    batch_size: int,
    **guidance,
) -> Iterator[np.ndarray]:
    """Yield images (B, H, W, C) uint8, one for each of `conditions` and its seed, `batch_size` at a time.

    A condition is what `pipeline.condition` takes: an id or a name, a vector, a prompt, or None for the null one.
    `guidance` is passed on: guidance_scale, guidance_interval, guidance_rescale. Runs where the pipeline is, under the
    caller's autocast; the chain itself stays float32.

    Raises:
        UserError: the scheduler cannot take `num_inference_steps`.
    """
    check_steps(pipeline.scheduler, num_inference_steps)
    batch_size = limited_batch_size(pipeline.unet, batch_size)
    pipeline.set_progress_bar_config(disable=True)
    with _evaluation_mode(pipeline):
        for start in range(0, len(seeds), batch_size):
            images = pipeline(
                **{pipeline.condition: list(conditions[start : start + batch_size])},
                num_inference_steps=num_inference_steps,
                generator=seeded_generators(seeds[start : start + batch_size]),
                output_type="pt",
                **guidance,
            ).images
            yield to_uint8(images)


def decoded_shape(pipeline: ConditionalPipeline) -> tuple[int, int, int]:
    """(H, W, C) of the images of `pipeline`."""
    height, width = image_size(pipeline.unet)
    if pipeline.vae is None:
        return height, width, pipeline.unet.config.out_channels
    factor = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    return height * factor, width * factor, pipeline.vae.config.out_channels


@contextmanager
def _evaluation_mode(pipeline: ConditionalPipeline) -> Iterator[None]:
    modules = [module for module in pipeline.components.values() if isinstance(module, nn.Module)]
    were_training = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module, was_training in zip(modules, were_training, strict=True):
            module.train(was_training)
