"""A rank of test_muon_divided_over_processes_is_muon_bit_for_bit in tests/training/test_optimizers.py.

muon_worker.py CONFIG RESULT     # leaves RESULT<rank>: weights and state of the optimizer after three steps
"""

import os
import sys

import torch
import torch.distributed as dist
from diffusers import UNet2DModel
from safetensors.torch import save_file

from trainkit.options.training import OptimizationOptions
from trainkit.training.optimizers import build_optimizer

STEPS = 3


def muon_steps(config: str | os.PathLike, result: str | os.PathLike, rank: int = 0) -> None:
    """Take steps with the same gradients on each rank, and write what they made of weights and state."""
    torch.manual_seed(0)
    unet = UNet2DModel.from_config(UNet2DModel.load_config(config))
    options = OptimizationOptions(optimizer="muon", learning_rate=1e-3, adam_weight_decay=0.1)
    optimizer = build_optimizer(options, unet)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        for parameter in unet.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    states = {f"{i}/{what}": x for i, p in enumerate(unet.parameters()) for what, x in optimizer.state[p].items()}
    save_file({name: p.detach() for name, p in unet.named_parameters()} | states, f"{result}{rank}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    muon_steps(sys.argv[1], sys.argv[2], dist.get_rank())
    dist.destroy_process_group()
