"""How well the hardware is used: FLOPs of the model, peak FLOP/s of the device, memory."""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

# Dense peaks in TFLOP/s for bfloat16/float16 and for TF32, by a part of torch's device name, from NVIDIA's data sheets
# (values with sparsity halved). More specific names come first.
PEAKS = {
    "H200": (989, 495),
    "H100 PCIe": (756, 378),
    "H100 NVL": (835, 418),
    "H100": (989, 495),
    "A100": (312, 156),
    "L40S": (362, 183),
    "L40": (181, 90.5),
    "L4": (121, 60),
    "RTX 4090": (165, 83),
    "RTX 3090": (71, 36),
    "V100": (125, 15.7),
    "T4": (65, 8.1),
}


def flops_of_image(unet: nn.Module, shape: tuple[int, int, int], inputs: dict[str, torch.Tensor] | None = None) -> int:
    """FLOPs of training on one image of `shape` (C, H, W): three times those of the forward pass.

    A multiplication and an addition are two FLOPs. Recomputation (`--gradient_checkpointing`) is not counted, as usual
    for model FLOP utilization (Chowdhery et al. 2022, appendix B). `inputs` are further keyword arguments of the model
    for one image.
    """
    device, training = next(unet.parameters()).device, unet.training
    image, timestep = torch.zeros(1, *shape, device=device), torch.zeros(1, dtype=torch.long, device=device)
    inputs = {name: value.to(device) for name, value in (inputs or {}).items()}
    unet.eval()
    # plain attention consists of products that the counter knows on every device
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        unet(image, timestep, **inputs)
    unet.train(training)
    return 3 * counter.get_total_flops()


def peak_tflops(device_name: str, mixed_precision: str) -> float | None:
    """The dense peak of a device in TFLOP/s by its name; None if it is not in the table, such as a CPU."""
    for name, (half, single) in PEAKS.items():
        if name in device_name:
            return half if mixed_precision in ("bf16", "fp16") else single
    return None


def memory_peak_mib(device: torch.device) -> float:
    """The peak memory use so far in MiB: of tensors on a GPU, else of this process. MPS reports what Metal holds."""
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**20
    if device.type != "cpu":
        return torch.get_device_module(device).max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        found = psutil.Process().memory_info()
        return getattr(found, "peak_wset", found.rss) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def core_seconds() -> tuple[float, float] | None:
    """Seconds that all threads of this process have run, and have waited for a core; None where Linux does not say."""
    ran_ns = waited_ns = 0
    for file in Path("/proc/self/task").glob("*/schedstat"):
        try:
            ran, waited, _ = file.read_text().split()
        except (OSError, ValueError):  # the thread has just ended; or the kernel does not count
            continue
        ran_ns, waited_ns = ran_ns + int(ran), waited_ns + int(waited)
    return (ran_ns / 1e9, waited_ns / 1e9) if ran_ns else None


class CoreWait:
    """The share of its time that a process waits for a core, because other programs use them."""

    def __init__(self):
        self._last = core_seconds()

    def share(self) -> float | None:
        """The share in [0, 1] since the last call, over the threads that were not idle; None if it is not known."""
        now, last = core_seconds(), self._last
        self._last = now
        if now is None or last is None:
            return None
        ran, waited = max(now[0] - last[0], 0.0), max(now[1] - last[1], 0.0)  # threads that ended are not counted
        return waited / max(ran + waited, 1e-9)


def device_name(device: torch.device) -> str:
    """The name of the GPU, or the kind of the device: cpu, mps."""
    name = None if device.type == "cpu" else getattr(torch.get_device_module(device), "get_device_name", None)
    return device.type if name is None else name(device)


class Throughput:
    """Turns images/s into the hardware values of a log line."""

    def __init__(self, image_flops: int, device: torch.device, mixed_precision: str, num_processes: int):
        self.image_flops, self.device, self.num_processes = image_flops, device, num_processes
        self.device_name = device_name(device)
        self.peak_tflops = peak_tflops(self.device_name, mixed_precision)

    def __str__(self) -> str:
        return f"{self.image_flops / 1e9:.3g} GFLOP per image in training"

    def values(self, images_per_s: float) -> dict[str, float]:
        """`images_per_s` is over all processes, the rest per device. `mfu` is the fraction of the peak, if known."""
        of_device = images_per_s / self.num_processes
        tflops = of_device * self.image_flops / 1e12
        values = {
            "images_per_s": round(images_per_s, 1),
            "images_per_s_per_device": round(of_device, 1),
            "model_tflops_per_s": round(tflops, 4),
            "memory_peak_mib": round(memory_peak_mib(self.device), 1),
        }
        return values | ({"mfu": round(tflops / self.peak_tflops, 4)} if self.peak_tflops else {})
