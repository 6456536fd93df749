"""The held-out loss and the score while training: always the same question, and no disturbance of the training."""

import contextlib
import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from process_helpers import run_code, run_forked
from training_helpers import STEPS, golden, losses, tiny_run

from trainkit.data.cache import open_or_prepare
from trainkit.errors import UserError
from trainkit.training.log import METRICS_FILE, plot_loss, read_metrics, truncate_metrics
from trainkit.training.score import SampleScore, check_score
from trainkit.training.validation import HeldOutLoss, loss_by_noise, open_validation_images, stratified_uniforms

NUM_HELD_OUT, COUNT, T = 14, 12, 1000
BINS = [f"validation_loss_t{low}_{low + 250}" for low in range(0, T, 250)]


def test_each_stratum_of_the_schedule_has_one_image_in_no_order():
    uniforms = stratified_uniforms(seed=3, count=400)
    assert sorted((uniforms * 400).astype(int)) == list(range(400))
    assert abs(np.corrcoef(uniforms, np.arange(400))[0, 1]) < 0.15
    assert np.array_equal(uniforms, stratified_uniforms(3, 400))
    assert not np.array_equal(uniforms, stratified_uniforms(4, 400))


def test_four_bins_average_to_the_whole():
    timesteps = (stratified_uniforms(0, 64) * T).astype(int)
    values = loss_by_noise((timesteps / T).astype(np.float32), timesteps, T)
    assert list(values) == ["validation_loss", *BINS]
    assert np.mean([values[name] for name in BINS]) == pytest.approx(values["validation_loss"])
    assert [values[name] for name in BINS] == pytest.approx([0.125, 0.375, 0.625, 0.875], abs=0.02)
    assert list(loss_by_noise(np.ones(2), np.array([10, 260]), T)) == ["validation_loss", *BINS[:2]]


class FakeRun:
    """One rank of a run at `step` whose reduction leaves its own share as it is."""

    def __init__(self, batch_size=5, rank=0, ranks=1, step=9, written=None):
        self.options = SimpleNamespace(seed=3, validation_images=COUNT, eval_batch_size=batch_size)
        self.accelerator = SimpleNamespace(
            autocast=contextlib.nullcontext,
            process_index=rank, num_processes=ranks, device=torch.device("cpu"),
            reduce=lambda values, how: values, print=lambda *words, **how: None,
        )  # fmt: skip
        self.step, self.lines = step, []
        self.log = SimpleNamespace(last_step=lambda name: written, write_values=lambda *line: self.lines.append(line))

    @contextlib.contextmanager
    def averaged_weights(self):
        yield torch.nn.Identity()


class Numbered:
    """Images of 4x6 that are all their own number; only a centre crop is given out."""

    height, width, channels, bit_depth, holds_latents = 4, 6, 1, 8, False

    def __len__(self):
        return NUM_HELD_OUT

    def gather(self, indices, crops):
        assert crops is None
        return np.broadcast_to(indices.astype(np.uint8)[:, None, None, None], (len(indices), 4, 6, 1)).copy()


def all_of_a_batch(unet, batch, timesteps):
    """A stand-in for a loss that every part of the batch goes into."""
    assert torch.allclose(batch.images[:, 0, 0, 0], torch.from_numpy(batch.indices) / 127.5 - 1)
    return batch.images.mean((1, 2, 3)) + batch.noise.square().mean((1, 2, 3)) * timesteps


def held_out_loss(**how):
    return HeldOutLoss(FakeRun(**how), Numbered(), all_of_a_batch, T)


def test_the_same_question_at_every_call_batch_size_and_division():
    whole = held_out_loss()
    expected = whole.losses(None)
    assert len(set(expected)) == COUNT and len(set(whole.indices)) == COUNT
    assert np.array_equal(whole.losses(None), expected)
    assert held_out_loss(batch_size=1).losses(None) == pytest.approx(expected, rel=1e-6)
    shares = [held_out_loss(rank=rank, ranks=3, batch_size=2).losses(None) for rank in range(3)]
    assert [np.count_nonzero(share) for share in shares] == [4, 4, 4]
    assert sum(shares) == pytest.approx(expected, rel=1e-6)


