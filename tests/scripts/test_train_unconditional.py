"""The training script, run through `accelerate launch` on real files: what it leaves, and that nothing disturbs it."""

import json
import math
import os
import shutil
import signal

import numpy as np
import pytest
from conftest import launch, launch_forked
from PIL import Image
from process_helpers import run_code, run_forked
from training_helpers import STEPS, golden, losses, same_training_state, same_weights, start_and_signal, tiny_run

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def run_dir(image_folder, tiny_unet, cache_dir, tmp_path_factory):
    """One whole run that the tests look at and compare others with."""
    output_dir = tmp_path_factory.mktemp("whole") / "model"
    arguments = tiny_run(image_folder, tiny_unet, cache_dir, output_dir, logger="tensorboard", preview_steps=10)
    output = launch("train_unconditional.py", *arguments).stdout
    assert "20 steps = 160 images" in output and "saved the pipeline" in output
    return output_dir


@pytest.mark.slow(16)
def test_what_a_run_leaves(run_dir):
    assert Image.open(run_dir / "samples.png").width >= 4 * 16
    assert Image.open(run_dir / "loss.png").width > 400
    assert sorted(path.name for path in (run_dir / "samples").iterdir()) == ["0000010.png", "0000020.png"]
    assert list((run_dir / "logs").rglob("events.out.tfevents*"))
    index = json.loads((run_dir / "model_index.json").read_text())
    assert index["_class_name"] == "DDPMPipeline" and index["scheduler"] == [
        "diffusers",
        "DPMSolverMultistepScheduler",
    ]
    assert {"ddpm", "ddim", "dpmsolver"} <= {path.name for path in (run_dir / "schedulers").iterdir()}
    assert "from_pretrained" in (run_dir / "README.md").read_text()
    assert not [path for path in run_dir.iterdir() if path.name.startswith((".tmp", "tmp-"))]


