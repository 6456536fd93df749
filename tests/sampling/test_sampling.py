"""Sampling: an image depends on its seed alone, a second start makes what is missing, `datasets` loads the folder."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, slow_after
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image
from process_helpers import run_code, run_forked
from sampling_helpers import flags, read, sample, tiny_model, words

from pipelines.unconditional import UnconditionalPipeline
from trainkit.errors import UserError
from trainkit.sampling.catalogue import SCHEDULER_NAMES
from trainkit.sampling.generate import generate
from trainkit.sampling.grid import image_grid
from trainkit.sampling.pipeline import save_pipeline
from trainkit.sampling.schedulers import scheduler_bundle

pytestmark = pytest.mark.usefixtures("on_the_cpu_alone")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_pipeline(folder, DDPMPipeline(tiny_model(), DDPMScheduler()), "A model card.")
    return folder


@pytest.fixture(scope="module")
def samples(model_folder, tmp_path_factory):
    """Seven images by one process in batches of four."""
    folder = tmp_path_factory.mktemp("samples")
    sample(model_folder, folder)
    return folder


@pytest.mark.parametrize(
    ("name", "channels", "sample_size"),
    slow_after(
        1,
        [
            *((name, 3, 16) for name in SCHEDULER_NAMES),
            *((name, *shape) for name in ("sde_dpmsolver", "unipc") for shape in ((1, (16, 8)), (4, 16))),
        ],
    ),
)
def test_an_image_does_not_depend_on_its_batch(name, channels, sample_size):
    unet, scheduler = tiny_model(channels, sample_size), scheduler_bundle(DDPMScheduler())[name]
    images = {
        batch_size: np.concatenate(list(generate(UnconditionalPipeline(unet, scheduler), range(3, 8), 5, batch_size)))
        for batch_size in (1, 2, 5)
    }
    assert images[5].shape == (5, 16, 8 if channels == 1 else 16, channels)
    assert images[5].dtype == np.uint8 and images[5].std() > 10
    assert len({image.tobytes() for image in images[5]}) == 5
    for batch_size in (1, 2):
        assert np.abs(images[5].astype(int) - images[batch_size]).max() <= 1
    last = next(generate(DDPMPipeline(unet, scheduler), [7], 5, 1))[0]
    assert np.abs(last.astype(int) - images[5][4]).max() <= 1


def test_autocast_keeps_the_chain_in_float32():
    unet, scheduler = tiny_model(), scheduler_bundle(DDPMScheduler())["dpmsolver"]
    exact = next(generate(DDPMPipeline(unet, scheduler), range(4), 10, 4)).astype(int)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = next(generate(DDPMPipeline(unet, scheduler), range(4), 10, 4)).astype(int)
    assert 0 < np.abs(exact - rounded).mean() < 2


@pytest.mark.slow
def test_two_processes_make_the_same_images(model_folder, samples, tmp_path):
    values = flags(model_folder, tmp_path, sample_batch_size=3)
    run_forked("sample.py", *words(values), processes=2)
    assert np.abs(read(tmp_path) - read(samples)).max() <= 1
    record = json.loads((tmp_path / "sampling.json").read_text())
    assert record["num_processes"] == 2 and record["complete"] and record["images_per_second"] > 0
    assert record["num_inference_steps"] == 5 and record["scheduler"]["class"] == "DPMSolverMultistepScheduler"


def test_a_second_start_makes_only_what_is_missing(model_folder, samples, capsys):
    before = read(samples)
    (samples / "000002.png").unlink()
    times = {path.name: path.stat().st_mtime_ns for path in samples.glob("0*.png")}
    sample(model_folder, samples, num_images=8)
    assert "8 images, 2 generated now" in capsys.readouterr().out
    for name, written in times.items():
        assert (samples / name).stat().st_mtime_ns == written
    assert np.abs(read(samples) - before).max() <= 1
    assert not list(samples.glob(".tmp*"))
    assert Image.open(samples / "grid.png").width >= 400


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_inference_steps": 6}, "another num_inference_steps (5 there, 6 now)"),
        ({"seed": 4}, "another seed (3 there, 4 now)"),
        ({"scheduler": "ddim"}, "another scheduler (DPMSolverMultistepScheduler there, DDIMScheduler now)"),
    ],
)
def test_other_settings_do_not_mix_into_a_folder(model_folder, samples, change, message):
    with pytest.raises(UserError, match="use another --output_dir") as refused:
        sample(model_folder, samples, **change)
    assert message in str(refused.value)


def test_a_retrained_model_does_not_mix_into_a_folder(samples, tmp_path):
    retrained = tiny_model()
    with torch.no_grad():
        next(retrained.parameters()).add_(1)
    save_pipeline(tmp_path, DDPMPipeline(retrained, DDPMScheduler()), "Another.")
    with pytest.raises(UserError, match="images of another model"):
        sample(tmp_path, samples)


def test_an_output_folder_that_cannot_be_written_is_one_line(model_folder, tmp_path):
    (tmp_path / "a_file").touch()
    for folder in ("/proc/samples", tmp_path / "a_file"):
        with pytest.raises(UserError, match="--output_dir .* cannot be written .*choose another folder"):
            sample(model_folder, folder)


@pytest.mark.parametrize("what", ["missing", "empty", "conditional"])
def test_what_is_no_unconditional_pipeline_is_refused_in_one_line(tmp_path, what):
    folder = tmp_path / "model"
    if what != "missing":
        folder.mkdir()
    if what == "conditional":
        (folder / "model_index.json").write_text(json.dumps({"_class_name": ["pipeline", "ConditionalPipeline"]}))
    with pytest.raises(UserError, match="--model_name_or_path"):
        sample(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--model_name_or_path is missing"),
        (["--model_name_or_path", "x", "--num_images", "0"], "--num_images 0 must be at least 1"),
        (["--model_name_or_path", "x", "--num_inference_steps", "0"], "--num_inference_steps 0 must be at least 1"),
        (["--model_name_or_path", "x", "--num_image", "3"], "--num_images"),
    ],
)
def test_mistakes_are_told_in_one_line_at_once(arguments, message):
    done = subprocess.run([sys.executable, str(ROOT / "sample.py"), *arguments], capture_output=True, text=True)
    assert done.returncode == 1 and message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_pipeline_without_subfolders_and_schedulers_samples(tmp_path):
    tiny_model(channels=1).save_pretrained(tmp_path / "model")
    DDPMScheduler(beta_schedule="squaredcos_cap_v2").save_pretrained(tmp_path / "model")
    sample(tmp_path / "model", tmp_path / "out", scheduler="ddim", num_images=2)
    assert Image.open(tmp_path / "out" / "000001.png").mode == "L"


@pytest.mark.slow
def test_the_saved_folder_needs_nothing_but_diffusers(model_folder, tmp_path):
    """In a process that cannot see this repository: load, sample, exchange the scheduler."""
    program = f"""
