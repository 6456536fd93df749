"""What does a larger set cost? Preparing, an image; opening, in time and memory.

    python benchmarks/growth.py

Prepares folders of 1,000 to 100,000 small images in this process (no process start counts), listing included. Then
opens prepared sets of 10,000 to 1,000,000 rows (8x8 px), each in a separate process whose imports are done, and
takes a first batch of 64 rows from all over the set. Last, it opens a set of 50,000 shards, as 10**8 images have:
there each shard is a hard link to the same small file, since only their number is of interest.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from trainkit.data.preparation.prepare import prepare
from trainkit.data.settings import PreparationSettings
from trainkit.data.sources.folder import ImageFolder

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = PreparationSettings(8, 8, resize_mode="crop")
OPEN = """
import sys, time
import numpy as np
from trainkit.data.loading.dataset import PreparedImages

def resident_mb():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024

before, started = resident_mb(), time.perf_counter()
images = PreparedImages(sys.argv[1])
opened = time.perf_counter()
images.gather(np.random.default_rng(0).integers(0, len(images), 64))
print(opened - started, time.perf_counter() - started, resident_mb() - before)
"""


def write_images(folder: Path, num_images: int, side: int = 32) -> None:
    generator = np.random.default_rng(0)
    for number in range(num_images):
        if number % 1000 == 0:
            (folder / f"{number // 1000:04d}").mkdir(parents=True)
        pixels = generator.integers(0, 255, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number // 1000:04d}/{number:06d}.bmp")


def grow(prepared: Path, output: Path, num_shards: int, place) -> int:
    """A set of `num_shards` times the first shard of another; `place(from, to)` makes each. Returns its rows."""
    preparation = json.loads((prepared / "preparation.json").read_text())
    state = json.loads((prepared / "state.json").read_text())
    first = preparation["shards"][0]
    output.mkdir()
    names = [f"data-{number:016x}.arrow" for number in range(num_shards)]
    for name in names:
        place(prepared / first["filename"], output / name)
    preparation["shards"] = [first | {"filename": name} for name in names]
    state["_data_files"] = [{"filename": name} for name in names]
    (output / "preparation.json").write_text(json.dumps(preparation))
    (output / "state.json").write_text(json.dumps(state))
    shutil.copy(prepared / "dataset_info.json", output)
    return first["num_rows"] * num_shards


def open_in_new_process(folder: Path) -> tuple[float, float, float]:
    """Seconds until it is open, seconds until the first batch is there, MB of memory for both."""
    command = [sys.executable, "-c", OPEN, str(folder)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, check=True)
    opening, first_batch, megabytes = map(float, done.stdout.split())
    return opening, first_batch, megabytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="images to prepare")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="rows to open")
    parser.add_argument("--shards", type=int, default=50_000, help="shards to open")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        write_images(work / "images", 1)
        prepare(ImageFolder(work / "images"), SETTINGS, work / "one", num_proc=1, show_progress=False)  # imports
        shutil.rmtree(work / "images")
        print("images to prepare   listing    all   microseconds an image", flush=True)
        for num_images in arguments.images:
            write_images(work / "images", num_images)
            started, cpu_started = time.perf_counter(), time.process_time()
            source = ImageFolder(work / "images")
            listed = time.perf_counter() - started
            prepare(source, SETTINGS, work / "prepared", num_proc=1, show_progress=False)
            seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
            each = f"{seconds / num_images * 1e6:.0f} (of the processor {cpu_s / num_images * 1e6:.0f})"
            print(f"{num_images:17,} {listed:7.2f} s {seconds:6.1f} s   {each}", flush=True)
            shutil.rmtree(work / "images")
            if num_images != arguments.images[-1]:
                shutil.rmtree(work / "prepared")
        print("\nrows to open   shards    open   first batch   memory", flush=True)
        shard_rows = json.loads((work / "prepared/preparation.json").read_text())["shards"][0]["num_rows"]
        for rows in arguments.rows:
            num_rows = grow(work / "prepared", work / "grown", max(1, rows // shard_rows), shutil.copy)
            tell(work / "grown", num_rows)
        num_rows = grow(work / "one", work / "grown", arguments.shards, os.link)
        tell(work / "grown", num_rows)


def tell(folder: Path, num_rows: int) -> None:
    opening, first_batch, megabytes = open_in_new_process(folder)
    shards = len(list(folder.glob("data-*")))
    print(f"{num_rows:12,} {shards:8,} {opening:6.3f} s {first_batch:11.3f} s {megabytes:5.1f} MB", flush=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
