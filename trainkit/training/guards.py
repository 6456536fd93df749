"""Checks that run beside the training: non-finite gradients, diverging replicas, failed writes."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError

from trainkit.data.loading.class_order import ClassBalancedOrder
from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.loading.order import SampleOrder
from trainkit.errors import UserError, one_line
from trainkit.terminal import warn
from trainkit.training.sharding import local_part

READ_THE_DEVICE = ("Adafactor", "Prodigy")  # optimizers whose steps compute on the host with values from the device
SKIPPED_FILE, NAMED_IMAGES = "skipped_steps.jsonl", 8


class WriteGuard:
    """A context manager around each write into `output_dir`: a full disk costs a warning, not the training."""

    def __init__(self, output_dir: Path):
        self.output_dir = output_dir
        self._failures: dict[str, str] = {}  # kind of file -> what failed and why

    @contextlib.contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """Turn a failure to write `what` into a warning. A later success of the same kind clears the failure."""
        kind = what.partition("-")[0]  # a complete checkpoint replaces the one before
        try:
            yield
            self._failures.pop(kind, None)
        except (OSError, RuntimeError, SafetensorError) as error:  # what the different writers raise
            reason = one_line(error)
            self._failures[kind] = f"{what} could not be written ({reason})"
            warn(
                f"{what} could not be written to --output_dir {self.output_dir} ({reason}); training continues, and "
                "earlier files are kept. Is the disk full?"
            )

    def raise_failure(self) -> None:
        """Raise `UserError` if a file is still missing at the end of the run."""
        if self._failures:
            raise UserError(
                f"--output_dir {self.output_dir}: {next(iter(self._failures.values()))}: free some space, then run "
                "the same command with --resume_from_checkpoint latest"
            )


def step_if_finite(optimizer: torch.optim.Optimizer, grad_norm: torch.Tensor) -> None:
    """Run one optimizer step, or none if `grad_norm` (a scalar on the device, equal on all ranks) is not finite.

    A skipped step leaves weights and optimizer state unchanged; the caller clears the gradients. On an accelerator the
    device decides, so the host does not wait for the norm; step counters on the host then include skipped steps. The
    host decides in the first step, which creates the state, and for optimizers that read the device themselves.
    """
    finite = torch.isfinite(grad_norm)
    if all(group.get("fused") for group in optimizer.param_groups):
        # The attribute that torch's GradScaler sets; the stubs do not have it.
        optimizer.found_inf = (~finite).to(torch.float32)  # type: ignore[attr-defined]
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf  # type: ignore[attr-defined]
    elif _host_decides(optimizer, grad_norm.device):
        if finite:
            optimizer.step()
    else:
        _step_or_restore(optimizer, finite)


def _host_decides(optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
    if device.type == "cpu" or type(optimizer).__name__ in READ_THE_DEVICE:
        return True
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return any(not optimizer.state.get(parameter) for parameter in parameters)


@torch.no_grad()
def _step_or_restore(optimizer: torch.optim.Optimizer, finite: torch.Tensor) -> None:
    """Step, then put back weights and state if `finite` is false. The copies use memory that activations left free.

    There is one copy per type of numbers, not per tensor: thousands of small kernels would take longer than the wait.
    """
    before = {dtype: _flat_copy(parts)[0] for dtype, parts in _parts_by_type(optimizer, finite.device).items()}
    optimizer.step()
    for dtype, parts in _parts_by_type(optimizer, finite.device).items():  # some optimizers replace tensors
        chosen, views = _flat_copy(parts)
        torch.where(finite, chosen, before.pop(dtype), out=chosen)
        torch._foreach_copy_(parts, views)


def _parts_by_type(optimizer: torch.optim.Optimizer, device: torch.device) -> dict[torch.dtype, list[torch.Tensor]]:
    """This rank's parts of the weights and the optimizer state that are on `device`."""
    values = [p for group in optimizer.param_groups for p in group["params"]]
    values += [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    by_type: dict[torch.dtype, list[torch.Tensor]] = {}
    for value in values:
        part = local_part(value)
        if part.device == device:
            by_type.setdefault(part.dtype, []).append(part)
    return by_type


def _flat_copy(parts: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Copy `parts` of one type into one flat tensor; returns it and its views of their shapes and strides."""
    flat = torch.empty(sum(part.numel() for part in parts), dtype=parts[0].dtype, device=parts[0].device)
    pieces = flat.split([part.numel() for part in parts])
    views = [piece.as_strided(part.shape, part.stride()) for piece, part in zip(pieces, parts, strict=True)]
    torch._foreach_copy_(views, parts)
    return flat, views


class SkippedSteps:
    """Reports skipped steps with the files they trained on, and ends a run that skips too many in a row."""

    def __init__(
        self,
        images: PreparedImages,
        order: SampleOrder | ClassBalancedOrder,
        global_size: int,
        limit: int,
        output_dir: Path,
        is_main: bool,
        in_a_row: int = 0,
    ):
        self.images, self.order, self.global_size, self.limit = images, order, global_size, limit
        self.output_dir, self.is_main, self.in_a_row = output_dir, is_main, in_a_row

    def record(self, step: int, finite: bool) -> None:
        """Record optimizer step `step` (counted from 1), in order. Raises `UserError` after `limit` in a row."""
        if finite:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        if self.is_main:
            self._report(step)
        if self.in_a_row >= self.limit:
            raise UserError(
                f"--max_skipped_steps {self.limit}: the gradients of {self.in_a_row} steps in a row, up to {step}, "
                f"were not finite; lower --learning_rate, or check the images listed in "
                f"{self.output_dir / SKIPPED_FILE}"
            )

    def _report(self, step: int) -> None:
        # The global batch is a function of the step, so nothing had to be stored to name it.
        positions = (step - 1) * self.global_size + torch.arange(self.global_size).numpy()
        indices = self.order.indices(positions)
        sources = self.images.sources(indices)
        more = f" and {len(sources) - NAMED_IMAGES} more" if len(sources) > NAMED_IMAGES else ""
        warn(
            f"step {step} was skipped because its gradient is not finite; its images: "
            f"{', '.join(sources[:NAMED_IMAGES])}{more} (all in {SKIPPED_FILE})"
        )
        try:
            with (self.output_dir / SKIPPED_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "indices": indices.tolist(), "sources": sources}) + "\n")
        except OSError as error:  # a full disk must not end the training
            warn(f"{SKIPPED_FILE} could not be written: {error.strerror}")


def check_same_dataset(accelerator: Accelerator, images: PreparedImages) -> None:
    """Raise `UserError` on all ranks if not every rank opened the same dataset: they would diverge or wait forever."""
    if accelerator.num_processes == 1:
        return
    by_rank = gather_object([(len(images), images.fingerprint)])
    others = [rank for rank, found in enumerate(by_rank) if found != by_rank[0]]
    if others:
        ranks = ", ".join(map(str, others))
        raise UserError(
            f"--train_data_dir or --dataset_name: the dataset of rank {ranks} ({by_rank[others[0]][0]} images) "
            f"differs from that of rank 0 ({by_rank[0][0]} images): copy the prepared folder of rank 0 to the others"
        )


def check_replicas(accelerator: Accelerator, model: torch.nn.Module, step: int) -> None:
    """Compare a hash of every parameter and buffer over the ranks: a collective with one short wait for the device.

    Raises `UserError` on all ranks, naming the first tensor that differs and the ranks.
    """
    if accelerator.num_processes == 1:
        return
    tensors = dict(model.state_dict())
    hashes = torch.stack([_hash(tensor) for tensor in tensors.values()])
    by_rank = accelerator.gather(hashes[None])  # (P, tensors)
    differs = (by_rank != by_rank[0]).cpu()
    if not differs.any():
        return
    first = int(differs.any(0).nonzero()[0])
    ranks = differs[:, first].nonzero().flatten().tolist()
    raise UserError(
        f"--replica_check_steps: after step {step}, {list(tensors)[first]} of rank {', '.join(map(str, ranks))} "
        f"differs from rank 0 ({int(differs.any(0).sum())} of {len(tensors)} tensors differ): a faulty device, or "
        "code that changes weights on one rank; resume with --resume_from_checkpoint latest"
    )


def _hash(tensor: torch.Tensor) -> torch.Tensor:
    """A 64-bit sum of the tensor's bits, each word weighted by its position: int64 scalar on its device."""
    words = tensor.detach().contiguous().flatten().view(torch.uint8)
    words = torch.nn.functional.pad(words, (0, -len(words) % 4)).view(torch.int32).to(torch.int64)
    positions = torch.arange(1, len(words) + 1, device=words.device, dtype=torch.int64)
    return (words * (positions * 0x9E3779B1 + 0x85EBCA77)).sum()
