"""Images to score, from a folder or a prepared dataset, all brought to the size and mode of the feature extractor."""

# N images, B batch, H/W pixels, C channels, S side of the extractor's input in pixels

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from trainkit.data.sources.entries import ReadOptions
from trainkit.data.sources.listing import list_folder
from trainkit.data.sources.splits import ALL
from trainkit.errors import UserError

NOT_READABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
PREPARATION_NAME, RECORD_NAME = "preparation.json", "sampling.json"


class ImageFolder:
    """The images in a folder and all folders below it, in the order of their names.

    In an output folder of sample.py these are its numbered samples alone. One that cannot be read is a `UserError`, or
    with `skip_unreadable` left out of the batches and noted in `unreadable`: its number and why.
    """

    def __init__(self, folder: Path, flag: str, skip_unreadable: bool = False):
        self.folder, self.flag, self.skip_unreadable = folder, flag, skip_unreadable
        self.unreadable: dict[int, str] = {}
        listing = list_folder(folder, flag, ReadOptions(split=ALL))  # as prepare_dataset.py lists it
        files = [folder / entry.path for entry in listing.entries if entry.size > 0]
        if (folder / RECORD_NAME).is_file():
            files = [path for path in files if path.parent == folder and re.fullmatch(r"\d{6,}", path.stem)]
        self.files = files
        if not self.files:
            raise UserError(f"{flag} {folder} holds no image that can be read")

    def __len__(self) -> int:
        return len(self.files)

    @property
    def side(self) -> int:
        """The longer side in pixels of the first image that can be read."""
        for file in self.files:
            try:
                with Image.open(file) as image:
                    return max(image.size)
            except NOT_READABLE:
                continue
        raise UserError(f"{self.flag} {self.folder} holds no image that can be read")

    def batches(self, indices: np.ndarray, batch_size: int, side: int) -> Iterator[np.ndarray]:
        """Yield (B, S, S, 3) uint8 of the images `indices`, `batch_size` at a time."""
        with ThreadPoolExecutor(4) as pool:
            for start in range(0, len(indices), batch_size):
                found = pool.map(lambda index: self._read(int(index), side), indices[start : start + batch_size])
                images = [image for image in found if image is not None]
                if images:
                    yield np.stack(images)

    def _read(self, index: int, side: int) -> np.ndarray | None:
        file = self.files[index]
        try:
            with Image.open(file) as image:
                return _resized(ImageOps.exif_transpose(image), side)
        except NOT_READABLE as error:
            reason = " ".join(str(error).split()).replace(repr(str(file)), "it")
            if not self.skip_unreadable:
                raise UserError(f"{self.flag}: {file} cannot be read ({reason}); remove or replace it") from None
            self.unreadable[index] = reason
            return None


class PreparedFolder:
    """The images of a prepared dataset."""

    def __init__(self, folder: Path):
        from trainkit.data.loading.dataset import PreparedImages

        self.images = PreparedImages(folder)
        self.unreadable: dict[int, str] = {}  # preparation has left those out
        self.side = max(self.images.stored_height, self.images.stored_width)

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, indices: np.ndarray, batch_size: int, side: int) -> Iterator[np.ndarray]:
        """Yield (B, S, S, 3) uint8 of the images `indices`, `batch_size` at a time."""
        for start in range(0, len(indices), batch_size):
            pixels = self.images.gather(np.asarray(indices[start : start + batch_size], dtype=np.int64), None)
            if pixels.dtype == np.uint16:
                pixels = (pixels >> 8).astype(np.uint8)
            yield np.stack([_resized(_from_array(image), side) for image in pixels])


class ImageArray:
    """Images in memory, (N, H, W, C) uint8 of 1, 3 or 4 channels."""

    def __init__(self, images: np.ndarray):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, indices: np.ndarray, batch_size: int, side: int) -> Iterator[np.ndarray]:
        """Yield (B, S, S, 3) uint8 of the images `indices`, `batch_size` at a time."""
        for start in range(0, len(indices), batch_size):
            chosen = self.images[indices[start : start + batch_size]]
            yield np.stack([_resized(_from_array(image), side) for image in chosen])


def open_images(path: str, flag: str, skip_unreadable: bool = False) -> ImageFolder | PreparedFolder:
    """The images under `path`: a prepared dataset where it holds preparation.json, else an `ImageFolder`."""
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{flag} {path} is no folder; give a folder of images or a prepared dataset")
    if (folder / PREPARATION_NAME).is_file():
        return PreparedFolder(folder)
    return ImageFolder(folder, flag, skip_unreadable)


def read_sampling_record(path: str) -> dict:
    """sampling.json of a folder that sample.py wrote, {} for any other.

    Raises:
        UserError: sampling is not finished there.
    """
    file = Path(path) / RECORD_NAME
    if not file.is_file():
        return {}
    try:
        record = json.loads(file.read_text())
    except ValueError:
        raise UserError(f"--generated {path}: {RECORD_NAME} is not readable JSON; sample into a new folder") from None
    if not record.get("complete"):
        raise UserError(
            f"--generated {path}: its {record.get('num_images')} samples are not complete; run sample.py again"
        )
    return record


def _from_array(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def _resized(image: Image.Image, side: int) -> np.ndarray:
    """(S, S, 3) uint8: transparency over white, grey repeated, bicubic with antialiasing."""
    if image.mode.startswith("I"):  # 16 bits a channel
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC))
