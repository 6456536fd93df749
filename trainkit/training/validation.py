"""The loss on held-out images: always the same images, with the same noise, at the same timesteps.

The value is a function of the weights and the seed alone. So two steps, two runs of one seed, or the same run on other
processes differ by what was learned, not by what was drawn. Each image has a timestep from its own one of N equal
strata of the schedule: every noise level counts as in training, with far less variance.

N validation images, B batch, C channels, H/W pixels, T timesteps of the noise schedule.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from trainkit.data.cache import local_copy, open_or_prepare
from trainkit.data.files import RemotePath, cache_root, exists, location
from trainkit.data.format import PREPARATION_NAME
from trainkit.data.loading.augment import to_training_size
from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.loading.loader import Batch, Condition, to_model_input
from trainkit.data.loading.model_range import to_host_tensor
from trainkit.data.loading.order import Purpose, normal_draws, sample_indices, uniform_draws
from trainkit.data.pairing import wants_pairs
from trainkit.data.settings import check_training_size
from trainkit.diffusion.noise_schedule import uniform_timesteps
from trainkit.errors import UserError
from trainkit.options.script import ConditionalTrainingOptions, TrainingOptions
from trainkit.terminal import say
from trainkit.training.run import Run

NUM_BINS = 4


def open_validation_images(options: TrainingOptions, images: PreparedImages) -> PreparedImages | None:
    """The held-out images of `--validation_data_dir` or `--validation_split`, opened like the training `images`.

    None if neither is given. Raw images are prepared once, like the training images but with a centre crop. Raises
    `UserError` if they do not fit the training images, or are the same.
    """
    given, split = options.validation_data_dir, options.validation_split
    _check_conditioning_folder(options)
    if given is None and split is None:
        if options.validation_steps is not None:
            raise UserError(
                f"--validation_steps {options.validation_steps} needs --validation_data_dir, a folder of other "
                "images, or --validation_split"
            )
        return None
    for name in ("validation_steps", "validation_images"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value} must be at least 1")
    if given is not None and split is not None:
        raise UserError("--validation_data_dir and --validation_split both name the held-out images: give one of them")
    if split is not None:
        what, held_out = f"--validation_split {split}", _prepare_split(options, images)
    else:
        assert given is not None  # without a split
        _refuse_training_images(given, options)
        what, held_out = f"--validation_data_dir {given}", _open_folder(given, options, images)
    shapes = [f"{opened.height}x{opened.width} {opened.image_mode}" for opened in (held_out, images)]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"{what} holds images of {shapes[0]}, the training data of {shapes[1]}: prepare it with the same "
            "settings, or give the raw images"
        )
    return held_out


def _open_folder(given: str, options: TrainingOptions, images: PreparedImages) -> PreparedImages:
    place = location(given, options.storage_options)
    if not exists(place / PREPARATION_NAME):
        try:
            source = {"train_data_dir": given, "dataset_name": None}
            if isinstance(options, ConditionalTrainingOptions):
                source["conditioning_data_dir"] = folder = options.validation_conditioning_data_dir
                source["conditioning_image_column"] = None if folder else options.conditioning_image_column
            return _prepare_like(images, options, **source)
        except UserError as error:
            message = str(error).replace("--train_data_dir", "--validation_data_dir")
            raise UserError(message.replace("--conditioning_data_dir", "--validation_conditioning_data_dir")) from None
    if isinstance(place, RemotePath):
        place = local_copy(place, cache_root(options.cache_dir) / "copies")
    held_out = PreparedImages(place)
    if held_out.settings.train_height is None:
        return held_out
    resolution = images.height, images.width  # it is stored larger, for any training size
    check_training_size(resolution, (held_out.stored_height, held_out.stored_width))
    return PreparedImages(place, resolution)


def _prepare_split(options: TrainingOptions, images: PreparedImages) -> PreparedImages:
    split = options.validation_split
    if split == options.dataset_split:
        raise UserError(f"--validation_split {split} is the split that is trained on: name another one")
    train_data_dir = options.train_data_dir if options.dataset_name is None else None
    if train_data_dir is not None and exists(location(train_data_dir, options.storage_options) / PREPARATION_NAME):
        raise UserError(
            f"--validation_split {split}: --train_data_dir {train_data_dir} is a prepared dataset of one "
            f"split; prepare the other with --dataset_split {split}, and give it as --validation_data_dir"
        )
    return _prepare_like(images, options, dataset_split=split)


def _prepare_like(images: PreparedImages, options: TrainingOptions, **source) -> PreparedImages:
    """Prepare another `source` with the settings of the training `images`, but with a centre crop."""
    if images.pairs is not None and wants_pairs(options):
        maps = images.pairs.classes is not None
        source |= {
            "conditioning_classes": images.pairs.classes,
            "conditioning_image_mode": None if maps else images.pairs.mode,
        }
    return open_or_prepare(
        replace(
            options,
            streaming=False,
            resolution=f"{images.height}x{images.width}",
            stored_resolution=None,
            center_crop=False,
            resize_mode=images.settings.resize_mode if images.fixed_size else "crop",
            image_mode=images.image_mode,
            background="#{:02x}{:02x}{:02x}".format(*images.settings.background),
            preserve_input_precision=images.bit_depth > 8,
            **source,
        )
    )


def stratified_uniforms(seed: int, count: int) -> np.ndarray:
    """`count` numbers (N,) float64 in [0, 1), one in each of N equal strata, in a shuffled order."""
    strata = np.argsort(uniform_draws(seed, 1, Purpose.VALIDATION_TIMESTEPS, count))
    return (strata + uniform_draws(seed, 0, Purpose.VALIDATION_TIMESTEPS, count)) / count


def loss_by_noise(losses: np.ndarray, timesteps: np.ndarray, num_train_timesteps: int) -> dict[str, float]:
    """The mean of `losses` (N,) as `validation_loss`, and the mean for each quarter of the timesteps that has any.

    `validation_loss_t0_250` is over timesteps 0 to 249 of 1000, which have the least noise.
    """
    values = {"validation_loss": float(np.mean(losses, dtype=np.float64))}
    edges = [num_train_timesteps * number // NUM_BINS for number in range(NUM_BINS + 1)]
    for low, high in zip(edges, edges[1:], strict=False):
        inside = losses[(timesteps >= low) & (timesteps < high)]
        if len(inside):
            values[f"validation_loss_t{low}_{high}"] = float(np.mean(inside, dtype=np.float64))
    return values


class HeldOutLoss:
    """Measures the loss of the averaged weights on the first `--validation_images` of `images` in a fixed order.

    `loss_per_image(unet, batch, timesteps)` returns the training loss (B,) with the noise in `batch.noise`.
    `condition` gives the conditions of `images`, none of which is dropped. Create it, and call it, on every rank.
    """

    def __init__(
        self,
        run: Run,
        images: PreparedImages,
        loss_per_image: Callable[[torch.nn.Module, Batch, torch.Tensor], torch.Tensor],
        num_train_timesteps: int,
        condition: Condition | None = None,
    ):
        self.run, self.images, self.loss_per_image, self.condition = run, images, loss_per_image, condition
        self.num_train_timesteps = num_train_timesteps
        seed, count = run.options.seed, min(len(images), run.options.validation_images)
        self.indices = sample_indices(np.arange(count), len(images), seed)
        self.uniforms = torch.from_numpy(stratified_uniforms(seed, count))
        self.timesteps = uniform_timesteps(self.uniforms, num_train_timesteps)
        self._measured_step = run.log.last_step("validation_loss")

    def measure(self) -> None:
        """Measure, log and print the loss of the current step, unless that was done already."""
        run = self.run
        if self._measured_step == run.step:
            return
        self._measured_step = run.step
        with run.averaged_weights() as unet, torch.no_grad(), run.accelerator.autocast():
            values = loss_by_noise(self.losses(unet), self.timesteps.numpy(), self.num_train_timesteps)
        run.log.write_values(run.step, values)
        total, *bins = ((name.removeprefix("validation_loss_"), value) for name, value in values.items())
        by_noise = ", ".join(f"{name.replace('_', '-')} {value:.4f}" for name, value in bins)
        say(f"step {run.step}: validation loss {total[1]:.4f} ({by_noise})")

    def losses(self, unet: torch.nn.Module) -> np.ndarray:
        """The loss of each validation image (N,) float32, on every rank; each computes its share."""
        accelerator, batch_size = self.run.accelerator, self.run.options.eval_batch_size
        share = range(accelerator.process_index, len(self.indices), accelerator.num_processes)
        losses = torch.zeros(len(self.indices), device=accelerator.device)
        for start in range(0, len(share), batch_size):
            rows = share[start : start + batch_size]
            batch = self._batch(rows)
            timesteps = self.timesteps[list(rows)].to(accelerator.device)
            losses[list(rows)] = self.loss_per_image(unet, batch, timesteps).float()
        return accelerator.reduce(losses, "sum").cpu().numpy()

    def _batch(self, rows: range) -> Batch:
        device, images = self.run.accelerator.device, self.images
        indices = self.indices[list(rows)]
        pixels = to_host_tensor(images.gather(indices, None))  # the centre
        shape = (images.channels, images.height, images.width)
        noise = normal_draws(self.run.options.seed, 0, rows, shape, Purpose.VALIDATION_NOISE)
        inputs = to_training_size(to_model_input(pixels.to(device), images), shape[1:])
        condition = {} if self.condition is None else self.condition.inputs(indices)
        return Batch(
            images=inputs,
            noise=torch.from_numpy(noise).to(device),
            uniforms=self.uniforms[list(rows)],
            indices=indices,
            step=self.run.step,
            micro_step=0,
            condition={name: value.to(device) for name, value in condition.items()},
            picture=self._picture(inputs, indices, rows),
        )

    def _picture(self, images: torch.Tensor, indices: np.ndarray, rows: range) -> torch.Tensor | None:
        picture = None if self.condition is None else self.condition.picture
        if picture is None:
            return None
        drawn = picture.draw(self.run.options.seed, 0, rows, len(self.indices))
        drawn = {name: value.to(images.device) for name, value in drawn.items()}
        return picture.channels(picture.source(images, indices), drawn)


def _check_conditioning_folder(options: TrainingOptions) -> None:
    """Raise `UserError` if there are no raw held-out images for `--validation_conditioning_data_dir`."""
    folder, given = getattr(options, "validation_conditioning_data_dir", None), options.validation_data_dir
    if folder is None:
        return
    if given is None:
        raise UserError(f"--validation_conditioning_data_dir {folder} needs --validation_data_dir, its images")
    if exists(location(given, options.storage_options) / PREPARATION_NAME):
        raise UserError(
            f"--validation_conditioning_data_dir {folder}, but --validation_data_dir {given} is prepared already: "
            "leave the flag out, or prepare the raw images with --conditioning_data_dir"
        )


def _refuse_training_images(given: str, options: TrainingOptions) -> None:
    """The loss on training images says nothing about other images."""
    if options.train_data_dir is None or options.dataset_name is not None:
        return
    folders = [location(where, options.storage_options) for where in (given, options.train_data_dir)]
    raw = not any(exists(folder / PREPARATION_NAME) for folder in folders)
    held_out, trained_on = (
        str(folder.resolve() if isinstance(folder, Path) else folder).rstrip("/") for folder in folders
    )
    if held_out == trained_on or (raw and held_out.startswith(f"{trained_on}/")):
        raise UserError(
            f"--validation_data_dir {given} is part of --train_data_dir "
            f"{options.train_data_dir}, whose images are trained on: move the held-out images elsewhere"
        )
