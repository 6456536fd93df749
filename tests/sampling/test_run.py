"""The run of sample.py: work is handed out as it is finished, memory that is short halves batches, nothing is lost."""

import errno
import json
import shutil
import threading
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import slow_after
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from process_helpers import ScriptRun, run_forked
from sampling_helpers import contents, flags, read, sample, tiny_model, words

from evaluate_samples import Options as EvaluationOptions
from evaluate_samples import evaluate
from sample import Options
from trainkit import terminal
from trainkit.errors import UserError
from trainkit.sampling import progress, team
from trainkit.sampling.files import ImageFiles
from trainkit.sampling.pipeline import save_pipeline
from trainkit.sampling.progress import Progress
from trainkit.sampling.run import Sampler
from trainkit.sampling.team import Team, cut_units
from trainkit.training.launch import compile_as_launched

pytestmark = pytest.mark.usefixtures("on_the_cpu_alone")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_pipeline(folder, DDPMPipeline(tiny_model(), DDPMScheduler()), "")
    return folder


@pytest.fixture(scope="module")
def samples(model, tmp_path_factory):
    """Seven images by one process in batches of four."""
    folder = tmp_path_factory.mktemp("samples")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        sample(model, folder)
    return folder


@pytest.fixture
def teams(monkeypatch):
    """Processes of a run in this one: they share a store."""
    store = dist.HashStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)

    class Rank:
        num_processes = 2

        def __init__(self, rank):
            self.process_index = rank

    return [Team(Rank(rank)) for rank in range(2)]


def test_batches_do_not_depend_on_what_is_missing():
    assert cut_units(10, 4, set(range(10))) == [range(0, 4), range(4, 8), range(8, 10)]
    assert cut_units(10, 4, {2, 9}) == [range(0, 4), range(8, 10)]
    assert cut_units(10, 4, {9}, padded=True) == [range(8, 12)]
    assert cut_units(10, 4, set()) == []


def test_a_slow_process_gets_less_work(teams):
    units = [range(number, number + 1) for number in range(40)]
    taken = [[], []]

    def work(rank):
        for unit in teams[rank].take(units):
            taken[rank].append(unit)
            time.sleep(0.1 if rank else 0.01)

    threads = [threading.Thread(target=work, args=[rank]) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken[0] + taken[1], key=min) == units
    assert len(taken[0]) > 2 * len(taken[1]) > 0


def test_a_lost_process_does_not_hold_up_the_others(teams, monkeypatch):
    monkeypatch.setattr(team, "LOST_AFTER_S", 0.3)
    teams[0].report({"seconds": 1})
    assert teams[0].reports() == [{"seconds": 1}]
    teams[1].report({"seconds": 2})
    assert teams[0].reports() == [{"seconds": 1}, {"seconds": 2}]


def test_a_process_that_gives_signs_of_life_is_waited_for(teams, monkeypatch):
    monkeypatch.setattr(team, "LOST_AFTER_S", 0.5)
    monkeypatch.setattr(progress, "INTERVAL_S", 0.05)
    teams[0].report({})
    with Progress(teams[1], 1):
        threading.Timer(1.2, teams[1].report, [{"late": True}]).start()
        assert teams[0].reports() == [{}, {"late": True}]


def test_images_of_a_lost_process_are_named(model, tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFiles, "write", lambda self, numbers, images: None)
    with pytest.raises(UserError, match="7 images are missing: run the same command again") as refused:
        sample(model, tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("limit, failed", slow_after(1, [(2, [4]), (1, [4, 2, 2])]))
def test_batches_are_halved_until_they_fit(model, samples, tmp_path, monkeypatch, limit, failed):
    forward, too_large = UNet2DModel.forward, []

    def small_memory(self, images, *rest, **named):
        if len(images) > limit:
            too_large.append(len(images))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, images, *rest, **named)

    monkeypatch.setattr(UNet2DModel, "forward", small_memory)
    sample(model, tmp_path / "found", find_batch_size=True)
    assert np.abs(read(tmp_path / "found") - read(samples)).max() <= 1
    record = json.loads((tmp_path / "found" / "sampling.json").read_text())
    assert record["batch_size"] == limit and record["sample_batch_size"] == 4 and too_large == failed
    with pytest.raises(UserError, match="--sample_batch_size: 4 images do not fit into memory together"):
        sample(model, tmp_path / "given")


def test_not_even_one_image_is_one_line(model, tmp_path, monkeypatch):
    def no_memory(self, *arguments, **named):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(UNet2DModel, "forward", no_memory)
    with pytest.raises(UserError, match="not even one image fits into memory"):
        sample(model, tmp_path, find_batch_size=True)