@pytest.mark.slow
def test_saved_folder_loads_without_this_repository(run_dir, tmp_path):
    code = """
import sys
from diffusers import DDIMScheduler, DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
assert type(pipeline).__name__ == "DDPMPipeline" and "trainkit" not in sys.modules
assert pipeline(batch_size=2, num_inference_steps=4).images[0].size == (16, 16)
pipeline.scheduler = DDIMScheduler.from_pretrained(sys.argv[1], subfolder="schedulers/ddim")
assert pipeline(num_inference_steps=4).images[0].size == (16, 16)
"""
    done = run_code(code, run_dir, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_saved_weights_are_the_averaged_ones(run_dir):
    last = run_dir / f"checkpoint-{STEPS}"
    same_weights(run_dir / WEIGHTS, last / "unet_ema/diffusion_pytorch_model.safetensors")
    with pytest.raises(AssertionError):
        same_weights(run_dir / WEIGHTS, last / WEIGHTS)


@pytest.mark.slow
def test_golden_losses(run_dir):
    assert losses(run_dir) == pytest.approx(golden("unconditional"), rel=2e-3)


@pytest.mark.slow
def test_learning_rate_counts_optimizer_steps(run_dir):
    rates = [json.loads(line)["lr"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert rates == pytest.approx(expected_rates())


def expected_rates(warmup=5, peak=1e-3):
    cosine = [0.5 * (1 + math.cos(math.pi * (step - warmup) / (STEPS - warmup))) for step in range(warmup, STEPS)]
    return [peak * step / warmup for step in range(warmup)] + [peak * factor for factor in cosine]


@pytest.mark.slow
def test_killed_and_resumed_run_is_bit_equal(run_dir, image_folder, tiny_unet, cache_dir, tmp_path):
    arguments = tiny_run(image_folder, tiny_unet, cache_dir, tmp_path, checkpoints_total_limit=2)
    start_and_signal(arguments, tmp_path, 9, signal.SIGKILL)
    output = run_forked("train_unconditional.py", *arguments, "--resume_from_checkpoint", "latest").stdout
    assert "resumed from" in output
    same_training_state(tmp_path / f"checkpoint-{STEPS}", run_dir / f"checkpoint-{STEPS}")
    same_weights(tmp_path / WEIGHTS, run_dir / WEIGHTS)
    assert losses(tmp_path) == losses(run_dir)
    kept = sorted(path.name for path in tmp_path.iterdir() if "checkpoint" in path.name)
    assert kept == ["checkpoint-18", "checkpoint-20"]


@pytest.fixture(scope="module")
def two_process_run(image_folder, tiny_unet, cache_dir, tmp_path_factory):
    """The same run on two processes, half the batch each."""
    folder = tmp_path_factory.mktemp("two")
    arguments = tiny_run(image_folder, tiny_unet, cache_dir, output_dir := folder / "out", train_batch_size=4)
    launch_forked(folder, "train_unconditional.py", *arguments, processes=2)
    return output_dir


@pytest.mark.slow
def test_two_processes_are_the_same_run(run_dir, two_process_run):
    assert losses(two_process_run) == pytest.approx(losses(run_dir), abs=1e-4)
    rates = [json.loads(line)["lr"] for line in (two_process_run / "metrics.jsonl").read_text().splitlines()]
    assert rates == pytest.approx(expected_rates())
    states = {path.name for path in (two_process_run / "checkpoint-9").glob("random_states_*")}
    assert states == {
        "random_states_0.safetensors",
        "random_states_1.safetensors",
    }  # every rank took part in the checkpoint
    same_weights(two_process_run / WEIGHTS, run_dir / WEIGHTS, tolerance=1e-3)
    grids = [np.asarray(Image.open(folder / "samples.png")).astype(int) for folder in (two_process_run, run_dir)]
    assert np.abs(grids[0] - grids[1]).mean() < 2  # each process made its half of the same samples


@pytest.mark.slow
def test_resume_on_another_number_of_processes_keeps_the_global_batch(
    run_dir, two_process_run, image_folder, tiny_unet, cache_dir, tmp_path
):
    """Two processes to step 9, then one process: accumulation follows by itself, with the schedule unstretched."""
    shutil.copytree(two_process_run / "checkpoint-9", tmp_path / "checkpoint-9")
    shutil.copy(two_process_run / "metrics.jsonl", tmp_path)
    arguments = tiny_run(image_folder, tiny_unet, cache_dir, tmp_path, train_batch_size=4)
    output = run_forked("train_unconditional.py", *arguments, "--resume_from_checkpoint", "latest").stdout
    assert "--gradient_accumulation_steps 2 keeps the global batch of 8" in output
    assert losses(tmp_path) == pytest.approx(losses(run_dir), abs=1e-4)
    rates = [json.loads(line)["lr"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rates == pytest.approx(expected_rates())


@pytest.mark.slow
def test_sigterm_writes_a_checkpoint_and_exits_cleanly(run_dir, image_folder, tiny_unet, cache_dir, tmp_path):
    arguments = tiny_run(image_folder, tiny_unet, cache_dir, tmp_path, checkpointing_steps=0)
    status, output = start_and_signal(arguments, tmp_path, 4, signal.SIGTERM)
    assert status == 0 and "stopped by a signal" in output
    checkpoint = next(tmp_path.glob("checkpoint-*"))
    assert 4 <= int(checkpoint.name.removeprefix("checkpoint-")) < STEPS
    run_forked("train_unconditional.py", *arguments, "--resume_from_checkpoint", "latest")
    same_weights(tmp_path / WEIGHTS, run_dir / WEIGHTS)


@pytest.mark.slow
def test_latest_falls_back_over_a_damaged_checkpoint(run_dir, image_folder, tiny_unet, cache_dir, tmp_path):
    for step in (9, 12):
        shutil.copytree(run_dir / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    weights = tmp_path / "checkpoint-12" / WEIGHTS
    os.truncate(weights, weights.stat().st_size // 2)
    arguments = tiny_run(image_folder, tiny_unet, cache_dir, tmp_path, max_train_steps=STEPS, save_model_epochs=1000)
    output = run_forked("train_unconditional.py", *arguments, "--resume_from_checkpoint", "latest").stdout
    assert "checkpoint-12 is damaged" in output and "checkpoint-9: 9 of 20 steps done" in output
    same_weights(tmp_path / WEIGHTS, run_dir / WEIGHTS)


LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
import train_unconditional
from trainkit.errors import run_script
run_script(train_unconditional.main)
"""


@pytest.mark.slow
def test_full_disk_keeps_the_last_whole_checkpoint_and_the_training(image_folder, tiny_unet, cache_dir, tmp_path):
    """No file may grow beyond 8 KiB, as with `ulimit -f`: weights cannot be written, and the run trains to its end."""
    arguments = tiny_run(image_folder, tiny_unet, cache_dir, tmp_path)
    run_forked("train_unconditional.py", *arguments, "--max_train_steps", "4")
    done = run_code(LIMITED, *arguments, "--resume_from_checkpoint", "latest")
    assert done.stdout.count("could not be written to --output_dir") >= 5, done.stderr[-2000:]
    assert "error: --output_dir" in done.stderr and "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.glob("*checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


@pytest.mark.slow
def test_noise_is_added_in_float32_under_autocast(image_folder, tiny_unet, cache_dir, tmp_path):
    code = """
import sys
import diffusers, torch
seen, forward = set(), diffusers.UNet2DModel.forward
def spy(self, sample, timestep, *arguments, **keywords):
    if self.training:
        seen.add((sample.dtype, torch.is_autocast_enabled("cpu")))
    return forward(self, sample, timestep, *arguments, **keywords)
diffusers.UNet2DModel.forward = spy
import train_unconditional
train_unconditional.main()
assert seen == {(torch.float32, True)}, seen
"""
    flags = {"mixed_precision": "bf16", "max_train_steps": 2, "checkpointing_steps": 0}
    arguments = tiny_run(image_folder, tiny_unet, cache_dir, tmp_path, **flags)
    done = run_code(code, *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
