"""Launches of several processes: accumulation, a rank that is killed and restarted by the launcher, two machines."""

import os
import signal
import socket
import time
from pathlib import Path

import psutil
import pytest
from conftest import LAUNCHER, ROOT, launch_words
from process_helpers import ScriptRun, run_forked, start_launcher
from training_helpers import losses, same_training_state, same_weights, tiny_run

SCRIPT = "train_unconditional.py"
STEPS = 12
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def arguments(image_folder, tiny_unet, cache_dir):
    """Flags of one run of 8 images a step on two processes that accumulate twice, for an output folder."""

    def build(output_dir, **flags):
        flags = {"max_train_steps": STEPS, "train_batch_size": 2, "gradient_accumulation_steps": 2} | flags
        return tiny_run(image_folder, tiny_unet, cache_dir, output_dir, **flags)

    return build


@pytest.fixture(scope="module")
def two_process_run(arguments, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("two")
    output = run_forked(SCRIPT, *arguments(output_dir), processes=2).stdout
    assert "2 per device x 2 processes x 2 micro-steps" in output
    return output_dir


@pytest.mark.slow(6)
def test_two_processes_that_accumulate_are_the_run_of_one(two_process_run, arguments, tmp_path):
    run_forked(SCRIPT, *arguments(tmp_path, train_batch_size=8, gradient_accumulation_steps=1))
    assert losses(two_process_run) == pytest.approx(losses(tmp_path), abs=1e-4)
    same_weights(two_process_run / WEIGHTS, tmp_path / WEIGHTS, tolerance=1e-3)


@pytest.mark.slow(7)
def test_the_launcher_restarts_the_group_when_a_rank_is_killed(two_process_run, arguments, tmp_path):
    """One command for all: the first start finds no checkpoint, the second resumes from the newest."""
    words = launch_words(SCRIPT, *arguments(tmp_path), "--resume_from_checkpoint", "latest", processes=2)
    launcher = start_launcher(tmp_path, LAUNCHER, "--max_restarts", "1", *words)
    output = _kill_and_wait([launcher], "1", tmp_path / "checkpoint-3")
    assert "no checkpoint in" in output and "resumed from" in output
    same_training_state(tmp_path / f"checkpoint-{STEPS}", two_process_run / f"checkpoint-{STEPS}")
    same_weights(tmp_path / WEIGHTS, two_process_run / WEIGHTS)
    assert losses(tmp_path) == losses(two_process_run)


@pytest.mark.slow(14)
def test_two_machines_are_the_run_of_one_machine_and_outlive_a_killed_rank(two_process_run, arguments, tmp_path):
    """The command of docs/scaling.md, once for each of two `machines` of one process; both agents start again."""
    agent = [
        "--nnodes", "2", "--nproc_per_node", "1", "--max_restarts", "2", "--rdzv_backend", "c10d",
        "--rdzv_endpoint", f"127.0.0.1:{_free_port()}", "--rdzv_id", "pictures", "--local_addr", "127.0.0.1",
    ]  # fmt: skip
    words = [*agent, str(ROOT / SCRIPT), *arguments(tmp_path), "--resume_from_checkpoint", "latest"]
    environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    launchers = [start_launcher(tmp_path, "torch.distributed.run", *words, environment=environment) for _ in range(2)]
    output = _kill_and_wait(launchers, "1", tmp_path / "checkpoint-3")
    assert "2 per device x 2 processes x 2 micro-steps" in output and "resumed from" in output
    assert losses(tmp_path) == losses(two_process_run)
    same_weights(tmp_path / WEIGHTS, two_process_run / WEIGHTS)


def _kill_and_wait(launchers: list[ScriptRun], rank: str, checkpoint: Path) -> str:
    """SIGKILL the training process of `rank` once `checkpoint` is there, and wait for the `launchers`.

    Returns their output; every one must end well.
    """
    try:
        deadline = time.monotonic() + 100
        while not checkpoint.exists():
            assert time.monotonic() < deadline and all(launcher.running() for launcher in launchers), [
                launcher.output() for launcher in launchers
            ]
            time.sleep(0.01)
        os.kill(_training_process(launchers, rank), signal.SIGKILL)
        done = [launcher.wait(timeout=120) for launcher in launchers]
        output = "\n".join(launcher.stdout + launcher.stderr for launcher in done)
        assert [launcher.returncode for launcher in done] == [0] * len(launchers), output[-6000:]
        return output
    finally:
        for launcher in launchers:
            launcher.ranks[0].send_signal(signal.SIGTERM)  # it ends its own processes


def _training_process(launchers: list[ScriptRun], rank: str) -> int:
    for launcher in launchers:
        for process in psutil.Process(launcher.ranks[0].pid).children(recursive=True):
            try:
                if process.environ().get("RANK") == rank and str(ROOT / SCRIPT) in process.cmdline():
                    return process.pid
            except psutil.Error:  # it has just ended
                continue
    raise AssertionError(f"no process of rank {rank}")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
