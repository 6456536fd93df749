"""Does `--find_learning_rate` find a rate that is about the best of a grid, on two sets and for two optimizers?

    python tools/fetch_images.py mnist data/mnist
    python benchmarks/learning_rate.py --images data/mnist --image_mode L
    python tools/fetch_images.py cifar10 data/cifar10
    python benchmarks/learning_rate.py --images data/cifar10 --image_mode RGB

Trains a tiny UNet at 16 px at each rate of the grid for as many steps, all else alike, and takes the loss on held-out
images; then asks the finder. Prints both, and the pick over the best rate. What is in --output_dir is not done again.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from trainkit.errors import run_script

ROOT = Path(__file__).resolve().parent.parent

RATES = (3e-3, 1e-2, 1e-3, 3e-2)
UNET = {
    "_class_name": "UNet2DModel", "layers_per_block": 1, "block_out_channels": [16, 32], "norm_num_groups": 8,
    "down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "attention_head_dim": 16,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder with train/ and heldout/ inside")
    parser.add_argument("--image_mode", default="L", choices=("L", "RGB"))
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "muon"])
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps of each run of the grid")
    parser.add_argument("--cpu_threads", type=int, default=1, help="threads of a run")
    parser.add_argument("--output_dir", type=Path, default=Path("learning-rates"))
    options = parser.parse_args()
    os.environ["ACCELERATE_USE_CPU"] = "true"
    options.output_dir /= options.image_mode
    options.output_dir.mkdir(parents=True, exist_ok=True)
    channels = {"L": 1, "RGB": 3}[options.image_mode]
    (options.output_dir / "config.json").write_text(
        json.dumps(UNET | {"in_channels": channels, "out_channels": channels})
    )
    for optimizer in options.optimizers:
        losses = {rate: held_out_loss(options, optimizer, rate) for rate in RATES}
        for rate, loss in sorted(losses.items()):
            print(f"{optimizer} {rate:g}: held-out loss {loss:.4f} after {options.steps} steps", flush=True)
        best = min(losses, key=losses.get)
        pick = found(options, optimizer)
        print(f"{optimizer}: found {pick:.2g}, which is {pick / best:.2f} times the grid's best {best:g}", flush=True)


def held_out_loss(options: argparse.Namespace, optimizer: str, rate: float) -> float:
    folder = options.output_dir / f"{optimizer}-{rate:g}-{options.steps}"
    if not (folder / "model_index.json").exists():
        train(options, folder, "--optimizer", optimizer, "--learning_rate", rate)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return next(line["validation_loss"] for line in reversed(lines) if "validation_loss" in line)


def found(options: argparse.Namespace, optimizer: str) -> float:
    folder = options.output_dir / f"{optimizer}-found"
    if not (folder / "learning_rate.json").exists():
        train(options, folder, "--optimizer", optimizer, "--find_learning_rate")
    return json.loads((folder / "learning_rate.json").read_text())["learning_rate"]


def train(options: argparse.Namespace, folder: Path, *arguments) -> None:
    command = [
        sys.executable, ROOT / "train_unconditional.py", *arguments, "--train_data_dir", options.images / "train",
        "--validation_data_dir", options.images / "heldout", "--cache_dir", options.output_dir / "cache",
        "--output_dir", folder, "--overwrite_output_dir", "--resolution", 16, "--center_crop",
        "--image_mode", options.image_mode, "--model_config_name_or_path", options.output_dir,
        "--prediction_type", "v_prediction", "--ddpm_beta_schedule", "squaredcos_cap_v2",
        "--max_train_steps", options.steps, "--train_batch_size", 16, "--lr_warmup_steps", options.steps // 10,
        "--no_use_ema", "--checkpointing_steps", 0, "--eval_batch_size", 16, "--ddpm_num_inference_steps", 5,
        "--logger", "none", "--cpu_threads", options.cpu_threads, "--num_proc", 1,
    ]  # fmt: skip
    subprocess.run(list(map(str, command)), check=True)


if __name__ == "__main__":
    run_script(main)
