"""How fast do random batches come from the prepared Arrow dataset, against the same images exported to HDF5?

    python benchmarks/hdf5.py --num_images 4000

Batches of 128 in random order: ours by `PreparedImages.gather`; HDF5's in the two ways that h5py has, a sorted list of
indices at once (`data[indices]`), and an image at a time into one array (`read_direct`). Uncompressed, lzf and gzip
take turns with ours; all files are in the page cache.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from prepare import write_photographs
from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.preparation.export import export_hdf5
from trainkit.data.preparation.prepare import prepare
from trainkit.data.settings import PreparationSettings
from trainkit.data.sources.folder import ImageFolder
from trainkit.packages import load_package


def one_by_one(data: Any, indices: np.ndarray) -> np.ndarray:
    batch = np.empty((len(indices), *data.shape[1:]), dtype=data.dtype)
    for position, index in enumerate(np.sort(indices).tolist()):
        data.read_direct(batch, np.s_[index], np.s_[position])
    return batch


def images_per_second(read: Callable[[np.ndarray], np.ndarray], count: int, batch_size: int, batches: int) -> float:
    generator = np.random.default_rng(0)
    started = time.perf_counter()
    for _ in range(batches):
        read(generator.choice(count, batch_size, replace=False))
    return batches * batch_size / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--num_images", type=int, default=4000)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    h5py = load_package("h5py", "this benchmark")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_photographs(folder / "photographs", options.num_images)
        settings = PreparationSettings(options.resolution, options.resolution, resize_mode="crop")
        prepare(ImageFolder(folder / "photographs"), settings, folder / "prepared", show_progress=False)
        images = PreparedImages(folder / "prepared")
        sizes = {"Arrow": sum(shard["num_bytes"] for shard in images.preparation["shards"])}
        readers = {"Arrow": images.gather}
        for compression in ("none", "lzf", "gzip"):
            path = folder / f"{compression}.h5"
            export_hdf5(images, path, compression)
            data = h5py.File(path, "r")["data"]
            readers[f"HDF5 {compression}, list"] = lambda indices, data=data: data[np.sort(indices)]
            readers[f"HDF5 {compression}, one by one"] = lambda indices, data=data: one_by_one(data, indices)
            sizes |= dict.fromkeys(list(readers)[-2:], path.stat().st_size)
        some = np.random.default_rng(1).choice(len(images), 32, replace=False)
        assert all(np.array_equal(read(np.sort(some)), images.gather(np.sort(some))) for read in readers.values())
        rates = {name: [] for name in readers}
        for _ in range(options.rounds):
            for name, read in readers.items():
                batches = {"Arrow": 400, "list": 5}.get(name.rpartition(" ")[2], 20)
                rates[name].append(images_per_second(read, len(images), options.batch_size, batches))
        print(f"{len(images):,} images of {options.resolution} pixels, batches of {options.batch_size}, medians:")
        for name in readers:
            ratio = np.median(np.array(rates["Arrow"]) / np.array(rates[name]))
            print(
                f"  {name:22s} {np.median(rates[name]):10,.0f} images/s   Arrow is {ratio:6.1f} times as fast   "
                f"{sizes[name] / sizes['Arrow']:.2f} of its bytes",
                flush=True,
            )


if __name__ == "__main__":
    main()
