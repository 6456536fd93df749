"""The captions of a prepared dataset, each different one once, and what a text encoder makes of them.

An image's `text` holds a caption a line. Caption 0 is the null caption, the empty one: that of images without any, and
what classifier-free guidance is trained with (Ho & Salimans 2022).

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
INDEX_NAMES = ("starts", "numbers", "firsts")  # the last one written means that all are there


def split_captions(text: str) -> list[str]:
    """The captions in `text`, one per line without superfluous blanks; [""] if there are none."""
    lines = (" ".join(line.split()) for line in text.split("\n"))
    return [line for line in lines if line] or [""]


class CaptionIndex:
    """Which captions each image has; built once in `folder`, then mapped into memory.

    `starts` (N + 1,) int64 is where the captions of an image begin in `numbers` (captions in all,) int64, which holds
    the number of each. `firsts` (different captions,) int64 is the place in `numbers` where each stands first, -1 for
    the null caption. Building takes 40 bytes a caption of memory, on one process while the others wait.
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
        """How many different captions there are, the null one among them."""
        return len(self.firsts)

    def texts(self, numbers: Sequence[int] | np.ndarray) -> list[str]:
        """The captions of these numbers."""
        firsts = self.firsts[np.asarray(numbers, dtype=np.int64)]
        owners = np.maximum(np.searchsorted(self.starts, firsts, side="right") - 1, 0)
        told = [split_captions(text) for text in self.images.texts(owners)]
        places = firsts - self.starts[owners]
        return [lines[place] if first >= 0 else "" for lines, place, first in zip(told, places, firsts, strict=True)]

    def first_of(self, indices: np.ndarray) -> np.ndarray:
        """The number of the first caption (B,) int64 of each image."""
        return self.numbers[self.starts[indices]]

    def drawn(self, indices: np.ndarray, uniforms: np.ndarray, dropout: float) -> np.ndarray:
        """A caption's number (B,) int64 for each image, any of its own evenly, or 0 with the probability `dropout`.

        `uniforms` (B,) in [0, 1) decide both: the part of them that drops nothing is spread over the captions.
        """
        starts = self.starts[indices]
        picks = np.maximum(uniforms - dropout, 0) / max(1 - dropout, 1e-9)
        counts = self.starts[indices + 1] - starts
        chosen = self.numbers[starts + np.minimum((picks * counts).astype(np.int64), counts - 1)]
        return np.where(uniforms < dropout, 0, chosen)


class TextEncodings:
    """The encodings of a dataset's captions, as training reads them. `rows` holds one of (L * D,) for each caption.

    All are padded to `length`, the most tokens of any, so that an image's condition does not depend on its batch.
    """

    def __init__(self, index: CaptionIndex, rows: Rows, width: int, length: int):
        self.index, self.rows, self.width, self.length = index, rows, width, length

    def gather(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Hidden states (B, L, D) float32, zero behind a caption's end, and the mask (B, L) bool of its tokens."""
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
    """`starts`, `numbers` and `firsts` of `CaptionIndex`. Captions are told apart by 64 bits of a hash."""
    hashes, counts = [np.array([_hash("")], dtype=np.uint64)], [np.zeros(1, dtype=np.int64)]
    for start in range(0, len(images), CHUNK_IMAGES):
        end = min(start + CHUNK_IMAGES, len(images))
        if isinstance(images.folder, RemotePath):  # fetches these shards and lets go of those before
            images.read_ahead([(start, end)])
        told = [split_captions(text) for text in images.texts(np.arange(start, end))]
        counts.append(np.array([len(captions) for captions in told], dtype=np.int64))
        hashes.append(np.array([_hash(caption) for captions in told for caption in captions], dtype=np.uint64))
    _, firsts, numbers = np.unique(np.concatenate(hashes), return_index=True, return_inverse=True)
    order = np.argsort(firsts)  # numbered as they come, so that a unit's captions lie side by side
    ranks = np.empty_like(order)
    ranks[order] = np.arange(len(order))
    return np.cumsum(np.concatenate(counts)), ranks[numbers[1:]], firsts[order] - 1


def _hash(caption: str) -> int:
    digest = hashlib.blake2b(caption.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
