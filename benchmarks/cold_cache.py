"""How long does reading a batch from a cold page cache stop other threads, and how fast is it?

    python benchmarks/cold_cache.py --rounds 5

One call per row of numpy's indexing holds the GIL; pieces of rows release it; advice asks the disk for the next batch.
Turns alternate, and each starts with an empty page cache (Linux).
"""

import argparse
import mmap
import os
import tempfile
import threading
import time
from unittest import mock

import numpy as np

from trainkit.data.loading import mapped_memory

WAYS = ("whole rows", "pieces", "pieces, with advice")


def longest_pause_s(done: threading.Event) -> float:
    """Return the longest time in which this thread did not run, until `done`."""
    last, longest = time.perf_counter(), 0.0
    while not done.wait(0.001):
        now = time.perf_counter()
        last, longest = now, max(longest, now - last)
    return longest


def read_all(base: int, batches: np.ndarray, size: int, way: str) -> tuple[float, float]:
    """Return images per second and the longest pause of another thread in ms."""
    done, pauses = threading.Event(), []
    watcher = threading.Thread(target=lambda: pauses.append(longest_pause_s(done)))
    watcher.start()
    started = time.perf_counter()
    for number, rows in enumerate(batches):
        if way == WAYS[2] and number + 1 < len(batches):
            mapped_memory.will_need((base + row * size, size) for row in batches[number + 1].tolist())
        mapped_memory.copy_rows(base + rows * size, size)
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    return batches.size / seconds, pauses[0] * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--num_images", type=int, default=4096)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    size, generator = 3 * arguments.resolution**2, np.random.default_rng(0)
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    with tempfile.NamedTemporaryFile() as file:
        for _ in range(arguments.num_images):
            file.write(generator.bytes(size))
        file.flush()
        os.fsync(file.fileno())
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        pixels = np.frombuffer(mapped, dtype=np.uint8)
        for _ in range(arguments.rounds):
            for way in WAYS:
                mapped.madvise(mmap.MADV_DONTNEED)
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                batches = generator.permutation(arguments.num_images).reshape(-1, arguments.batch_size)
                pieces = mapped_memory.pieces_per_row if way != WAYS[0] else lambda num_rows, size: 1
                with mock.patch.object(mapped_memory, "pieces_per_row", pieces):
                    found[way].append(read_all(pixels.ctypes.data, batches, size, way))
    print(f"{'median (range)':24}{'images/s':>28}{'longest pause of a thread, ms':>34}")
    for way, measured in found.items():
        rates, pauses = np.array(measured).T
        print(
            f"{way:24}{np.median(rates):10,.0f} ({rates.min():,.0f} to {rates.max():,.0f})"
            f"{np.median(pauses):16,.1f} ({pauses.min():,.1f} to {pauses.max():,.1f})"
        )


if __name__ == "__main__":
    main()
