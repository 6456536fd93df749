"""pipelines/unconditional.py: the images of DDPMPipeline where that works, and right ones where it does not."""

import json
import re

import pytest
import torch
from conftest import TINY_UNET
from diffusers import DDPMPipeline, DDPMScheduler, LCMScheduler, UNet2DModel
from latent_helpers import LATENT_CHANNELS, SCALE, SHIFT, make_vae
from process_helpers import run_code

from pipelines.unconditional import UnconditionalPipeline, solve
from trainkit.diffusion.noise_schedule import build_noise_scheduler
from trainkit.errors import UserError
from trainkit.options.model import ObjectiveOptions
from trainkit.sampling.catalogue import CATALOGUE, FLOW_SCHEDULER_NAMES, SCHEDULER_NAMES
from trainkit.sampling.load import find_pipeline, load_pipeline
from trainkit.sampling.pipeline import save_pipeline
from trainkit.sampling.schedulers import scheduler_bundle

BUNDLES = {
    "diffusion": (SCHEDULER_NAMES, {"prediction_type": "sample"}),
    "flow": (FLOW_SCHEDULER_NAMES, {"prediction_type": "flow_prediction"}),
}
RUNS = [(kind, name) for kind, (names, _) in BUNDLES.items() for name in names]


def unet(channels=3, size=16):
    torch.manual_seed(0)
    config = {key: value for key, value in TINY_UNET.items() if not key.startswith("_")}
    channels = {"in_channels": channels, "out_channels": channels}
    return UNet2DModel(**config | channels | {"sample_size": size}).eval()


def images(pipeline_class, scheduler):
    pipeline = pipeline_class(unet(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    return pipeline(batch_size=2, generator=generators, num_inference_steps=4, output_type="pt").images


def scheduler_of(kind, name):
    return scheduler_bundle(build_noise_scheduler(ObjectiveOptions(**BUNDLES[kind][1])))[name]


@pytest.mark.parametrize("kind, name", [run for run in RUNS if CATALOGUE[run[1]].in_stock_pipeline])
def test_images_equal_those_of_the_stock_pipeline_bit_for_bit(kind, name):
    stock = images(DDPMPipeline, scheduler_of(kind, name))
    stock = stock if isinstance(stock, torch.Tensor) else torch.from_numpy(stock).permute(0, 3, 1, 2)
    assert torch.equal(images(UnconditionalPipeline, scheduler_of(kind, name)), stock)


@pytest.mark.parametrize("kind, name", [run for run in RUNS if not CATALOGUE[run[1]].in_stock_pipeline])
def test_the_stock_pipeline_cannot_run_the_others(kind, name):
    """If this fails, diffusers has learned to: the catalogue can say so."""
    ours = images(UnconditionalPipeline, scheduler_of(kind, name))
    try:
        assert (images(DDPMPipeline, scheduler_of(kind, name)) - ours).abs().max() > 0.1
    except TypeError as error:
        assert "generator" in str(error)


@pytest.mark.parametrize("kind, name", RUNS)
def test_latents_are_decoded_after_every_scheduler(kind, name):
    """Not square: eight by twelve latents of an autoencoder that scales and shifts."""
    model, vae, (scheduler, again) = unet(LATENT_CHANNELS, (8, 12)), make_vae(), (scheduler_of(kind, name),) * 2
    pipeline = UnconditionalPipeline(model, scheduler, vae)
    pipeline.set_progress_bar_config(disable=True)
    generators = [[torch.Generator().manual_seed(seed) for seed in (3, 4)] for _ in range(2)]
    made = pipeline(batch_size=2, generator=generators[0], num_inference_steps=4, output_type="pt").images
    start = torch.cat([torch.randn(1, LATENT_CHANNELS, 8, 12, generator=each) for each in generators[1]])
    again.set_timesteps(4)
    with torch.no_grad():
        latents = solve(again, lambda _, timestep, sample: model(sample, timestep).sample, start, generators[1])
        decoded = vae.decode(latents / SCALE + SHIFT).sample
    assert made.shape == (2, 3, 16, 24)
    torch.testing.assert_close(made, (decoded / 2 + 0.5).clamp(0, 1))


def test_a_student_of_latents_takes_its_own_steps_by_default():
    scheduler = LCMScheduler(original_inference_steps=3, clip_sample=False)
    pipeline = UnconditionalPipeline(unet(LATENT_CHANNELS, 8), scheduler, make_vae())
    assert pipeline(output_type="latent").images.shape == (1, LATENT_CHANNELS, 8, 8)
    assert len(scheduler.timesteps) == 3


@pytest.mark.slow
def test_it_travels_with_a_saved_model_and_needs_diffusers_alone(tmp_path):
    folder = tmp_path / "model"
    save_pipeline(folder, DDPMPipeline(unet(), DDPMScheduler()), "")
    expected = images(UnconditionalPipeline, scheduler_bundle(DDPMScheduler())["unipc"])
    torch.save(expected, tmp_path / "expected.pt")
    program = f"""
import sys, torch
from diffusers import DiffusionPipeline, UniPCMultistepScheduler
folder = {str(folder)!r}
assert type(DiffusionPipeline.from_pretrained(folder)).__name__ == "DDPMPipeline"
pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline="unconditional", trust_remote_code=True)
pipeline.scheduler = UniPCMultistepScheduler.from_pretrained(folder, subfolder="schedulers/unipc")
generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
made = pipeline(batch_size=2, generator=generators, num_inference_steps=4, output_type="pt").images
assert (made - torch.load({str(tmp_path / "expected.pt")!r})).abs().max() < 1e-4
assert pipeline(num_inference_steps=2).images[0].size == (16, 16)
assert "trainkit" not in sys.modules
pipeline.save_pretrained("again")
"""
    done = run_code(program, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    again = tmp_path / "again"
    assert json.loads((again / "model_index.json").read_text())["_class_name"] == [
        "unconditional",
        "UnconditionalPipeline",
    ]
    assert (again / "unconditional.py").read_text() == (folder / "unconditional.py").read_text()
    assert type(load_pipeline(find_pipeline(str(again)), DDPMScheduler())) is UnconditionalPipeline


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"output_type": "jpeg"}, "output_type jpeg: use pil, np, pt or latent"),
        ({"batch_size": 3, "generator": [torch.Generator()]}, "1 generators for 3 images"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        UnconditionalPipeline(unet(), DDPMScheduler())(**changes)


def test_the_folder_that_was_meant_is_named(tmp_path):
    for name in ("model/unet/config.json", "model/model_index.json", "model/checkpoint-5/training_state.json",
                 "early/checkpoint-5/training_state.json", "data/preparation.json"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    for given, message in (
        ("model/unet", f"is a part of a saved pipeline: give {tmp_path}/model"),
        ("model/checkpoint-5", f"is a checkpoint, which is for resuming: give {tmp_path}/model, where"),
        ("early/checkpoint-5", f"--output_dir {tmp_path}/early --resume_from_checkpoint latest"),
        ("early", "is the folder of a run that has not saved a pipeline yet"),
        ("data", "is a prepared dataset: give the --output_dir of a training run"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            find_pipeline(str(tmp_path / given))


def test_another_kind_of_pipeline_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(UserError, match="only DDPMPipeline and ConditionalPipeline"):
        find_pipeline(str(tmp_path))
