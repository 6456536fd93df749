"""How fast do batches come from a prepared dataset, against decoding on the fly, WebDataset, HDF5 and a memory copy?

    python benchmarks/loading.py --num_images 2000
    pip install webdataset h5py     # two of the peers; each is left out where its package is missing

All start from the same 512 px JPEGs, and all give shuffled batches of 64 px images. On a machine with a GPU a loader's
work ends with a batch of uint8 pixels, since converting, flipping and augmenting are the GPU's; where the peer gives
uint8 too, uint8 is compared, and the float32 tensors of the stock loader stand against both. Turns alternate.
"""

import argparse
import importlib.util
import io
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from prepare import write_photographs
from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.loading.model_range import to_model_range
from trainkit.data.preparation.prepare import prepare
from trainkit.data.settings import PreparationSettings
from trainkit.data.sources.folder import ImageFolder

SIDE = 64
OURS = "prepared, uint8"


def resized(image: Image.Image) -> Image.Image:
    """Random crop of a 64 px resize, and a flip, as the stock loader does at every visit."""
    image = image.convert("RGB")
    scale = SIDE / min(image.size)
    image = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BILINEAR)
    left, top = np.random.randint(image.width - SIDE + 1), np.random.randint(image.height - SIDE + 1)
    image = image.crop((left, top, left + SIDE, top + SIDE))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if np.random.random() < 0.5 else image


class OnTheFly(torch.utils.data.Dataset):
    """What `dataset.set_transform(transform_images)` does in diffusers' example (Pillow in torchvision's place)."""

    def __init__(self, folder: Path):
        self.paths = sorted(folder.glob("*.jpg"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        tensor = torch.from_numpy(np.array(resized(Image.open(self.paths[index])))).permute(2, 0, 1).float() / 255
        return (tensor - 0.5) / 0.5


def stock(folder: Path, batch_size: int, num_workers: int) -> int:
    loader = torch.utils.data.DataLoader(OnTheFly(folder), batch_size, shuffle=True, num_workers=num_workers)
    return sum(len(batch) for batch in loader)


def prepared(images: PreparedImages, batch_size: int, as_float: bool) -> int:
    order = np.random.permutation(len(images))
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        crops = None if images.fixed_size else np.random.random((len(indices), 2))
        batch = torch.from_numpy(images.gather(indices, crops))
        if as_float:
            batch = to_model_range(batch, 8)
            flip = torch.from_numpy(np.random.random(len(indices)) < 0.5)
            batch[flip] = batch[flip].flip(3)
    return len(order)


def memory_copy(pixels: np.ndarray, batch_size: int, shuffled: bool) -> int:
    order = np.random.permutation(len(pixels))
    for start in range(0, len(order), batch_size):
        batch = pixels[order[start : start + batch_size]] if shuffled else pixels[start : start + batch_size].copy()
        torch.from_numpy(batch)
    return len(order)


def web_dataset(shard: Path, batch_size: int, decoded: Callable[[bytes], np.ndarray]) -> int:
    import webdataset

    samples = webdataset.WebDataset(str(shard), shardshuffle=False, empty_check=False).shuffle(1000).to_tuple("jpg")
    batches = samples.map(lambda sample: decoded(sample[0])).batched(batch_size)
    return sum(len(batch[0]) if isinstance(batch, tuple) else len(batch) for batch in batches)


def hdf5(file: Path, batch_size: int) -> int:
    import h5py

    with h5py.File(file) as opened:
        data = opened["data"]
        order = np.random.permutation(len(data))
        for start in range(0, len(order), batch_size):
            torch.from_numpy(data[np.sort(order[start : start + batch_size])])  # h5py takes them sorted
    return len(order)


def write_tar(file: Path, images: list[tuple[str, bytes]]) -> None:
    with tarfile.open(file, "w") as tar:
        for name, content in images:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def encoded(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    return file.getvalue()


def contestants(folder: Path, images: PreparedImages, whole: PreparedImages, batch_size: int) -> dict[str, Callable]:
    """Name -> one epoch, which returns the number of images."""
    photographs = folder / "photographs"
    pixels = images.gather(np.arange(len(images)))
    found = {
        OURS: lambda: prepared(images, batch_size, as_float=False),
        "prepared, float32, flipped": lambda: prepared(images, batch_size, as_float=True),
        "prepared whole, cropped at each visit, uint8": lambda: prepared(whole, batch_size, as_float=False),
        "memory copy in the same order": lambda: memory_copy(pixels, batch_size, shuffled=True),
        "memory copy, front to back": lambda: memory_copy(pixels, batch_size, shuffled=False),
        "stock loader, no workers": lambda: stock(photographs, batch_size, 0),
        "stock loader, 2 workers": lambda: stock(photographs, batch_size, 2),
    }
    if importlib.util.find_spec("webdataset"):
        write_tar(folder / "512.tar", [(path.name, path.read_bytes()) for path in sorted(photographs.glob("*.jpg"))])
        write_tar(folder / "64.tar", [(f"{i:06d}.jpg", encoded(image)) for i, image in enumerate(pixels)])
        found["WebDataset of the 512 px JPEGs"] = lambda: web_dataset(
            folder / "512.tar", batch_size, lambda content: np.array(resized(Image.open(io.BytesIO(content))))
        )
        found["WebDataset of 64 px JPEGs"] = lambda: web_dataset(
            folder / "64.tar", batch_size, lambda content: np.array(Image.open(io.BytesIO(content)))
        )
    if importlib.util.find_spec("h5py"):
        from trainkit.data.preparation.export import export_hdf5

        export_hdf5(images, str(folder / "images.h5"), "none")
        found["HDF5, an image a chunk"] = lambda: hdf5(folder / "images.h5", batch_size)
    return found


def images_per_second(epoch: Callable[[], int], seconds: float = 0.5) -> float:
    """Over whole epochs, for `seconds` at least."""
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        count += epoch()
    return count / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--num_images", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder, opened = Path(temporary), []
        write_photographs(folder / "photographs", arguments.num_images)
        for resize_mode in ("crop", "random_crop"):
            settings = PreparationSettings(SIDE, SIDE, resize_mode=resize_mode)
            prepare(ImageFolder(folder / "photographs"), settings, folder / resize_mode, show_progress=False)
            opened.append(PreparedImages(folder / resize_mode))
        epochs = contestants(folder, *opened, arguments.batch_size)
        rates = {name: [] for name in epochs}
        for _ in range(arguments.rounds):
            for name, epoch in epochs.items():
                epoch() if name == OURS else None  # the page cache is warm for all, in every round
                rates[name].append(images_per_second(epoch))
        ours = np.array(rates[OURS])
        print(f"{'images/s on one core, median':52}{'':>12}{OURS:>20} is")
        for name, measured in rates.items():
            ratio = np.median(ours / np.array(measured))
            print(f"{name:52}{np.median(measured):12,.0f}{ratio:14,.2f} times as fast")


if __name__ == "__main__":
    main()
