"""Runs of evaluate_samples.py in the process of a test, and images to score."""

import numpy as np
import torch
from PIL import Image
from training_helpers import run_in_process

from trainkit.evaluation.features import ROUNDED_RESIZE


class TinyExtractor(torch.nn.Module):
    """12 features: the mean colours of the quarters of an image."""

    name, weights_sha256, input_size, num_features, resize = "tiny", "0" * 64, 8, 12, ROUNDED_RESIZE

    def forward(self, images):
        return images.float().reshape(-1, 2, 4, 2, 4, 3).mean(dim=(2, 4)).flatten(1) / 255


def evaluate(monkeypatch, **flags):
    """evaluate_samples.py in this process; several values of a flag are separated by semicolons."""
    words = [word for name, value in flags.items() for word in (f"--{name}", *str(value).split(";"))]
    run_in_process(monkeypatch, "evaluate_samples", words)


def write_images(folder, count, noise=0.0, seed=0, mode="RGB"):
    """Coloured waves of 24 px, with `noise` grey levels on top."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:24, 0:24] / 24
    for i in range(count):
        frequency, phase, colour = rng.uniform(2, 9, 2), rng.uniform(0, 6, 2), rng.uniform(60, 250, 3)
        waves = 0.5 + 0.4 * np.sin(frequency[0] * rows + phase[0]) * np.cos(frequency[1] * columns + phase[1])
        pixels = waves[..., None] * colour + noise * rng.standard_normal((24, 24, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode).save(folder / f"{i:06d}.png")
    return folder
