"""The distinct captions of a prepared dataset, and their encodings by a text encoder.

The `text` of an image holds one caption per line. Caption 0 is the null caption, which is empty: it is used for images
without a caption and to train classifier-free guidance (Ho & Salimans 2022).

B batch, L tokens, D width of the encoder.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock

from trainkit.data.files import RemotePath, written
from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.loading.encodings import Rows
from trainkit.errors import UserError

CHUNK_IMAGES = 2**14
INDEX_NAMES = ("starts", "numbers", "firsts")  # the last one is written last: if it exists, all do


def split_captions(text: str) -> list[str]:
    """Return the captions in `text`, one per line without superfluous blanks; [""] if there are none."""
    lines = (" ".join(line.split()) for line in text.split("\n"))
    return [line for line in lines if line] or [""]


class CaptionIndex:
    """The captions of each image; built once in `folder`, then mapped into memory.

    `starts` (N + 1,) int64 is where the captions of an image start in `numbers` (all captions,) int64, which has the
    number of each. `firsts` (distinct captions,) int64 is where each first occurs in `numbers`, -1 for the null
    caption. Building uses 40 bytes of memory per caption, on one process while the others wait.
    """

    def __init__(self, images: PreparedImages, folder: Path):
        self.images, paths = images, [folder / f"{name}.npy" for name in INDEX_NAMES]
        try:
            if not paths[-1].is_file():  # else it is complete, and the folder may be read-only
                _write_index(images, folder, paths)
            self.starts, self.numbers, self.firsts = (np.load(path, mmap_mode="r") for path in paths)
        except OSError as error:
            raise UserError(f"--cache_dir: {folder} cannot be written ({error.strerror or error})") from None

    def __len__(self) -> int:
        """Return the number of distinct captions, including the null caption."""
        return len(self.firsts)

    def texts(self, numbers: Sequence[int] | np.ndarray) -> list[str]:
        """Return the captions with these numbers."""
        firsts = self.firsts[np.asarray(numbers, dtype=np.int64)]
        owners = np.maximum(np.searchsorted(self.starts, firsts, side="right") - 1, 0)
        captions = [split_captions(text) for text in self.images.texts(owners)]
        places = firsts - self.starts[owners]
        return [
            lines[place] if first >= 0 else "" for lines, place, first in zip(captions, places, firsts, strict=True)
        ]

    def first_of(self, indices: np.ndarray) -> np.ndarray:
        """Return the number of the first caption of each image (B,) int64."""
        return self.numbers[self.starts[indices]]

    def drawn(self, indices: np.ndarray, uniforms: np.ndarray, dropout: float) -> np.ndarray:
        """Draw one caption number per image (B,) int64: 0 with probability `dropout`, else any of the image's, evenly.

        `uniforms` (B,) in [0, 1) decide both: the range above `dropout` is spread over the captions.
        """
        starts = self.starts[indices]
        picks = np.maximum(uniforms - dropout, 0) / max(1 - dropout, 1e-9)
        counts = self.starts[indices + 1] - starts
        chosen = self.numbers[starts + np.minimum((picks * counts).astype(np.int64), counts - 1)]
        return np.where(uniforms < dropout, 0, chosen)


class TextEncodings:
    """The encodings of a dataset's captions for training. `rows` holds one row (L * D,) per caption.

    All are padded to `length`, the maximum number of tokens, so a condition does not depend on its batch.
    """

    def __init__(self, index: CaptionIndex, rows: Rows, width: int, length: int):
        self.index, self.rows, self.width, self.length = index, rows, width, length

    def gather(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return hidden states (B, L, D) float32, zero after a caption's end, and the mask (B, L) bool of tokens."""
        states = np.zeros((len(numbers), self.length, self.width), dtype=np.float32)
        mask = np.zeros((len(numbers), self.length), dtype=bool)
        for position, number in enumerate(numbers.tolist()):
            row = self.rows[number].reshape(-1, self.width)
            states[position, : len(row)] = row
            mask[position, : len(row)] = True
        return states, mask


def _write_index(images: PreparedImages, folder: Path, paths: list[Path]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "index.lock"):
        if not paths[-1].is_file():
            for path, array in zip(paths, _index(images), strict=True):
                with written(path) as temporary, temporary.open("wb") as file:
                    np.save(file, array, allow_pickle=False)


def _index(images: PreparedImages) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return `starts`, `numbers` and `firsts` of `CaptionIndex`. Captions are distinguished by 64 bits of a hash."""
    hashes, counts = [np.array([_hash("")], dtype=np.uint64)], [np.zeros(1, dtype=np.int64)]
    for start in range(0, len(images), CHUNK_IMAGES):
        end = min(start + CHUNK_IMAGES, len(images))
        if isinstance(images.folder, RemotePath):  # fetches these shards and releases earlier ones
            images.read_ahead([(start, end)])
        texts = [split_captions(text) for text in images.texts(np.arange(start, end))]
        counts.append(np.array([len(captions) for captions in texts], dtype=np.int64))
        hashes.append(np.array([_hash(caption) for captions in texts for caption in captions], dtype=np.uint64))
    _, firsts, numbers = np.unique(np.concatenate(hashes), return_index=True, return_inverse=True)
    order = np.argsort(firsts)  # numbered in order of occurrence, so the captions of a unit are adjacent
    ranks = np.empty_like(order)
    ranks[order] = np.arange(len(order))
    return np.cumsum(np.concatenate(counts)), ranks[numbers[1:]], firsts[order] - 1


def _hash(caption: str) -> int:
    digest = hashlib.blake2b(caption.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
