"""What watches over a run: steps whose gradient is not finite, and replicas that drift apart."""

import json
from pathlib import Path

import torch
from accelerate import Accelerator

from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.loading.order import SampleOrder
from trainkit.errors import UserError

SKIPPED_FILE, NAMED_IMAGES = "skipped_steps.jsonl", 8


def step_if_finite(optimizer: torch.optim.Optimizer, grad_norm: torch.Tensor) -> None:
    """One optimizer step, or none where `grad_norm` (a scalar on the device, the same on all ranks) is not finite.

    A fused optimizer decides on the device, so that the host need not wait for the norm. Weights and optimizer state
    stay as they are; the gradients are the caller's to clear.
    """
    if all(group.get("fused") for group in optimizer.param_groups):
        optimizer.found_inf = (~torch.isfinite(grad_norm)).to(torch.float32)  # what torch's GradScaler sets too
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf
    elif torch.isfinite(grad_norm):
        optimizer.step()


class SkippedSteps:
    """Tells of the steps that were skipped, with the files they trained on, and ends a run of too many in a row."""

    def __init__(
        self,
        images: PreparedImages,
        order: SampleOrder,
        global_size: int,
        limit: int,
        output_dir: Path,
        is_main: bool,
        in_a_row: int = 0,
    ):
        self.images, self.order, self.global_size, self.limit = images, order, global_size, limit
        self.output_dir, self.is_main, self.in_a_row = output_dir, is_main, in_a_row

    def see(self, step: int, finite: bool) -> None:
        """Take note of optimizer step `step` (counted from 1), in order. Raises `UserError` after `limit` in a row."""
        if finite:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        if self.is_main:
            self._tell(step)
        if self.in_a_row >= self.limit:
            raise UserError(
                f"--max_skipped_steps {self.limit}: the gradient of {self.in_a_row} steps in a row, up to {step}, was "
                f"not finite; lower --learning_rate, or look at the images (in {self.output_dir / SKIPPED_FILE})"
            )

    def _tell(self, step: int) -> None:
        # The global batch is a function of the step: nothing had to be kept to know it.
        positions = (step - 1) * self.global_size + torch.arange(self.global_size).numpy()
        indices = self.order.indices(positions)
        sources = self.images.sources(indices)
        more = f" and {len(sources) - NAMED_IMAGES} more" if len(sources) > NAMED_IMAGES else ""
        print(
            f"\nWARNING: step {step} was skipped, its gradient is not finite; its images: "
            f"{', '.join(sources[:NAMED_IMAGES])}{more} (all in {SKIPPED_FILE})",
            flush=True,
        )
        try:
            with (self.output_dir / SKIPPED_FILE).open("a") as file:
                file.write(json.dumps({"step": step, "indices": indices.tolist(), "sources": sources}) + "\n")
        except OSError as error:  # a full disk must not end the training
            print(f"\nWARNING: {SKIPPED_FILE} could not be written: {error.strerror}", flush=True)


def check_replicas(accelerator: Accelerator, model: torch.nn.Module, step: int) -> None:
    """Compare a hash of every parameter and buffer over the ranks; a collective, and one short wait for the device.

    Raises `UserError` on all ranks, naming what differs first and on which ranks.
    """
    if accelerator.num_processes == 1:
        return
    tensors = dict(model.state_dict())
    hashes = torch.stack([_hash(tensor) for tensor in tensors.values()])
    by_rank = accelerator.gather(hashes[None])  # (P, tensors)
    differs = (by_rank != by_rank[0]).cpu()
    if not differs.any():
        return
    place = int(differs.any(0).nonzero()[0])
    ranks = differs[:, place].nonzero().flatten().tolist()
    raise UserError(
        f"--replica_check_steps: after step {step}, {list(tensors)[place]} of rank {', '.join(map(str, ranks))} is "
        f"not that of rank 0 ({int(differs.any(0).sum())} of {len(tensors)} tensors differ): a faulty device, or code "
        "that changes weights on one rank; go on with --resume_from_checkpoint latest"
    )


def _hash(tensor: torch.Tensor) -> torch.Tensor:
    """A 64-bit sum of the tensor's bits, each word weighed by its place: int64 scalar on its device, no host wait."""
    words = tensor.detach().contiguous().flatten().view(torch.uint8)
    words = torch.nn.functional.pad(words, (0, -len(words) % 4)).view(torch.int32).to(torch.int64)
    places = torch.arange(1, len(words) + 1, device=words.device, dtype=torch.int64)
    return (words * (places * 0x9E3779B1 + 0x85EBCA77)).sum()
