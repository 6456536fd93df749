#!/usr/bin/env python
"""Make conditioning images from a folder of images: what sample.py --conditioning_dir accepts, and the true images.

    python tools/make_conditions.py photos conditions --condition_from downscale:4 --resolution 64 --num_images 100

    python tools/make_conditions.py photos pairs --condition_from levels:4 --resolution 64 --num_images 1000000
    accelerate launch train_conditional.py --condition image --train_data_dir pairs/truth \\
        --conditioning_data_dir pairs/conditions --conditioning_classes 4 --output_dir levels-to-photos-64

Writes OUTPUT/conditions (small, grey or incomplete images, or edges) and OUTPUT/truth (the images at --resolution)
under the same names; for downscale also OUTPUT/bicubic, the small images enlarged by bicubic interpolation, as a
baseline of evaluate_samples.py --paired; for mask OUTPUT/masks. levels:N are label maps: N equal ranges of grey have
the ids 0 to N - 1. Images are taken at even distances of the listing.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipelines.image_input import ImageInput, grey
from trainkit.data.faults import RejectedImage
from trainkit.data.images.decode import decode_image
from trainkit.data.loading.masks import draw_mask
from trainkit.data.loading.model_range import to_model_range
from trainkit.data.loading.order import Purpose, row_generator
from trainkit.data.settings import PreparationSettings, parse_resolution
from trainkit.diffusion.image_condition import image_input_of, to_uint8
from trainkit.errors import UserError, run_script
from trainkit.sampling.grid import save_image, to_pil
from trainkit.sampling.pictures import list_images


def make(options: argparse.Namespace) -> None:
    height, width = parse_resolution(options.resolution)
    settings = PreparationSettings(height, width, "crop", "RGB")
    levels = parse_levels(options.condition_from)
    image_input = None if levels else image_input_of(options.condition_from, height, width, 3)
    files, output = list_images(options.images, "IMAGES"), options.output
    count = min(options.num_images, len(files))
    for number in range(count):
        file = files[number * len(files) // count]
        try:
            pixels = decode_image(file, settings)
        except RejectedImage as error:
            raise UserError(f"{file} cannot be read: {error}") from None
        images = to_model_range(torch.from_numpy(np.array(pixels))[None], 8)
        made = {"truth": pixels}
        if image_input is None:
            made["conditions"] = level_map(images, levels)
        else:
            made |= derived(image_input, images, row_generator(options.seed, 0, Purpose.MASK, number))
        name = file.relative_to(options.images).with_suffix(".png")
        shown = {kind: to_pil(image) for kind, image in made.items()}
        if image_input is not None and image_input.kind == "downscale":
            shown["bicubic"] = shown["conditions"].resize((width, height), Image.Resampling.BICUBIC)
        for kind, picture in shown.items():
            path = output / kind / name
            path.parent.mkdir(parents=True, exist_ok=True)
            save_image(picture, path)
    print(f"{output}: {', '.join(sorted(path.name for path in output.iterdir()))} of {count} images")


def derived(image_input: ImageInput, images: torch.Tensor, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """The condition that `image_input` makes of one image (1, 3, H, W) in [-1, 1], and its mask if there is one."""
    pictures, made = image_input.pictures(images), {}
    if image_input.kind == "mask":
        mask = draw_mask(generator, *images.shape[2:])
        made["masks"] = mask[..., None].astype(np.uint8) * 255
        pictures = torch.where(torch.from_numpy(mask), 0.0, pictures)
    return made | {"conditions": to_uint8(pictures)[0]}


def parse_levels(given: str) -> int:
    """N of levels:N; 0 for other kinds. Raises `UserError`."""
    kind, _, number = given.partition(":")
    if kind != "levels":
        return 0
    if not number.isdecimal() or not 2 <= int(number) <= 256:
        raise UserError(f"--condition_from {given}: give the number of levels, 2 to 256, such as levels:4")
    return int(number)


def level_map(images: torch.Tensor, levels: int) -> np.ndarray:
    """The ids (H, W, 1) uint8 of one image (1, 3, H, W) in [-1, 1]: its luma in `levels` equal ranges."""
    ids = ((grey(images)[0] + 1) / 2 * levels).floor().clamp(0, levels - 1)
    return ids.permute(1, 2, 0).to(torch.uint8).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("images", type=Path, help="folder of images")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--condition_from", required=True, help="downscale:FACTOR, grayscale, mask, edges or levels:N")
    parser.add_argument("--resolution", default="64", help="side of the true images in pixels, or HxW")
    parser.add_argument("--num_images", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="seed of the masks")
    make(parser.parse_args())


if __name__ == "__main__":
    run_script(main)
