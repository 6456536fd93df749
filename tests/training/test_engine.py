"""The training engine under faults: broken gradients, replicas that drift, checkpoints in the background."""

import json
import math
import shutil
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from process_helpers import run_code, run_forked
from training_helpers import STEPS, losses, run_in_process, same_weights, start_and_signal, tiny_run

from trainkit.data.loading.order import sample_indices
from trainkit.errors import UserError
from trainkit.training.averages.ema import build_ema
from trainkit.training.averages.power_ema import snapshot_files
from trainkit.training.checkpoints.state import Snapshot
from trainkit.training.checkpoints.writer import CheckpointWriter
from trainkit.training.guards import step_if_finite

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def train(image_folder, tiny_unet, cache_dir, tmp_path, monkeypatch):
    """Run the script's main in this process with flags over those of the tiny run; returns the output folder."""

    def call(name="out", **flags):
        arguments = tiny_run(image_folder, tiny_unet, cache_dir, tmp_path / name, **flags)
        run_in_process(monkeypatch, "train_unconditional", arguments)
        return tmp_path / name

    return call


@pytest.fixture
def broken_steps(monkeypatch):
    """Makes the loss NaN at the given calls of the objective (one call a step in the tiny run)."""
    import trainkit.diffusion.objective as objective

    sound, calls = objective.denoising_errors, iter(range(10**6))

    def break_at(*steps):
        monkeypatch.setattr(
            objective, "denoising_errors", lambda *a: sound(*a) * (math.nan if next(calls) in steps else 1)
        )

    return break_at


@pytest.mark.parametrize("fused", [False, True])
def test_a_broken_gradient_leaves_weights_and_optimizer_as_they_are(fused):
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)
    for broken in (False, True, False):
        before = weight.detach().clone()
        state = {key: value.clone() for key, value in optimizer.state[weight].items()}
        weight.grad = torch.full((4,), math.nan if broken else 1.0)
        step_if_finite(optimizer, weight.grad.norm())
        assert torch.equal(before, weight) == broken
        if broken:
            assert all(torch.equal(value, optimizer.state[weight][key]) for key, value in state.items())
    assert optimizer.state[weight]["step"] == 2


@pytest.mark.slow
def test_a_broken_step_is_skipped_and_its_images_are_named(train, broken_steps, capsys, image_folder, cache_dir):
    broken_steps(4)
    output_dir = train(max_train_steps=8, checkpointing_steps=1)
    skipped = [json.loads(line) for line in (output_dir / "skipped_steps.jsonl").read_text().splitlines()]
    indices = sample_indices(np.arange(4 * 8, 5 * 8), 37, 7)  # positions of step 5, seed 7
    assert [line["step"] for line in skipped] == [5] and skipped[0]["indices"] == indices.tolist()
    assert all((image_folder / source).is_file() for source in skipped[0]["sources"])
    assert f"step 5 was skipped because its gradient is not finite; its images: {skipped[0]['sources'][0]}" in (
        capsys.readouterr().out
    )
    same_weights(output_dir / "checkpoint-4" / WEIGHTS, output_dir / "checkpoint-5" / WEIGHTS)
    same_weights(output_dir / "checkpoint-4/optimizer.safetensors", output_dir / "checkpoint-5/optimizer.safetensors")
    with pytest.raises(AssertionError):
        same_weights(output_dir / "checkpoint-5" / WEIGHTS, output_dir / "checkpoint-6" / WEIGHTS)
    values = losses(output_dir)
    assert values[4] is None and all(math.isfinite(value) for value in values[:4] + values[5:])
    assert (output_dir / "model_index.json").is_file() and (output_dir / "loss.png").is_file()


def test_too_many_broken_steps_in_a_row_end_the_run(train, broken_steps):
    broken_steps(1, 3, 4, 5)
    with pytest.raises(UserError, match="--max_skipped_steps 3: the gradients of 3 steps in a row, up to 6"):
        train(max_skipped_steps=3)


DRIFTING = """
import os, sys
import torch
from trainkit.training.run import Run
update = Run.update
def drift(run, loss):
    update(run, loss)
    if run.step == 3 and run.accelerator.process_index == 1:
        with torch.no_grad():
            dict(run.unet.named_parameters())["conv_out.weight"][0, 0, 0, 0] += 1e-6
Run.update = drift
import train_unconditional
from trainkit.errors import run_script
run_script(train_unconditional.main)
"""


