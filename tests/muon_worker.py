"""A rank of test_muon_divided_over_processes_is_muon_bit_for_bit in tests/training/test_optimizers.py.

muon_worker.py CONFIG RESULT     # leaves RESULT_replicas<rank> and RESULT_shards<rank>: after three steps of weights
                                 # that each process holds, and of shards, all weights and the state of the optimizer
"""

import os
import sys
from unittest import mock

import torch
import torch.distributed as dist
from diffusers import UNet2DModel
from host_reads import HostReads
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor, distribute_tensor

from trainkit.options.training import OptimizationOptions
from trainkit.training import divided_muon
from trainkit.training.optimizers import build_optimizer
from trainkit.training.sharding import shard

STEPS = 3


def muon_steps(config: str | os.PathLike, result: str | os.PathLike, sharded: bool = False) -> int:
    """Take steps with the same gradients on each rank, and write what they made of weights and state.

    Returns how many matrices Muon orthogonalized, all steps and processes together.
    """
    torch.manual_seed(0)
    unet = UNet2DModel.from_config(UNet2DModel.load_config(config))
    if sharded:
        shard(unet, None, "cpu")
    options = OptimizationOptions(optimizer="muon", learning_rate=1e-3, adam_weight_decay=0.1)
    optimizer = build_optimizer(options, unet)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        for parameter in unet.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            if isinstance(parameter, DTensor):
                parameter.grad = distribute_tensor(parameter.grad, parameter.device_mesh, parameter.placements)
        with HostReads() as reads:
            optimizer.step()
        assert reads.count == 0
    states = {f"{i}/{what}": x for i, p in enumerate(unet.parameters()) for what, x in optimizer.state[p].items()}
    found = dict(unet.named_parameters()) | states
    save_file({name: x.full_tensor() if sharded else x.detach() for name, x in found.items()}, result)
    return STEPS * len(optimizer.param_groups[0]["params"])


def main(config: str, result: str) -> None:
    rank, function = dist.get_rank(), "zero_power_via_newton_schulz_5"
    for name, sharded in (("replicas", False), ("shards", True)):
        with (
            mock.patch.object(divided_muon, function, wraps=getattr(divided_muon, function)) as orthogonalize,
            mock.patch.object(divided_muon, "EXCHANGED_AT_ONCE", 1),  # several rounds
        ):
            matrices = muon_steps(config, f"{result}_{name}{rank}", sharded)
        calls = torch.tensor(orthogonalize.call_count)
        assert calls > 0, "this process has no share"
        dist.all_reduce(calls)
        assert calls == matrices, "a matrix is orthogonalized by one process"


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    main(*sys.argv[1:])
    dist.destroy_process_group()
