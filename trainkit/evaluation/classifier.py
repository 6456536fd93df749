"""A small classifier trained on real images and cached; it judges whether samples show the requested class."""

# N images, B batch, S side of the classifier's input in pixels, K classes

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from trainkit.atomic import replacing
from trainkit.errors import UserError
from trainkit.evaluation.conditions import Annotations
from trainkit.evaluation.images import ImageSet
from trainkit.terminal import Progress

FORMAT = 1  # increase it when the same images would give another classifier
MAX_SIDE, MAX_IMAGES = 64, 30_000
EPOCHS, BATCH_SIZE, PEAK_LEARNING_RATE = 16, 128, 3e-3
MIN_STEPS, MAX_STEPS = 100, 2000
HELD_OUT = 10  # every tenth image of a class


class Classifier:
    """Predicts which of `labels` an image shows; `accuracy` was measured on `num_held_out` held-out real images."""

    def __init__(self, network: nn.Module, labels: list[str], side: int, accuracy: float, num_held_out: int):
        self.network, self.labels, self.side = network.eval(), labels, side
        self.accuracy, self.num_held_out = accuracy, num_held_out

    def predict(self, images: ImageSet, indices: np.ndarray) -> list[str]:
        """The class of each of `images[indices]`, all of which can be read."""
        batches = images.batches(indices, BATCH_SIZE, self.side)
        numbers = [predicted(self.network, _as_input(batch)) for batch in batches]
        return [self.labels[number] for number in torch.cat(numbers).tolist()]


def open_classifier(images: ImageSet, annotations: Annotations, flag: str, cache: Path, seed: int) -> Classifier:
    """The classifier of the classes of `images`, loaded from `cache` or trained for these images and this seed.

    At most `MAX_IMAGES` drawn by `seed` are used, resized to squares of at most `MAX_SIDE` pixels. Every tenth image
    of a class is held out to measure accuracy. Raises `UserError` naming `flag`.
    """
    names = annotations.label_names
    if len(names) < 2:
        raise UserError(
            f"{flag} has {len(names)} classes: give images in class folders, or with labels in their metadata"
        )
    side = min(MAX_SIDE, images.side)
    identity = hashlib.sha256(repr((FORMAT, annotations.fingerprint, side, seed)).encode()).hexdigest()[:16]
    file = cache / "classifiers" / f"{identity}.safetensors"
    network = seeded_network(3, len(names), seed)
    record = load_network(file, network, identity)
    if record is None:
        record = _train_and_measure(network, images, annotations, flag, side, seed)
        save_network(file, network, record | {"identity": identity})
    return Classifier(network, names, side, record["accuracy"], record["num_held_out"])


def _train_and_measure(
    network: nn.Module, images: ImageSet, annotations: Annotations, flag: str, side: int, seed: int
) -> dict:
    chosen = np.random.default_rng(seed).permutation(len(images))
    chosen = chosen[[annotations.labels[index] is not None for index in chosen]][:MAX_IMAGES]
    with Progress(f"{flag} images", len(chosen), "images") as progress:
        pixels = np.concatenate(list(progress.count(images.batches(chosen, BATCH_SIZE, side))))
    kept = [index for index in chosen if index not in images.unreadable]
    names = annotations.label_names
    numbers = np.array([names.index(annotations.labels[index]) for index in kept])
    held_out = np.zeros(len(kept), dtype=bool)
    for number, name in enumerate(names):
        of_class = np.flatnonzero(numbers == number)
        if len(of_class) < 2:
            raise UserError(f"{flag} has {len(of_class)} images of class {name}; give at least 2 of each class")
        held_out[of_class[:: min(HELD_OUT, len(of_class))]] = True
    inputs, targets = _as_input(pixels), torch.from_numpy(numbers)
    training = torch.from_numpy(np.flatnonzero(~held_out))

    def batch_of(rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return jitter(inputs[training[rows]], generator), targets[training[rows]]

    fit(network, len(training), batch_of, seed)
    right = predicted(network, inputs[held_out]) == targets[held_out]
    return {"accuracy": right.float().mean().item(), "num_held_out": int(held_out.sum())}


def seeded_network(channels: int, classes: int, seed: int) -> nn.Module:
    """(B, channels, S, S) float32 in [0, 1] -> (B, classes) logits; 0.1 M parameters for ten classes."""

    def block(channels_in: int, channels_out: int, kernel: int, stride: int) -> list[nn.Module]:
        conv = nn.Conv2d(channels_in, channels_out, kernel, stride, padding=kernel // 2, bias=False)
        return [conv, nn.BatchNorm2d(channels_out), nn.ReLU()]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            *block(channels, 32, 5, 2), *block(32, 48, 3, 1), *block(48, 64, 3, 2), *block(64, 64, 3, 1),
            nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 7 * 7, classes),
        )  # fmt: skip