@pytest.mark.slow
def test_replicas_that_drift_apart_are_told_with_the_parameter(image_folder, tiny_unet, cache_dir, tmp_path):
    (tmp_path / "drifting.py").write_text(DRIFTING)
    flags = {"train_batch_size": 4, "replica_check_steps": 2, "checkpointing_steps": 0}
    arguments = tiny_run(image_folder, tiny_unet, cache_dir, tmp_path / "out", **flags)
    done = run_forked(
        tmp_path / "drifting.py", *arguments, processes=2, environment={"PYTHONPATH": str(ROOT)}, check=False
    )
    assert done.returncode != 0
    assert "after step 4, conv_out.weight of rank 1 differs from rank 0 (1 of" in done.stderr


@pytest.mark.slow(9)
def test_a_signal_to_one_rank_stops_all_at_one_step(train, image_folder, tiny_unet, cache_dir, tmp_path):
    """A checkpoint of two processes resumes with one, and one of one process with two, as the uninterrupted run."""
    import signal

    flags = {"train_batch_size": 4, "checkpointing_steps": 15}
    arguments = tiny_run(image_folder, tiny_unet, cache_dir, tmp_path / "out", **flags)
    status, output = start_and_signal(arguments, tmp_path / "out", 4, signal.SIGUSR1, processes=2)
    assert status == 0 and "stopped by a signal at step" in output, output[-2000:]
    stopped_at = len(losses(tmp_path / "out"))
    assert 4 <= stopped_at < STEPS and (tmp_path / "out" / f"checkpoint-{stopped_at}").is_dir()
    stop_later = [*arguments, "--resume_from_checkpoint", "latest", "--deterministic"]
    run_forked("train_unconditional.py", *stop_later)
    train("whole", checkpointing_steps=15)
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "whole"), abs=1e-4)
    (tmp_path / "whole" / "checkpoint-20").rename(tmp_path / "moved-20")
    halves = tiny_run(image_folder, tiny_unet, cache_dir, tmp_path / "whole", **flags)
    before = losses(tmp_path / "whole")
    output = run_forked("train_unconditional.py", *halves, "--resume_from_checkpoint", "latest", processes=2).stdout
    assert "15 of 20 steps done" in output
    assert losses(tmp_path / "whole") == pytest.approx(before, abs=1e-4)
    same_weights(tmp_path / "whole" / "checkpoint-20" / WEIGHTS, tmp_path / "moved-20" / WEIGHTS, tolerance=1e-3)


class _Alone:
    num_processes, process_index, is_main_process = 1, 0, True


def test_training_waits_for_no_more_than_the_copy(tmp_path, monkeypatch):
    """The disk is slow: `save` is back before anything is written, and the next one waits for it."""
    import contextlib

    from trainkit.training.checkpoints import writer as module

    disk_is_ready, write = threading.Event(), module.write_snapshot
    monkeypatch.setattr(module, "write_snapshot", lambda *a: (disk_is_ready.wait(30), write(*a)))
    writer = CheckpointWriter(tmp_path, _Alone(), 1, True, lambda what: contextlib.nullcontext())
    snapshot = Snapshot({"unet": {}}, {"unet": {"w": torch.ones(3)}}, {"w/exp_avg": torch.zeros(3)}, {"step": 5})
    writer.save(5, lambda: snapshot)
    assert writer.saved_step is None and not (tmp_path / "checkpoint-5").exists()
    disk_is_ready.set()
    writer.save(6, lambda: snapshot)
    assert writer.saved_step == 5
    writer.wait()
    assert writer.saved_step == 6 and [path.name for path in tmp_path.iterdir()] == ["checkpoint-6"]
    writer.close()


@pytest.mark.slow
def test_a_snapshot_shares_nothing_with_the_training(train, monkeypatch):
    """Checkpoints written in the background, while training continues, are those written at once."""
    at_once = train("at_once", max_train_steps=4, checkpointing_steps=1, async_checkpointing="false")
    behind = train("behind", max_train_steps=4, checkpointing_steps=1)
    for step in range(1, 5):
        for file in (WEIGHTS, "unet_ema/diffusion_pytorch_model.safetensors", "optimizer.safetensors"):
            same_weights(at_once / f"checkpoint-{step}" / file, behind / f"checkpoint-{step}" / file)


