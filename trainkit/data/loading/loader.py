"""Batches of one process: images of the prepared dataset and their noise, prefetched by threads.

A batch is a pure function of its optimizer step and micro-step. So threads may make batches in any order, and a run
resumes at any step at no cost.

B batch (images per device and micro-step), A micro-steps, P processes, C channels, H/W pixels; global batch B * A * P.
"""

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch

from trainkit.data.loading.augment import augment
from trainkit.data.loading.augment_draws import Augmentation, Parameters, draw_parameters
from trainkit.data.loading.class_order import ClassBalancedOrder
from trainkit.data.loading.conditioning_images import SecondImages
from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.loading.model_range import channels_first, conditions_to_model_range, to_host_tensor, to_model_range
from trainkit.data.loading.order import DropoutDraws, Purpose, SampleOrder, normal_draws, uniform_draws
from trainkit.data.loading.transfer import pins_memory, to_device


def to_model_input(gathered: torch.Tensor, images: PreparedImages) -> torch.Tensor:
    """Return the model input (B, C, H, W) float32 for pixels or latents (B, H, W, C) gathered from `images`."""
    return channels_first(gathered) if images.holds_latents else to_model_range(gathered, images.bit_depth)


@dataclass(frozen=True)
class BatchShape:
    """How the global batch of an optimizer step is split over processes and micro-steps."""

    per_device: int
    micro_steps: int
    num_processes: int
    process_index: int

    @property
    def global_size(self) -> int:
        return self.per_device * self.micro_steps * self.num_processes

    def rows(self, micro_step: int) -> range:
        """Return this process's rows of the global batch in `micro_step`."""
        start = (micro_step * self.num_processes + self.process_index) * self.per_device
        return range(start, start + self.per_device)


class Condition(Protocol):
    """The conditions of images: classes, captions, vectors or images (trainkit/diffusion/conditioning.py)."""

    @property
    def picture(self) -> "PictureInput | None":
        """Return what makes a second image for the model, if there is one."""

    def inputs(self, indices: np.ndarray, draws: DropoutDraws | None = None) -> dict[str, torch.Tensor]:
        """Return the model's keyword arguments for the images `indices` (B,), on the host.

        `draws` decide which conditions are dropped; without them none is.
        """


