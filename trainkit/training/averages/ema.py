"""An exponential moving average of weights that also works on sharded parameters.

diffusers' EMAModel can step on sharded parameters, but its `copy_to`, `restore` and `save_pretrained` raise on them:
torch has no `_foreach_copy_` for DTensor. This class works on each rank's own shard without communication, with the
same arithmetic as `EMAModel(foreach=True)`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from trainkit.errors import UserError
from trainkit.options.training import EmaOptions
from trainkit.training.sharding import copy_now, full_weights, is_sharded, load_full_weights, local_parameters

SETTINGS = (
    "decay",
    "min_decay",
    "optimization_step",
    "update_after_step",
    "use_ema_warmup",
    "inv_gamma",
    "power",
)


def build_ema(options: EmaOptions, model: torch.nn.Module, global_batch_size: int) -> "ShardedEMA | None":
    """The average that `EmaOptions` describe, or None. Its decay rises as 1 - (1 + step / inv_gamma) ** -power.

    A half-life in images gives the same average at any batch size: decay = 0.5 ** (batch / half-life), as in the
    training loop of EDM (Karras et al. 2022).
    """
    if not options.use_ema:
        return None
    decay, half_life = options.ema_max_decay, options.ema_half_life_images
    if half_life is not None:
        if half_life <= 0:
            raise UserError(f"--ema_half_life_images {half_life} must be more than 0")
        decay = 0.5 ** (global_batch_size / half_life)
    return ShardedEMA(
        model, decay=decay, use_ema_warmup=True, inv_gamma=options.ema_inv_gamma, power=options.ema_power
    )


class ShardedEMA:
    """An exponential moving average of `model`'s parameters (sharded or not), float32, on their device.

    Create it after `model` was moved to its device and sharded. The settings are those of diffusers' EMAModel.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        decay: float = 0.9999,
        min_decay: float = 0.0,
        update_after_step: int = 0,
        use_ema_warmup: bool = False,
        inv_gamma: float = 1.0,
        power: float = 2 / 3,
    ):
        self.model = model
        self.decay, self.min_decay, self.update_after_step = decay, min_decay, update_after_step
        self.use_ema_warmup, self.inv_gamma, self.power = use_ema_warmup, inv_gamma, power
        self.optimization_step = 0
        self._sharded = is_sharded(model)
        self._cached: dict[bool, tuple[list | None, list[torch.Tensor], list[torch.Tensor]]] = {}
        self._averages = [parameter.clone() for parameter in local_parameters(model)]

    def decay_at(self, step: int) -> float:
        """The decay of optimizer step `step`, from 1: rising to `decay`; 0 (a plain copy) at the first."""
        past = step - self.update_after_step - 1
        if past <= 0:
            return 0.0
        rising = 1 - (1 + past / self.inv_gamma) ** -self.power if self.use_ema_warmup else (1 + past) / (10 + past)
        return max(min(rising, self.decay), self.min_decay)

    @torch.no_grad()
    def step(self) -> None:
        """Update the average with the current parameters. Parameters that are not trained are copied."""
        self.optimization_step += 1
        rest = 1 - self.decay_at(self.optimization_step)
        averages, parameters = self._lists(trained=True)
        frozen_averages, frozen = self._lists(trained=False)
        if frozen:
            torch._foreach_copy_(frozen_averages, frozen)
        if rest < 0.5:  # in place, in one pass
            torch._foreach_lerp_(averages, parameters, weight=rest)
        else:  # in the first steps, where lerp rounds otherwise than EMAModel
            torch._foreach_sub_(averages, torch._foreach_sub(averages, parameters), alpha=rest)

    def _lists(self, trained: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The averages and this rank's part of the parameters that are `trained`, or not.

        They are kept while the parameters keep their memory. FSDP may move that of its shards.
        """
        whole = list(self.model.parameters())
        key = None if self._sharded else [(parameter.data_ptr(), parameter.requires_grad) for parameter in whole]
        if key is None or trained not in self._cached or self._cached[trained][0] != key:
            rows = zip(self._averages, local_parameters(self.model), whole, strict=True)
            pairs = [row[:2] for row in rows if row[2].requires_grad is trained]
            self._cached[trained] = key, [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        return self._cached[trained][1:]

    @contextmanager
    def swapped_in(self) -> Iterator[torch.nn.Module]:
        """`model` with the averages instead of its weights inside the block. Do not train inside."""
        self._swap()
        try:
            yield self.model
        finally:
            self._swap()

    def full_weights(self, copy: Callable[[torch.Tensor], torch.Tensor] = copy_now) -> dict[str, torch.Tensor]:
        """The full averaged state dict, a copy, on the CPU of rank 0; {} on the other ranks. A collective.

        Averages that are not sharded are copied by `copy`.
        """
        if self._sharded:
            with self.swapped_in():
                return full_weights(self.model)
        averages = {id(p): average for p, average in zip(self.model.parameters(), self._averages, strict=True)}

        def copy_average(value: torch.Tensor) -> torch.Tensor:
            return copy(averages.get(id(value), value))  # buffers have no average

        return full_weights(self.model, copy_average)

    def load_full_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Load the full averaged state dict from rank 0. A collective; raises `ValueError` if it does not fit."""
        with self.swapped_in():
            load_full_weights(self.model, weights)

    def state_dict(self) -> dict[str, float]:
        """The settings and the step, under the names that EMAModel writes to its config.json."""
        return {name: getattr(self, name) for name in SETTINGS}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Load the step from `state_dict()` or from a config.json that EMAModel saved; the settings stay."""
        self.optimization_step = int(state["optimization_step"])

    @torch.no_grad()
    def _swap(self) -> None:
        for average, parameter in zip(self._averages, local_parameters(self.model), strict=True):
            weights = parameter.clone()
            parameter.copy_(average)
            average.copy_(weights)
