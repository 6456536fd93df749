"""Copies for a checkpoint that the device makes late: they hold what was there when the checkpoint was taken."""

import threading
import time

import torch
from training_helpers import run_in_process, same_weights, tiny_run

from trainkit.training.checkpoints import state
from trainkit.training.checkpoints.host_copies import HostCopies

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


class LateCopies(HostCopies):
    """Copies at the last moment, as the device may."""

    def __init__(self, device):
        super().__init__(device)
        self.pairs, self.lock = [], threading.Lock()

    def add(self, tensor):
        self.pairs.append((torch.full(tensor.shape, 7, dtype=tensor.dtype), tensor.detach()))
        return self.pairs[-1][0]

    def before_update(self):
        with self.lock:
            while self.pairs:
                copy, tensor = self.pairs.pop()
                copy.copy_(tensor)

    def wait(self):
        time.sleep(0.3)  # the training goes on
        self.before_update()


def test_copies_end_before_anything_changes(image_folder, tiny_unet, cache_dir, tmp_path, monkeypatch):
    """Checkpoints in the middle, and previews, which swap the averages in: as if each copy had been made at once."""
    flags = {"max_train_steps": 5, "checkpointing_steps": 2, "preview_steps": 2}
    at_once, late = tmp_path / "at_once", tmp_path / "late"
    arguments = tiny_run(image_folder, tiny_unet, cache_dir, at_once, **flags)
    run_in_process(monkeypatch, "train_unconditional", arguments)
    monkeypatch.setattr(state, "HostCopies", LateCopies)
    arguments = tiny_run(image_folder, tiny_unet, cache_dir, late, **flags)
    run_in_process(monkeypatch, "train_unconditional", arguments)
    for file in (WEIGHTS, "unet_ema/diffusion_pytorch_model.safetensors", "optimizer.safetensors"):
        for step in (2, 4):
            same_weights(at_once / f"checkpoint-{step}" / file, late / f"checkpoint-{step}" / file)
