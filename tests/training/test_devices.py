"""Devices and systems that this machine does not have: MPS without float64, XPU, Windows without POSIX modules."""

import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_UNET, slow_after
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from process_helpers import run_code
from torch.utils._python_dispatch import TorchDispatchMode
from training_helpers import losses, tiny_run

from trainkit import atomic
from trainkit.data.loading.augment_draws import Augmentation
from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.loading.loader import BatchLoader, BatchShape
from trainkit.data.loading.transfer import pins_memory, to_device
from trainkit.diffusion.augmentation_input import add_augmentation_input
from trainkit.diffusion.frozen import local_device
from trainkit.diffusion.noise_schedule import add_noise
from trainkit.diffusion.objective import denoising_errors
from trainkit.diffusion.timesteps import draw_timesteps
from trainkit.training.averages.ema import ShardedEMA
from trainkit.training.checkpoints.state import restore_random_states, write_random_states
from trainkit.training.optimizers import build_optimizer
from trainkit.training.throughput import device_name, memory_peak_mib

META = torch.device("meta")


class NoFloat64(TorchDispatchMode):
    """Refuses float64 on the meta device, which takes the place of MPS here."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        found = function(*arguments, **(keywords or {}))
        for value in found if isinstance(found, tuple | list) else [found]:
            if isinstance(value, torch.Tensor) and value.device.type == "meta":
                assert value.dtype != torch.float64, f"{function} gives float64 on the device"
        return found


def test_the_check_sees_a_float64_that_is_moved():
    with NoFloat64():
        torch.zeros(3).to("meta")
        torch.zeros(3, dtype=torch.float64).sum()
        with pytest.raises(AssertionError, match="gives float64 on the device"):
            torch.zeros(3, dtype=torch.float64).to("meta")


@pytest.fixture(scope="module")
def prepared(image_folder, tmp_path_factory):
    from train_unconditional import Options
    from trainkit.data.cache import open_or_prepare

    cache = str(tmp_path_factory.mktemp("cache"))
    return open_or_prepare(Options(train_data_dir=str(image_folder), resolution="16", cache_dir=cache, num_proc=1))


@pytest.mark.parametrize("sampling", slow_after(1, ["uniform", "logit_normal", "edm_lognormal"]))
@pytest.mark.parametrize("scheduler_class", slow_after(1, [DDPMScheduler, FlowMatchEulerDiscreteScheduler]))
def test_nothing_on_the_device_is_float64(prepared: PreparedImages, scheduler_class, sampling):
    """Loader, augmentation, timesteps, loss, gradients, Muon and the average: all of a step."""
    from train_unconditional import Options

    settings = Augmentation(rotation=10, brightness=0.1, hue=20, with_labels=True)
    loader = BatchLoader(prepared, BatchShape(4, 1, 1, 0), 0, True, META, 1, augmentation=settings)
    prediction_type = {} if scheduler_class is FlowMatchEulerDiscreteScheduler else {"prediction_type": "sample"}
    scheduler, options = scheduler_class(**prediction_type), Options(timestep_sampling=sampling)
    unet = UNet2DModel(**{key: value for key, value in TINY_UNET.items() if not key.startswith("_")}).to(META)
    add_augmentation_input(unet, 15)
    optimizer, average = build_optimizer(options, unet), ShardedEMA(unet)
    with NoFloat64():
        for batch in loader.iterate(0, 2):
            timesteps = draw_timesteps(options, scheduler, batch.uniforms, batch.images.device)
            noisy = add_noise(scheduler, batch.images, batch.noise, timesteps)
            prediction = unet(noisy, timesteps, **batch.inputs).sample
            errors = denoising_errors(scheduler, prediction, batch.images, batch.noise, timesteps, 5.0)
            errors.mean().backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            average.step()
    assert batch.images.device == META and batch.uniforms.device.type == "cpu"


@pytest.mark.parametrize("kind, pinned", [("cpu", False), ("mps", False), ("cuda", True), ("xpu", True)])
def test_copies_are_not_waited_for_only_where_memory_is_pinned(kind, pinned, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *a, **k: calls.append(k) or tensor)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: calls.append("pinned") or tensor)
    to_device(torch.zeros(2), torch.device(kind))
    assert pins_memory(torch.device(kind)) is pinned
    assert calls == (["pinned", {"non_blocking": True}] if pinned else [{}])


class FakeDevice(SimpleNamespace):
    """What torch.xpu and torch.mps have."""

    state = torch.arange(16, dtype=torch.uint8)

    def get_rng_state(self):
        return self.state

    def set_rng_state(self, state):
        self.state = state


@pytest.fixture(params=["xpu", "mps"])
def other_accelerator(request, monkeypatch):
    module = FakeDevice()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(request.param))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    return request.param, module


def test_random_states_of_every_accelerator_are_kept(other_accelerator, tmp_path):
    _, module = other_accelerator
    write_random_states(tmp_path, 0)
    module.state = torch.zeros(16, dtype=torch.uint8)
    restore_random_states(tmp_path, 0)
    assert torch.equal(module.state, torch.arange(16, dtype=torch.uint8))


def test_frozen_networks_run_on_the_accelerator(other_accelerator, monkeypatch):
    kind, _ = other_accelerator
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    assert local_device().type == kind
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert local_device().type == "cpu"


def test_memory_and_name_are_those_of_the_device(other_accelerator, monkeypatch):
    kind, module = other_accelerator
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 3 * 2**20)
    module.max_memory_allocated = lambda device: 3 * 2**20
    assert memory_peak_mib(torch.device(kind)) == 3
    assert device_name(torch.device(kind)) == kind
    module.get_device_name = lambda device: "Data Center GPU Max"
    assert device_name(torch.device(kind)) == "Data Center GPU Max" and device_name(torch.device("cpu")) == "cpu"


def test_a_rename_on_windows_waits_for_readers(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(atomic, "REPLACE_DELAY_S", 0)
    replace, failures = os.replace, [PermissionError(13, "in use")] * 3

    def in_use_at_first(*paths):
        if failures:
            raise failures.pop()
        replace(*paths)

    monkeypatch.setattr(os, "replace", in_use_at_first)
    atomic.write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new" and not failures
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(PermissionError(13, "read-only")))
    with pytest.raises(PermissionError, match="read-only"):
        atomic.write_text(tmp_path / "a", "newer")


def test_windows_flushes_files_that_it_may_write_to(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    opened, open_file = [], os.open
    monkeypatch.setattr(os, "open", lambda path, flags: opened.append((path, flags)) or open_file(path, flags))
    (tmp_path / "a").write_text("a")
    atomic.flush_to_disk(tmp_path / "a")
    atomic.flush_to_disk(tmp_path)
    assert opened == [(tmp_path / "a", os.O_RDWR)]


AS_ON_WINDOWS = """
import mmap, os, signal, sys
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGKILL", "SIGCHLD", "SIGALRM", "alarm", "setitimer"):
    delattr(signal, name)
