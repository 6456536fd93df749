"""How well the hardware is used: FLOPs of the model, the device's peak, memory."""

import resource
import sys

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

# Dense peaks in TFLOP/s by a part of torch's device name: bfloat16/float16, and TF32 for float32 runs, from NVIDIA's
# data sheets (those with sparsity halved). The more special name stands first.
PEAKS = {
    "H200": (989, 495),
    "H100 PCIe": (756, 378),
    "H100": (989, 495),
    "A100": (312, 156),
    "L40S": (362, 183),
    "L4": (121, 60),
    "RTX 4090": (165, 83),
    "RTX 3090": (71, 36),
    "V100": (125, 15.7),
    "T4": (65, 8.1),
}


def flops_of_image(unet: nn.Module, shape: tuple[int, int, int], inputs: dict[str, torch.Tensor] | None = None) -> int:
    """FLOPs of training on one image (C, H, W) `shape`: three times the forward pass, since the backward pass is two.

    A multiplication and an addition are two FLOPs; recomputation (`--gradient_checkpointing`) is not counted, as is
    usual for model FLOP utilisation (Chowdhery et al. 2022, appendix B). `inputs` are the model's further keyword
    arguments for one image.
    """
    device, training = next(unet.parameters()).device, unet.training
    image, timestep = torch.zeros(1, *shape, device=device), torch.zeros(1, dtype=torch.long, device=device)
    inputs = {name: value.to(device) for name, value in (inputs or {}).items()}
    unet.eval()
    # the plain attention is made of products that the counter knows on every device
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        unet(image, timestep, **inputs)
    unet.train(training)
    return 3 * counter.get_total_flops()


def peak_tflops(device_name: str, mixed_precision: str) -> float | None:
    """The dense peak of a device by its name, in TFLOP/s; None where it is not in the table (a CPU, for one)."""
    for name, (half, single) in PEAKS.items():
        if name in device_name:
            return half if mixed_precision in ("bf16", "fp16") else single
    return None


def memory_peak_mib(device: torch.device) -> float:
    """The most memory that was in use so far in MiB: on CUDA by tensors, else by this process as a whole."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


class Throughput:
    """Turns images/s into what a log line says of the hardware."""

    def __init__(self, image_flops: int, device: torch.device, mixed_precision: str, num_processes: int):
        self.image_flops, self.device, self.num_processes = image_flops, device, num_processes
        self.device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self.peak_tflops = peak_tflops(self.device_name, mixed_precision)

    def __str__(self) -> str:
        peak = f"peak {self.peak_tflops:g} TFLOP/s" if self.peak_tflops else "no peak known"
        return f"{self.image_flops / 1e9:.2f} GFLOP an image, {self.device_name} with {peak}"

    def values(self, images_per_s: float) -> dict[str, float]:
        """`images_per_s` is over all processes; the rest is a device's. `mfu`: the share of the peak, where known."""
        of_device = images_per_s / self.num_processes
        tflops = of_device * self.image_flops / 1e12
        values = {
            "images_per_s": round(images_per_s, 1),
            "images_per_s_per_device": round(of_device, 1),
            "model_tflops_per_s": round(tflops, 4),
            "memory_peak_mib": round(memory_peak_mib(self.device), 1),
        }
        return values | ({"mfu": round(tflops / self.peak_tflops, 4)} if self.peak_tflops else {})
