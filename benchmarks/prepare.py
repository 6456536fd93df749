"""How fast are photographs prepared, against `load_dataset("imagefolder").map(...)` and `save_to_disk`?

    python benchmarks/prepare.py --num_images 2000 --num_proc 2

Both turn the same generated JPEGs (512 px, quality 90) into a folder of 64 px images that `datasets.load_from_disk`
opens, with the same bilinear resize and centre crop, and take turns in one run. Each runs in a separate process
(imports and process start count, as they do for a user) and starts from an empty cache.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SIDE = 64

PEER = """
import sys
import datasets
from PIL import Image

def resize(example):
    image = example["image"].convert("RGB")
    scale = {side} / min(image.size)
    image = image.resize((int(image.width * scale), int(image.height * scale)), Image.BILINEAR)
    left, top = (image.width - {side}) // 2, (image.height - {side}) // 2
    return {{"image": image.crop((left, top, left + {side}, top + {side}))}}

if __name__ == "__main__":
    source, output, num_proc = sys.argv[1:]
    datasets.disable_progress_bars()
    images = datasets.load_dataset("imagefolder", data_dir=source, split="train")
    images.map(resize, num_proc=int(num_proc)).save_to_disk(output)
"""


def write_photographs(folder: Path, num_images: int, side: int = 512) -> None:
    """JPEGs of smooth colours and fine texture, about 75 kB each at 512 px: photographs have 40 to 90 kB at that."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    y, x = np.mgrid[0:side, 0:side]
    texture = generator.normal(0, 7.5, (side, side, 3))
    for number in range(num_images):
        smooth = [128 + 80 * np.sin(x / 40 + y / 60 + number), 128 + 90 * np.cos(y / 30 + number), (x + y) / 4]
        pixels = np.stack(smooth, axis=2) + np.roll(texture, 7 * number, axis=0)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:06d}.jpg", quality=90)


def timed(command: list, environment: dict[str, str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, env=os.environ | environment, stdout=subprocess.DEVNULL, cwd=ROOT)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--num_images", type=int, default=2000)
    parser.add_argument("--num_proc", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_photographs(folder / "photographs", arguments.num_images)
        (folder / "peer.py").write_text(PEER.format(side=SIDE))
        photographs, num_proc = str(folder / "photographs"), str(arguments.num_proc)
        ours = [sys.executable, "prepare_dataset.py", "--train_data_dir", photographs, "--output_dir", folder / "ours"]
        ours += ["--resolution", str(SIDE), "--center_crop", "--num_proc", num_proc]
        peer = [sys.executable, folder / "peer.py", photographs, folder / "peer", num_proc]
        ratios = []
        for _ in range(arguments.rounds):
            for name in ("ours", "peer", "cache"):
                shutil.rmtree(folder / name, ignore_errors=True)
            seconds = timed(ours, {})
            peer_seconds = timed(peer, {"HF_HOME": str(folder / "cache")})
            ratios.append(peer_seconds / seconds)
            rate, peer_rate = arguments.num_images / seconds, arguments.num_images / peer_seconds
            print(f"prepare {rate:,.0f} images/s, datasets.map {peer_rate:,.0f}: {ratios[-1]:.1f} times", flush=True)
        print(f"median of {arguments.rounds} rounds: {np.median(ratios):.1f} times as fast")


if __name__ == "__main__":
    main()
