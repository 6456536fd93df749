"""How often a block of code waits for the device."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class HostReads(TorchDispatchMode):
    """Counts what `.item()`, `float()` and `bool()` of a tensor and `nonzero` call: on a GPU, each waits for it."""

    count = 0
    functions = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function in self.functions:
            self.count += 1
        return function(*arguments, **(keywords or {}))