for name in ("fork", "sched_getaffinity", "sysconf", "getuid", "geteuid", "link", "uname", "posix_fadvise", "kill"):
    if hasattr(os, name):
        delattr(os, name)
del mmap.MADV_WILLNEED
sys.platform = "win32"
sys.path.insert(0, {root!r})
script, *sys.argv[1:] = sys.argv[1:]
from trainkit.errors import run_script
run_script(__import__(script).main)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="hides what only POSIX systems have")
def test_scripts_run_without_posix(prepared, tiny_unet, tmp_path):
    code = AS_ON_WINDOWS.format(root=str(ROOT))
    flags = {"max_train_steps": 3, "checkpointing_steps": 2, "ema_power_lengths": 0.1, "ema_snapshot_steps": 3}
    arguments = tiny_run(prepared.folder, tiny_unet, tmp_path / "cache", tmp_path / "out", **flags)
    done = run_code(code, "train_unconditional", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    (tmp_path / "out" / "checkpoint-3").rename(tmp_path / "moved")
    done = run_code(code, "train_unconditional", *arguments, "--resume_from_checkpoint", "latest")
    assert done.returncode == 0 and "2 of 3 steps done" in done.stdout, done.stderr[-3000:]
    assert np.isfinite(losses(tmp_path / "out")).all()
    words = ["--model_name_or_path", tmp_path / "out", "--output_dir", tmp_path / "samples", "--num_images", "2"]
    done = run_code(code, "sample", *words, "--num_inference_steps", "2")
    assert done.returncode == 0 and (tmp_path / "samples" / "000001.png").exists(), done.stderr[-3000:]
