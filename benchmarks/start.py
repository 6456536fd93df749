"""How long from the command to the first training step, on a raw folder of images and on a prepared dataset?

    python tools/fetch_images.py cifar10 data/cifar10
    python benchmarks/start.py --images data/cifar10/train

Times, from process start and imports included: train_unconditional.py on the folder for the first time (it prepares
the images into its cache), for the second time, and on a dataset that prepare_dataset.py made; then what the example's
`load_dataset("imagefolder", data_dir=...)` takes for its dataset alone, first and second time, in a process whose
imports are done.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UNET = {
    "_class_name": "UNet2DModel", "layers_per_block": 1, "block_out_channels": [16, 32], "norm_num_groups": 8,
    "down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"],
}  # fmt: skip
PEER = """
import sys, time
import datasets
datasets.disable_progress_bars()
started = time.perf_counter()
images = datasets.load_dataset("imagefolder", data_dir=sys.argv[1], cache_dir=sys.argv[2], split="train")
print(time.perf_counter() - started)
"""
OPEN = """
import sys, time
from trainkit.data.loading.dataset import PreparedImages
started = time.perf_counter()
images = PreparedImages(sys.argv[1])
images.gather([0, len(images) - 1])
print(time.perf_counter() - started)
"""


def seconds_to_first_step(train_data_dir: Path, work: Path, name: str, resolution: int) -> float:
    """From starting the process until the line of the first optimizer step is in metrics.jsonl."""
    output_dir = work / name
    command = [
        sys.executable, ROOT / "train_unconditional.py", "--train_data_dir", train_data_dir,
        "--resolution", resolution,
        "--cache_dir", work / "cache", "--model_config_name_or_path", work / "unet", "--output_dir", output_dir,
        "--max_train_steps", 2, "--logging_steps", 1, "--checkpointing_steps", 0, "--logger", "none",
        "--eval_batch_size", 1, "--ddpm_num_inference_steps", 1,
    ]  # fmt: skip
    started = time.perf_counter()
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    process = subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.DEVNULL)
    metrics = output_dir / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        if process.poll() not in (None, 0):
            sys.exit(f"error: {' '.join(map(str, command))} failed")
        time.sleep(0.02)
    seconds = time.perf_counter() - started
    process.wait()
    return seconds


def printed_seconds(code: str, *arguments) -> float:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, check=True)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of images, searched recursively")
    parser.add_argument("--resolution", type=int, default=32, help="side of the training images in pixels")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "unet").mkdir()
        (work / "unet" / "config.json").write_text(json.dumps(UNET))
        first = seconds_to_first_step(arguments.images, work, "first", arguments.resolution)
        second = seconds_to_first_step(arguments.images, work, "second", arguments.resolution)
        prepared = next((work / "cache" / "prepared").iterdir())
        on_prepared = seconds_to_first_step(prepared, work, "prepared", arguments.resolution)
        opening = printed_seconds(OPEN, prepared)
        peer_first, peer_second = (printed_seconds(PEER, arguments.images, work / "peer") for _ in range(2))
    print("first step after")
    print(f"  {first:6.1f} s  on the folder, first start (prepares it into the cache)")
    print(f"  {second:6.1f} s  on the folder, second start")
    print(f"  {on_prepared:6.1f} s  on the prepared dataset, which opens in {opening:.3f} s")
    print("the example's load_dataset('imagefolder'), dataset alone")
    print(f"  {peer_first:6.1f} s  first time")
    print(f"  {peer_second:6.1f} s  second time")


if __name__ == "__main__":
    main()