def test_a_step_is_measured_once():
    fresh, done = held_out_loss(written=6), held_out_loss(written=9)
    for held_out in (fresh, fresh, done):
        held_out.measure()
    assert [line[0] for line in fresh.run.lines] == [9] and not done.run.lines
    fresh.run.step = 12
    fresh.measure()
    assert [line[0] for line in fresh.run.lines] == [9, 12] and fresh.run.lines[0][1] == fresh.run.lines[1][1]


def write_metrics(folder, with_validation):
    lines = [{"step": step, "loss": 1 / step, "lr": 1e-3} for step in range(1, 11)]
    if with_validation:
        lines.insert(5, {"step": 5, "validation_loss": 0.5, BINS[0]: 0.5})
        lines += [{"step": 10, "validation_loss": 0.4}, {"step": 10, "kid": 0.1}]
    (folder / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_resumed_run_keeps_the_validations_up_to_its_step(tmp_path):
    write_metrics(tmp_path, with_validation=True)
    truncate_metrics(tmp_path, 9)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9]


@pytest.mark.slow
def test_the_loss_curve_shows_validations_as_red_points(tmp_path, drawn_figures):
    red = []
    for with_validation in (False, True):
        write_metrics(tmp_path, with_validation)
        plot_loss(tmp_path)
        pixels = np.asarray(Image.open(tmp_path / "loss.png").convert("RGB")).astype(int)
        red.append(int((np.abs(pixels - (214, 39, 40)).sum(-1) < 30).sum()))
    assert red[0] == 0 and red[1] > 20


@pytest.fixture(scope="module")
def held_out_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held_out")
    for i in range(NUM_HELD_OUT):
        rows, columns = np.mgrid[0:18, 0:21] / (8 + i)
        pixels = (np.sin(rows * (1 + i % 3)) + np.cos(columns))[..., None] * [50, 60, 40] + 100 + 5 * i
        Image.fromarray(pixels.clip(0, 255).astype("uint8")).save(folder / f"{i:02d}.png")
    return folder


def options_for(image_folder, tiny_unet, cache_dir, **flags):
    from train_unconditional import Options
    from trainkit.options.parsing import parse_options

    return parse_options(Options, "", tiny_run(image_folder, tiny_unet, cache_dir, "unused", **flags))


def test_the_held_out_images_are_prepared_like_the_training_images(
    image_folder, held_out_folder, tiny_unet, cache_dir, tmp_path
):
    options = options_for(image_folder, tiny_unet, cache_dir, validation_data_dir=held_out_folder)
    images = open_or_prepare(options)
    held_out = open_validation_images(options, images)
    assert len(held_out) == NUM_HELD_OUT and (held_out.height, held_out.width, held_out.channels) == (16, 16, 3)

    options.validation_data_dir = str(held_out.folder)  # prepared already
    assert open_validation_images(options, images).fingerprint == held_out.fingerprint
    small = open_or_prepare(options_for(held_out_folder, tiny_unet, cache_dir, resolution=8))
    options.validation_data_dir = str(small.folder)
    with pytest.raises(UserError, match="holds images of 8x8 RGB, the training data of 16x16 RGB"):
        open_validation_images(options, images)
    for trained_on in (image_folder, image_folder / "round"):
        options.validation_data_dir = str(trained_on)
        with pytest.raises(UserError, match="part of --train_data_dir .*: move the held-out images elsewhere"):
            open_validation_images(options, images)
    (tmp_path / "empty").mkdir()
    options.validation_data_dir = str(tmp_path / "empty")
    with pytest.raises(UserError, match="^--validation_data_dir .*empty"):
        open_validation_images(options, images)


def test_a_score_without_its_packages_is_refused_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(
        UserError, match="--score_steps 5: the feature extractor is not installed: pip install"
    ) as error:
        check_score(
            SimpleNamespace(score_steps=5, score_images=200, score_extractor="efficientnet_lite0", cache_dir=None)
        )
    assert "\n" not in str(error.value)
    check_score(SimpleNamespace(score_steps=None, score_images=200))


