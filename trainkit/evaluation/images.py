"""Images to score: folders, prepared datasets, .npz files or arrays, resized for the feature extractor."""

# N images, B batch, H/W pixels, C channels, S side of the extractor's input in pixels

import hashlib
import json
import re
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps

from trainkit.data.files import RemotePath
from trainkit.data.format import PREPARATION_NAME
from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.sources.entries import ReadOptions
from trainkit.data.sources.listing import list_folder
from trainkit.data.sources.splits import ALL, find_splits
from trainkit.errors import UserError, one_line
from trainkit.sampling.npz import NPZ_NAME

NOT_READABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
RECORD_NAME = "sampling.json"


class ImageSet(Protocol):
    """Images that can be read in batches of one size."""

    unreadable: dict[int, str]  # index and reason of images that were left out
    side: int  # longer side in pixels of the (first) image
    fingerprint: str  # changes with the images

    def __len__(self) -> int: ...

    def batches(self, indices: np.ndarray, batch_size: int, side: int, rounded: bool = True) -> Iterator[np.ndarray]:
        """Yield (B, S, S, 3) of the images `indices`, `batch_size` at a time.

        The pixels are uint8, or float32 in [0, 255] if they are not `rounded` after the resize.
        """
        ...


class ImageFolder:
    """The images that prepare_dataset.py would read from a folder, in the order of their names.

    In an output folder of sample.py these are only its numbered samples. An unreadable image raises `UserError`. With
    `skip_unreadable` it is left out of the batches and its number and reason are kept in `unreadable`.
    """

    def __init__(self, folder: Path, flag: str, skip_unreadable: bool = False):
        self.folder, self.flag, self.skip_unreadable = folder, flag, skip_unreadable
        self.unreadable: dict[int, str] = {}
        listing = list_folder(folder, flag, ReadOptions(split=ALL))
        entries = [entry for entry in listing.entries if entry.size > 0]
        if (folder / RECORD_NAME).is_file():
            entries = [entry for entry in entries if re.fullmatch(r"\d{6,}\.[^./]+", entry.path)]
        if not entries:
            raise UserError(f"{flag} {folder} holds no image that can be read")
        _, self.splits = find_splits(entry.path for entry in entries)
        self.files = [folder / entry.path for entry in entries]
        state = repr([(entry.path, entry.size, entry.mtime_ns) for entry in entries])
        self.fingerprint = hashlib.sha256(state.encode()).hexdigest()[:16]

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

    def batches(self, indices: np.ndarray, batch_size: int, side: int, rounded: bool = True) -> Iterator[np.ndarray]:
        """Yield (B, S, S, 3) of the images `indices`: see `ImageSet.batches`."""
        with ThreadPoolExecutor(4) as pool:
            for start in range(0, len(indices), batch_size):
                chosen = indices[start : start + batch_size]
                found = pool.map(lambda index: self._read(int(index), side, rounded), chosen)
                images = [image for image in found if image is not None]
                if images:
                    yield np.stack(images)

    def pixels(self, index: int) -> np.ndarray:
        """An image (H, W, 3) uint8 of its own size; it was read before."""
        with Image.open(self.files[index]) as image:
            return np.asarray(_to_rgb(ImageOps.exif_transpose(image)))

    def _read(self, index: int, side: int, rounded: bool) -> np.ndarray | None:
        file = self.files[index]
        try:
            with Image.open(file) as image:
                return _resized(ImageOps.exif_transpose(image), side, rounded)
        except NOT_READABLE as error:
            reason = one_line(error).replace(repr(str(file)), "it")
            if not self.skip_unreadable:
                raise UserError(f"{self.flag}: {file} cannot be read ({reason}); remove or replace it") from None
            self.unreadable[index] = reason
            return None


def describe_splits(images: ImageSet) -> str:
    """The splits of a folder that has several, such as "train (160), test (40)"; else an empty string."""
    splits = images.splits if isinstance(images, ImageFolder) else {}
    named = [f"{split} ({count:,})" for split, count in splits.items() if split is not None and count]
    return ", ".join(named) if len(named) > 1 else ""


class PreparedFolder:
    """The images of a prepared dataset."""

    def __init__(self, folder: Path | RemotePath):
        self.folder, self.images = folder, PreparedImages(folder)
        self.unreadable: dict[int, str] = {}  # preparation has left those out
        self.side = max(self.images.stored_height, self.images.stored_width)
        self.fingerprint = self.images.fingerprint

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, indices: np.ndarray, batch_size: int, side: int, rounded: bool = True) -> Iterator[np.ndarray]:
        """Yield (B, S, S, 3) of the images `indices`: see `ImageSet.batches`."""
        for start in range(0, len(indices), batch_size):
            pixels = self.images.gather(np.asarray(indices[start : start + batch_size], dtype=np.int64), None)
            if pixels.dtype == np.uint16:
                pixels = (pixels >> 8).astype(np.uint8)
            yield np.stack([_resized(_from_array(image), side, rounded) for image in pixels])

    def pixels(self, index: int) -> np.ndarray:
        """An image (H, W, 3) uint8 of its own size."""
        pixels = self.images.gather(np.array([index]), None)[0]
        return np.asarray(_to_rgb(_from_array(pixels if pixels.dtype == np.uint8 else (pixels >> 8).astype(np.uint8))))


