"""How much faster does the fused AdamW update sharded weights?

    python benchmarks/sharded_optimizer.py --rounds 20

Two processes on the CPU, each with one thread; turns alternate. Times are those of the first process, per parameter.
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

from trainkit.training.sharding import shard


def sharded_unet() -> UNet2DModel:
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return shard(UNet2DModel(sample_size=8, block_out_channels=(32, 64), **blocks), None, "cpu")


def set_gradients(unet: UNet2DModel) -> None:
    for parameter in unet.parameters():
        parameter.grad = torch.empty_like(parameter)
        parameter.grad.to_local().normal_()


def measure(rank: int, processes: int, store: str, rounds: int) -> None:
    dist.init_process_group("gloo", rank=rank, world_size=processes, store=dist.FileStore(store, processes))
    torch.set_num_threads(1)
    unets = {fused: sharded_unet() for fused in (False, True)}
    optimizers = {fused: torch.optim.AdamW(unet.parameters(), fused=fused) for fused, unet in unets.items()}
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for round_number in range(rounds + 1):
        for fused, unet in unets.items():
            set_gradients(unet)
            started = time.perf_counter()
            optimizers[fused].step()
            if round_number:  # the first one creates the state
                seconds[fused].append(time.perf_counter() - started)
    if rank == 0:
        count = len(list(unets[True].parameters()))
        ratio = statistics.median(one / other for one, other in zip(seconds[False], seconds[True], strict=True))
        for fused, name in ((False, "not fused"), (True, "fused")):
            each = [1e6 * value / count for value in seconds[fused]]
            print(f"{name:10}{statistics.median(each):7.0f} us per parameter ({min(each):.0f} to {max(each):.0f})")
        print(f"{count} parameters; the fused step is {ratio:.1f} times as fast (median over turns)")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        torch.multiprocessing.spawn(measure, (2, store, arguments.rounds), nprocs=2)


if __name__ == "__main__":
    main()
