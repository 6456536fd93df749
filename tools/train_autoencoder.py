#!/usr/bin/env python
"""Train a small autoencoder (AutoencoderKL), to try training on latents without the Hub.

    python tools/train_autoencoder.py --train_data_dir photos --resolution 32 --center_crop --output_dir vae
    accelerate launch train_unconditional.py --train_data_dir photos --resolution 32 --center_crop \\
        --vae_name_or_path vae --model_config_name_or_path latent_unet --output_dir ddpm-latents

The loss is the mean absolute error and a small KL divergence from the standard normal distribution. The autoencoders
of published models are also trained with a perceptual loss and a discriminator (Rombach et al. 2022, section 3.1), so
theirs are sharper: prefer one of them for RGB images.

`scaling_factor` is set to the inverse of the latents' standard deviation. reconstructions.png shows images above what
is left of them, and the PSNR is printed: samples of a latent model cannot be better than that.
"""

import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trainkit.errors import UserError, run_script
from trainkit.options.data import ImageOptions, LoadingOptions, SourceOptions
from trainkit.options.fields import option
from trainkit.options.parsing import parse_options

SHOWN, MEASURED, LOGGING_STEPS, WARMUP_STEPS = 12, 256, 50, 100
MAX_CHANNELS = 4  # of the deepest level, relative to the first


@dataclass
class AutoencoderOptions:
    """autoencoder: its size and its training"""

    output_dir: str | None = option(None, "new folder for the autoencoder and reconstructions.png")
    halvings: int = option(2, "how often it halves an image", within="[1, 5]")
    latent_channels: int = option(4, "channels of the latents", within="[1, 64]")
    base_channels: int = option(32, "channels at the full size; a multiple of 8", within="[8, 512]")
    kl_weight: float = option(1e-3, "weight of the KL divergence per number of the latents", within="[0, inf)")
    max_train_steps: int = option(2000, "optimizer steps", within="[1, inf)")
    train_batch_size: int = option(32, "images per step", within="[1, inf)")
    learning_rate: float = option(1e-3, "peak learning rate of AdamW; it warms up, and decays to 0", within="(0, inf)")
    mixed_precision: str = option("no", "autocast of the forward pass", choices=("no", "bf16"))
    cpu_threads: int = option(0, "threads to compute with on a CPU; 0: as many as there are cores", within="[0, inf)")
    seed: int = option(0, "seed of the weights, the order and the noise", within="[0, inf)")


@dataclass
class Options(SourceOptions, ImageOptions, LoadingOptions, AutoencoderOptions):
    """The options of train_autoencoder.py."""


def train(options: Options) -> None:
    import torch
    from tqdm import tqdm

    from trainkit.data.cache import open_or_prepare
    from trainkit.data.loading.loader import BatchLoader, BatchShape
    from trainkit.diffusion.frozen import local_device
    from trainkit.training.launch import set_cpu_threads

    images = open_or_prepare(options)
    check_images(options, images)
    set_cpu_threads(options.cpu_threads)
    torch.manual_seed(options.seed)
    device, steps = local_device(), options.max_train_steps
    vae = build(options, images.channels, images.height).to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), options.learning_rate)
    lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    shape = BatchShape(options.train_batch_size, 1, 1, 0)
    workers, block = options.dataloader_num_workers, options.shuffle_block_size
    loader = BatchLoader(images, shape, options.seed, False, device, workers, shuffle_block_size=block)
    bar = tqdm(loader.iterate(0, steps), total=steps, desc="training", unit="step")
    for batch in bar:
        with torch.autocast(device.type, torch.bfloat16, enabled=options.mixed_precision == "bf16"):
            latents = vae.encode(batch.images).latent_dist
            decoded = vae.decode(latents.sample()).sample
        error = (decoded.float() - batch.images).abs().mean()
        divergence = latents.kl().mean() / latents.mean[0].numel()
        optimizer.zero_grad()
        (error + options.kl_weight * divergence).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        lr_scheduler.step()
        if batch.step % LOGGING_STEPS == 0:
            bar.set_postfix_str(f"error {error.item():.4f}, KL {divergence.item():.2f}")
    first = loader.iterate(0, math.ceil(min(MEASURED, len(images)) / options.train_batch_size))
    measured = torch.cat([batch.images for batch in first])[:MEASURED]
    save(options, vae.eval(), measured[: len(images)])


def check_images(options: Options, images) -> None:
    """Raise `UserError` for images that cannot be halved that often."""
    factor = 2**options.halvings
    if images.height % factor or images.width % factor:
        raise UserError(
            f"--resolution {images.height}x{images.width} must be divisible by {factor} (--halvings "
            f"{options.halvings}): use a multiple, or fewer --halvings"
        )


def build(options: Options, channels: int, size: int):
    """An AutoencoderKL with random weights for images (B, C, H, W) of `channels`."""
    from diffusers import AutoencoderKL

    levels = options.halvings + 1
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=[options.base_channels * min(2**level, MAX_CHANNELS) for level in range(levels)],
        norm_num_groups=8,
        latent_channels=options.latent_channels,
        sample_size=size,
    )


def save(options: Options, vae, images) -> None:
    """Measure what is left of `images` (N, C, H, W) in [-1, 1], set the scaling factor, and write the folder."""
    import numpy as np
    import torch

    from trainkit.sampling.generate import to_uint8
    from trainkit.sampling.grid import image_grid, save_image

    with torch.no_grad():
        parts = [vae.encode(part).latent_dist for part in images.split(options.train_batch_size)]
        decoded = torch.cat([vae.decode(part.mode()).sample for part in parts])
        std = torch.cat([part.sample() for part in parts]).std().item()
    shown, wanted = (to_uint8((each / 2 + 0.5).clamp(0, 1)).cpu().numpy() for each in (decoded, images))
    psnr = 10 * np.log10(255**2 / np.square(shown.astype(float) - wanted).mean(axis=(1, 2, 3)).clip(1e-9)).mean()
    vae.register_to_config(scaling_factor=1 / std)
    folder = Path(options.output_dir)
    staging = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    vae.to("cpu").save_pretrained(staging)
    pairs = np.concatenate([wanted[:SHOWN], shown[:SHOWN]])
    save_image(image_grid(pairs, len(pairs) // 2), staging / "reconstructions.png")
    staging.rename(folder)
    channels, height, width = parts[0].mean.shape[1:]
    print(
        f"{folder}: latents of {channels}x{height}x{width}, scaling_factor {1 / std:.4g}; PSNR {psnr:.1f} dB of "
        f"{len(images)} training images; see {folder / 'reconstructions.png'}"
    )


def check(options: Options) -> None:
    """Raise `UserError` for flags that are missing or cannot work, before anything is read."""
    if options.output_dir is None:
        raise UserError("--output_dir is missing: give a new folder for the autoencoder")
    if Path(options.output_dir).exists():
        raise UserError(f"--output_dir {options.output_dir} is there already: give a new folder")
    if options.base_channels % 8:
        raise UserError(f"--base_channels {options.base_channels} must be a multiple of 8, the groups of its norms")


def main() -> None:
    options = parse_options(Options, __doc__)
    check(options)
    train(options)


if __name__ == "__main__":
    run_script(main)