def fit(
    network: nn.Module,
    num_images: int,
    batch_of: Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor]],
    seed: int,
    class_weights: Tensor | None = None,
) -> None:
    """Train with cross-entropy and one-cycle AdamW for `EPOCHS`, within `MIN_STEPS` and `MAX_STEPS`; leaves eval mode.

    `batch_of(rows, generator)` returns inputs and targets for image numbers (B,).
    """
    generator = torch.Generator().manual_seed(seed)
    batch_size = min(BATCH_SIZE, num_images)
    steps = min(MAX_STEPS, max(MIN_STEPS, EPOCHS * (num_images // batch_size)))
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=steps)
    network.train()
    order = torch.empty(0, dtype=torch.int64)
    progress = Progress("training the classifier", steps, "steps")
    with progress, torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)  # of dropout
        for _ in range(steps):
            if len(order) < batch_size:
                order = torch.randperm(num_images, generator=generator)
            rows, order = order[:batch_size], order[batch_size:]
            inputs, targets = batch_of(rows, generator)
            loss = F.cross_entropy(network(inputs), targets, weight=class_weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.advance()
    network.eval()


def jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate by up to 10 degrees, scale by up to 10 %, shift by up to 7 % and add weak noise."""
    turn, scale, *shift = (torch.rand(4, len(images), generator=generator) * 2 - 1) * torch.tensor(
        [[0.17], [0.1], [2 / 14], [2 / 14]]
    )
    cos, sin = turn.cos() * (1 + scale), turn.sin() * (1 + scale)
    theta = torch.stack([torch.stack([cos, -sin, shift[0]], 1), torch.stack([sin, cos, shift[1]], 1)], 1)
    moved = F.grid_sample(images, F.affine_grid(theta, list(images.shape), align_corners=False), align_corners=False)
    noise = torch.randn(images.shape, generator=generator) * 0.12
    return (moved + noise * torch.rand(len(images), 1, 1, 1, generator=generator)).clamp(0, 1)


@torch.no_grad()
def predicted(network: nn.Module, images: Tensor) -> Tensor:
    """Class numbers (N,) of images (N, C, S, S)."""
    return torch.cat([network(batch).argmax(1) for batch in images.split(500)])


def _as_input(images: np.ndarray) -> Tensor:
    """(B, S, S, 3) uint8 -> (B, 3, S, S) float32 in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255)


def save_network(file: Path, network: nn.Module, record: dict) -> None:
    """Write the weights and a JSON `record` about them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        save_file(network.state_dict(), temporary, metadata={"record": json.dumps(record)})


def load_network(file: Path, network: nn.Module, identity: str) -> dict | None:
    """Load the weights in `file` into `network` and return their record; None without weights of this identity."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as stored:
            record = json.loads((stored.metadata() or {}).get("record", "{}"))
            if record.get("identity") != identity:
                return None
            network.load_state_dict({name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118
    except SafetensorError:  # cut off by a full disk: train it again
        return None
    return record
