"""Muon whose orthogonalization, nearly all of its work, is divided over the processes."""

from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from pytorch_optimizer import Muon
from pytorch_optimizer.optimizer.utils import zero_power_via_newton_schulz_5
from torch.distributed.tensor import DTensor

GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13


class DividedMuon(Muon):
    """`pytorch_optimizer.Muon` with the same updates, bit for bit, on processes that all hold the same gradients.

    Each matrix is orthogonalized by one process, together with its other matrices of that shape. One all-gather then
    gives every process all of them. Weights sharded by FSDP take the way of the base class. Matrices on a CPU are
    orthogonalized in float32, since many CPUs compute bfloat16 many times slower, and the others in bfloat16.
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
        parameters = [p for p in group["params"] if p.grad is not None]
        if not group["use_muon"] or not _is_divided(parameters):
            super()._step_foreach_group(group)
            return
        gradients = [p.grad for p in parameters]
        buffers = [self.state[p]["momentum_buffer"] for p in parameters]
        self.apply_weight_decay_foreach(
            parameters, gradients, group["lr"], group["weight_decay"], group["weight_decouple"], fixed_decay=False
        )
        torch._foreach_lerp_(buffers, gradients, weight=1.0 - group["momentum"])
        if group["nesterov"]:
            torch._foreach_lerp_(gradients, buffers, weight=group["momentum"])
        updates = self._divided(group, gradients if group["nesterov"] else buffers)
        for indices in _by_shape(parameters).values():
            self._apply_muon_updates(
                group, *([values[index] for index in indices] for values in (parameters, gradients, updates))
            )

    def _divided(self, group: dict[str, Any], matrices: list[torch.Tensor]) -> list[torch.Tensor]:
        """The orthogonalized `matrices`, each flattened to two dimensions, on every process."""
        rank, num_processes = dist.get_rank(), dist.get_world_size()
        owners = owners_of([tuple(matrix.shape) for matrix in matrices], num_processes)
        lengths, starts = [0] * num_processes, []  # of each process's share; of each matrix in its owner's share
        for matrix, owner in zip(matrices, owners, strict=True):
            starts.append(lengths[owner])
            lengths[owner] += matrix.numel()
        device = matrices[0].device
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16  # that of `_orthogonalize`
        shares = torch.empty(num_processes, max(lengths), dtype=dtype, device=device)
        places = [
            shares[owner, start : start + matrix.numel()].view(matrix.size(0), -1)
            for matrix, owner, start in zip(matrices, owners, starts, strict=True)
        ]
        own = [index for index, owner in enumerate(owners) if owner == rank]
        for positions in _by_shape([matrices[index] for index in own]).values():
            batch = [own[position] for position in positions]
            for index, update in zip(batch, self._orthogonalize(group, [matrices[i] for i in batch]), strict=True):
                places[index].copy_(update)
        GATHER(shares.view(-1), shares[rank].clone())
        return places


def owners_of(shapes: list[tuple[int, ...]], num_processes: int) -> list[int]:
    """The process that orthogonalizes each matrix: the largest first, each to the process with the least work."""
    work, owners = [0] * num_processes, [0] * len(shapes)
    costs = [_cost(shape) for shape in shapes]
    for index in sorted(range(len(shapes)), key=lambda index: -costs[index]):
        owners[index] = min(range(num_processes), key=lambda process: work[process])
        work[owners[index]] += costs[index]
    return owners


def _cost(shape: tuple[int, ...]) -> int:
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    return min(rows, columns) ** 2 * max(rows, columns)


def _is_divided(parameters: list[torch.Tensor]) -> bool:
    several = dist.is_initialized() and dist.get_world_size() > 1
    return several and not any(isinstance(parameter, DTensor) for parameter in parameters)


def _by_shape(matrices: list[torch.Tensor]) -> dict[tuple[int, int], list[int]]:
    """Indices of the matrices of each shape; that of a transposed matrix is the same."""
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, matrix in enumerate(matrices):
        rows, columns = matrix.size(0), matrix.numel() // matrix.size(0)
        groups[min(rows, columns), max(rows, columns)].append(index)
    return groups
