"""What does each mistake of docs/troubleshooting.md look like, and the same run with the setting mended?

    python tools/fetch_images.py mnist data/mnist
    python tools/fetch_images.py cifar10 data/cifar10
    python tools/symptoms.py --digits data/mnist --photos data/cifar10

Trains tiny UNets at 16 px with the training scripts, at most 300 steps each, and writes docs/images/symptom_*.png:
the symptom on the left, the mended run on the right, none picked. A run that is in --output_dir already is not done
again. Minutes on one idle core.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from trainkit.errors import run_script

ROOT = Path(__file__).resolve().parent.parent
GAP, SIDE = 12, 400  # pixels of a picture: between its halves, width of a curve
UNET = {
    "_class_name": "UNet2DModel", "layers_per_block": 1, "block_out_channels": [16, 32], "norm_num_groups": 8,
    "down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "attention_head_dim": 16,
}  # fmt: skip
COMMON = {
    "resolution": 16, "center_crop": True, "train_batch_size": 16, "lr_warmup_steps": 20, "ema_max_decay": 0.99,
    "prediction_type": "v_prediction", "ddpm_beta_schedule": "squaredcos_cap_v2", "optimizer": "muon",
    "learning_rate": 5e-3, "adam_beta1": 0.9, "adam_beta2": 0.99, "logger": "none", "checkpointing_steps": 0,
    "eval_batch_size": 16, "ddpm_num_inference_steps": 20, "overwrite_output_dir": True,
}  # fmt: skip
LONG = {"max_train_steps": 300}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", type=Path, required=True, help="what fetch_images.py mnist wrote")
    parser.add_argument("--photos", type=Path, required=True, help="what fetch_images.py cifar10 wrote")
    parser.add_argument("--output_dir", type=Path, default=Path("symptoms"), help="folder of the runs")
    parser.add_argument("--pictures", type=Path, default=ROOT / "docs/images")
    parser.add_argument("--cpu_threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=SYMPTOMS, default=list(SYMPTOMS))
    options = parser.parse_args()
    os.environ["ACCELERATE_USE_CPU"] = "true"
    options.output_dir.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        picture = SYMPTOMS[name](options).quantize(128)  # fewer grey levels and colours: small files
        picture.save(options.pictures / f"symptom_{name}.png", optimize=True)
        print(
            f"symptom_{name}.png: {(options.pictures / f'symptom_{name}.png').stat().st_size / 1024:.0f} KB",
            flush=True,
        )


def loss_flat(options) -> Image.Image:
    flat = trained(options, "flat", options.digits / "train", max_train_steps=80, learning_rate=1e-6)
    return beside(curve(flat), curve(well_trained(options)))


def noise(options) -> Image.Image:
    early = trained(options, "early", options.digits / "train", max_train_steps=40)
    return beside(samples(early), samples(well_trained(options)))


def grey(options) -> Image.Image:
    leaking = trained(options, "grey", options.digits / "train", max_train_steps=150, random_brightness=0.8)
    return beside(samples(leaking), samples(well_trained(options)))


def colour(options) -> Image.Image:
    flags, ships = {"image_mode": "RGB"} | LONG, options.photos / "train" / "ship"
    leaking = trained(options, "colour", ships, random_hue=180, **flags)
    return beside(samples(leaking), samples(trained(options, "colour-plain", ships, **flags)))


def one_class(options) -> Image.Image:
    """500 ones and 20 of each other digit: without and with classes evened out, then two samples a class."""
    from trainkit.sampling.grid import image_grid

    uneven = subset(options, "uneven", lambda digit: 500 if digit == "1" else 20)
    flags = {"max_train_steps": 150}
    mostly = trained(options, "one-class", uneven, **flags)
    even = trained(options, "classes-even", uneven, script="train_conditional", class_balance="inverse", **flags)
    return beside(samples(mostly), image_grid(cells(even, 2)[..., None], columns=5))


def overfitting(options) -> Image.Image:
    """Rows of samples, each above the training images nearest to them."""
    few = subset(options, "few", lambda digit: 1)
    copied = trained(options, "overfitting", few, **LONG)
    return beside(with_nearest(copied, few), with_nearest(well_trained(options), options.digits / "train"))


SYMPTOMS = {
    "loss_flat": loss_flat, "noise": noise, "grey": grey, "colour": colour, "one_class": one_class,
    "overfitting": overfitting,
}  # fmt: skip


def well_trained(options) -> Path:
    return trained(options, "digits", options.digits / "train", **LONG)


def trained(options, name: str, images: Path, script: str = "train_unconditional", **flags) -> Path:
    """The folder of a run of `script` on `images`, trained unless it is there."""
    folder = options.output_dir / name
    if (folder / "model_index.json").exists():
        return folder
    flags = COMMON | {"image_mode": "L"} | flags
    channels = {"L": 1, "RGB": 3}[flags["image_mode"]]
    unet = options.output_dir / f"unet-{channels}"
    unet.mkdir(exist_ok=True)
    (unet / "config.json").write_text(json.dumps(UNET | {"in_channels": channels, "out_channels": channels}))
    flags |= {
        "train_data_dir": images, "model_config_name_or_path": unet, "output_dir": folder, "num_proc": 1,
        "cache_dir": options.output_dir / "cache", "cpu_threads": options.cpu_threads,
    }  # fmt: skip
    arguments = []
    for flag, value in flags.items():
        arguments += [f"--{flag}"] if value is True else [f"--{flag}", str(value)]
    sys.argv = [f"{script}.py", *arguments]
    __import__(script).main()
    return folder


def subset(options, name: str, count) -> Path:
    """A folder with the first `count(digit)` training images of each digit."""
    folder = options.output_dir / "images" / name
    if not folder.exists():
        staging = folder.with_name(f".tmp-{name}")
        for digit in sorted(path for path in (options.digits / "train").iterdir() if path.is_dir()):
            (staging / digit.name).mkdir(parents=True, exist_ok=True)
            for file in sorted(digit.iterdir())[: count(digit.name)]:
                shutil.copy(file, staging / digit.name)
        staging.rename(folder)
    return folder


def samples(folder: Path) -> Image.Image:
    return Image.open(folder / "samples.png")


def curve(folder: Path) -> Image.Image:
    picture = Image.open(folder / "loss.png")
    return picture.resize((SIDE, round(picture.height * SIDE / picture.width)), Image.Resampling.LANCZOS)


def cells(folder: Path, columns: int) -> np.ndarray:
    """The samples (N, 16, 16) uint8 in the last grid, which has `columns` of them, 2 pixels apart."""
    grid = np.asarray(samples(folder).convert("L"))
    side = (grid.shape[1] - 2) // columns - 2
    starts = [range(2, length - 2, side + 2) for length in grid.shape]
    middle = side // 32  # of a pixel of the sample
    scale = side // 16
    return np.stack(
        [grid[y : y + side, x : x + side][middle::scale, middle::scale] for y in starts[0] for x in starts[1]]
    )


def with_nearest(folder: Path, images: Path) -> Image.Image:
    """Four rows of four samples, under each row the training images nearest by squared error."""
    from trainkit.sampling.grid import image_grid

    drawn = cells(folder, 4)
    known = np.stack([small(file) for file in images.rglob("*.png")])
    difference = drawn.reshape(16, 1, -1).astype(np.float32) - known.reshape(1, len(known), -1)
    nearest = known[np.square(difference).mean(2).argmin(1)]
    rows = [part[4 * row : 4 * row + 4] for row in range(4) for part in (drawn, nearest)]
    return image_grid(np.concatenate(rows)[..., None], columns=4)


def small(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file).convert("L").resize((16, 16), Image.Resampling.BOX))


def beside(bad: Image.Image, mended: Image.Image) -> Image.Image:
    parts = [part.convert("RGB") for part in (bad, mended)]
    side = max(part.width for part in parts)
    picture = Image.new("RGB", (2 * side + GAP, max(part.height for part in parts) + 20), "white")
    draw = ImageDraw.Draw(picture)
    for number, (part, head) in enumerate(zip(parts, ("the symptom", "mended"), strict=True)):
        draw.text((4 + number * (side + GAP), 4), head, fill="black")
        picture.paste(part, (number * (side + GAP), 20))
    return picture


if __name__ == "__main__":
    run_script(main)
