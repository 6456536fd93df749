"""The settings of a preparation, which decide how images are stored, and their values from a script's options."""

# H/W height and width in pixels

import dataclasses
from dataclasses import dataclass

import numpy as np
from PIL import ImageColor

from trainkit.errors import UserError

CHANNELS = {"L": 1, "RGB": 3, "RGBA": 4}
DEFAULT_RESOLUTION = "64"
LOSSY_STORAGES = ("jpeg", "webp")


@dataclass(frozen=True)
class PreparationSettings:
    """Everything besides the file that decides the stored bytes, and the training size.

    `height` and `width` are the size of the stored window; `train_height` and `train_width` are set if training uses a
    smaller one (`--stored_resolution`).
    """

    height: int
    width: int
    resize_mode: str = "random_crop"  # crop, random_crop, pad or stretch
    image_mode: str = "RGB"  # L, RGB or RGBA
    background: tuple[int, int, int] = (255, 255, 255)  # behind transparent pixels in L and RGB, and in padding
    bit_depth: int = 8  # 8 or 16
    storage: str = "pixels"  # pixels, png, jpeg or webp
    storage_quality: int = 100  # of jpeg and webp; 100 for other storages
    min_size: int = 0  # pixels of the shorter side
    max_aspect_ratio: float = 0.0  # longer by shorter side; 0: any
    animated: str = "first"  # first or reject
    max_image_pixels: int = 89_478_485  # Pillow's own limit; 0: any
    train_height: int | None = None
    train_width: int | None = None

    @property
    def channels(self) -> int:
        return CHANNELS[self.image_mode]

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint8 if self.bit_depth == 8 else np.uint16)

    @property
    def fixed_size(self) -> bool:
        """Whether every image is stored at (height, width); else it covers that window."""
        return self.resize_mode != "random_crop"

    @property
    def identity(self) -> tuple:
        """The values that the stored bytes depend on, which excludes the training size."""
        return dataclasses.astuple(dataclasses.replace(self, train_height=None, train_width=None))


def settings_from_options(options) -> PreparationSettings:
    """Return the settings of a script's `ImageOptions`. Raises `UserError` naming the flag."""
    resolution = parse_resolution(options.resolution or DEFAULT_RESOLUTION)
    stored = resolution
    if options.stored_resolution is not None:
        stored = parse_resolution(options.stored_resolution, "--stored_resolution")
        check_training_size(resolution, stored)
    try:
        background = ImageColor.getrgb(options.background)[:3]
    except ValueError:
        raise UserError(f"--background {options.background} is not a colour; give a name or #rrggbb") from None
    _check_storage(options)
    for name in ("min_size", "max_image_pixels"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name} {getattr(options, name)} must be 0 (no limit) or more")
    if options.max_aspect_ratio != 0 and not options.max_aspect_ratio >= 1:
        raise UserError(f"--max_aspect_ratio {options.max_aspect_ratio} must be 0 (any) or at least 1 (square)")
    train_height, train_width = (None, None) if options.stored_resolution is None else resolution
    return PreparationSettings(
        height=stored[0],
        width=stored[1],
        resize_mode=resize_mode_from_options(options) or "random_crop",
        image_mode=options.image_mode or "RGB",
        background=background,
        bit_depth=16 if options.preserve_input_precision else 8,
        storage=options.storage,
        storage_quality=options.storage_quality if options.storage in LOSSY_STORAGES else 100,
        min_size=options.min_size,
        max_aspect_ratio=float(options.max_aspect_ratio),
        animated=options.animated,
        max_image_pixels=options.max_image_pixels,
        train_height=train_height,
        train_width=train_width,
    )


def resize_mode_from_options(options) -> str | None:
    """Return `--resize_mode`, or crop for `--center_crop`; None if neither is given. Raises `UserError`."""
    if options.center_crop and options.resize_mode not in (None, "crop"):
        raise UserError(f"--center_crop means --resize_mode crop, not {options.resize_mode}: leave one of them out")
    return "crop" if options.center_crop else options.resize_mode


def parse_resolution(resolution: str, flag: str = "--resolution") -> tuple[int, int]:
    """Parse '64' as (64, 64) and '64x96' as height 64, width 96. Raises `UserError`."""
    sides = str(resolution).lower().split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdigit() and int(side) > 0 for side in sides):
        raise UserError(f"{flag} {resolution} is not a size; give pixels, or HEIGHTxWIDTH as in 64x96")
    return int(sides[0]), int(sides[-1])


def check_training_size(resolution: tuple[int, int], stored: tuple[int, int]) -> None:
    """Raise `UserError` if stored images would have to be enlarged or stretched for training."""
    (height, width), (stored_height, stored_width) = resolution, stored
    what = f"--resolution {height}x{width}, stored at {stored_height}x{stored_width}"
    if height > stored_height or width > stored_width:
        raise UserError(f"{what}: --stored_resolution must be at least as large as --resolution")
    if height * stored_width != width * stored_height:
        raise UserError(f"{what}: both must have the same aspect ratio")


def _check_storage(options) -> None:
    storage = options.storage
    if not 1 <= options.storage_quality <= 100:
        raise UserError(f"--storage_quality {options.storage_quality} must be from 1 to 100")
    if storage == "jpeg" and options.image_mode == "RGBA":
        raise UserError("--storage jpeg stores no transparency; give --storage png or webp, or --image_mode RGB")
    if storage in LOSSY_STORAGES and options.preserve_input_precision:
        raise UserError(
            f"--storage {storage} stores 8 bits per channel; give --storage png, or drop --preserve_input_precision"
        )