def test_too_few_reference_images_are_refused(tiny_unet):
    run = SimpleNamespace(options=SimpleNamespace(score_steps=5), images=[0, 1, 2])
    with pytest.raises(UserError, match="3 training images are too few"):
        SampleScore(run, None, generate=None)


def watched_run(image_folder, held_out_folder, tiny_unet, cache_dir, output_dir, **flags):
    watching = {
        "validation_data_dir": held_out_folder, "validation_steps": 6, "validation_images": COUNT,
        "score_steps": 15, "score_images": 8, "save_images_epochs": 100,
    }  # fmt: skip
    return tiny_run(image_folder, tiny_unet, cache_dir, output_dir, **(watching | flags))


@pytest.fixture(scope="module")
def watched(image_folder, held_out_folder, tiny_unet, cache_dir, tmp_path_factory):
    """A whole run that is measured now and then, with what it printed."""
    output_dir = tmp_path_factory.mktemp("watched") / "model"
    arguments = watched_run(image_folder, held_out_folder, tiny_unet, cache_dir, output_dir, logger="tensorboard")
    return output_dir, run_forked("train_unconditional.py", *arguments).stdout


def lines_with(output_dir, name):
    return {row["step"]: row for row in read_metrics(output_dir) if name in row}


def steps_with(output_dir, name):
    return [row["step"] for row in read_metrics(output_dir) if name in row]


@pytest.mark.slow
def test_measuring_does_not_disturb_the_training(watched):
    assert losses(watched[0]) == pytest.approx(golden("unconditional"), rel=2e-3)


@pytest.mark.slow
def test_validation_lines(watched):
    output_dir, output = watched
    assert steps_with(output_dir, "validation_loss") == [6, 12, 18, 20]
    rows = lines_with(output_dir, "validation_loss")
    assert list(rows[6]) == ["step", "validation_loss", *BINS]
    for row in rows.values():
        assert np.mean([row[name] for name in BINS]) == pytest.approx(row["validation_loss"])
    assert rows[20]["validation_loss"] < rows[6]["validation_loss"] - 0.01  # it learns
    assert f"step 20: validation loss {rows[20]['validation_loss']:.4f} (t0-250 " in output


@pytest.mark.slow
def test_score_lines_tell_all_that_they_depend_on(watched):
    output_dir, output = watched
    assert steps_with(output_dir, "kid") == [15, 20]
    row = lines_with(output_dir, "kid")[20]
    assert (row["kid_n"], row["kid_reference_n"], row["kid_reference"]) == (8, NUM_HELD_OUT, "validation")
    assert 0 < row["kid"] < 5 and row["kid_std"] > 0 and row["kid_num_inference_steps"] == 3
    assert row["kid_scheduler"] == "sde_dpmsolver"
    line_of_20 = next(line for line in output.splitlines() if line.startswith("step 20: KID"))
    for words in ("8 generated, 14 validation images", "sde_dpmsolver, 3 steps",
                  "efficientnet-lite0", "not comparable with published figures"):  # fmt: skip
        assert words in line_of_20


@pytest.mark.slow
def test_values_reach_tensorboard(watched):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = [EventAccumulator(str(file.parent)) for file in (watched[0] / "logs").rglob("events.out.tfevents*")]
    found = {}
    for accumulator in events:
        accumulator.Reload()
        found |= {name: accumulator.Scalars(name) for name in accumulator.Tags()["scalars"]}
    assert [event.step for event in found["validation/loss"]] == [6, 12, 18, 20]
    assert [event.step for event in found["score/kid"]] == [15, 20]
    assert len(found["train/loss"]) == STEPS and any(BINS[3].removeprefix("validation_loss") in name for name in found)


@pytest.mark.slow
def test_the_time_left_is_written_down(watched):
    rows = lines_with(watched[0], "eta_s")
    assert sorted(rows) == list(range(1, STEPS + 1)) and rows[STEPS]["eta_s"] == 0
    for step, row in rows.items():
        assert row["eta_s"] == pytest.approx((STEPS - step) * 8 / row["images_per_s"], rel=0.05, abs=0.06)


