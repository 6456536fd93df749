"""Speed and memory: device settings, memory layout, compilation, micro-batch size. None changes what is learned."""

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size
from diffusers import ModelMixin, UNet2DModel
from diffusers.models.resnet import ResnetBlock2D

from trainkit.errors import UserError
from trainkit.options.training import HardwareOptions
from trainkit.terminal import say


class CompileOptions(Protocol):
    """Options of a script that can compile its UNet and choose its memory layout; a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    compile: bool | None
    compile_mode: str
    channels_last: str


def prepare_device(options: HardwareOptions) -> None:
    """On CUDA: the fastest algorithm for each convolution, and with `--allow_tf32` float32 products in TensorFloat-32.

    TensorFloat-32 has 10 bits of mantissa. torch and diffusers' example use it for convolutions alone, unless told
    otherwise. It makes no difference under bf16 and fp16 autocast.
    """
    if torch.cuda.is_available():
        torch.backends.cudnn.benchmark = True  # off again with --deterministic
        torch.set_float32_matmul_precision("high" if options.allow_tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = options.allow_tf32


def memory_format(options: CompileOptions, device: torch.device) -> torch.memory_format:
    """The memory layout of images and weights; `--channels_last auto` is yes on CUDA only, where it is faster."""
    wanted = options.channels_last == "yes" or (options.channels_last == "auto" and device.type == "cuda")
    return torch.channels_last if wanted else torch.contiguous_format


def move_to_device(unet: UNet2DModel, options: HardwareOptions, device: torch.device) -> UNet2DModel:
    """Move `unet` to `device` in its memory layout, with gradient checkpointing if the options ask for it.

    Weights that will be sharded stay contiguous, because fully_shard refuses others.
    """
    if options.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    layout = torch.contiguous_format if options.shard_weights else memory_format(options, device)
    if layout == torch.channels_last:
        _keep_layout_in_shortcuts(unet)
    return unet.to(device=device, memory_format=layout)


def _keep_layout_in_shortcuts(unet: UNet2DModel) -> None:
    """Keep ResnetBlock2D itself out of training mode, in which it copies its shortcut's input to contiguous memory.

    diffusers spares DDP a warning about the strides of small weights that way, and convolutions copy the input back.
    The modules inside a block, such as dropout, follow `train` and `eval` as usual.
    """

    def train(block: ResnetBlock2D, mode: bool = True) -> ResnetBlock2D:
        torch.nn.Module.train(block, mode)
        block.training = False
        return block

    for block in unet.modules():
        if isinstance(block, ResnetBlock2D):
            block.train = partial(train, block)
            block.training = False


WITHOUT_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}


def wants_compilation(options: CompileOptions, device: torch.device) -> bool:
    """Whether the UNet is compiled: what `--compile` or `--no_compile` says, else on CUDA if torch.compile can run."""
    if options.compile is not None or device.type != "cuda":
        return bool(options.compile)
    missing = None
    if torch.cuda.get_device_capability(device)[0] < 7:
        missing = "a GPU of compute capability 7.0 or newer"
    elif importlib.util.find_spec("triton") is None:
        missing = "the package triton"
    elif sys.platform != "win32" and not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        missing = "a C compiler"
    if missing:
        say(f"the UNet is not compiled, because torch.compile needs {missing}")
    return missing is None


def compile_unet(unet: ModelMixin, options: CompileOptions, micro_steps: int, device: torch.device) -> None:
    """Compile `unet` in place, so that weights keep their names, if `wants_compilation`.

    The first step then takes a minute or more. By default a part that cannot be compiled runs as it is. With several
    micro-steps CUDA graphs are left out: gradients add up in memory that the next replay overwrites (pytorch#169545).
    """
    if wants_compilation(options, device):
        torch._dynamo.config.suppress_errors = options.compile is None
        mode = options.compile_mode
        if micro_steps > 1:
            mode = WITHOUT_GRAPHS.get(mode, mode)
        # the first checkpoint would add keys to the configuration, and the next step would be compiled anew for that
        unet.to_json_string()
        # one shape is computed; guessing at others would only slow that one down
        unet.compile(mode=mode, dynamic=False)


@contextmanager
def uncompiled(unet: UNet2DModel) -> Iterator[None]:
    """Around sampling: batches of other shapes, and evaluation mode, would be compiled anew each."""
    compiled, unet._compiled_call_impl = unet._compiled_call_impl, None
    try:
        yield
    finally:
        unet._compiled_call_impl = compiled


def largest_micro_batch(rows: int, fits: Callable[[int], bool]) -> int:
    """The largest divisor of `rows` (the images of an optimizer step on a process) that `fits` into memory.

    Raises `UserError` where a single image does not.
    """
    sizes = [size for size in range(1, rows + 1) if rows % size == 0]
    low, high = -1, len(sizes)  # sizes[low] fits, sizes[high] does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(sizes[middle]) else (low, middle)
    if low < 0:
        raise UserError(
            "--find_batch_size: not even one image fits into memory; try --gradient_checkpointing, --mixed_precision "
            "bf16, --shard_weights or a smaller UNet"
        )
    return sizes[low]


def memory_trial(
    accelerator: Accelerator,
    unet: UNet2DModel,
    shape: tuple[int, int, int],
    inputs_of: Callable[[int], dict[str, torch.Tensor]] = lambda size: {},
) -> Callable[[int], bool]:
    """A function that tells whether forward and backward pass of n images (C, H, W) `shape` fit, on all ranks.

    `inputs_of(n)` are the model's further keyword arguments. It sets aside what the optimizer and the averages will
    take, and leaves weights, gradients and random state alone.
    """

    def fits(size: int) -> bool:
        fitted, reserved = True, []
        with torch.random.fork_rng(devices=[]):  # the device's is set before every micro-step of training
            try:
                # two Adam moments, one average, and the gradients while they are summed
                reserved += [torch.empty_like(p) for p in unet.parameters() for _ in range(4)]
                images = torch.zeros(size, *shape, device=accelerator.device)
                timesteps = torch.zeros(size, dtype=torch.long, device=accelerator.device)
                inputs = {name: value.to(accelerator.device) for name, value in inputs_of(size).items()}
                with accelerator.autocast():
                    prediction = unet(images, timesteps, **inputs).sample
                prediction.float().square().mean().backward()
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                if not should_reduce_batch_size(error):
                    raise
                fitted = False
            finally:
                reserved.clear()
                unet.zero_grad(set_to_none=True)
        if accelerator.device.type != "cpu":
            torch.get_device_module(accelerator.device).empty_cache()
        if accelerator.num_processes == 1:
            return fitted
        failures = torch.tensor([0 if fitted else 1], device=accelerator.device)
        return accelerator.reduce(failures, "sum").item() == 0

    return fits
