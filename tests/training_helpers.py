"""What the tests of the training scripts share: the flags of one tiny run, and how to read what it wrote."""

import importlib
import json
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from conftest import ROOT
from PIL import Image
from process_helpers import ScriptRun
from safetensors.torch import load_file

STEPS = 20


def golden(name):
    """The losses (one per step) that the configuration `name` had when tests/golden/`name`.json was written."""
    return json.loads((ROOT / "tests" / "golden" / f"{name}.json").read_text(encoding="utf-8"))


def tiny_run(image_folder, tiny_unet, cache_dir, output_dir, **flags):
    """Arguments of a run of 20 steps of 8 images at 16 px; `flags` override.

    None leaves one out, True is a switch, a list is several words.
    """
    values = {
        "train_data_dir": image_folder, "model_config_name_or_path": tiny_unet, "cache_dir": cache_dir,
        "output_dir": output_dir, "resolution": 16, "random_flip": True, "max_train_steps": STEPS,
        "train_batch_size": 8, "learning_rate": 1e-3, "lr_warmup_steps": 5, "checkpointing_steps": 3,
        "eval_batch_size": 4, "ddpm_num_inference_steps": 3, "logging_steps": 1, "logger": "none",
        "cpu_threads": 1, "num_proc": 1, "seed": 7,
        "optimizer": "adamw",  # imported seconds sooner than muon
    }  # fmt: skip
    values |= flags
    arguments = []
    for name, value in values.items():
        if value is not None:
            words = [] if value is True else value if isinstance(value, list) else [value]
            arguments += [f"--{name}", *map(str, words)]
    return arguments


def run_in_process(monkeypatch, script, arguments):
    """Run `main` of a script, "train_unconditional" for example, in this process on the CPU."""
    forget = partial(AcceleratorState._reset_state, reset_partial_state=True)  # the precision of a run
    forget()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
    try:
        importlib.import_module(script).main()
    finally:
        forget()


def losses(output_dir):
    rows = [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def same_weights(one, other, tolerance=0.0):
    """Assert that two safetensors files hold the same tensors, bit for bit or within `tolerance`."""
    one, other = load_file(one), load_file(other)
    assert one.keys() == other.keys()
    for name in one:
        if tolerance:
            torch.testing.assert_close(one[name], other[name], atol=tolerance, rtol=tolerance)
        else:
            assert torch.equal(one[name], other[name]), name


def same_training_state(one, other):
    """Assert that two checkpoints hold the same weights, averages, optimizer state and schedule, bit for bit."""
    for part in ("unet", "unet_ema"):
        file = f"{part}/diffusion_pytorch_model.safetensors"
        same_weights(one / file, other / file)
    same_weights(one / "optimizer.safetensors", other / "optimizer.safetensors")
    schedules = [json.loads((folder / "training_state.json").read_text())["lr_scheduler"] for folder in (one, other)]
    assert schedules[0] == schedules[1]


def start_and_signal(arguments, output_dir, at_step, number, processes=1):
    """Start a run, send its first training process signal `number` once `at_step` is logged.

    Returns the exit status and the output.
    """
    run = ScriptRun("train_unconditional.py", *arguments, processes=processes)
    metrics = Path(output_dir) / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not metrics.exists() or len(metrics.read_text(encoding="utf-8").splitlines()) < at_step:
        assert run.running() and time.monotonic() < deadline, run.output()
        time.sleep(0.01)
    run.ranks[0].send_signal(number)
    done = run.wait(timeout=120)
    if number == signal.SIGKILL:
        assert done.returncode != 0
    return done.returncode, done.stdout + done.stderr


def assert_trained_on_images(out, in_channels, arguments):
    """Assert that the run in `out` has further input channels, grids of three, its card, and one held-out loss."""
    config = json.loads((out / "unet" / "config.json").read_text())
    assert (config["in_channels"], config["out_channels"]) == (in_channels, 3)
    grid = Image.open(out / "samples.png")
    assert abs(grid.width / grid.height - 3) < 0.15  # two rows of two: condition, sample, true image
    assert arguments in (out / "README.md").read_text()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["validation_loss"] > 0 for row in rows if "validation_loss" in row] == [True]


def assert_resumes_bit_equal(train, out, flags, before):
    """Assert that `train(**flags)`, resumed from the checkpoint before its last, ends as the run in `out` did."""
    shutil.copytree(out, before)
    last = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2])).name
    shutil.rmtree(out / last)
    train(**flags, resume_from_checkpoint="latest")
    same_training_state(out / last, before / last)
    weights = Path("unet", "diffusion_pytorch_model.safetensors")
    same_weights(out / weights, before / weights)
    assert losses(out) == losses(before)
