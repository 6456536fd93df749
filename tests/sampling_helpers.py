"""A tiny model, and runs of sample.py in the process of a test."""

from functools import partial

import numpy as np
import torch
from conftest import TINY_UNET
from diffusers import UNet2DModel
from PIL import Image

from sample import Options
from sample import sample as run_sample


def tiny_model(channels=3, sample_size=16):
    torch.manual_seed(0)
    config = {key: value for key, value in TINY_UNET.items() if not key.startswith("_")}
    return UNet2DModel(**config | {"in_channels": channels, "out_channels": channels, "sample_size": sample_size})


def sample_flags(model, output_dir, **changes):
    values = {"model_name_or_path": str(model), "output_dir": str(output_dir), "seed": 3, "sample_batch_size": 4}
    return values | {"cpu_threads": 1} | changes


def sample_images(model, output_dir, **changes):
    run_sample(Options(**sample_flags(model, output_dir, **changes)))


SEVEN = {"num_images": 7, "num_inference_steps": 5}
flags, sample = partial(sample_flags, **SEVEN), partial(sample_images, **SEVEN)


def words(values):
    return [word for name, value in values.items() for word in (f"--{name}", value)]


def read(folder, count=7, extension="png"):
    images = [np.asarray(Image.open(folder / f"{i:06d}.{extension}")) for i in range(count)]
    return np.stack(images).astype(int)


def contents(folder):
    """The bytes of the images of a folder, by name, in any format."""
    ends = (".png", ".webp", ".jpg", ".npz", ".arrow")
    named = [path for path in folder.iterdir() if path.suffix in ends or path.name == "preparation.json"]
    return {path.name: path.read_bytes() for path in named if path.name != "grid.png"}


def interrupt_the_second_batch(monkeypatch):
    """Let sampling end with KeyboardInterrupt at its second batch."""
    from trainkit.sampling.run import Sampler

    draw, calls = Sampler.sample, []

    def interrupted(self, batch, step_noise):
        calls.append(batch)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(self, batch, step_noise)

    monkeypatch.setattr(Sampler, "sample", interrupted)
