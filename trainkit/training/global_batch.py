"""Split the global batch of an optimizer step into processes and micro-steps."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import UNet2DModel

from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.loading.loader import BatchShape
from trainkit.errors import UserError
from trainkit.options.script import TrainingOptions
from trainkit.terminal import say
from trainkit.training.checkpoints.state import read_training_state
from trainkit.training.device import largest_micro_batch, memory_trial


def split_global_batch(
    options: TrainingOptions,
    accelerator: Accelerator,
    unet: UNet2DModel,
    images: PreparedImages,
    inputs_of: Callable[[int], dict[str, torch.Tensor]],
    candidates: list[Path],
) -> BatchShape:
    """The split that the flags give. On resume the global batch size of the first of `candidates` is kept, and the
    number of micro-steps follows.

    `inputs_of(n)` returns further keyword arguments of `unet` for n images, for `--find_batch_size`. A collective.
    Raises `UserError` if the global batch size of the checkpoint cannot be reached.
    """
    micro_steps, per_device = options.gradient_accumulation_steps, options.train_batch_size
    kept = read_training_state(candidates[0])["global_batch_size"] if candidates else None
    if options.find_batch_size:
        rows = (kept or per_device * micro_steps * accelerator.num_processes) // accelerator.num_processes
        image_shape = (unet.config.in_channels, images.height, images.width)
        per_device = largest_micro_batch(rows, memory_trial(accelerator, unet, image_shape, inputs_of))
        micro_steps = rows // per_device
    once = per_device * accelerator.num_processes
    if kept is not None:
        if kept % once:
            raise UserError(
                f"--train_batch_size {per_device} on {accelerator.num_processes} processes cannot "
                f"make up the global batch of {kept} images that {candidates[0].name} was trained with: choose a "
                f"divisor of {kept // math.gcd(kept, accelerator.num_processes)}"
            )
        if kept // once != micro_steps:
            say(f"--gradient_accumulation_steps {kept // once} keeps the global batch of {kept}")
        micro_steps = kept // once
    accelerator.gradient_accumulation_steps = micro_steps
    return BatchShape(per_device, micro_steps, accelerator.num_processes, accelerator.process_index)