@pytest.mark.slow
def test_a_flipped_byte_is_noticed_and_the_checkpoint_before_is_taken(train, capsys):
    output_dir = train(max_train_steps=6)
    file = output_dir / "checkpoint-6" / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    train(max_train_steps=6, resume_from_checkpoint="latest")
    output = capsys.readouterr().out
    assert "checkpoint-6 is damaged (optimizer.safetensors has changed since it was written)" in output
    assert "checkpoint-3: 3 of 6 steps done" in output


def test_training_length_in_images(train):
    assert len(losses(train(max_train_steps=None, max_train_images=44))) == 6  # of 8 images
    with pytest.raises(UserError, match="--max_train_steps and --max_train_images"):
        train("both", max_train_images=44)


def test_half_life_in_images_is_the_same_average_at_any_batch_size():
    options = SimpleNamespace(
        use_ema=True, ema_max_decay=0.9999, ema_half_life_images=1000, ema_inv_gamma=1.0, ema_power=0.75
    )
    unet = torch.nn.Linear(1, 1)
    unet.config = {}
    for batch in (10, 50):
        decay = build_ema(options, unet, batch).decay
        assert decay ** (1000 / batch) == pytest.approx(0.5)
    options.ema_half_life_images = 0
    with pytest.raises(UserError, match="--ema_half_life_images 0 must be more than 0"):
        build_ema(options, unet, 8)