class PictureInput(Protocol):
    """A second image for the UNet: made from the first (trainkit/diffusion/image_condition.py), or stored with it."""

    @property
    def stored(self) -> SecondImages | None:
        """Return what is read for second images; None if they are made from the images that are trained on."""

    def draw(self, seed: int, step: int, rows: Sequence[int], total: int) -> dict:
        """Return what is random for `rows` of the `total` of a global batch, as tensors (B, ...) on the host."""

    def source(self, images: torch.Tensor, indices: np.ndarray) -> torch.Tensor:
        """Return what `channels` is given for `images` (B, C, H, W) of `indices` that are not augmented."""

    def channels(self, images: torch.Tensor, drawn: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the further input channels (B, K, H, W) of the UNet.

        `images` (B, C, H, W) are augmented: the images, or what is stored for second images.
        """


@dataclass
class Batch:
    """The inputs of a micro-step, on the training device except for what is drawn from `uniforms`."""

    images: torch.Tensor  # (B, C, H, W) float32 in [-1, 1]
    noise: torch.Tensor  # (B, C, H, W) float32, standard normal
    uniforms: torch.Tensor  # (B,) float64 in [0, 1) on the host, to draw timesteps from; MPS has no float64
    indices: np.ndarray  # (B,) int64, rows of the prepared dataset
    step: int  # optimizer step, from 0
    micro_step: int  # 0 .. A - 1
    augmentation: torch.Tensor | None = None  # (B, LABELS) float32, with --augmentation_conditioning
    condition: dict[str, torch.Tensor] = field(default_factory=dict)  # keyword arguments of the model, B rows each
    picture: torch.Tensor | None = None  # (B, K, H, W) float32, further input channels of the model

    def with_picture(self, noisy_images: torch.Tensor) -> torch.Tensor:
        """The input of the model: `noisy_images` (B, C, H, W) and, if there is one, the second image."""
        return noisy_images if self.picture is None else torch.cat([noisy_images, self.picture], dim=1)

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """The keyword arguments of the model besides noisy images and timesteps."""
        return self.condition | ({} if self.augmentation is None else {"augmentation": self.augmentation})


class BatchLoader:
    """Endless batches of `images` in the order of `seed`, from any step.

    `wait_s` is the time in seconds that the training loop has waited for data.
    """

    def __init__(
        self,
        images: PreparedImages,
        shape: BatchShape,
        seed: int,
        random_flip: bool,
        device: torch.device,
        num_threads: int,
        memory_format: torch.memory_format = torch.contiguous_format,
        shuffle_block_size: int = 0,
        augmentation: Augmentation | None = None,
        condition: Condition | None = None,
        order: SampleOrder | ClassBalancedOrder | None = None,
        picture: PictureInput | None = None,
    ):
        self.images, self.shape, self.seed, self.random_flip = images, shape, seed, random_flip
        self.order = order or SampleOrder(len(images), seed, shuffle_block_size)
        self.condition, self.picture = condition, picture
        self._stored = None if picture is None else picture.stored
        self.device, self.num_threads, self.memory_format = device, num_threads, memory_format
        self.augmentation, self.wait_s = augmentation, 0.0
        self._reading_ahead = threading.Lock()
        self._window: tuple[int, int] | None = None  # positions of the window that was read ahead

    def iterate(self, first_step: int, end_step: int) -> Iterator[Batch]:
        """Yield the micro-batches of optimizer steps `first_step` to `end_step` - 1, prefetched by threads."""
        micro_steps = self.shape.micro_steps
        places = ((i // micro_steps, i % micro_steps) for i in range(first_step * micro_steps, end_step * micro_steps))
        if self.num_threads == 0:
            for place in places:
                started = time.perf_counter()
                host_batch = self.make(*place)
                self.wait_s += time.perf_counter() - started
                yield self._to_device(host_batch)
            return
        executor = ThreadPoolExecutor(self.num_threads, thread_name_prefix="batches")
        try:
            ahead = deque(executor.submit(self.make, *place) for place in islice(places, 2 * self.num_threads))
            while ahead:
                started = time.perf_counter()
                host_batch = ahead.popleft().result()
                self.wait_s += time.perf_counter() - started
                ahead.extend(executor.submit(self.make, *place) for place in islice(places, 1))
                yield self._to_device(host_batch)
        finally:
            executor.shutdown(wait=False, cancel_futures=True)
            if self.order.block_size:
                self.images.read_ahead([])  # cancels requests that have not started

    def make(self, step: int, micro_step: int) -> dict:
        """Return the batch of one micro-step on the host: `images` (B, H, W, C) as stored, noise, uniforms, etc."""
        total, rows = self.shape.global_size, self.shape.rows(micro_step)
        here = slice(rows.start, rows.stop)

        def uniforms(purpose: Purpose) -> np.ndarray:
            return uniform_draws(self.seed, step, purpose, total)[here]

        positions = step * total + np.arange(rows.start, rows.stop)
        self._read_ahead(step, micro_step)
        indices = self.order.indices(positions)
        crops = None
        if not self.images.fixed_size:
            crops = np.stack([uniforms(Purpose.CROP_TOP), uniforms(Purpose.CROP_LEFT)], axis=1)
        shape = (self.images.channels, self.images.height, self.images.width)
        flip, augmentation = uniforms(Purpose.FLIP) < 0.5 if self.random_flip else None, None
        if self.images.holds_latents:  # a new sample per visit
            noise = normal_draws(self.seed, step, rows, shape, Purpose.LATENT)
            latents: Any = self.images  # trainkit.diffusion.latents.LatentImages, which stands above this folder
            pixels = latents.sample(indices, flip, noise)
        else:
            pixels = self.images.gather(indices, crops)
        if self.augmentation is not None:
            augmentation = draw_parameters(
                self.augmentation, self.seed, step, total, here, shape[1:], pixels.shape[1:3], flip
            )
            flip = None if augmentation.geometry is not None else flip  # the geometry contains it
        host_batch = {
            "images": to_host_tensor(pixels),
            "conditions": None if self._stored is None else to_host_tensor(self._stored.gather(indices, crops)),
            "noise": torch.from_numpy(normal_draws(self.seed, step, rows, shape)),
            "uniforms": torch.from_numpy(uniforms(Purpose.TIMESTEPS)),
            "flip": None if flip is None else torch.from_numpy(flip),
            "augmentation": augmentation,
        }
        condition = {}
        if self.condition is not None:
            condition = self.condition.inputs(indices, uniforms)
        drawn = {} if self.picture is None else self.picture.draw(self.seed, step, rows, total)
        if pins_memory(self.device):  # in this thread; the training thread only starts the copies
            host_batch = {name: x if x is None else x.pin_memory() for name, x in host_batch.items()}
            condition = {name: x.pin_memory() for name, x in condition.items()}
            drawn = {name: x.pin_memory() for name, x in drawn.items()}
        inputs = {"condition": condition, "drawn": drawn}
        return host_batch | inputs | {"indices": indices, "step": step, "micro_step": micro_step}

    def _read_ahead(self, step: int, micro_step: int) -> None:
        """Start to read from the disk what later batches need.

        With blocks that is the window of this batch and the next window, the first time one is entered. Otherwise it
        is the batch that this thread makes next.
        """
        last = step * self.shape.global_size + self.shape.rows(micro_step)[-1]
        if not isinstance(self.order, SampleOrder) or not self.order.block_size:
            steps, micro_step = divmod(micro_step + max(1, self.num_threads), self.shape.micro_steps)
            first = (step + steps) * self.shape.global_size + self.shape.rows(micro_step).start
            indices = self.order.indices(first + np.arange(self.shape.per_device))
            self.images.read_soon(indices)
            if self._stored is not None:
                self._stored.read_soon(indices)
            return
        with self._reading_ahead:  # several threads make batches
            if self._window is not None and last < self._window[1]:
                return
            self._window = first, end = self.order.window(last)
            ranges = self.order.ranges(first, end) + self.order.ranges(*self.order.window(end))
            self.images.read_ahead(ranges)
            if self._stored is not None:
                self._stored.read_ahead(ranges)

    def _to_device(self, host_batch: dict) -> Batch:
        images, noise = (to_device(host_batch[name], self.device) for name in ("images", "noise"))
        augmentation = host_batch["augmentation"]
        augmentation = None if augmentation is None else augmentation.to(self.device)
        flip = None if host_batch["flip"] is None else to_device(host_batch["flip"], self.device)
        images, size = to_model_input(images, self.images), (self.images.height, self.images.width)
        if not self.images.holds_latents:  # which are those of mirrored images already
            images = augmented(images, augmentation, flip, size)
        images, noise = (x.contiguous(memory_format=self.memory_format) for x in (images, noise))
        labels = None if augmentation is None else augmentation.labels
        place = host_batch["indices"], host_batch["step"], host_batch["micro_step"]
        condition = {name: to_device(x, self.device) for name, x in host_batch["condition"].items()}
        drawn = {name: to_device(x, self.device) for name, x in host_batch["drawn"].items()}
        picture = None
        if self.picture is not None:
            second = images
            if self._stored is not None:  # geometry moves both alike; colours are those of the image alone
                second = conditions_to_model_range(to_device(host_batch["conditions"], self.device), self._stored)
                moves = None if augmentation is None else replace(augmentation, colour=None)
                second = augmented(second, moves, flip, self._stored.size, self._stored.are_label_maps)
            picture = self.picture.channels(second, drawn)
        return Batch(images, noise, host_batch["uniforms"], *place, labels, condition, picture)


def augmented(
    images: torch.Tensor,
    augmentation: Parameters | None,
    flip: torch.Tensor | None,
    size: tuple[int, int],
    nearest: bool = False,
) -> torch.Tensor:
    """Return images (B, C, H, W) of `size` in training: moved, recoloured, mirrored where `flip` (B,) says so."""
    images = augment(images, augmentation, size, nearest)
    return images if flip is None else torch.where(flip[:, None, None, None], images.flip(-1), images)
