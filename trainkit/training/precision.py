"""What `--mixed_precision auto` means on a device, and a warning where bfloat16 would be slower than float32."""

import torch
from accelerate.utils import parse_flag_from_env

from trainkit.terminal import warn

SLOW_BF16 = (
    "--mixed_precision bf16: this CPU has no instructions for bfloat16 (AVX-512 BF16 or AMX) and computes it several "
    "times slower than float32: use --mixed_precision auto or no"
)


def resolve_precision(mixed_precision: str | None) -> str | None:
    """`--mixed_precision` with auto replaced by bf16, where the device of this process computes it fast, or by no.

    None stays: Accelerate's launcher decides. Before the `Accelerator` is built, which takes the precision.
    """
    if mixed_precision != "auto":
        return mixed_precision
    return "bf16" if has_fast_bfloat16(_device_type()) else "no"


def has_fast_bfloat16(device_type: str) -> bool:
    """Whether a device of this type multiplies bfloat16 in hardware, as far as torch tells."""
    if device_type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # get_capabilities: newer
    if device_type == "cuda":  # also AMD's; Volta and Turing only emulate it
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device_type == "xpu" and torch.xpu.is_bf16_supported()


def warn_of_slow_bfloat16(mixed_precision: str, device_type: str) -> None:
    """Print a line if a CPU has to emulate `--mixed_precision bf16`."""
    if mixed_precision == "bf16" and device_type == "cpu" and not has_fast_bfloat16("cpu"):
        warn(SLOW_BF16)


def _device_type() -> str:
    """The type of device that Accelerate will choose."""
    device = torch.accelerator.current_accelerator()  # None without one
    return "cpu" if device is None or parse_flag_from_env("ACCELERATE_USE_CPU") else device.type
