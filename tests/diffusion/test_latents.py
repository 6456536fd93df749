"""Training on latents: encoded once, drawn anew at each visit, the same on any number of processes, and decoded."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from latent_helpers import latent_run, save_vae
from PIL import Image
from process_helpers import run_forked
from training_helpers import losses, same_weights

from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.loading.loader import BatchLoader, BatchShape
from trainkit.data.loading.order import Purpose, normal_draws
from trainkit.diffusion.latents import open_latents
from trainkit.errors import UserError

WEIGHTS = "diffusion_pytorch_model.safetensors"


def conditional_run(*arguments, **flags):
    return latent_run(*arguments, **{"condition": "class"} | flags)


@pytest.fixture(scope="module")
def whole(image_folder, latent_unet, vae, tmp_path_factory):
    """Six steps of eight images on one process, with a checkpoint after the third."""
    folder, held_out = (tmp_path_factory.mktemp("runs") / name for name in ("whole", "held_out"))
    for file in sorted(image_folder.rglob("*.png"))[::4]:
        target = held_out / file.parent.name / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    cache = tmp_path_factory.mktemp("cache")
    flags = {"validation_data_dir": held_out}
    run_forked("train_conditional.py", *conditional_run(image_folder, latent_unet, cache, folder, vae, **flags))
    return folder, cache


class Options:
    """What `open_latents` reads, and what a UNet of one halving is described by."""

    def __init__(self, vae, unet, cache_dir):
        self.vae_name_or_path, self.model_config_name_or_path = str(vae), str(unet)
        self.pretrained_model_name_or_path, self.condition, self.cache_dir = None, "class", str(cache_dir)


@pytest.fixture(scope="module")
def opened(whole, vae, latent_unet):
    """The prepared images of the run, and their latents."""
    folder = next(path for path in (whole[1] / "prepared").iterdir() if len(PreparedImages(path)) == 37)
    images = PreparedImages(folder)
    return images, open_latents(Options(vae, latent_unet, whole[1]), images, flips=True)


@pytest.mark.slow
def test_latents_are_those_of_the_vae_and_of_the_mirrored_image(opened, vae):
    images, latents = opened
    encoder = AutoencoderKL.from_pretrained(vae)
    rows = np.array([3, 36, 0])
    pixels = torch.from_numpy(images.gather(rows)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        plain, mirrored = (encoder.encode(inputs).latent_dist for inputs in (pixels, pixels.flip(-1)))
    assert (latents.channels, latents.height, latents.width, len(latents)) == (2, 8, 8, 37)
    expected = ((plain.mean - 0.1) * 0.7).permute(0, 2, 3, 1).numpy()
    assert np.allclose(latents.gather(rows), expected, atol=2e-3)
    noise = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 2, 8, 8)))
    flip = np.array([False, True, True])
    found = latents.sample(rows, flip, noise.numpy())
    chosen = torch.from_numpy(flip)[:, None, None, None]
    drawn = torch.where(chosen, mirrored.mean, plain.mean) + torch.where(chosen, mirrored.std, plain.std) * noise
    assert np.allclose(found, ((drawn - 0.1) * 0.7).permute(0, 2, 3, 1).numpy(), atol=5e-3)
    assert not np.allclose(found[1], latents.gather(rows)[1], atol=0.05)


@pytest.mark.slow
def test_a_batch_is_a_function_of_seed_step_and_row(opened):
    images, latents = opened

    def batch(rank, world, step=5):
        shape = BatchShape(8 // world, 1, world, rank)
        loader = BatchLoader(latents, shape, seed=3, random_flip=True, device=torch.device("cpu"), num_threads=0)
        return next(loader.iterate(step, step + 1))

    whole = batch(0, 1)
    halves = [batch(rank, 2) for rank in range(2)]
    assert torch.equal(whole.images, torch.cat([half.images for half in halves]))
    assert whole.images.shape == (8, 2, 8, 8) and whole.images.dtype == torch.float32
    plain = latents.sample(whole.indices, None, normal_draws(3, 5, range(8), (2, 8, 8), Purpose.LATENT))
    same = [np.allclose(one.permute(1, 2, 0), other) for one, other in zip(whole.images, plain, strict=True)]
    assert 0 < sum(same) < 8, "some are of the mirror image"
    other = latents.sample(whole.indices, None, normal_draws(3, 6, range(8), (2, 8, 8), Purpose.LATENT))
    assert not np.allclose(plain, other, atol=1e-3), "drawn anew at another step"


@pytest.mark.slow
def test_they_are_encoded_once_and_anew_by_other_weights(opened, whole, vae, latent_unet, tmp_path, monkeypatch):
    images, latents = opened
    calls = []
    encode = AutoencoderKL.encode
    monkeypatch.setattr(AutoencoderKL, "encode", lambda self, x: calls.append(len(x)) or encode(self, x))
    again = open_latents(Options(vae, latent_unet, whole[1]), images, flips=True)
    assert calls == [] and np.array_equal(again.gather(np.arange(37)), latents.gather(np.arange(37)))
    copy = shutil.copytree(vae, tmp_path / "pipeline" / "vae")
    assert open_latents(Options(copy.parent, latent_unet, whole[1]), images, False).fingerprint == latents.fingerprint
    assert calls == [], "the weights count, not where they lie"
    other = open_latents(Options(save_vae(tmp_path / "other", 1), latent_unet, tmp_path), images, flips=False)
    assert sum(calls) == 37 and other.fingerprint != latents.fingerprint


@pytest.mark.slow
def test_the_saved_pipeline_decodes(whole, vae):
    folder, _ = whole
    assert {path.name for path in folder.iterdir()} >= {"vae", "unet", "conditional.py", "samples.png"}
    same_weights(folder / "vae" / WEIGHTS, vae / WEIGHTS)
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert not config["thresholding"], "latents have no range to be clamped to"
    assert "16x16" in (folder / "README.md").read_text()
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    made = pipeline(class_labels=["round"], num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    assert made.images[0].size == (16, 16)
    latents = pipeline(
        class_labels=["round"], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="latent"
    ).images
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents / 0.7 + 0.1).sample.clamp(-1, 1)
    pixels = np.asarray(made.images[0], dtype=np.float32) / 127.5 - 1
    assert np.allclose(pixels, decoded[0].permute(1, 2, 0), atol=0.01)
    assert Image.open(folder / "samples.png").width >= 32
    assert any("validation_loss" in line for line in (folder / "metrics.jsonl").read_text().splitlines())


@pytest.mark.slow
def test_two_processes_go_on_as_one_would(whole, image_folder, latent_unet, vae, tmp_path):
    folder, cache = whole
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    shutil.copytree(folder / "checkpoint-3", resumed / "checkpoint-3")
    shutil.copy(folder / "metrics.jsonl", resumed)
    flags = {"train_batch_size": 2, "gradient_accumulation_steps": 2, "resume_from_checkpoint": "latest"}
    run_forked(
        "train_conditional.py", *conditional_run(image_folder, latent_unet, cache, resumed, vae, **flags), processes=2
    )
    assert losses(resumed) == pytest.approx(losses(folder), abs=1e-4)
    same_weights(resumed / "unet" / WEIGHTS, folder / "unet" / WEIGHTS, tolerance=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"vae_name_or_path": "/nowhere"}, "--vae_name_or_path /nowhere: the folder does not exist"),
        ({"center_crop": None}, "--vae_name_or_path encodes each image once: add --center_crop"),
        ({"random_rotation": 5}, "--random_flip is the only augmentation"),
        ({"resolution": 18}, "--resolution 18x18 must be divisible by 4: the VAE halves it 1 times"),
        ({"image_mode": "L"}, "expects 3 channels, but --image_mode L gives 1"),
    ],
)
def test_one_line_error(flags, message, image_folder, latent_unet, cache_dir, vae, tmp_path, monkeypatch):
    import train_conditional

    arguments = conditional_run(image_folder, latent_unet, cache_dir, tmp_path / "out", vae, **flags)
    monkeypatch.setattr("sys.argv", ["train_conditional.py", *arguments])
    with pytest.raises(UserError, match=message) as error:
        train_conditional.main()
    assert "\n" not in str(error.value)


def test_a_unet_of_other_channels_is_refused(image_folder, tiny_unet, cache_dir, vae, tmp_path, monkeypatch):
    import train_conditional

    arguments = conditional_run(image_folder, tiny_unet, cache_dir, tmp_path / "out", vae)
    monkeypatch.setattr("sys.argv", ["train_conditional.py", *arguments])
    with pytest.raises(UserError, match="in_channels 3, but the latents of --vae_name_or_path have 2 channels"):
        train_conditional.main()
