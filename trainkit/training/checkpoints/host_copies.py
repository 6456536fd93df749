"""Copies of tensors on the host: of the CPU's at once, of a GPU's while the GPU goes on with other work.

copies = HostCopies(device)
copy = copies.add(tensor)        # its content follows
copies.before_update()           # before the tensors change: only the device waits, not the host
copies.wait()                    # in any thread; then every copy has its content
"""

import torch

from trainkit.data.loading.transfer import pins_memory
from trainkit.training.sharding import copy_now


class HostCopies:
    """Copies that share no memory with their tensors. On CUDA and XPU they are made by a second stream."""

    def __init__(self, device: torch.device):
        self._module = torch.get_device_module(device) if pins_memory(device) else None
        self._done = None
        if self._module is not None:
            self._stream = self._module.Stream(device)
            self._stream.wait_stream(self._module.current_stream(device))

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy of `tensor` on the CPU."""
        tensor = tensor.detach()
        if self._module is None or tensor.device.type == "cpu":
            return copy_now(tensor)
        with self._module.stream(self._stream):
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            copy.copy_(tensor.contiguous(), non_blocking=True)
            tensor.record_stream(self._stream)
            self._done = self._stream.record_event()
        return copy

    def before_update(self) -> None:
        """Let the device's work from here on start after the copies."""
        if self._module is not None and self._done is not None:
            self._module.current_stream().wait_event(self._done)

    def wait(self) -> None:
        """Wait until all copies are made."""
        if self._done is not None:
            self._done.synchronize()