def test_a_full_disk_is_one_line_and_nothing_else_is_lost(model, samples, tmp_path, monkeypatch):
    write = ImageFiles.write

    def full(self, numbers, images):
        if 5 in numbers:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, numbers, images)

    with monkeypatch.context() as patch:
        patch.setattr(ImageFiles, "write", full)
        with pytest.raises(UserError, match=r"cannot be written \(No space left on device\): free some space"):
            sample(model, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("0*.png"))[:4] == [f"{i:06d}.png" for i in range(4)]
    sample(model, tmp_path)
    assert contents(tmp_path) == contents(samples)


def test_compiled_batches_have_one_shape(model, samples, tmp_path, monkeypatch):
    shapes, settings = set(), []

    def compile_eagerly(self, **given):
        def call(images, *rest, **named):
            shapes.add(images.shape)
            return self._call_impl(images, *rest, **named)

        settings.append(given)
        self._compiled_call_impl = call

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    sample(model, tmp_path, compile=True, compile_mode="reduce-overhead", channels_last="yes")
    assert settings == [{"mode": "reduce-overhead", "dynamic": False}] and len(shapes) == 1
    assert np.abs(read(tmp_path) - read(samples)).max() <= 1
    assert not (tmp_path / "000007.png").exists()


def test_channels_last_reaches_weights_and_images(model, tmp_path, monkeypatch):
    seen, forward = [], UNet2DModel.forward

    def watched(self, images, *rest, **named):
        seen.append((images.stride(1), self.conv_in.weight.stride(1)))
        return forward(self, images, *rest, **named)

    monkeypatch.setattr(UNet2DModel, "forward", watched)
    sample(model, tmp_path / "last", channels_last="yes", num_images=2)
    assert set(seen) == {(1, 1)}
    seen.clear()
    sample(model, tmp_path / "auto", num_images=2)
    assert set(seen) == {(256, 9)}


def test_a_dynamo_config_is_the_flag_compile_or_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(UserError, match=r"dynamo_backend INDUCTOR: evaluate_samples.py compiles nothing; remove"):
        evaluate(EvaluationOptions(generated="a", reference="b"))
    assert compile_as_launched(Options()).compile
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    with pytest.raises(UserError, match="dynamo_backend EAGER is not supported"):
        sample("no model", "out")


def test_speed_and_waiting_are_in_the_record_and_the_summary(model, samples, tmp_path, capsys):
    shutil.copytree(samples, tmp_path / "copy")
    (tmp_path / "copy" / "000001.png").unlink()
    sample(model, tmp_path / "copy")
    record = json.loads((tmp_path / "copy" / "sampling.json").read_text())
    assert record["images_per_second"] > 0 and record["batch_size"] == 4
    assert 0 <= record["waited_for_noise"] < 1 and 0 <= record["waited_for_writing"] < 1
    assert (
        f"images/s; the device waited {record['waited_for_noise']:.1%} of the time for noise"
        in capsys.readouterr().out
    )
    sample(model, tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "sampling.json").read_text()) == record


def test_progress_is_a_line_now_and_then_without_a_terminal(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "INTERVAL_S", 0.01)
    monkeypatch.setattr(terminal, "_settings", {"quiet": False, "interval_s": 0.01})
    draw = Sampler.sample
    monkeypatch.setattr(Sampler, "sample", lambda self, *given: (time.sleep(0.1), draw(self, *given))[1])
    sample(model, tmp_path)
    assert "sampling: 4 of 7 images (57.1%), " in capsys.readouterr().out


@pytest.mark.slow(10)
def test_a_killed_process_loses_only_its_own_batches(model, tmp_path):
    """kill -9 of one of two processes; the other goes on, and the next start makes what is missing, bit for bit."""
    values = flags(model, tmp_path / "killed", num_images=60, sample_batch_size=2, num_inference_steps=10)
    run = ScriptRun("sample.py", *words(values), processes=2)
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "killed").glob("0*.png"))) < 6:
        assert time.monotonic() < deadline and run.running(), run.output()
        time.sleep(0.01)
    run.ranks[1].send_signal(9)
    at_kill = len(list((tmp_path / "killed").glob("0*.png")))
    while (written := len(list((tmp_path / "killed").glob("0*.png")))) < 52:
        assert time.monotonic() < deadline and run.ranks[0].poll() is None, (at_kill, written, run.output())
        time.sleep(0.01)
    run.ranks[0].send_signal(15)
    run.wait()
    held = {path.name for path in (tmp_path / "killed").glob("0*.png")}
    assert at_kill < 52 and 52 <= len(held) < 60
    run_forked("sample.py", *words(values), processes=2)
    sample(model, tmp_path / "whole", num_images=60, sample_batch_size=2, num_inference_steps=10)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
