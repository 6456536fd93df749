"""A random autoencoder of two latent channels, and the flags of a tiny run on its latents."""

import torch
from diffusers import AutoencoderKL
from training_helpers import tiny_run

LATENT_CHANNELS, SCALE, SHIFT = 2, 0.7, 0.1


def make_vae(seed=0):
    """Random weights that halve RGB images once."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=LATENT_CHANNELS, sample_size=16,
        scaling_factor=SCALE, shift_factor=SHIFT,
    ).eval()  # fmt: skip


def save_vae(folder, seed=0):
    make_vae(seed).save_pretrained(folder)
    return folder


def latent_run(image_folder, latent_unet, cache_dir, output_dir, vae, **flags):
    """Arguments of six steps of eight images at 16 px, with a checkpoint after the third."""
    flags = {"vae_name_or_path": vae, "center_crop": True, "max_train_steps": 6} | flags
    return tiny_run(image_folder, latent_unet, cache_dir, output_dir, **flags)
