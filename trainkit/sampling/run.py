"""Generate the missing images of a folder on all processes, with a device that does not wait."""

# B batch, C channels, H/W pixels

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from trainkit.data.preparation.pool import num_cores
from trainkit.errors import UserError
from trainkit.sampling.background import Ahead, Writer
from trainkit.sampling.conditions import Conditions
from trainkit.sampling.files import Samples
from trainkit.sampling.generate import Pipeline, Upsampler, evaluation_mode, noise_shape, sample_cascade
from trainkit.sampling.noise import Batch, Noise, draw
from trainkit.sampling.progress import Progress
from trainkit.sampling.team import Team

MAX_WRITERS = 8  # threads per process that encode and write


@dataclass
class Sampler:
    """Turns batches of noise into images; with `find_batch_size` it halves its batches when memory is short."""

    pipeline: Pipeline
    num_inference_steps: int
    seed: int
    conditions: Conditions | None
    batch_size: int
    find_batch_size: bool = False
    memory_format: torch.memory_format = torch.contiguous_format
    upsamplers: Sequence[Upsampler] = ()

    @property
    def device(self) -> torch.device:
        return next(self.pipeline.unet.parameters()).device

    def draw(self, units: Iterator[range], missing: set[int]) -> Iterator[Noise]:
        """The noise of the parts of `units` that hold a missing image, `batch_size` images at most."""
        parts = (part for unit in units for part in self._parts(unit) if not missing.isdisjoint(part))
        return self._draw(parts)

    def _parts(self, unit: Sequence[int]) -> Iterator[Sequence[int]]:
        size = self.batch_size  # it may shrink while the noise of other units is drawn
        return (unit[start : start + size] for start in range(0, len(unit), size))

    def _draw(self, parts: Iterator[Sequence[int]]) -> Iterator[Noise]:
        seeded = ((part, [self.seed + number for number in part]) for part in parts)
        pin_memory = self.device.type == "cuda"
        shape, chains = noise_shape(self.pipeline), [one.chain for one in self.upsamplers]
        return draw(seeded, shape, self.pipeline.scheduler, self.num_inference_steps, pin_memory, chains)

    def sample(self, batch: Batch, step_noise: Iterator[Noise]) -> torch.Tensor:
        """Images (B, H, W, C) uint8 on the device; `step_noise` yields the rest of the noise of `batch`.

        Raises:
            UserError: the batch does not fit into memory, or with `find_batch_size` not even one image.
        """
        settings: dict[str, Any] = {"memory_format": self.memory_format}
        if self.conditions is not None:
            settings |= {"conditions": self.conditions.for_images(batch.numbers)} | self.conditions.guidance
        try:
            given = self.pipeline, self.upsamplers, batch, step_noise, self.num_inference_steps
            return sample_cascade(*given, **settings)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not should_reduce_batch_size(error):
                raise
            self._shrink(len(batch.numbers))
        # outside of the handler, whose traceback keeps tensors
        clear_device_cache(garbage_collection=True)
        again = self._draw(self._parts(batch.numbers))
        return torch.cat([self.sample(part, again) for part in again if starts_images(part)])

    def _shrink(self, size: int) -> None:
        if size == 1:
            raise UserError("not even one image fits into memory: use --mixed_precision bf16 or a larger device")
        if not self.find_batch_size:
            raise UserError(
                f"--sample_batch_size: {size} images do not fit into memory together: use a smaller one, or "
                "--find_batch_size"
            )
        self.batch_size = min(self.batch_size, size // 2)


def starts_images(noise: Noise) -> TypeGuard[Batch]:
    """Whether new images start with this noise, which is not the rest of a batch that did not fit into memory."""
    return isinstance(noise, Batch) and noise.stage == 0


class Figures(NamedTuple):
    """What a process reports of its run: seconds in all, and those in which its main thread waited."""

    seconds: float
    noise_s: float  # for noise
    writing_s: float  # for encoding and writing
    batch_size: int


def run_units(sampler: Sampler, samples: Samples, team: Team, units: list[range], missing: set[int]) -> dict | None:
    """Generate on all processes the images of `units` that are `missing`.

    Returns on the main process, once all others have finished, what the record says about speed; None on the others.

    Raises:
        OSError: an image cannot be written. Those that were generated before are written as far as possible.
        UserError: another process ended early, or one image does not fit into memory.
    """
    with Progress(team, len(missing)), evaluation_mode(sampler.pipeline):
        team.report(_generate_share(sampler, samples, team, units, missing)._asdict())
        if not team.is_main:
            return None
        reports = team.reports()
    lost = missing - samples.held()
    if lost:
        raise UserError(
            f"{team.size - len(reports)} of {team.size} processes ended early and {len(lost)} images are missing: run "
            "the same command again, which generates only these"
        )
    return _summary([Figures(**report) for report in reports], len(missing))


def _generate_share(sampler: Sampler, samples: Samples, team: Team, units: list[range], missing: set[int]) -> Figures:
    """Generate units that no other process has taken, until none is left, and write their images."""
    writers = max(1, min(MAX_WRITERS, num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    started = time.perf_counter()
    noise = Ahead(sampler.draw(team.take(units), missing))
    writer = Writer(writers, slots=2 * writers)
    with writer, noise:
        for batch in noise:
            if not starts_images(batch):
                continue
            images = HostCopy(sampler.sample(batch, noise))
            wanted = [row for row, number in enumerate(batch.numbers) if number in missing]
            num_parts = 1 if samples.pieces_at_once else min(writers, len(wanted))
            for rows in np.array_split(wanted, num_parts):
                writer.submit(_write, samples, team, [batch.numbers[row] for row in rows], images, rows)
    return Figures(time.perf_counter() - started, noise.waited_s, writer.waited_s, sampler.batch_size)


def _write(samples: Samples, team: Team, numbers: list[int], images: "HostCopy", rows: np.ndarray) -> None:
    samples.write(numbers, images.array()[rows])
    team.add_written(len(numbers))


class HostCopy:
    """A tensor on its way to main memory: the thread that reads it waits for the device, the main thread does not."""

    def __init__(self, tensor: torch.Tensor):
        self._tensor, self._copied = tensor, None
        if tensor.device.type == "cuda":
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def array(self) -> np.ndarray:
        if self._copied is not None:
            self._copied.synchronize()
        return self._tensor.cpu().numpy()


def _summary(figures: list[Figures], num_images: int) -> dict:
    """Speed of all processes together, and the share of their time in which they waited."""
    total = sum(one.seconds for one in figures)
    return {
        "images_per_second": round(num_images / max(one.seconds for one in figures), 2),
        "waited_for_noise": round(sum(one.noise_s for one in figures) / total, 4),
        "waited_for_writing": round(sum(one.writing_s for one in figures) / total, 4),
        "batch_size": min(one.batch_size for one in figures),
    }