@pytest.mark.slow
def test_deterministic_refuses_algorithms_of_chance(tmp_path):
    code = (
        "import torch\nfrom trainkit.training.launch import make_deterministic\nmake_deterministic()\n"
        "assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark\n"
    )
    done = run_code(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_deterministic_flag_is_heard(train, monkeypatch):
    from trainkit.training import launch as module

    asked = []
    monkeypatch.setattr(module, "make_deterministic", lambda: asked.append(True))
    train("plain", max_train_steps=1)
    assert not asked
    train("deterministic", max_train_steps=1, deterministic=True)
    assert asked


@pytest.mark.slow
def test_other_options_at_resume_are_told(train, capsys):
    train(max_train_steps=3)
    train(max_train_steps=6, learning_rate=1e-4, resume_from_checkpoint="latest")
    output = capsys.readouterr().out
    assert "--learning_rate 0.001 -> 0.0001" in output and "--max_train_steps 3 -> 6" in output
    assert "--resume_from_checkpoint" not in output.partition("these options differ")[2]


@pytest.mark.slow
def test_muon_takes_the_inner_matrices_and_resumes_bit_for_bit(train, tiny_unet):
    from diffusers import UNet2DModel

    from trainkit.training.optimizers import build_optimizer

    unet = UNet2DModel.from_config(UNet2DModel.load_config(tiny_unet))
    options = SimpleNamespace(
        optimizer="muon", learning_rate=1e-3, adam_beta1=0.9, adam_beta2=0.99, adam_epsilon=1e-8, adam_weight_decay=0.1
    )
    names = {id(value): name for name, value in unet.named_parameters()}
    inner, outer, vectors = (
        [names[id(p)] for p in group["params"]] for group in build_optimizer(options, unet).param_groups
    )
    assert len(inner) + len(outer) + len(vectors) == len(names)
    assert "down_blocks.0.resnets.0.conv1.weight" in inner and "mid_block.attentions.0.to_q.weight" in inner
    assert {"conv_in.weight", "conv_out.weight", "time_embedding.linear_1.weight"} <= set(outer)
    assert not [name for name in vectors if "conv1.weight" in name]

    whole = train("whole", max_train_steps=6, optimizer="muon")
    parts = train("parts", max_train_steps=6, optimizer="muon")
    shutil.rmtree(parts / "checkpoint-6")
    train("parts", max_train_steps=6, optimizer="muon", resume_from_checkpoint="latest")
    same_weights(whole / "checkpoint-6" / WEIGHTS, parts / "checkpoint-6" / WEIGHTS)
    same_weights(whole / "checkpoint-6/optimizer.safetensors", parts / "checkpoint-6/optimizer.safetensors")
    assert losses(parts) == losses(whole)


@pytest.mark.slow(8)
def test_sharded_weights_are_the_same_run_and_resume_anywhere(
    train, image_folder, smaller_unet, cache_dir, tmp_path, capsys
):
    """Two processes with half of the weights each, and accumulation: their checkpoint resumes in one process."""
    flags = {"train_batch_size": 2, "gradient_accumulation_steps": 2, "shard_weights": True, "preview_steps": 2}
    short = {"max_train_steps": 4, "checkpointing_steps": 3, "ema_power_lengths": [0.05, 0.1], "ema_snapshot_steps": 2}
    short["model_config_name_or_path"] = smaller_unet
    arguments = tiny_run(image_folder, smaller_unet, cache_dir, tmp_path / "sharded", **flags, **short)
    run_forked("train_unconditional.py", *arguments, processes=2)
    train("whole", **short)
    assert losses(tmp_path / "sharded") == pytest.approx(losses(tmp_path / "whole"), abs=1e-4)
    snapshots = [path.relative_to(tmp_path / "sharded").as_posix() for path in snapshot_files(tmp_path / "sharded")]
    assert len(snapshots) == 4
    parts = ("optimizer.safetensors", *(f"unet_ema{which}/{WEIGHTS[5:]}" for which in ("", "_0.05", "_0.1")))
    for file in (WEIGHTS, *(f"checkpoint-4/{part}" for part in parts), *snapshots):
        same_weights(tmp_path / "sharded" / file, tmp_path / "whole" / file, tolerance=1e-3)
    shutil.rmtree(tmp_path / "sharded" / "checkpoint-4")
    capsys.readouterr()
    train("sharded", **short, resume_from_checkpoint="latest")
    assert "3 of 4 steps done" in capsys.readouterr().out
    assert losses(tmp_path / "sharded") == pytest.approx(losses(tmp_path / "whole"), abs=1e-4)


def test_a_checkpoint_does_not_bring_its_kernels_along(tiny_unet, tmp_path):
    """The state comes from the checkpoint; kernels and settings are those of this run."""
    from diffusers import UNet2DModel

    from trainkit.training.checkpoints.state import restore, take_snapshot, write_snapshot

    unet = UNet2DModel.from_config(UNet2DModel.load_config(tiny_unet))
    fused = torch.optim.AdamW(unet.parameters(), lr=1e-3, fused=True)
    for parameter in unet.parameters():
        parameter.grad = torch.ones_like(parameter)
    fused.step()
    write_snapshot(take_snapshot(unet, {}, fused, {"step": 1}), tmp_path)
    plain = torch.optim.AdamW(unet.parameters(), lr=9.0)
    restore(tmp_path, unet, {}, plain)
    assert plain.param_groups[0]["fused"] is None and plain.param_groups[0]["lr"] == 9.0
    first = next(unet.parameters())
    assert torch.equal(plain.state[first]["exp_avg"], fused.state[first]["exp_avg"])


UNREADABLE = """
import sys
from pathlib import Path
from trainkit.training.checkpoints import folder as checkpoint
checkpoint.damage = lambda folder, checksums=False: None  # sizes and checksums were right, and reading fails
import train_unconditional
from trainkit.errors import run_script
run_script(train_unconditional.main)
"""


@pytest.mark.slow
def test_a_file_that_rank_0_cannot_read_stops_no_rank_for_ever(image_folder, tiny_unet, cache_dir, tmp_path):
    arguments = tiny_run(image_folder, tiny_unet, cache_dir, tmp_path / "out", train_batch_size=4, max_train_steps=6)
    run_forked("train_unconditional.py", *arguments, processes=2)
    (tmp_path / "out" / "checkpoint-6" / "optimizer.safetensors").write_bytes(b"no tensors")
    (tmp_path / "unreadable.py").write_text(UNREADABLE)
    again = [*arguments, "--resume_from_checkpoint", "latest"]
    done = run_forked(tmp_path / "unreadable.py", *again, processes=2, environment={"PYTHONPATH": str(ROOT)})
    assert "checkpoint-6 cannot be loaded" in done.stdout and "checkpoint-3: 3 of 6 steps done" in done.stdout
