"""Images are encoded once by a frozen autoencoder; training reads latents instead of pixels.

Mean and standard deviation of each latent are kept, so training draws a new sample on every visit as a function of
seed, step and row. The latents of a mirrored image are not mirrored latents: with `--random_flip` both are kept
(Rombach et al. 2022, section 3.3, for the model).

B batch, C channels and h/w size of the latents, H/W pixels.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from trainkit.data.files import cache_root, exists, location
from trainkit.data.format import PREPARATION_NAME
from trainkit.data.loading.augment import build_augmentation
from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.loading.encodings import Rows, make_units, read_complete, unit_name, write_complete, write_rows
from trainkit.data.loading.mapped_memory import will_need
from trainkit.data.loading.model_range import to_model_range
from trainkit.data.settings import parse_resolution, resize_mode_from_options
from trainkit.diffusion.frozen import local_device, state_digest
from trainkit.diffusion.pretrained import FLAG as PRETRAINED_FLAG
from trainkit.diffusion.pretrained import pipeline_index
from trainkit.diffusion.unet import check_channels, load_any_variant, unet_halvings
from trainkit.errors import UserError, one_line
from trainkit.options.script import TrainingOptions
from trainkit.terminal import Progress, say, warn

FLAG = "--vae_name_or_path"
FORMAT = "1"  # increase it when the same image and VAE would give other numbers
IMAGES_PER_UNIT, IMAGES_PER_BATCH, IMAGES_PER_FORWARD = 1024, 64, 8


class LatentImages:
    """The latents of `images`, with the interface of PreparedImages; other attributes are those of `images`.

    `rows` holds mean and standard deviation (2 * C * h * w,) of each image, `mirrored` those of the mirrored images.
    """

    holds_latents, fixed_size = True, True

    def __init__(self, images: PreparedImages, vae: AutoencoderKL, digest: str, rows: Rows, mirrored: Rows | None):
        self.images, self.vae, self.rows, self.mirrored = images, vae, rows, mirrored
        self.channels = vae.config.latent_channels
        self.height, self.width = (side >> halvings(vae.config) for side in (images.height, images.width))
        self.fingerprint = f"{images.fingerprint}-{digest}"
        self.scale, self.shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0

    def __len__(self) -> int:
        return len(self.images)

    def __getattr__(self, name: str):
        return getattr(self.images, name)

    def column(self, name: str) -> Iterator[np.ndarray]:
        """The column `name` of the images, shard by shard."""
        return self.images.column(name)

    @property
    def components(self) -> dict:
        """Components of the saved pipeline: the autoencoder that decodes."""
        return {"vae": self.vae}

    def gather(self, indices: np.ndarray, crops: np.ndarray | None = None) -> np.ndarray:
        """The means (B, h, w, C) float32 of images, scaled as the model expects them."""
        return self._scaled(self._rows(indices, None)[:, 0])

    def sample(self, indices: np.ndarray, flip: np.ndarray | None, noise: np.ndarray) -> np.ndarray:
        """Latents (B, h, w, C) float32 of images, mirrored where `flip` (B,), drawn with `noise` (B, C, h, w)."""
        rows = self._rows(indices, flip)
        return self._scaled(rows[:, 0] + rows[:, 1] * noise)

    def read_soon(self, indices: np.ndarray) -> None:
        """Start to read the latents of the images `indices` (B,), without waiting."""
        rows = [part[row] for part in (self.rows, self.mirrored) if part is not None for row in indices.tolist()]
        will_need((row.ctypes.data, row.nbytes) for row in rows)

    def _rows(self, indices: np.ndarray, flip: np.ndarray | None) -> np.ndarray:
        found = np.empty((len(indices), 2, self.channels, self.height, self.width), dtype=np.float32)
        for place, index in enumerate(indices.tolist()):
            rows = self.rows if flip is None or not flip[place] else self.mirrored
            assert rows is not None  # open_latents encodes the mirrored images too if any is to be flipped
            found[place] = rows[index].reshape(found.shape[1:])
        return found

    def _scaled(self, latents: np.ndarray) -> np.ndarray:
        return ((latents - self.shift) * self.scale).transpose(0, 2, 3, 1)


def halvings(vae_config: dict) -> int:
    """How often an AutoencoderKL halves an image."""
    return len(vae_config["block_out_channels"]) - 1


def latent_grid(vae: AutoencoderKL | None) -> dict[str, int]:
    """The settings of an ImageInput that say what the latents of `vae` are; none without one."""
    if vae is None:
        return {}
    return {"latent_channels": vae.config.latent_channels, "latent_factor": 2 ** halvings(vae.config)}


def check_pictures(vae_config: dict, channels: int) -> None:
    """Raise `UserError` if the autoencoder cannot encode conditioning pictures of `channels`."""
    accepted = vae_config["in_channels"]
    if channels not in (1, accepted):
        raise UserError(
            f"{FLAG} encodes images of {accepted} channels, but the conditioning images have {channels}: use "
            f"--conditioning_image_mode {'L' if accepted == 1 else 'RGB'}"
        )


def check_latent_options(options: TrainingOptions) -> None:
    """Raise `UserError` for options that do not go with `--vae_name_or_path`, before anything is prepared."""
    name = options.vae_name_or_path
    if name is None:
        _refuse_latents_as_pixels(options.pretrained_model_name_or_path)
        return
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise UserError(f"{FLAG} {name}: the folder does not exist")
    if build_augmentation(options, 3) is not None:
        raise UserError(f"{FLAG} encodes images once: --random_flip is the only augmentation it supports")
    config, _ = _find_vae(name)
    given = options.train_data_dir if options.dataset_name is None else None
    prepared = given is not None and exists(location(given, options.storage_options) / PREPARATION_NAME)
    if not prepared and resize_mode_from_options(options) in (None, "random_crop"):
        raise UserError(f"{FLAG} encodes each image once: add --center_crop, or --resize_mode pad or stretch")
    if options.image_mode is not None or not prepared:
        _check_image_mode(options, config, options.image_mode or "RGB")
    if mode := getattr(options, "conditioning_image_mode", None):
        check_pictures(config, len(mode))
    check_channels(options, config["latent_channels"])
    if options.resolution is not None:
        _check_size(options, config, *parse_resolution(options.resolution))


def encode_images(
    options: TrainingOptions, images: PreparedImages, held_out: PreparedImages | None = None
) -> tuple[PreparedImages | LatentImages, PreparedImages | LatentImages | None]:
    """`images` and `held_out` as latents with `--vae_name_or_path`, else unchanged. Raises `UserError`."""
    if options.vae_name_or_path is None:
        return images, held_out
    latents = open_latents(options, images, flips=options.random_flip)
    return latents, None if held_out is None else open_latents(options, held_out, flips=False)


def load_vae(options: TrainingOptions) -> AutoencoderKL | None:
    """The autoencoder of `--vae_name_or_path`, frozen, on the CPU; None without the flag. Raises `UserError`."""
    name = options.vae_name_or_path
    if name is None:
        return None
    _, subfolder = _find_vae(name)
    try:
        return load_any_variant(AutoencoderKL, name, subfolder=subfolder).eval().requires_grad_(False)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{FLAG} {name}: its AutoencoderKL cannot be loaded: {one_line(error)}") from None


def open_latents(options: TrainingOptions, images: PreparedImages, flips: bool) -> LatentImages:
    """The latents of `images` by `--vae_name_or_path`; those that the cache does not hold yet are computed.

    With `flips` the mirrored images are encoded too. All processes of a run may call this at the same time and share
    the work. Raises `UserError`.
    """
    vae = load_vae(options)
    assert vae is not None  # the caller asks for latents
    _check_images(options, vae.config, images)
    digest = state_digest(vae, FORMAT)
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", images.folder.name)[:60]
    folder = cache_root(options.cache_dir) / "latents" / f"{stem}-{images.fingerprint}-{digest}"
    rows = _encoded(images, vae, folder, mirror=False)
    mirrored = _encoded(images, vae, folder / "mirrored", mirror=True) if flips else None
    latents = LatentImages(images, vae, digest, rows, mirrored)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        _print_statistics(latents, folder)
    return latents


def _encoded(images: PreparedImages, vae: AutoencoderKL, folder: Path, mirror: bool) -> Rows:
    rows = Rows(folder, len(images), IMAGES_PER_UNIT)
    if read_complete(folder) is not None:
        return rows
    vae.to(local_device())
    rank, world, units = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), len(rows.unit_names)

    def make(number: int) -> None:
        unit = rows.unit_rows(number)
        batches = (unit[start : start + IMAGES_PER_BATCH] for start in range(0, len(unit), IMAGES_PER_BATCH))
        try:
            write_rows(folder / unit_name(number), (_encode(images, vae, batch, mirror) for batch in batches))
        except ValueError as error:
            raise UserError(f"{FLAG}: the VAE gave {error}; the cache holds float16: use another VAE") from None

    with Progress("encoding latents", len(images), "images") as progress:

        def show(number: int) -> None:
            progress.advance(len(rows.unit_rows(number)))

        make_units(folder, rows.unit_names, make, rank * units // max(1, world), show)
    vae.to("cpu")
    write_complete(folder, {"images": len(images)})
    return rows


@torch.no_grad()
def _encode(images: PreparedImages, vae: AutoencoderKL, batch: range, mirror: bool) -> list[np.ndarray]:
    """Mean and standard deviation (2, C, h, w) of each image of `batch`."""
    encoded = []
    for start in range(0, len(batch), IMAGES_PER_FORWARD):
        pixels = images.gather(np.array(batch[start : start + IMAGES_PER_FORWARD]), None)
        pixels = pixels.astype(np.int32) if pixels.dtype == np.uint16 else pixels
        inputs = to_model_range(torch.from_numpy(pixels).to(vae.device), images.bit_depth)
        latents = vae.encode(inputs.flip(-1) if mirror else inputs).latent_dist
        encoded += list(torch.stack([latents.mean, latents.std], dim=1).cpu().numpy())
    return encoded


def _find_vae(name: str) -> tuple[dict, str | None]:
    """The config of an AutoencoderKL in a folder or Hub repository, and its subfolder: the `vae` of a pipeline there.

    The class is checked: diffusers loads any other model as an AutoencoderKL with random weights.
    """
    reasons = []
    for subfolder in ("vae", None):
        try:
            config = AutoencoderKL.load_config(name, subfolder=subfolder)
        except (OSError, ValueError, RuntimeError) as error:
            reasons.append(one_line(error).partition(". ")[0])
            continue
        if config.get("_class_name") == "AutoencoderKL":
            return dict(config), subfolder
        reasons.insert(0, f"it holds a {config.get('_class_name')}")
    raise UserError(
        f"{FLAG} {name} is not an AutoencoderKL ({reasons[0]}); give its folder or Hub id, or that of a pipeline"
    )


def _refuse_latents_as_pixels(name: str | None) -> None:
    """A UNet of latents has nothing to start from for pixels."""
    if name is not None and (pipeline_index(name).get("vae") or [None])[0] is not None:
        raise UserError(f"{PRETRAINED_FLAG} {name} was trained on the latents of its vae: add {FLAG} {name}")


def _check_size(options: TrainingOptions, vae_config: dict, height: int, width: int) -> None:
    by_vae, by_unet = halvings(vae_config), unet_halvings(options)
    factor = 2 ** (by_vae + by_unet)
    if height % factor or width % factor:
        raise UserError(
            f"--resolution {height}x{width} must be divisible by {factor}: the VAE halves it {by_vae} times, and the "
            f"UNet its latents {by_unet} times; use a multiple, or a smaller UNet through --model_config_name_or_path"
        )


def _check_image_mode(options: TrainingOptions, vae_config: dict, image_mode: str) -> None:
    if vae_config["in_channels"] != len(image_mode):
        raise UserError(
            f"{FLAG} {options.vae_name_or_path} expects {vae_config['in_channels']} channels, but --image_mode "
            f"{image_mode} gives {len(image_mode)}: change one of the two"
        )


def _check_images(options: TrainingOptions, vae_config: dict, images: PreparedImages) -> None:
    _check_size(options, vae_config, images.height, images.width)
    _check_image_mode(options, vae_config, images.image_mode)
    if not images.fixed_size or (images.stored_height, images.stored_width) != (images.height, images.width):
        raise UserError(
            f"{FLAG} encodes each image once, and these are cropped randomly on each visit: prepare them at the "
            "training size, with --center_crop or --resize_mode pad or stretch"
        )


def _print_statistics(latents: LatentImages, folder: Path) -> None:
    first = latents.gather(np.arange(min(len(latents), 256)))
    mean, std = float(first.mean()), float(first.std())
    say(
        f"encoded images: {folder}, latents of {latents.channels}x{latents.height}x{latents.width}, mean {mean:.2f}, "
        f"standard deviation {std:.2f}"
    )
    if not 0.5 < std < 2:
        warn(
            f"{FLAG}: latents should have a standard deviation near 1: set scaling_factor in its config.json to "
            f"{latents.scale / std:.4g}"
        )
