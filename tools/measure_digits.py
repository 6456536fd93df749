"""How bold and how slanted is a digit? Two numbers an image, to condition on, and to check samples with.

    python tools/fetch_images.py mnist digits
    python tools/measure_digits.py digits/train                            # NAME.npy beside each image
    python tools/measure_digits.py digits/heldout --output_file asked.npy  # one array, for sample.py --vectors_file
    python tools/measure_digits.py --samples samples                       # asked against measured

Stroke width in pixels is twice the area over the perimeter, slant in degrees (to the right is positive) is that of the
axis through the centres of the rows: both of the grey levels themselves, with no threshold.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

# N images, H/W pixels; images are white on black in [0, 1]
ATTRIBUTES = ("stroke width in pixels", "slant in degrees")
GOAL = 0.8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("images", type=Path, nargs="?", help="folder of PNGs to measure, searched recursively")
    parser.add_argument(
        "--output_file", type=Path, help="write one .npy (images, 2) there, and none beside the images"
    )
    parser.add_argument(
        "--samples", type=Path, help="folder that sample.py --vectors_file wrote: how well was it done?"
    )
    parser.add_argument("--report", type=Path, help="JSON file for what --samples finds; default: print it only")
    arguments = parser.parse_args()
    if (arguments.images is None) == (arguments.samples is None):
        sys.exit("error: give either a folder of images or --samples")
    if arguments.samples is not None:
        report = compare(*asked_and_measured(arguments.samples))
        print_report(report)
        if arguments.report is not None:
            arguments.report.write_text(json.dumps(report, indent=2) + "\n")
        return
    files = sorted(arguments.images.rglob("*.png"))
    if not files:
        sys.exit(f"error: {arguments.images} holds no PNG: python tools/fetch_images.py mnist digits")
    vectors = np.stack([measure(read(file)) for file in files])
    if arguments.output_file is not None:
        np.save(arguments.output_file, vectors)
    else:
        for file, vector in zip(files, vectors, strict=True):
            np.save(file.with_suffix(".npy"), vector)
    for name, values in zip(ATTRIBUTES, vectors.T, strict=True):
        print(f"{name}: {values.mean():.2f} +- {values.std():.2f}, {values.min():.2f} to {values.max():.2f}")


def read(file: Path) -> np.ndarray:
    """(H, W) float64 in [0, 1]."""
    try:
        return np.asarray(Image.open(file).convert("L"), dtype=np.float64) / 255
    except OSError as error:
        sys.exit(f"error: {file} cannot be read ({error}); remove or replace it")


def measure(image: np.ndarray) -> np.ndarray:
    """The two numbers of `ATTRIBUTES` (2,) float32 of an image (H, W); an empty one has zeros."""
    return np.array([stroke_width(image), slant(image)], dtype=np.float32)


def stroke_width(image: np.ndarray) -> float:
    """Pixels: a long line of width w has area w L and perimeter 2 L, and so w = 2 area / perimeter.

    Area is the sum of the grey levels, perimeter their total variation (the coarea formula): an edge that is spread
    over several pixels counts as the same edge. Below 2 pixels, where both edges share one, it reads too much.
    """
    padded = np.pad(image, 1)
    down, right = np.diff(padded, axis=0), np.diff(padded, axis=1)
    # gradients in the middle of four pixels, so that no direction is preferred
    down, right = (down[:, 1:] + down[:, :-1]) / 2, (right[1:] + right[:-1]) / 2
    perimeter = np.hypot(down, right).sum()
    return float(2 * image.sum() / perimeter) if perimeter else 0.0


def slant(image: np.ndarray) -> float:
    """Degrees from upright: the slope of the regression of columns on rows, by second central moments.

    A shear of an upright shape by s columns a row upwards turns it by exactly arctan(s).
    """
    total = image.sum()
    if not total:
        return 0.0
    rows, columns = np.mgrid[0 : image.shape[0], 0 : image.shape[1]]
    rows, columns = rows - (rows * image).sum() / total, columns - (columns * image).sum() / total
    spread = (rows**2 * image).sum()
    return float(np.degrees(np.arctan2(-(rows * columns * image).sum(), spread))) if spread else 0.0


def asked_and_measured(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Two arrays (N, 2): what metadata.jsonl says that each image was asked for, and what it shows."""
    metadata = folder / "metadata.jsonl"
    if not metadata.is_file():
        sys.exit(f"error: {folder} has no metadata.jsonl, which says what was asked for: use sample.py --vectors_file")
    lines = [json.loads(line) for line in metadata.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line.get("vector") is not None]
    if len(lines) < 3 or any(len(line["vector"]) != len(ATTRIBUTES) for line in lines):
        sys.exit(f"error: {metadata} must name at least 3 images, with a `vector` of {len(ATTRIBUTES)} numbers each")
    return (
        np.array([line["vector"] for line in lines]),
        np.stack([measure(read(folder / line["file_name"])) for line in lines]),
    )


def compare(asked: np.ndarray, measured: np.ndarray) -> dict[str, dict]:
    """For each attribute of (N, 2) and (N, 2): correlation, mean absolute error, deviation of what was asked."""
    return {
        name: {
            "correlation": float(np.corrcoef(want, got)[0, 1]) if want.std() and got.std() else 0.0,
            "mean_absolute_error": float(np.abs(want - got).mean()),
            "deviation_asked": float(want.std()),
            "n": len(want),
        }
        for name, want, got in zip(ATTRIBUTES, asked.T, measured.T, strict=True)
    }


def print_report(report: dict[str, dict]) -> None:
    for name, found in report.items():
        print(
            f"{name}: correlation of asked and measured {found['correlation']:.3f} (goal {GOAL}; chance 0), mean "
            f"absolute error {found['mean_absolute_error']:.2f}, asked for with a deviation of "
            f"{found['deviation_asked']:.2f} | n = {found['n']}"
        )


if __name__ == "__main__":
    main()
