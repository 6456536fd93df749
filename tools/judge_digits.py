"""Are generated digits digits? A small classifier, trained on real MNIST digits alone, says how many it is sure of.

    python tools/fetch_images.py mnist demo/mnist
    python tools/judge_digits.py --generated demo/samples

The judge is a convolutional network of ten digits and an eleventh class, "not a digit", that it learns from noise,
shuffled, halved and overlaid digits and blobs: without it a classifier is sure of anything. It trains in about 40 s
on two cores and is kept beside the report. Controls show what its word is worth: the same share for real digits it
has not seen, and for garbage, two kinds of which (molten digits, random strokes) it has not met either.
"""

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from trainkit.evaluation.classifier import FORMAT, fit, jitter, load_network, save_network, seeded_network

# B batch; images are (B, 1, 28, 28) float32 in [0, 1], white on black; class 10 is "not a digit"
NOT_A_DIGIT = 10
SURE = 0.9


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--generated", type=Path, required=True, help="folder of PNGs to judge (grid.png is skipped)")
    parser.add_argument("--digits", type=Path, default=Path("demo/mnist"), help="folder fetch_images.py made")
    parser.add_argument("--output_file", type=Path, help="report (default: judge.json beside --generated)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the judge's training and of the controls")
    arguments = parser.parse_args()
    output_file = arguments.output_file or arguments.generated.parent / "judge.json"

    files = sorted(file for file in arguments.generated.glob("*.png") if file.name != "grid.png")
    if not files:
        sys.exit(f"error: --generated {arguments.generated} holds no PNG")
    generated = load_images(files)
    heldout, labels = load_digits(arguments.digits, "heldout")
    output_file.parent.mkdir(parents=True, exist_ok=True)
    judge = trained_judge(arguments.digits, output_file.with_suffix(".safetensors"), arguments.seed)

    generator = torch.Generator().manual_seed(arguments.seed)
    report = {
        "sure_means": f"a digit with probability >= {SURE}",
        "generated": verdict(judge, generated),
        "judge_accuracy_on_heldout": (probabilities(judge, heldout).argmax(1) == labels).float().mean().item(),
        "controls": {
            "real held-out digits": verdict(judge, heldout),
            "real digits, faint noise": verdict(judge, faint_noise(heldout, generator)),
            "uniform noise": verdict(judge, torch.rand(heldout.shape, generator=generator)),
            "digits under heavy noise": verdict(judge, under_noise(heldout, generator)),
            "digits with patches shuffled": verdict(judge, shuffle_patches(heldout, 7, generator)),
            "molten digits (never seen)": verdict(judge, melt(heldout, generator)),
            "random strokes (never seen)": verdict(judge, random_strokes(len(heldout), generator)),
        },
    }
    output_file.write_text(json.dumps(report, indent=2) + "\n")
    print_report(report, output_file)


def load_images(files: list[Path]) -> Tensor:
    """The files as images (N, 1, 28, 28) in [0, 1], made grey and resized where they are not."""
    images = [Image.open(file).convert("L") for file in files]
    images = [image if image.size == (28, 28) else image.resize((28, 28), Image.Resampling.BOX) for image in images]
    return torch.from_numpy(np.stack(images)).float().div(255).unsqueeze(1)


