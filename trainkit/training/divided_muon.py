"""Muon whose orthogonalization, nearly all of its work, is divided over the processes."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from pytorch_optimizer import Muon
from pytorch_optimizer.optimizer.muon import get_adjusted_lr
from pytorch_optimizer.optimizer.utils import zero_power_via_newton_schulz_5
from torch.distributed.tensor import DTensor

from trainkit.training.sharding import local_part

GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
EXCHANGED_AT_ONCE = 2**22  # numbers of a process in one exchange of shards, which bounds its memory


class DividedMuon(Muon):
    """`pytorch_optimizer.Muon` with the same updates, bit for bit, on processes that all hold the same gradients.

    Each matrix is orthogonalized by one process, together with its other matrices of that shape. One all-gather then
    gives every process all of them. If FSDP shards the weights, an all-to-all takes the rows of each matrix to its
    process, and another one takes the orthogonalized rows back. Matrices on a CPU are orthogonalized in float32, since
    many CPUs compute bfloat16 many times slower, and the others in bfloat16.
    """

    @staticmethod
    def _orthogonalize(group: dict[str, Any], updates: list[torch.Tensor]) -> list[torch.Tensor]:
        if updates[0].device.type != "cpu":
            return Muon._orthogonalize(group, updates)
        settings = {"num_steps": group["ns_steps"], "weights": group["ns_coeffs"], "dtype": torch.float32}
        matrices = [update.reshape(update.size(0), -1) for update in updates]
        # one by one: batches of other sizes would round differently
        return [zero_power_via_newton_schulz_5(matrix, **settings) for matrix in matrices]

    def _step_foreach_group(self, group: dict[str, Any]) -> None:
        if not group["use_muon"] or not dist.is_initialized() or dist.get_world_size() == 1:
            super()._step_foreach_group(group)
            return
        parameters = [p for p in group["params"] if p.grad is not None]
        weights = [local_part(p) for p in parameters]
        gradients = [local_part(p.grad) for p in parameters]
        buffers = [local_part(self.state[p]["momentum_buffer"]) for p in parameters]
        self.apply_weight_decay_foreach(
            weights, gradients, group["lr"], group["weight_decay"], group["weight_decouple"], fixed_decay=False
        )
        torch._foreach_lerp_(buffers, gradients, weight=1.0 - group["momentum"])
        if group["nesterov"]:
            torch._foreach_lerp_(gradients, buffers, weight=group["momentum"])
        momenta = gradients if group["nesterov"] else buffers
        all_shapes = [p.shape for p in parameters]  # of shards, the whole
        sharded = isinstance(parameters[0], DTensor)
        for chosen in rounds_of(all_shapes, dist.get_world_size()) if sharded else [range(len(parameters))]:
            shapes, values = [all_shapes[i] for i in chosen], [momenta[i] for i in chosen]
            updates = self._of_shards(group, shapes, values) if sharded else self._of_replicas(group, shapes, values)
            for same in _by_shape(shapes).values():
                rate: Any = get_adjusted_lr(group["lr"], shapes[same[0]], use_adjusted_lr=group["use_adjusted_lr"])
                torch._foreach_add_([weights[chosen[i]] for i in same], [updates[i] for i in same], alpha=-rate)

    def _of_replicas(
        self, group: dict[str, Any], shapes: list[torch.Size], matrices: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """The orthogonalized `matrices`, which every process holds, on every process."""
        rank, num_processes = dist.get_rank(), dist.get_world_size()
        owners = owners_of(shapes, num_processes)
        lengths, starts = [0] * num_processes, []  # of each process's share; of each matrix in its owner's share
        for shape, owner in zip(shapes, owners, strict=True):
            starts.append(lengths[owner])
            lengths[owner] += shape.numel()
        shares = matrices[0].new_empty(num_processes, max(lengths), dtype=_exchanged_dtype(matrices[0]))
        places = [
            shares[owner, start : start + shape.numel()].view(shape[0], -1)
            for shape, owner, start in zip(shapes, owners, starts, strict=True)
        ]
        for batch in _batches_of(rank, owners, shapes):
            for index, update in zip(batch, self._orthogonalize(group, [matrices[i] for i in batch]), strict=True):
                places[index].copy_(update)
        GATHER(shares.view(-1), shares[rank].clone())
        return [place.view(shape) for place, shape in zip(places, shapes, strict=True)]

    def _of_shards(
        self, group: dict[str, Any], shapes: list[torch.Size], parts: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """This process's rows of the orthogonalized matrices of `shapes`; `parts` are its rows of the matrices."""
        rank, num_processes = dist.get_rank(), dist.get_world_size()
        owners = owners_of(shapes, num_processes)
        own = [index for index, owner in enumerate(owners) if owner == rank]
        rows = [rows_of_shards(shape[0], num_processes) for shape in shapes]
        widths = [shape[1:].numel() for shape in shapes]
        # Messages follow the order of the processes, and each holds the rows of one matrix after another.
        order = sorted(range(len(shapes)), key=owners.__getitem__)
        there = [sum(parts[i].numel() for i in order if owners[i] == process) for process in range(num_processes)]
        here = [sum(rows[i][process] * widths[i] for i in own) for process in range(num_processes)]
        sent = parts[0].new_empty(sum(there), dtype=_exchanged_dtype(parts[0]))
        received = sent.new_empty(sum(here))
        flat = dict(zip(order, sent.split([parts[i].numel() for i in order]), strict=True))
        places = [flat[index].view(part.shape) for index, part in enumerate(parts)]
        torch._foreach_copy_(places, parts)
        dist.all_to_all_single(received, sent, here, there)
        pieces = received.split([rows[i][process] * widths[i] for process in range(num_processes) for i in own])
        blocks = {i: [piece.view(-1, widths[i]) for piece in pieces[n :: len(own)]] for n, i in enumerate(own)}
        for batch in _batches_of(rank, owners, shapes):
            matrices = [torch.cat(blocks[i]) for i in batch]
            for index, update in zip(batch, self._orthogonalize(group, matrices), strict=True):
                torch._foreach_copy_(blocks[index], update.split(rows[index]))
        dist.all_to_all_single(sent, received, there, here)
        return places


