"""What does each `--storage` cost: bytes an image on disk, and images/s that training can gather?

    python benchmarks/storage.py --num_images 500

The same generated photographs, centre-cropped, are prepared as pixels, PNG, JPEG and WebP at two sizes. Batches of 64
are then gathered in random order by one thread and by two, as `--dataloader_num_workers` 1 and 2 do; the storages take
turns in every round.
"""

import argparse
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from prepare import write_photographs
from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.preparation.prepare import prepare
from trainkit.data.settings import PreparationSettings
from trainkit.data.sources.folder import ImageFolder

STORAGES = {"pixels": ("pixels", 100), "png": ("png", 100), "jpeg, quality 95": ("jpeg", 95)}
STORAGES |= {"webp, quality 95": ("webp", 95), "webp, lossless": ("webp", 100)}


def gather_rate(images: PreparedImages, num_threads: int, seconds: float) -> float:
    """Images/s, of batches of 64."""
    generator = np.random.default_rng(0)
    started, count = time.perf_counter(), 0
    with ThreadPoolExecutor(num_threads) as threads:
        while time.perf_counter() - started < seconds:
            batches = generator.integers(0, len(images), (4 * num_threads, 64))
            count += sum(len(pixels) for pixels in threads.map(images.gather, batches))
        return count / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--num_images", type=int, default=500)
    parser.add_argument("--sides", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_photographs(folder / "photographs", arguments.num_images)
        for side in arguments.sides:
            opened = {}
            for name, (storage, quality) in STORAGES.items():
                settings = PreparationSettings(side, side, "crop", storage=storage, storage_quality=quality)
                output = folder / f"{side}-{storage}-{quality}"
                prepare(ImageFolder(folder / "photographs"), settings, output, show_progress=False)
                opened[name] = PreparedImages(output)
            rates = {name: [] for name in opened}
            for _ in range(arguments.rounds):
                for name, images in opened.items():
                    rates[name].append([gather_rate(images, threads, arguments.seconds) for threads in (1, 2)])
            print(f"{side} px                kB an image   images/s, 1 thread   2 threads")
            for name, images in opened.items():
                kilobytes = sum(shard["num_bytes"] for shard in images.preparation["shards"]) / len(images) / 1000
                one, two = np.median(rates[name], axis=0)
                print(f"  {name:20} {kilobytes:11.1f} {one:20,.0f} {two:11,.0f}", flush=True)


if __name__ == "__main__":
    main()
