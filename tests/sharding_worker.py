"""A rank of tests/training/test_sharding.py: torch.distributed.run starts two, each trains on its half of every batch.

sharding_worker.py FOLDER     # reads FOLDER/unsharded_half.pt, leaves FOLDER/sharded_half.pt, resumed_all.pt, copy/
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import UNet2DModel

from trainkit.errors import UserError
from trainkit.training import sharding
from trainkit.training.averages.ema import ShardedEMA

BATCHES = 4  # steps of all, half of them before the resume
MICRO_STEPS = 2
CONFIG = {
    "sample_size": 8, "layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 8,
}  # fmt: skip


class Training:
    """A tiny UNet with AdamW, a schedule and averages: all that a checkpoint holds."""

    def __init__(self, seed: int, sharded: bool):
        torch.manual_seed(seed)
        self.unet = UNet2DModel(**CONFIG)
        self.unet.time_embedding.linear_1.bias.requires_grad_(False)
        if sharded:
            sharding.shard(self.unet, None, "cpu")
        # A large epsilon: the gradient of the key bias is zero but for rounding, which Adam would otherwise blow up.
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=1e-3, weight_decay=1e-2, eps=1e-4)
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.averages = ShardedEMA(self.unet, use_ema_warmup=True)
        self.norms = []

    def train(self, first: int, last: int, rank: int = 0, ranks: int = 1) -> None:
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            images = torch.randn(8, 3, 8, 8, generator=generator).chunk(MICRO_STEPS)
            for i in range(MICRO_STEPS):
                part = images[i].chunk(ranks)[rank]
                if ranks > 1 and i < MICRO_STEPS - 1:
                    with sharding.no_gradient_sync(self.unet):
                        self._backward(part)
                else:
                    self._backward(part)
            norm = torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 0.5)
            self.norms.append(sharding.gradient_norm_to_tensor(norm).item())
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()
            self.averages.step()
            with self.averages.swapped_in(), torch.no_grad():  # as for a grid of samples
                self.unet(images[0], 5)

    def _backward(self, images: torch.Tensor) -> None:
        loss = (self.unet(images, torch.arange(len(images)) * 0 + 3).sample - images.flip(-1)).square().mean()
        (loss / MICRO_STEPS).backward()

    def state(self) -> dict:
        return {
            "weights": sharding.full_weights(self.unet),
            "averages": self.averages.full_weights(),
            "optimizer": sharding.full_optimizer_state(self.unet, self.optimizer),
            "average_settings": self.averages.state_dict(),
            "schedule": self.schedule.state_dict(),
            "norms": self.norms,
        }

    def load(self, state: dict) -> None:
        """`state` is whole on rank 0 alone, but for the small parts."""
        sharding.load_full_optimizer_state(self.unet, self.optimizer, state["optimizer"])
        sharding.load_full_weights(self.unet, state["weights"])
        self.averages.load_full_weights(state["averages"])
        self.averages.load_state_dict(state["average_settings"])
        self.schedule.load_state_dict(state["schedule"])


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()

    training = Training(seed=0, sharded=True)
    assert sharding.is_sharded(training.unet)
    held = sum(part.numel() for part in sharding.local_parameters(training.unet))
    assert held < 0.6 * sum(p.numel() for p in training.unet.parameters()), "each rank holds about half"
    training.train(0, BATCHES // 2, rank, 2)
    state = training.state()
    assert rank == 0 or not (state["weights"] or state["averages"] or state["optimizer"])
    copy = sharding.unsharded_copy(training.unet)
    assert type(copy) is UNet2DModel and not sharding.is_sharded(copy)
    if rank == 0:
        torch.save(state, folder / "sharded_half.pt")
        copy.save_pretrained(folder / "copy")

    resumed = Training(seed=1 + rank, sharded=True)  # what was there before must not matter
    saved = torch.load(folder / "unsharded_half.pt", weights_only=True)
    if rank != 0:
        saved |= {"weights": {}, "averages": {}, "optimizer": {}}
    resumed.load(saved)
    resumed.train(BATCHES // 2, BATCHES, rank, 2)
    state = resumed.state()
    if rank == 0:
        torch.save(state, folder / "resumed_all.pt")

    broken = saved["weights"] | {"conv_in.bias": torch.zeros(3)} if rank == 0 else {}
    try:  # on both ranks: one alone would wait for the other for half an hour
        sharding.load_full_weights(resumed.unet, broken)
        raise AssertionError("weights of another shape were taken")
    except ValueError as error:
        assert "conv_in.bias: expected (8,), given (3,)" in str(error)

    check_bfloat16()
    dist.ReduceOp.AVG = dist.ReduceOp.SUM  # as gloo had it in torch 2.7
    try:
        Training(seed=0, sharded=True)
        raise AssertionError("gradients would be multiplied by the number of processes")
    except UserError as error:
        assert "cannot train sharded weights on a CPU" in str(error)
    dist.destroy_process_group()


def check_bfloat16() -> None:
    """Blocks compute in bfloat16, close to autocast alone; parameters stay float32 and timesteps exact."""
    results = {}
    for sharded in (False, True):
        torch.manual_seed(0)
        unet = UNet2DModel(**CONFIG)
        images = torch.randn(2, 3, 8, 8)
        if sharded:
            sharding.shard(unet, "bf16", "cpu")
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                next_time = unet(images, torch.full((2,), 1000.0)).sample.float()
            sharding.reshard(unet)
            sample = unet(images, torch.full((2,), 999.0)).sample.float()
        sample.square().mean().backward()
        gradients = [p.grad for p in unet.parameters()]
        assert {p.dtype for p in unet.parameters()} == {gradient.dtype for gradient in gradients} == {torch.float32}
        norm = sharding.gradient_norm_to_tensor(torch.nn.utils.clip_grad_norm_(unet.parameters(), 1e9))
        assert not torch.equal(sample, next_time), "999 became 1000"
        results[sharded] = (sample, next_time, norm)
    torch.testing.assert_close(results[True], results[False], atol=0.02, rtol=0.02)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
