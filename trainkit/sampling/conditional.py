"""Save a conditional pipeline with the code it needs, and sample it over processes."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel, UNet2DModel
from torch import nn

from pipelines.conditional import ConditionalPipeline
from pipelines.vector_embedding import VectorEmbedding
from trainkit.sampling.pipeline import PIPELINE_FILES, replace_part
from trainkit.sampling.schedulers import DEFAULT_SCHEDULER, save_bundle, scheduler_bundle

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
        pipeline = ConditionalPipeline(
            unet=unet,
            scheduler=bundle[DEFAULT_SCHEDULER],
            vector_embedding=vector_embedding or inside,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            vae=vae,
            id2label=id2label,
            prompt_length=prompt_length,
        )
        pipeline.save_pretrained(staging)
    save_bundle(staging, bundle)
    (staging / "README.md").write_text(card)
    for name in CONDITIONAL_PIPELINE_FILES:
        if (staging / name).exists():
            replace_part(staging / name, folder / name)
    shutil.rmtree(staging)