def owners_of(shapes: Sequence[tuple[int, ...]], num_processes: int) -> list[int]:
    """The process that orthogonalizes each matrix: the largest first, each to the process with the least work."""
    work, owners = [0] * num_processes, [0] * len(shapes)
    costs = [_cost(shape) for shape in shapes]
    for index in sorted(range(len(shapes)), key=lambda index: -costs[index]):
        owners[index] = min(range(num_processes), key=lambda process: work[process])
        work[owners[index]] += costs[index]
    return owners


def rounds_of(shapes: Sequence[torch.Size], num_processes: int) -> Iterator[list[int]]:
    """Indices of the matrices of each exchange: `EXCHANGED_AT_ONCE`, or the largest matrix, times the processes."""
    numbers = [shape.numel() for shape in shapes]
    limit = num_processes * max(EXCHANGED_AT_ONCE, max(numbers))
    chosen: list[int] = []
    for index in sorted(range(len(shapes)), key=lambda index: -_cost(shapes[index])):  # shapes stay together
        if chosen and sum(numbers[i] for i in chosen) + numbers[index] > limit:
            yield chosen
            chosen = []
        chosen.append(index)
    yield chosen


def rows_of_shards(rows: int, num_processes: int) -> list[int]:
    """How many of the `rows` of a tensor FSDP gives each process: the chunks of `torch.chunk`, then none."""
    most = -(-rows // num_processes)
    return [len(range(rows)[process * most : (process + 1) * most]) for process in range(num_processes)]


def _cost(shape: tuple[int, ...]) -> int:
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    return min(rows, columns) ** 2 * max(rows, columns)


def _exchanged_dtype(values: torch.Tensor) -> torch.dtype:
    """The type in which `_orthogonalize` computes. It rounds to it first, so the exchange loses nothing."""
    return torch.float32 if values.device.type == "cpu" else torch.bfloat16


def _batches_of(rank: int, owners: list[int], shapes: list[torch.Size]) -> Iterator[list[int]]:
    """Indices of the matrices that process `rank` orthogonalizes, those of a shape together."""
    own = [index for index, owner in enumerate(owners) if owner == rank]
    for positions in _by_shape([shapes[index] for index in own]).values():
        yield [own[position] for position in positions]


def _by_shape(shapes: list[torch.Size]) -> dict[tuple[int, int], list[int]]:
    """Indices of the matrices of each shape; that of a transposed matrix is the same."""
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, shape in enumerate(shapes):
        rows, columns = shape[0], shape[1:].numel()
        groups[min(rows, columns), max(rows, columns)].append(index)
    return groups
