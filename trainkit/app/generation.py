"""The images of a job as they denoise. Image i is that of sample.py with the same settings."""

# N images, B batch, H/W pixels, C channels

import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from trainkit.app.models import AppModel
from trainkit.app.pictures import example_uploads
from trainkit.app.requests import Job, Request, Setting, example_vector, make_job
from trainkit.sampling.generate import evaluation_mode, limited_batch_size, noise_shape, to_uint8
from trainkit.sampling.noise import Batch, draw
from trainkit.sampling.preview import preview_batch

BATCH_SIZE = 16  # as sample.py's default: in batches of another size, images differ by rounding
PREVIEWS = 8  # per batch, before its images are finished


class Frame(NamedTuple):
    """What can be shown at one moment."""

    images: np.ndarray  # (n, H, W, C) uint8, the first n of the N images; those of the last batch may be previews
    fraction: float  # of all calls of the UNet
    seconds: float  # since the start
    is_final: bool


def frames(job: Job) -> Iterator[Frame]:
    """Yield previews, then the finished images, of all images of `job` in batches of `BATCH_SIZE`."""
    started, count = time.perf_counter(), len(job.seeds)
    batch_size = limited_batch_size(job.pipeline, min(BATCH_SIZE, count))
    starts = range(0, count, batch_size)
    parts = ((range(start, min(start + batch_size, count)), job.seeds[start : start + batch_size]) for start in starts)
    noise = draw(parts, noise_shape(job.pipeline), job.pipeline.scheduler, job.steps)
    calls = len(job.pipeline.scheduler.timesteps)
    finished: list[np.ndarray] = []
    with evaluation_mode(job.pipeline):
        for batch in noise:
            assert isinstance(batch, Batch)  # `preview_batch` takes the noise of all steps
            conditions = None if job.conditions is None else [job.conditions[number] for number in batch.numbers]
            given = (job.pipeline, batch, noise, job.steps, PREVIEWS, conditions)
            for call, images in preview_batch(*given, **job.guidance):
                shown = to_uint8(images).cpu().numpy()
                done = sum(map(len, finished)) + len(shown) * call / calls
                is_final = call == calls and batch.numbers[-1] + 1 == count
                seconds = time.perf_counter() - started
                yield Frame(np.concatenate([*finished, shown]), done / count, seconds, is_final)
            finished.append(shown)


def warm_up(model: AppModel) -> None:
    """Make an image in one step, so that the time of the first visitor's images is that of the others too."""
    vector = "" if model.vector_length is None else example_vector(model)
    scheduler = model.schedulers[-1] if model.is_student else "dpmsolver"
    picture, mask = (None, None) if model.image_input is None else example_uploads(model)
    for _ in frames(make_job(Setting(model, scheduler, 1), Request(0, 1, (), vector, "", picture, mask))):
        pass