import sys, warnings
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, SASolverScheduler
folder = {str(model_folder)!r}
pipeline = DiffusionPipeline.from_pretrained(folder)
assert type(pipeline).__name__ == "DDPMPipeline", type(pipeline)
assert type(pipeline.scheduler) is DPMSolverMultistepScheduler
classes = dict(ddim=DDIMScheduler, ddpm=DDPMScheduler, dpmsolver=DPMSolverMultistepScheduler,
               sde_dpmsolver=DPMSolverMultistepScheduler, sasolver=SASolverScheduler)
for name, scheduler_class in classes.items():
    pipeline.scheduler = scheduler_class.from_pretrained(folder, subfolder="schedulers/" + name)
    image = pipeline(num_inference_steps=4, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (16, 16), name
assert "trainkit" not in sys.modules
"""
    done = run_code(program, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "not expected" not in done.stderr  # a key of a scheduler's config that its class does not know
    shipped = {path.name for path in (model_folder / "schedulers").iterdir()}
    assert shipped == set(SCHEDULER_NAMES)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_grid_has_the_names_of_rows_and_captions_beside_the_images(channels):
    images = np.full((4, 8, 8, channels), 255, np.uint8)
    plain, named = image_grid(images, 2), image_grid(images, 2, row_names=["cat", "a name that is far too long"])
    dark = np.asarray(named.convert("L")) < 128
    left = named.width - plain.width
    assert np.asarray(plain.convert("L")).min() == 255 and 100 < left <= 158
    half = named.height // 2
    assert dark[:half, :left].any() and dark[half:, :left].any() and not dark[:, left:].any()
    captioned = image_grid(images, 2, captions=["one", "two", "three", ""])
    dark = np.asarray(captioned.convert("L")) < 128
    middle = captioned.width // 2
    assert captioned.height > plain.height and dark[-20:, :middle].any() and not dark[-20:, middle:].any()
    assert (np.asarray(image_grid(images, 2, captions=["a b " * 99] * 4).convert("L"))[:, -3:] == 255).all()


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_a_grid_shows_every_image_large_enough(channels, mode):
    images = np.stack([np.full((12, 8, channels), 20 * (i + 1), np.uint8) for i in range(5)])
    grid = image_grid(images)
    assert grid.mode == mode and grid.width >= 400
    levels = set(np.unique(np.asarray(grid).reshape(-1, channels)[:, 0]))
    assert {20, 40, 60, 80, 100} <= levels
    assert image_grid(images, columns=5).width > image_grid(images, columns=5).height
