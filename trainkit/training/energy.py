"""The energy that the devices of a run have used, by the counters of NVIDIA GPUs (NVML) or of Linux CPUs (RAPL).

Nothing needs to be installed for it. Where no counter can be read, there is no figure: RAPL is often for root alone.
"""

import ctypes
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

NVML_LIBRARY = "libnvidia-ml.so.1"  # of the driver
POWERCAP = Path("/sys/class/powercap")
INTERVAL_S = 60.0  # RAPL starts again at 0 after about 2.6e5 J: an hour at 70 W


class Counter(NamedTuple):
    """`read` returns joules, which begin again at 0 above `range_j` (0: they never do); raises OSError."""

    read: Callable[[], float]
    range_j: float = 0.0


class EnergyMeter:
    """Adds up the energy of this machine's devices of a run, over resumes too. Use it on the first process.

    `earlier` is what `record` returned before the resume, and `step` the optimizer step that this start begins at.
    """

    def __init__(self, device: torch.device, num_devices: int, step: int, earlier: dict | None = None):
        self._counters, self._covers = find_counters(device, num_devices)
        earlier = earlier or {}
        self._joules, self._since = earlier.get("joules", 0.0), earlier.get("since_step", step)
        self._last: list[float] = []
        self._read_at = time.monotonic()
        self.update()

    def update(self, at_least_s: float = 0.0) -> None:
        """Read the counters, unless that was less than `at_least_s` ago. A failure ends the measurement."""
        if not self._counters or time.monotonic() - self._read_at < at_least_s:
            return
        self._read_at = time.monotonic()
        try:
            now = [counter.read() for counter in self._counters]
        except (OSError, ValueError):
            self._counters = []
            return
        for before, after, counter in zip(self._last, now, self._counters, strict=False):  # there is none before
            self._joules += after - before + (counter.range_j if after < before else 0.0)
        self._last = now

    def record(self) -> dict[str, Any] | None:
        """What the report says: joules, what they cover, and since which optimizer step; None if nothing is known."""
        self.update()
        if not self._counters:
            return None
        return {"joules": round(self._joules, 1), "covers": self._covers, "since_step": self._since}


def find_counters(device: torch.device, num_devices: int) -> tuple[list[Counter], str]:
    """The counters of the first `num_devices` GPUs, or of the processors for the CPU, and what they cover."""
    if device.type == "cuda":
        counters = [counter for index in range(num_devices) if (counter := _gpu_counter(index)) is not None]
        whole = len(counters) == num_devices
        names = "the GPU" if num_devices == 1 else f"the {num_devices} GPUs of this machine"
        return (counters, f"{names} alone") if whole else ([], "")
    if device.type == "cpu":
        return _processor_counters(), "the processors alone, other programs on them included"
    return [], ""


def _processor_counters() -> list[Counter]:
    """Those of the processor packages, of which cores and the like are parts."""
    counters = []
    for zone in sorted(POWERCAP.glob("intel-rapl:*")):  # AMD's have this name too
        try:
            if (zone / "name").read_text().startswith("package"):
                _microjoules(zone / "energy_uj")
                counters.append(Counter(_reader(zone / "energy_uj"), _microjoules(zone / "max_energy_range_uj")))
        except (OSError, ValueError):
            return []
    return counters


def _microjoules(file: Path) -> float:
    return int(file.read_text()) / 1e6


def _reader(file: Path) -> Callable[[], float]:
    return lambda: _microjoules(file)


def _gpu_counter(index: int) -> Counter | None:
    """The counter of CUDA device `index`, found by its UUID: NVML does not know CUDA_VISIBLE_DEVICES."""
    try:
        nvml = ctypes.CDLL(NVML_LIBRARY)
        name = f"GPU-{torch.cuda.get_device_properties(index).uuid}".encode()
        handle, found = ctypes.c_void_p(), ctypes.c_ulonglong()
        _check(nvml.nvmlInit_v2())
        _check(nvml.nvmlDeviceGetHandleByUUID(ctypes.c_char_p(name), ctypes.byref(handle)))
    except (OSError, AttributeError, RuntimeError, AssertionError):  # no driver, an older torch, no such device
        return None

    def read() -> float:
        _check(nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(found)))  # mJ since the driver started
        return found.value / 1e3

    try:
        read()
    except OSError:  # before Volta
        return None
    return Counter(read)


def _check(status: int) -> None:
    if status:
        raise OSError(f"NVML returns {status}")


def local_devices() -> int:
    """The number of this machine's processes in the run, each of which has a device."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