class ImageArray:
    """Images in memory, (N, H, W, C) uint8 with 1, 3 or 4 channels.

    `conditioning` has the name of the conditioning image of each, if they are samples of such a model.
    """

    def __init__(self, images: np.ndarray, conditioning: list[str] | None = None):
        self.images, self.conditioning = images, conditioning
        self.unreadable: dict[int, str] = {}
        self.side = max(images.shape[1:3])

    def __len__(self) -> int:
        return len(self.images)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(np.ascontiguousarray(self.images).data).hexdigest()[:16]

    def batches(self, indices: np.ndarray, batch_size: int, side: int, rounded: bool = True) -> Iterator[np.ndarray]:
        """Yield (B, S, S, 3) of the images `indices`: see `ImageSet.batches`."""
        for start in range(0, len(indices), batch_size):
            chosen = self.images[indices[start : start + batch_size]]
            yield np.stack([_resized(_from_array(image), side, rounded) for image in chosen])

    def pixels(self, index: int) -> np.ndarray:
        """An image (H, W, 3) uint8 of its own size."""
        return np.asarray(_to_rgb(_from_array(self.images[index])))


def open_images(path: str, flag: str, skip_unreadable: bool = False) -> ImageFolder | PreparedFolder | ImageArray:
    """The images under `path`: a prepared dataset, a folder of images, or an .npz file.

    Raises:
        UserError: there are no images; the message names `flag`.
    """
    folder = Path(path)
    if (folder / RECORD_NAME).is_file() and (folder / NPZ_NAME).is_file():  # of sample.py --output_format npz
        folder = folder / NPZ_NAME
    if folder.is_file() and folder.suffix.lower() == ".npz":
        return ImageArray(read_npz(folder, flag))
    if not folder.is_dir():
        raise UserError(f"{flag} {path} is not a folder; give a folder of images, a prepared dataset or an .npz file")
    if (folder / PREPARATION_NAME).is_file():
        return PreparedFolder(folder)
    return ImageFolder(folder, flag, skip_unreadable)


def read_npz(file: Path, flag: str) -> np.ndarray:
    """The images (N, H, W, C) uint8 of an .npz file as guided-diffusion writes it: its first array.

    Raises:
        UserError: the file is damaged or holds something else.
    """
    try:
        with np.load(file, allow_pickle=False) as arrays:
            images = arrays[arrays.files[0]]
    except (OSError, ValueError, EOFError, IndexError, zipfile.BadZipFile) as error:
        raise UserError(f"{flag} {file} cannot be read ({one_line(error)}); write it again with numpy.savez") from None
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[-1] not in (1, 3, 4) or not len(images):
        raise UserError(
            f"{flag} {file} holds {images.dtype} of shape {images.shape}; its first array must be uint8 "
            "(images, height, width, channels)"
        )
    return images


def read_sampling_record(path: str) -> dict:
    """sampling.json of a folder that sample.py wrote, or of its samples.npz; {} for anything else.

    Raises:
        UserError: the samples are not complete.
    """
    folder = Path(path).parent if Path(path).name == NPZ_NAME else Path(path)
    file = folder / RECORD_NAME
    if not file.is_file():
        return {}
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"--generated {path}: {RECORD_NAME} is not readable JSON; sample into a new folder") from None
    if not record.get("complete"):
        raise UserError(
            f"--generated {path}: its {record.get('num_images')} samples are not complete; run sample.py again"
        )
    return record


def _from_array(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def _resized(image: Image.Image, side: int, rounded: bool) -> np.ndarray:
    """(S, S, 3) uint8, or float32 in [0, 255]: transparency over white, grey repeated, bicubic with antialiasing.

    Without rounding it is the resize of clean-fid (Parmar et al. 2022): each channel is resized as float32.
    """
    image = _to_rgb(image)
    if rounded:
        return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))
    channels = [channel.convert("F").resize((side, side), Image.Resampling.BICUBIC) for channel in image.split()]
    return np.stack([np.asarray(channel) for channel in channels], axis=-1).clip(0, 255)


def _to_rgb(image: Image.Image) -> Image.Image:
    """8 bits per channel, transparency over white, grey repeated."""
    if image.mode.startswith("I"):  # 16 bits per channel
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
