"""Several processes: work of one of them may take longer than a collective, and all stop at the same step."""

import itertools
import random
import threading
import time

import pytest
import torch.distributed as dist
from conftest import ROOT
from process_helpers import run_forked
from training_helpers import losses, tiny_run

from trainkit.training import signals
from trainkit.training.signals import StopAgreement

SLOW_FILES_AND_NETWORK = """
import datetime, time
import trainkit.processes as processes
processes.COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=3)
import trainkit.training.launch as launch
launch.COLLECTIVE_TIMEOUT = processes.COLLECTIVE_TIMEOUT
import {modules}
def slow(module, name):
    function = getattr(module, name)
    def call(*arguments, **keywords):
        if not call.slept and {condition}:
            call.slept = True
            time.sleep(4)
        return function(*arguments, **keywords)
    call.slept = False
    setattr(module, name, call)
for module, name in [{slow}]:
    slow(module, name)
import {script}
from trainkit.errors import run_script
run_script({script}.main)
"""


@pytest.fixture
def run_slowly(tmp_path):
    """Run a script on two processes whose collectives end after 3 s; the first call of each of `slow` takes 4 s."""

    def call(script, arguments, slow, condition="True"):
        modules = sorted({name.rpartition(".")[0] for name in slow})
        pairs = ", ".join(f"({name.rpartition('.')[0]}, {name.rpartition('.')[2]!r})" for name in slow)
        code = SLOW_FILES_AND_NETWORK.format(
            modules=", ".join(modules), slow=pairs, script=script, condition=condition
        )
        (tmp_path / "slow.py").write_text(code, encoding="utf-8")
        return run_forked(tmp_path / "slow.py", *arguments, processes=2, environment={"PYTHONPATH": str(ROOT)})

    return call


@pytest.mark.slow
def test_files_may_take_longer_than_a_collective(run_slowly, image_folder, tiny_unet, cache_dir, tmp_path):
    """Writing a checkpoint and the pipeline, with the push to the Hub inside; then its checksums and its content."""
    flags = {"max_train_steps": 2, "checkpointing_steps": 2, "train_batch_size": 4}
    arguments = tiny_run(image_folder, tiny_unet, cache_dir, tmp_path / "out", **flags)
    written = ["trainkit.training.checkpoints.folder.commit", "trainkit.training.outputs.save_pipeline"]
    run_slowly("train_unconditional", arguments, written)
    flags |= {"max_train_steps": 3, "checkpointing_steps": 0, "resume_from_checkpoint": "latest"}
    arguments = tiny_run(image_folder, tiny_unet, cache_dir, tmp_path / "out", **flags)
    read = ["trainkit.training.checkpoints.folder.damage", "trainkit.training.checkpoints.state.load_file"]
    run_slowly("train_unconditional", arguments, read)
    assert len(losses(tmp_path / "out")) == 3


@pytest.mark.slow
def test_a_download_may_take_longer_than_a_collective(run_slowly, image_folder, tiny_unet, cache_dir, tmp_path):
    flags = {"max_train_steps": 1, "checkpointing_steps": 0}
    run_forked("train_unconditional.py", *tiny_run(image_folder, tiny_unet, cache_dir, tmp_path / "model", **flags))
    arguments = ["--model_name_or_path", tmp_path / "model", "--output_dir", tmp_path / "samples"]
    arguments += ["--num_images", "2", "--num_inference_steps", "2"]
    condition = "__import__('os').environ['RANK'] == '0'"
    run_slowly("sample", arguments, ["trainkit.sampling.load.find_pipeline"], condition)
    assert (tmp_path / "samples" / "000001.png").exists()


NO_MESH = """
import torch.distributed as dist
def refuse(*arguments, **keywords):
    raise RuntimeError("Connect timeout: host names resolve to loopback")
dist.new_group = refuse
import train_unconditional
from trainkit.errors import run_script
run_script(train_unconditional.main)
"""


@pytest.mark.slow
def test_training_opens_no_second_process_group(image_folder, tiny_unet, cache_dir, tmp_path):
    """Gloo's mesh beside NCCL fails between machines whose own names resolve to loopback."""
    (tmp_path / "no_mesh.py").write_text(NO_MESH, encoding="utf-8")
    flags = {"max_train_steps": 2, "checkpointing_steps": 0, "train_batch_size": 4}
    arguments = tiny_run(image_folder, tiny_unet, cache_dir, tmp_path / "out", **flags)
    run_forked(tmp_path / "no_mesh.py", *arguments, processes=2, environment={"PYTHONPATH": str(ROOT)})


class Ranks:
    """Threads that take turns as the ranks of a run would, each ahead of the slowest by at most `ahead` steps."""

    def __init__(self, monkeypatch, count, max_steps, ahead, stops):
        monkeypatch.setattr(signals, "POLL_S", 0.002)
        monkeypatch.setattr(signals, "_numbers", itertools.repeat(0))  # as in processes of their own
        self.store, self.count, self.max_steps, self.ahead, self.stops = (
            dist.HashStore(),
            count,
            max_steps,
            ahead,
            stops,
        )
        self.finished, self.moved, self.results = [0] * count, threading.Condition(), [None] * count

    def run(self):
        threads = [threading.Thread(target=self._rank, args=(rank,), daemon=True) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
        return self.results

    def _rank(self, rank):
        draw = random.Random(rank)
        agreement = StopAgreement(
            self.store, rank, self.count, 0, lambda: self.finished[rank] >= self.stops.get(rank, 10**9)
        )
        for step in range(1, self.max_steps + 1):
            time.sleep(draw.uniform(0, 0.002))
            with self.moved:  # a collective: it ends once the others are near enough
                self.finished[rank] = step
                self.moved.notify_all()
                self.moved.wait_for(lambda step=step: min(self.finished) >= step - self.ahead)
            if step < self.max_steps and agreement.reached(step):
                self.results[rank] = step
                break
        else:
            self.results[rank] = "finished"
        agreement.close()


@pytest.mark.parametrize("ahead", [0, 7])
def test_all_ranks_stop_after_the_same_step(monkeypatch, ahead):
    results = Ranks(monkeypatch, 3, 1000, ahead, {1: 20, 2: 25}).run()
    assert len(set(results)) == 1 and 20 <= results[0] < 1000


@pytest.mark.parametrize("seed", range(5))
def test_a_signal_near_the_end_stops_all_or_none(monkeypatch, seed):
    results = Ranks(monkeypatch, 3, 12, 4, {seed % 3: 8 + seed % 4}).run()
    assert len(set(results)) == 1 and results[0] is not None


def test_without_a_signal_the_ranks_finish(monkeypatch):
    assert Ranks(monkeypatch, 2, 20, 3, {}).run() == ["finished"] * 2
