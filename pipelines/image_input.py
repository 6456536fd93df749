"""The second image that a UNet sees beside the noisy one. This file is saved inside the models it belongs to."""

# B images, C channels of the result, K channels of the second image, H/W pixels, h/w those of a small image
# or latents

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch.nn import functional

ID_MODES = ("1", "L", "P", "I", "I;16", "I;16L", "I;16B", "I;16N")  # of label maps
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in Pillow
NOISE_STREAM = 0x5EC0AD  # sets the noise of a small image apart from that of the image made from it


class ImageInput(ModelMixin, ConfigMixin):
    """What the second image is, and how it becomes channels that are concatenated to the UNet's input.

    It has no weights. `kind` is one of:

    - downscale: a small image, 1 / `factor` of the side, enlarged (Saharia et al. 2021), and a channel with the
      standard deviation of the noise in it, 0 to `noise` (Ho et al. 2022, section 4.2).
    - grayscale, edges: one channel.
    - mask: the known pixels, 0 elsewhere, and a channel that is 1 where an image is generated (Saharia et al. 2022).
    - picture: another picture of `picture_channels`, as it is.
    - labels: a map of ids from 0 to `classes` - 1, as a channel for each that is 1 where the map has this id.

    Without a condition all channels are 0 (Brooks et al. 2023), except that a mask is then 1 everywhere.

    A model of latents (`latent_channels`, each of `latent_factor` pixels along a side) sees the channels on their
    grid: see `on_latents`.
    """

    _source = Path(__file__).read_text(encoding="utf-8")  # kept: diffusers overwrites its copy of a loaded file

    @register_to_config
    def __init__(
        self,
        kind: str,
        channels: int,
        factor: int = 1,
        noise: float = 0.0,
        picture_channels: int | None = None,
        classes: int | None = None,
        latent_channels: int | None = None,
        latent_factor: int = 1,
    ):
        super().__init__()
        self.kind, self.channels, self.factor, self.noise = kind, channels, factor, noise
        self._picture_channels, self.classes = picture_channels or 1, classes or 0
        self.latent_channels, self.latent_factor = latent_channels, latent_factor
        self.register_buffer("placeholder", torch.zeros(1))  # diffusers expects a tensor in each module

    @property
    def num_channels(self) -> int:
        """K"""
        if self.kind == "labels":
            return self.classes
        return (self.latent_channels or self.picture_channels) + (self.kind in ("downscale", "mask"))

    @property
    def picture_channels(self) -> int:
        """The channels of the picture that a user gives; of a label map 1."""
        if self.kind == "picture":
            return self._picture_channels
        return self.channels if self.kind in ("downscale", "mask") else 1

    def pictures(self, images: torch.Tensor) -> torch.Tensor:
        """The pictures (B, _, h, w) of `images` (B, C, H, W), both float32 in [-1, 1].

        For a mask these are the images, and for pictures and label maps, which no image tells, what is given.
        """
        if self.kind == "downscale":
            size = images.shape[-2] // self.factor, images.shape[-1] // self.factor
            return functional.interpolate(images, size, mode="bicubic", antialias=True).clamp(-1, 1)
        if self.kind == "grayscale":
            return grey(images)
        return edges(images) if self.kind == "edges" else images

    def forward(
        self,
        pictures: torch.Tensor,
        masks: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        levels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The channels (B, K, H, W) float32 of `pictures` (B, _, h, w) in [-1, 1].

        Of label maps (B, 1, H, W) `pictures` are the ids. `masks` (B, 1, H, W) are True where an image is generated.
        `noise` (B, C, h, w) is standard normal and is scaled by `levels` (B,); None for no noise.
        """
        if self.kind == "labels":
            ids = torch.arange(self.classes, dtype=pictures.dtype, device=pictures.device)
            return (pictures == ids[:, None, None]).to(pictures.dtype)
        if self.kind == "mask":
            assert masks is not None  # of this kind
            return torch.cat([torch.where(masks, 0.0, pictures), masks.to(pictures.dtype)], dim=1)
        if self.kind != "downscale":
            return pictures
        size = pictures.shape[-2] * self.factor, pictures.shape[-1] * self.factor
        if noise is None or levels is None:
            levels = pictures.new_zeros(len(pictures))
        else:
            pictures = pictures + levels[:, None, None, None] * noise
        level = levels[:, None, None, None].expand(-1, 1, *size)
        return torch.cat([functional.interpolate(pictures, size, mode="bicubic"), level], dim=1)

    def on_latents(self, channels: torch.Tensor, vae) -> torch.Tensor:
        """The channels (B, K, h, w) that a model of the latents of `vae` sees, for those of pixels (B, _, H, W).

        A picture is encoded like the images, to the mode and not a sample (Rombach et al. 2022). Masks, levels of
        noise and classes are averaged over the pixels of a latent: 1 is a mask that covers all of them.
        """
        if self.kind == "labels":
            return functional.avg_pool2d(channels, self.latent_factor)
        pictures, others = channels[:, : self.picture_channels], channels[:, self.picture_channels :]
        pictures = pictures.expand(-1, self.channels, -1, -1)  # grey ones
        latents = vae.encode(pictures.to(vae.dtype)).latent_dist.mode().float()
        latents = (latents - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor
        if others.shape[1] == 0:
            return latents
        return torch.cat([latents, functional.avg_pool2d(others, self.latent_factor)], dim=1)

    def null(self, like: torch.Tensor) -> torch.Tensor:
        """The channels without a condition, of the shape (B, K, H, W) of `like`."""
        null = torch.zeros_like(like)
        if self.kind == "mask":
            null[:, -1:] = 1
        return null

    def encode(
        self,
        image,
        mask_image=None,
        size: Sequence[int] = (1, 1),
        divisor: int = 1,
        level: float = 0.0,
        generator=None,
        vae=None,
        device=None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The channels (B, K, H, W) float32 of the pictures that a user gives, those without a condition, and pixels.

        The pixels are what `keep_known` needs: the channels themselves, but of a model of latents (with `vae`) those
        before `on_latents`. `size` (H, W) in pixels is that of rows without a picture, if no row has one. H and W must
        be multiples of `divisor`. `level` is the noise to add to small images, drawn apart from what `generator` (one
        or a list) draws. Raises `ValueError` naming the argument.
        """
        rows = self.read(image, mask_image)
        sizes = {tuple(picture.shape[-2:]) for picture, _ in filter(None, rows)}
        if len(sizes) > 1:
            one, other = (f"{height}x{width}" for height, width in sorted(sizes)[:2])
            raise ValueError(f"image: pictures of {one} and of {other} (HxW) in one call: give those of one size")
        height, width = sizes.pop() if sizes else (side // self.factor for side in size)
        if height * self.factor % divisor or width * self.factor % divisor:
            made = f", {self.factor} times that" if self.factor > 1 else ""
            raise ValueError(
                f"image is {height}x{width} (HxW): the sides of the result{made} must be multiples of {divisor}"
            )
        if level and not 0 < level <= self.noise:
            raise ValueError(f"image_noise {level:g}: this model was trained with noise of 0 to {self.noise:g}")
        blank = torch.zeros(self.picture_channels, height, width), torch.ones(1, height, width, dtype=torch.bool)
        pictures = torch.stack([blank[0] if row is None else row[0] for row in rows])
        masks = torch.stack([blank[1] if row is None or row[1] is None else row[1] for row in rows])
        noise = _noise(pictures.shape, generator) if level else None
        # offloading moves them to another device
        pixels = self(pictures, masks, noise, torch.full((len(rows),), float(level)))
        pixels = pixels if device is None else pixels.to(device)
        channels = pixels if vae is None else self.on_latents(pixels, vae)
        null = self.null(channels)
        given = torch.tensor([row is not None for row in rows], device=channels.device)
        return torch.where(given[:, None, None, None], channels, null), null, pixels

    def keep_known(self, images: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """`images` (B, C, H, W) with the known `pixels` (B, _, H, W) of `encode`; unchanged for other kinds."""
        if self.kind != "mask":
            return images
        return torch.where(pixels[:, -1:] > 0.5, images, pixels[:, :-1].to(images.dtype))

    def read(self, image, mask_image=None) -> list[tuple[torch.Tensor, torch.Tensor | None] | None]:
        """The pictures in [-1, 1] and masks that a user gives, one of each or several; None in a list is null.

        Pictures are PIL images of any mode, arrays (h, w, _) of uint8 or of numbers in [0, 1], or tensors (_, h, w) of
        these. Masks are the same with one channel, of which 0.5 and more is generated. Label maps are PIL images of
        grey levels or a palette, arrays (h, w) or tensors (h, w), of whole numbers; their ids are returned. Raises
        `ValueError` naming the argument.
        """
        if self.kind == "labels":
            return [None if one is None else (self._ids(one), None) for one in _rows(image, are_maps=True)]
        pictures = [
            None if one is None else _tensor(one, self.picture_channels, "image") * 2 - 1 for one in _rows(image)
        ]
        if self.kind != "mask":
            return [None if picture is None else (picture, None) for picture in pictures]
        masks = _rows(mask_image)
        masks = masks * len(pictures) if len(masks) == 1 else masks
        if len(masks) != len(pictures):
            raise ValueError(f"mask_image: {len(masks)} masks for {len(pictures)} images")
        return [
            None if picture is None else (picture, _mask(mask, picture.shape[-2:]))
            for picture, mask in zip(pictures, masks, strict=True)
        ]

    def _ids(self, map_) -> torch.Tensor:
        """The ids (1, h, w) float32 of a label map. Raises `ValueError`."""
        if isinstance(map_, Image.Image):
            if map_.mode not in ID_MODES:
                raise ValueError(
                    f"image: a picture of mode {map_.mode} is no label map: give grey levels or a palette"
                )
            map_ = np.asarray(map_)
        array = torch.from_numpy(np.array(map_)) if isinstance(map_, np.ndarray) else map_
        if not isinstance(array, torch.Tensor) or array.is_floating_point():
            kind = str(getattr(map_, "dtype", type(map_).__name__))
            raise ValueError(f"image: {kind} is no label map: give a picture, an array or a tensor of whole numbers")
        ids = array.to("cpu", torch.int64)
        if ids.ndim == 3 and 1 in (ids.shape[0], ids.shape[2]):
            ids = ids[0] if ids.shape[0] == 1 else ids[..., 0]
        if ids.ndim != 2:
            raise ValueError(f"image has shape {tuple(array.shape)}: a label map is (height, width)")
        wrong = ids[(ids < 0) | (ids >= self.classes)]
        if len(wrong):
            raise ValueError(f"image: a label map holds the id {int(wrong[0])}, the model has 0 to {self.classes - 1}")
        return ids[None].float()

    def save_config(self, save_directory, push_to_hub: bool = False, **kwargs) -> None:
        """Write config.json and a copy of this file."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / "image_input.py").write_text(self._source, encoding="utf-8")
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)


def _mask(mask, size: Sequence[int]) -> torch.Tensor:
    """A mask (1, H, W) bool of `size`, True where an image is generated. Raises `ValueError` if it cannot be used."""
    if mask is None:
        raise ValueError("mask_image is missing: white marks what is generated, black what is kept")
    found = _tensor(mask, 1, "mask_image") >= 0.5
    if found.shape[-2:] != torch.Size(size):
        raise ValueError(
            f"mask_image is {_size(found)} pixels, its image {size[0]}x{size[1]} (HxW): give both one size"
        )
    if not found.any():
        raise ValueError("mask_image is black everywhere, so nothing would be generated: paint white what to replace")
    if found.all():
        raise ValueError(
            "mask_image is white everywhere, so nothing is kept: leave black what to keep, or give None as image"
        )
    return found


def grey(images: torch.Tensor) -> torch.Tensor:
    """The luma (B, 1, H, W) of `images` (B, C, H, W); alpha has no part in it."""
    if images.shape[1] == 1:
        return images
    red, green, blue = (weight * images[:, channel : channel + 1] for channel, weight in enumerate(LUMA))
    return red + green + blue


def edges(images: torch.Tensor) -> torch.Tensor:
    """The strength of edges (B, 1, H, W) in [-1, 1] of `images`: the gradient of the luma by Sobel's filter.

    -1 is flat, 1 a step from black to white or a stronger slope.
    """
    around = functional.pad(grey(images), (1, 1, 1, 1), mode="replicate")
    left, middle, right = around[..., :-2], around[..., 1:-1], around[..., 2:]
    across, along = right - left, left + 2 * middle + right
    across = across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]
    down = along[..., 2:, :] - along[..., :-2, :]
    strength = (across.square() + down.square()).sqrt() / 8  # 1 for a step of the whole range, which is 2
    return strength.clamp(max=1) * 2 - 1


def _noise(shape: torch.Size, generator) -> torch.Tensor:
    """Standard normal noise for small images, from other generators with the seeds of `generator`."""
    if generator is None:
        return torch.randn(shape)
    given = generator if isinstance(generator, list) else [generator]
    own = [torch.Generator().manual_seed(one.initial_seed() ^ NOISE_STREAM) for one in given]
    return randn_tensor(shape, generator=own if isinstance(generator, list) else own[0], device=torch.device("cpu"))


def _rows(given, are_maps: bool = False) -> list:
    """One or several pictures as a list. Several maps are also an array or tensor (B, h, w)."""
    if isinstance(given, list | tuple):
        return list(given)
    if isinstance(given, np.ndarray | torch.Tensor):
        several_maps = are_maps and given.ndim == 3 and given.shape[0] > 1 and given.shape[2] not in (1, 3, 4)
        if given.ndim == 4 or several_maps:
            return list(given)
    return [given]


def _tensor(picture, channels: int, name: str) -> torch.Tensor:
    """A picture (channels, h, w) float32 in [0, 1]."""
    if isinstance(picture, Image.Image):
        picture = np.asarray(picture.convert(MODES[channels]))
    if isinstance(picture, np.ndarray):
        picture = torch.from_numpy(np.array(picture))
        picture = picture[None] if picture.ndim == 2 else picture.movedim(-1, 0)
    if not isinstance(picture, torch.Tensor):
        raise ValueError(f"{name}: a {type(picture).__name__} is no PIL image, array or tensor")
    picture = picture[None] if picture.ndim == 2 else picture
    if picture.ndim != 3 or picture.shape[0] != channels:
        shape = tuple(picture.shape)
        raise ValueError(f"{name} has shape {shape} (channels, height, width), the model accepts {channels} channels")
    if picture.dtype == torch.uint8:
        return picture.float() / 255
    picture = picture.float()
    if not (picture.min() >= 0 and picture.max() <= 1):
        found = f"{picture.min():g} to {picture.max():g}"
        raise ValueError(f"{name}: numbers from {found}; give uint8, or numbers in [0, 1]")
    return picture


def _size(picture: torch.Tensor) -> str:
    return f"{picture.shape[-2]}x{picture.shape[-1]}"
