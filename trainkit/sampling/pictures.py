"""The pictures of sample.py --conditioning_dir, and their masks: read from their files when an image needs them."""

# H/W height and width, C channels

import hashlib
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from pipelines.conditional import ConditionalPipeline
from pipelines.image_input import ImageInput
from trainkit.data.faults import RejectedImage
from trainkit.data.images.conditions import decode_label_map
from trainkit.data.images.decode import decode_image, image_size
from trainkit.data.settings import PreparationSettings
from trainkit.data.sources.entries import IMAGE_EXTENSIONS
from trainkit.errors import UserError

FLAG, MASK_FLAG = "--conditioning_dir", "--mask_dir"
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
SAMPLE_NAME = re.compile(r"\d{6,}\.[^./]+")  # of an image in a folder of samples, which also has a grid
OPAQUE = 128  # alpha from which a pixel is kept


class Pictures:
    """The images of a folder in the order of their names, as arguments of `pipeline`.

    A mask is the image of the same name in `mask_folder`, or else the transparency of the picture. Raises `UserError`
    that names the file if one cannot be read, has another size, or leaves nothing to keep or to generate.
    """

    def __init__(self, folder: str, mask_folder: str | None, pipeline):
        self.folder, self.input = Path(folder), pipeline.image_input
        self.files = list_images(self.folder, FLAG)
        self.masks: list[Path] | None = None
        if mask_folder is not None:
            self.masks = self._match_masks(Path(mask_folder))
        self.small_size = _size_of(self.files[0], FLAG)
        for file in self.files:
            self._check_size(file, FLAG, self.small_size)
        for file in self.masks or ():
            self._check_size(file, MASK_FLAG, self.small_size)
        self.size = self.small_size[0] * self.input.factor, self.small_size[1] * self.input.factor
        self._check_with_pipeline(pipeline)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        file, mask = self.files[number], None if self.masks is None else self.masks[number]
        if self.input.kind == "labels":
            return {"image": self._read_labels(file)}
        read_mask = None if mask is None else partial(self._read, mask, MASK_FLAG)
        return picture_arguments(self.input, partial(self._read, file, FLAG), read_mask)

    def name(self, number: int) -> str:
        """The path of a picture relative to its folder."""
        return self.files[number].relative_to(self.folder).as_posix()

    def digest(self) -> str:
        """SHA-256 of names and contents: it changes with the pictures."""
        digest = hashlib.sha256()
        for file in [*self.files, *(self.masks or ())]:
            digest.update(file.name.encode("utf-8", "surrogateescape") + file.read_bytes())
        return digest.hexdigest()

    def _match_masks(self, folder: Path) -> list[Path]:
        masks = {file.relative_to(folder).with_suffix(""): file for file in list_images(folder, MASK_FLAG)}
        names = [file.relative_to(self.folder).with_suffix("") for file in self.files]
        missing = next((name for name in names if name not in masks), None)
        if missing is not None:
            raise UserError(f"{MASK_FLAG} {folder} has no mask {missing}.png, the partner of {FLAG} {self.folder}")
        return [masks[name] for name in names]

    def _check_size(self, file: Path, flag: str, expected: tuple[int, int]) -> None:
        height, width = _size_of(file, flag)
        if (height, width) != expected:
            raise UserError(
                f"{flag}: {file} is {height}x{width} (HxW), but {self.files[0].name} is {expected[0]}x{expected[1]}: "
                "give all of them one size"
            )

    def _check_with_pipeline(self, pipeline) -> None:
        """Refuse now what the pipeline would refuse during sampling."""
        if self.input.kind == "mask" and self.masks is None and self.input.channels == 4:
            raise UserError(f"{MASK_FLAG} is missing: the transparency of the pictures is part of this model's images")
        numbers = range(len(self)) if self.input.kind in ("mask", "labels") else [0]
        for number in numbers:
            given = self[number]
            try:
                check_picture(pipeline, given)
            except ValueError as error:
                source = self.files[number] if self.masks is None else self.masks[number]
                hint = f" (the transparency of the picture, without {MASK_FLAG})" if self._masks_by_alpha else ""
                raise UserError(f"{MASK_FLAG if self.masks else FLAG}: {source}: {error}{hint}") from None

    @property
    def _masks_by_alpha(self) -> bool:
        return self.input.kind == "mask" and self.masks is None

    def _read(self, file: Path, flag: str, mode: str) -> np.ndarray:
        try:
            return decode_image(file, PreparationSettings(*self.small_size, "stretch", mode))
        except RejectedImage as error:
            raise UserError(f"{flag}: {file} cannot be read: {error}") from None

    def _read_labels(self, file: Path) -> np.ndarray:
        try:
            return decode_label_map(file, PreparationSettings(*self.small_size, "stretch", "L"), self.input.classes)
        except RejectedImage as error:
            raise UserError(f"{FLAG}: {file} is not used: {error}") from None


def picture_arguments(
    image_input: ImageInput, read: Callable[[str], np.ndarray], read_mask: Callable[[str], np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """The arguments `image` and, for a model that fills masks, `mask_image`: arrays (H, W, C) uint8.

    `read` decodes the picture, and `read_mask` its mask, in an image mode of Pillow. Without `read_mask` what is
    transparent in the picture is generated.
    """
    mode = MODES[image_input.picture_channels]
    if image_input.kind != "mask":
        return {"image": read(mode)}
    if read_mask is not None:
        return {"image": read(mode), "mask_image": read_mask("L")}
    image = read("RGBA")
    hidden = (image[..., 3:] < OPAQUE).astype(np.uint8) * 255
    return {"image": read("L") if image_input.channels == 1 else image[..., :3], "mask_image": hidden}


def check_picture(pipeline: ConditionalPipeline, given: dict[str, np.ndarray]) -> None:
    """Raise `ValueError`, naming the argument, for a picture that `pipeline` would refuse during sampling."""
    pipeline.image_input.encode(given["image"], given.get("mask_image"), divisor=pipeline.image_divisor)


def list_images(folder: Path, flag: str) -> list[Path]:
    """The images in a folder and below it by name; of a folder of samples the samples. Raises `UserError`."""
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_EXTENSIONS)
    if (folder / "sampling.json").is_file():
        files = [file for file in files if SAMPLE_NAME.fullmatch(file.relative_to(folder).as_posix())]
    if not files:
        problem = "holds no images" if folder.is_dir() else "is not a folder"
        raise UserError(f"{flag} {folder} {problem}: give a folder with one image per condition")
    return files


def _size_of(file: Path, flag: str) -> tuple[int, int]:
    try:
        return image_size(file)
    except RejectedImage as error:
        raise UserError(f"{flag}: {file} cannot be read: {error}") from None
