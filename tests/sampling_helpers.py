"""A tiny model, and sample.py in this process."""

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


def flags(model, output_dir, **changes):
    values = {"model_name_or_path": str(model), "output_dir": str(output_dir), "num_images": 7, "seed": 3}
    return values | {"num_inference_steps": 5, "sample_batch_size": 4, "cpu_threads": 1} | changes


def words(values):
    return [word for name, value in values.items() for word in (f"--{name}", value)]


def sample(model, output_dir, **changes):
    """sample.py in this process."""
    run_sample(Options(**flags(model, output_dir, **changes)))


def read(folder, count=7, extension="png"):
    images = [np.asarray(Image.open(folder / f"{i:06d}.{extension}")) for i in range(count)]
    return np.stack(images).astype(int)


def contents(folder):
    """The bytes of the images of a folder, by name, in any format."""
    ends = (".png", ".webp", ".jpg", ".npz", ".arrow")
    named = [path for path in folder.iterdir() if path.suffix in ends or path.name == "preparation.json"]
    return {path.name: path.read_bytes() for path in named if path.name != "grid.png"}
