"""Write the folder that anybody loads with `DiffusionPipeline.from_pretrained`."""

import os
import shutil
from pathlib import Path

from diffusers import DDPMPipeline, UNet2DModel

from trainkit.diffusion.noise_schedule import NoiseScheduler
from trainkit.sampling.schedulers import DEFAULT_SCHEDULER, save_bundle, scheduler_bundle

# What the saved folder consists of, and all that is ever pushed to the Hub.
PIPELINE_FILES = ("model_index.json", "unet", "scheduler", "schedulers", "README.md", "samples.png")


def save_pipeline(folder: Path, unet: UNet2DModel, noise_scheduler: NoiseScheduler, model_card: str) -> None:
    """Save `unet` as a stock DDPMPipeline with its schedulers and README.md: staged, then renamed part by part.

    The folder may hold other files and an earlier save; a kill leaves the old part or the new one, never half of one.
    """
    staging = folder / ".tmp-pipeline"
    shutil.rmtree(staging, ignore_errors=True)
    bundle = scheduler_bundle(noise_scheduler)
    DDPMPipeline(unet=unet, scheduler=bundle[DEFAULT_SCHEDULER]).save_pretrained(staging)
    save_bundle(staging, bundle)
    (staging / "README.md").write_text(model_card)
    for name in PIPELINE_FILES:
        if (staging / name).exists():
            replace_part(staging / name, folder / name)
    shutil.rmtree(staging)


def replace_part(new: Path, target: Path) -> None:
    """Rename `new`, in a staging folder of the same disk, to `target`; what was there goes into that folder."""
    if new.is_file() or not target.exists():
        os.replace(new, target)
        return
    old = new.with_name(f"{new.name}.old")
    target.rename(old)
    new.rename(target)
