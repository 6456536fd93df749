"""How fast do batches of training tensors come, against decoding JPEGs on the fly?

    python benchmarks/loading.py --num_images 1000

The peer is the `DataLoader` of the diffusers example: resize, random crop, flip, tensor in [-1, 1] for every
image at every visit (written with Pillow where the example uses torchvision), with 0 and with 2 workers. Ours gathers
uint8 pixels from the prepared dataset, in random order, and makes the same float32 tensors. Both take turns.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from prepare import write_photographs  # noqa: E402

from trainkit.data.dataset import PreparedImages  # noqa: E402
from trainkit.data.prepare import PreparationSettings, prepare  # noqa: E402
from trainkit.data.sources import ImageFolder  # noqa: E402

SIDE = 64


class OnTheFly(torch.utils.data.Dataset):
    """What `dataset.set_transform(transform_images)` does in the example."""

    def __init__(self, folder: Path):
        self.paths = sorted(folder.glob("*.jpg"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        image = Image.open(self.paths[index]).convert("RGB")
        scale = SIDE / min(image.size)
        image = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BILINEAR)
        left, top = np.random.randint(image.width - SIDE + 1), np.random.randint(image.height - SIDE + 1)
        image = image.crop((left, top, left + SIDE, top + SIDE))
        if np.random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        return (tensor - 0.5) / 0.5


def on_the_fly_rate(folder: Path, batch_size: int, num_workers: int) -> float:
    loader = torch.utils.data.DataLoader(OnTheFly(folder), batch_size, shuffle=True, num_workers=num_workers)
    return images_per_second(lambda: sum(len(batch) for batch in loader))


def prepared_rate(images: PreparedImages, batch_size: int, visits: int) -> float:
    def epoch() -> int:
        for _ in range(visits):
            order = np.random.permutation(len(images))
            for start in range(0, len(order), batch_size):
                indices = order[start : start + batch_size]
                crops = None if images.fixed_size else np.random.random((len(indices), 2))
                batch = torch.from_numpy(images.gather(indices, crops)).permute(0, 3, 1, 2).float()
                batch = batch.div_(127.5).sub_(1)
                flip = torch.from_numpy(np.random.random(len(indices)) < 0.5)
                batch[flip] = batch[flip].flip(3)
        return visits * len(images)

    return images_per_second(epoch)


def images_per_second(epoch: Callable[[], int]) -> float:
    started = time.perf_counter()
    return epoch() / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--num_images", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_photographs(folder / "photographs", arguments.num_images)
        for resize_mode in ("crop", "random_crop"):
            settings = PreparationSettings(SIDE, SIDE, resize_mode)
            output = folder / f"prepared-{resize_mode}"
            prepare(ImageFolder(folder / "photographs"), settings, output, show_progress=False)
            images = PreparedImages(output)
            prepared_rate(images, arguments.batch_size, 1)
            print("stored centre-cropped:" if resize_mode == "crop" else "stored whole, cropped at random:")
            ratios = []
            for _ in range(arguments.rounds):
                ours = prepared_rate(images, arguments.batch_size, 20)
                peers = [on_the_fly_rate(folder / "photographs", arguments.batch_size, workers) for workers in (0, 2)]
                ratios.append([ours / peer for peer in peers])
                print(
                    f"  prepared {ours:,.0f} images/s; on the fly {peers[0]:,.0f} ({ratios[-1][0]:.0f} times), "
                    f"with 2 workers {peers[1]:,.0f} ({ratios[-1][1]:.0f} times)",
                    flush=True,
                )
            none, two = np.median(ratios, axis=0)
            print(f"  median: {none:.0f} times as fast as without workers, {two:.0f} times as with 2")


if __name__ == "__main__":
    main()