@pytest.mark.slow
def test_a_resumed_run_measures_the_same_and_writes_no_step_twice(
    watched, image_folder, held_out_folder, tiny_unet, cache_dir, tmp_path
):
    """From step 9, with all the lines of the run that went on to step 20 still in the file."""
    shutil.copytree(watched[0] / "checkpoint-9", tmp_path / "checkpoint-9")
    shutil.copy(watched[0] / METRICS_FILE, tmp_path)
    arguments = watched_run(image_folder, held_out_folder, tiny_unet, cache_dir, tmp_path, score_steps=None)
    run_forked("train_unconditional.py", *arguments, "--resume_from_checkpoint", "latest")
    assert steps_with(tmp_path, "validation_loss") == [6, 12, 18, 20]
    expected = lines_with(watched[0], "validation_loss")
    for step, row in lines_with(tmp_path, "validation_loss").items():
        assert row == pytest.approx(expected[step], rel=1e-5)


@pytest.mark.slow
def test_two_processes_measure_the_same_weights_alike(
    watched, image_folder, held_out_folder, tiny_unet, cache_dir, tmp_path
):
    """The last checkpoint, measured by two processes in batches of three; no training step in between."""
    shutil.copytree(watched[0] / f"checkpoint-{STEPS}", tmp_path / f"checkpoint-{STEPS}")
    flags = {"train_batch_size": 4, "eval_batch_size": 3}
    arguments = watched_run(image_folder, held_out_folder, tiny_unet, cache_dir, tmp_path, **flags)
    run_forked("train_unconditional.py", *arguments, "--resume_from_checkpoint", "latest", processes=2)
    assert [row["step"] for row in read_metrics(tmp_path)] == [STEPS, STEPS]
    for name in ("validation_loss", "kid"):
        here, there = (lines_with(folder, name)[STEPS] for folder in (tmp_path, watched[0]))
        tolerance = 1e-5 if name == "validation_loss" else 1e-2  # of KID: a pixel may round the other way
        for text in ("kid_reference", "kid_scheduler"):
            assert here.pop(text, None) == there.pop(text, None)
        assert here == pytest.approx(there, rel=tolerance)


@pytest.mark.slow
def test_validation_runs_on_averaged_weights_under_the_autocast_of_training(
    image_folder, held_out_folder, tiny_unet, cache_dir, tmp_path
):
    code = """
import sys, time
import diffusers, torch
from trainkit.training import validation
inside, seen, forward, measure = [], set(), diffusers.UNet2DModel.forward, validation.HeldOutLoss.losses
whole, averages = validation.HeldOutLoss.measure, {}
def measuring(self):
    averages.update(self.run.ema.full_weights())
    whole(self)
def spy(self, sample, timestep, *arguments, **keywords):
    if inside:
        seen.add((sample.dtype, torch.is_autocast_enabled("cpu"), self.training, torch.is_grad_enabled()))
    return forward(self, sample, timestep, *arguments, **keywords)
def losses(self, unet):
    inside.append(True)
    assert averages and all(torch.equal(averages[name], used) for name, used in unet.state_dict().items())
    time.sleep(1)
    measured = measure(self, unet)
    inside.clear()
    assert measured.dtype == "float32" and measured.all()
    return measured
diffusers.UNet2DModel.forward, validation.HeldOutLoss.losses = spy, losses
validation.HeldOutLoss.measure = measuring
import train_unconditional
train_unconditional.main()
assert seen == {(torch.float32, True, False, False)}, seen
"""
    flags = {"mixed_precision": "bf16", "max_train_steps": 2, "checkpointing_steps": 0, "score_steps": None}
    flags["validation_steps"] = 1
    arguments = watched_run(image_folder, held_out_folder, tiny_unet, cache_dir, tmp_path, **flags)
    done = run_code(code, *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    assert steps_with(tmp_path, "validation_loss") == [1, 2]
    # a validation takes a second, which the next step is not charged with
    assert lines_with(tmp_path, "images_per_s")[2]["images_per_s"] > 8
