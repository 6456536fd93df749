"""How many images/s are augmented, with everything on, against kornia.augmentation for the same set?

    python benchmarks/augmentation.py        # needs: pip install kornia

Both get float32 batches and flip, turn, shift, zoom, crop and resize, and change brightness, contrast, saturation and
hue, in the same ranges; kornia does so one after the other, at [0, 1]. Ours includes the draws on the host. They take
turns, and the ratio is taken within each turn.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

from trainkit.data.loading.augment import augment
from trainkit.data.loading.augment_draws import Augmentation, draw_parameters
from trainkit.errors import run_script
from trainkit.packages import load_package

GEOMETRY = {"rotation": 15, "translation": 0.1, "scale": 0.25, "crop_area": (0.5, 1.0), "crop_aspect": (0.75, 1.33)}
COLOUR = {"brightness": 0.2, "contrast": 0.3, "saturation": 0.4, "hue": 30}


def ours(augmentation: Augmentation, images: torch.Tensor) -> Callable[[], torch.Tensor]:
    size, count, steps = tuple(images.shape[-2:]), len(images), iter(range(10**9))

    def call() -> torch.Tensor:
        step = next(steps)
        flipped = np.random.Generator(np.random.Philox(step)).random(count) < 0.5
        drawn = draw_parameters(augmentation, 0, step, count, slice(0, count), size, size, flipped)
        return augment(images, drawn.to(images.device), size)

    return call


def flip_alone(images: torch.Tensor) -> Callable[[], torch.Tensor]:
    """As the loader does it for `--random_flip` by itself."""

    def call() -> torch.Tensor:
        flipped = torch.from_numpy(np.random.random(len(images)) < 0.5).to(images.device)
        return torch.where(flipped[:, None, None, None], images.flip(-1), images)

    return call


def kornias(images: torch.Tensor) -> Callable[[], torch.Tensor]:
    kornia = load_package("kornia", "the peer").augmentation
    sequence = kornia.AugmentationSequential(
        kornia.RandomHorizontalFlip(p=0.5),
        kornia.RandomAffine(15, (0.1, 0.1), (0.8, 1.25), padding_mode="reflection", p=1.0),
        kornia.RandomResizedCrop(tuple(images.shape[-2:]), (0.5, 1.0), (0.75, 1.33), p=1.0),
        kornia.ColorJiggle(0.2, 0.3, 0.4, 30 / 360, p=1.0),
        data_keys=["input"],
    )
    return lambda: sequence(images)


def images_per_second(call: Callable[[], torch.Tensor], count: int, seconds: float) -> float:
    """The rate of `call`, which makes `count` images, over at least `seconds`."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - started < seconds:
        call()
        calls += 1
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return calls * count / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch_size", type=int, default=64, help="images")
    parser.add_argument("--side", type=int, default=64, help="pixels")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.7, help="that each takes in a round, at least")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 0: all cores")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    unit = torch.rand(arguments.batch_size, 3, arguments.side, arguments.side, device=arguments.device)
    images = unit * 2 - 1
    contestants = {
        "all of them": ours(Augmentation(**GEOMETRY, **COLOUR), images),
        "kornia, all of them": kornias(unit),
        "rotation alone": ours(Augmentation(rotation=15), images),
        "all of the geometry": ours(Augmentation(**GEOMETRY), images),
        "all of the colour": ours(Augmentation(**COLOUR), images),
        "flip alone": flip_alone(images),
    }
    rates = {name: [] for name in contestants}
    for call in contestants.values():
        call()
    for _ in range(arguments.rounds):
        for name, call in contestants.items():
            rates[name].append(images_per_second(call, len(images), arguments.seconds))
    print(f"{tuple(images.shape)} on {arguments.device}, {torch.get_num_threads()} threads; medians:")
    for name, found in rates.items():
        rate = np.median(found)
        print(f"  {name:20} {rate:10,.0f} images/s, {1000 * len(images) / rate:8.2f} ms a batch")
    ratios = np.divide(rates["all of them"], rates["kornia, all of them"])
    by_round = ", ".join(f"{ratio:.1f}" for ratio in sorted(ratios))
    print(f"  {np.median(ratios):.1f} times kornia (by round: {by_round})")


if __name__ == "__main__":
    run_script(main)
