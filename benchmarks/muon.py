"""How much time does a step of Muon take if the processes divide the matrices, against each doing all?

    python benchmarks/muon.py --rounds 5
    python benchmarks/muon.py --rounds 5 --shard_weights     # each process holds half of each weight

Two processes on the CPU, each with one thread; the UNet of DDPM's CIFAR-10 (35.7 M parameters); turns alternate. Times
are those of the first process. On GPUs the exchange is a larger part, and this says nothing about it.
"""

import argparse
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
import torch.multiprocessing
from diffusers import UNet2DModel
from pytorch_optimizer import Muon

from train import UNETS
from trainkit.options.training import OptimizationOptions
from trainkit.training import divided_muon
from trainkit.training.optimizers import build_optimizer
from trainkit.training.sharding import local_parameters, local_part, shard


def measure(rank: int, processes: int, store: str, rounds: int, unet_name: str, sharded: bool) -> None:
    dist.init_process_group("gloo", rank=rank, world_size=processes, store=dist.FileStore(store, processes))
    torch.set_num_threads(1)
    optimizers, divided = {}, divided_muon.DividedMuon
    undivided = type("Undivided", (divided,), {"_step_foreach_group": Muon._step_foreach_group})
    for name, optimizer_class in (("each does all", undivided), ("divided", divided)):
        torch.manual_seed(0)
        unet = UNet2DModel(sample_size=32, **UNETS[unet_name])
        if sharded:
            shard(unet, None, "cpu")
        divided_muon.DividedMuon = optimizer_class
        optimizers[name] = unet, build_optimizer(OptimizationOptions(optimizer="muon", learning_rate=2e-3), unet)
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    busy_seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for round_number in range(rounds + 1):
        for name, (unet, optimizer) in optimizers.items():
            generator = torch.Generator().manual_seed(round_number)
            for parameter in unet.parameters():
                parameter.grad = torch.empty_like(parameter)
                local_part(parameter.grad).normal_(generator=generator)
            dist.barrier()
            started, busy = time.perf_counter(), time.process_time()
            optimizer.step()
            if round_number:  # the first one creates the state
                seconds[name].append(time.perf_counter() - started)
                busy_seconds[name].append(time.process_time() - busy)
    one, other = (local_parameters(unet) for unet, _ in optimizers.values())
    assert all(map(torch.equal, one, other))
    if rank == 0:
        for what, found in (("time", seconds), ("processor time", busy_seconds)):
            for name, values in found.items():
                spread = f"{min(values):.2f} to {max(values):.2f}"
                print(f"{name:14}{statistics.median(values):7.2f} s of {what} per step ({spread})")
            ratio = statistics.median(a / b for a, b in zip(*found.values(), strict=True))
            print(f"divided: {ratio:.2f} times as fast in {what} (median over turns)")
        print("the weights are the same bit for bit")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="steps of each, after a first one")
    parser.add_argument("--unet", default="ddpm_cifar10", choices=tuple(UNETS), help="the UNet")
    parser.add_argument("--shard_weights", action="store_true", help="divide the weights too (FSDP)")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        rest = arguments.rounds, arguments.unet, arguments.shard_weights
        torch.multiprocessing.spawn(measure, (2, store, *rest), nprocs=2)


if __name__ == "__main__":
    main()