def load_digits(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28) and labels (N,) of folder/split/<digit>/*.png."""
    files = [sorted((folder / split / str(digit)).glob("*.png")) for digit in range(10)]
    if not all(files):
        sys.exit(f"error: --digits {folder} is not complete: python tools/fetch_images.py mnist {folder}")
    labels = torch.arange(10).repeat_interleave(torch.tensor([len(of_class) for of_class in files]))
    return load_images([file for of_class in files for file in of_class]), labels


def trained_judge(digits: Path, weights_file: Path, seed: int) -> nn.Module:
    """The judge in eval mode: from `weights_file` where this very file trained it with this seed, else trained now."""
    judge = seeded_network(1, 11, seed)
    settings = str((FORMAT, seed, digits.resolve())).encode()
    identity = hashlib.sha256(Path(__file__).read_bytes() + settings).hexdigest()
    if load_network(weights_file, judge, identity) is None:
        started = time.monotonic()
        train(judge, *load_digits(digits, "train"), seed)
        print(f"trained the judge in {time.monotonic() - started:.0f} s")
        save_network(weights_file, judge, {"identity": identity})
    return judge.eval()


def train(judge: nn.Module, images: Tensor, labels: Tensor, seed: int) -> None:
    """On jittered digits and, half as many again, garbage made of them."""

    def batch_of(rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        digits = jitter(images[rows], generator)
        garbage = make_garbage(digits, labels[rows], generator)
        targets = torch.cat([labels[rows], torch.full((len(garbage),), NOT_A_DIGIT)])
        return torch.cat([digits, garbage]), targets

    class_weights = torch.ones(11)
    class_weights[NOT_A_DIGIT] = 0.15  # rather garbage let through than real digits refused: halves of two can be one
    fit(judge, len(images), batch_of, seed, class_weights)


def make_garbage(images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """About half as many images that are no digits, a share of each kind, out of a batch of digits."""
    share = len(images) // 16
    parts = images[torch.randperm(len(images), generator=generator)[: 5 * share]].split(share)
    half = torch.arange(28).view(1, 28) < 14
    partners = _of_another_class(images, labels, generator)
    mask = half if torch.rand(1, generator=generator) < 0.5 else half.T
    noise = torch.rand(parts[0].shape, generator=generator)
    return torch.cat([
        shuffle_patches(parts[0], 1, generator),
        shuffle_patches(parts[1], 4, generator),
        shuffle_patches(parts[2], 7, generator),
        parts[3].roll(14, dims=int(torch.randint(2, 4, (1,), generator=generator))),
        under_noise(parts[4], generator),
        torch.where(mask, images, partners)[:share],
        torch.maximum(images, partners)[-share:],
        noise if torch.rand(1, generator=generator) < 0.5 else make_blobs(share, generator),
    ])  # fmt: skip


def _of_another_class(images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """For each image one of another class of the batch (where there is one)."""
    allowed = (labels[:, None] != labels[None]).float() + 1e-9
    return images[torch.multinomial(allowed, 1, generator=generator).squeeze(1)]


def shuffle_patches(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Cut (B, 1, 28, 28) into patches of size x size pixels and put them back in random places."""
    patches = F.unfold(images, size, stride=size)
    places = torch.rand(len(images), 1, patches.shape[2], generator=generator).argsort(2)
    return F.fold(patches.gather(2, places.expand_as(patches)), 28, size, stride=size)


def under_noise(images: Tensor, generator: torch.Generator) -> Tensor:
    """Digits faded to 15 % under Gaussian noise of standard deviation 0.4."""
    return (0.15 * images + 0.4 * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def faint_noise(images: Tensor, generator: torch.Generator) -> Tensor:
    """Digits that still read well, as a few steps of a sampler may leave them."""
    return (images + 0.08 * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def make_blobs(count: int, generator: torch.Generator) -> Tensor:
    """Soft-edged white shapes: smoothed noise, of a random coarseness, cut at a random level."""
    cells = int(torch.randint(3, 9, (1,), generator=generator))
    smooth = F.interpolate(torch.randn(count, 1, cells, cells, generator=generator), 28, mode="bicubic")
    return ((smooth - torch.rand(count, 1, 1, 1, generator=generator)) * 4).clamp(0, 1)


def melt(images: Tensor, generator: torch.Generator) -> Tensor:
    """Digits pulled out of shape by a smooth random field of several pixels."""
    pull = F.interpolate(torch.randn(len(images), 2, 6, 6, generator=generator), 28, mode="bicubic")
    grid = F.affine_grid(torch.eye(2, 3).expand(len(images), 2, 3), images.shape, align_corners=False)
    return F.grid_sample(images, grid + 0.45 * pull.permute(0, 2, 3, 1), align_corners=False)


def random_strokes(count: int, generator: torch.Generator) -> Tensor:
    """A pen that wanders, with the width and the softness of MNIST's."""
    turns = torch.randn(count, 60, generator=generator).mul(0.5).cumsum(1)
    path = torch.stack([turns.cos(), turns.sin()], 2).cumsum(1)
    path = (path - path.mean(1, keepdim=True)) / path.abs().amax((1, 2), keepdim=True) * 9 + 13.5
    pixels = torch.stack(torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij"), 2).view(1, 784, 2)
    return (2 - torch.cdist(pixels.expand(count, -1, -1), path).amin(2)).clamp(0, 1).view(count, 1, 28, 28)


@torch.no_grad()
def probabilities(judge: nn.Module, images: Tensor) -> Tensor:
    """(N, 11), rows summing to 1."""
    return torch.cat([judge(batch) for batch in images.split(500)]).softmax(1)


def verdict(judge: nn.Module, images: Tensor) -> dict:
    """n, the share that is surely a digit, the mean probability of the best digit, and how many of each class."""
    every = probabilities(judge, images)
    confidence = every[:, :NOT_A_DIGIT].amax(1)
    counts = every.argmax(1).bincount(minlength=11).tolist()
    return {
        "n": len(images),
        "sure": (confidence >= SURE).float().mean().item(),
        "mean_confidence": confidence.mean().item(),
        "digits": counts[:NOT_A_DIGIT],
        "not_a_digit": counts[NOT_A_DIGIT],
    }


def print_report(report: dict, output_file: Path) -> None:
    generated = report["generated"]
    print(f"judge: {report['judge_accuracy_on_heldout']:.1%} right on real held-out digits")
    print(f"sure ({report['sure_means']}) of")
    for name, found in {"GENERATED": generated, **report["controls"]}.items():
        print(f"  {found['sure']:6.1%}  of {found['n']:5,}  {name}, mean confidence {found['mean_confidence']:.3f}")
    counts = "  ".join(f"{digit}:{count}" for digit, count in enumerate(generated["digits"]))
    print(f"generated by class: {counts}  none:{generated['not_a_digit']}")
    print(f"report: {output_file}")


if __name__ == "__main__":
    main()
