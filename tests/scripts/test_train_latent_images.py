"""Image conditions of models of latents, from training to files: exact, saved whole, known pixels kept."""

import json

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from latent_helpers import LATENT_CHANNELS, latent_run
from pair_helpers import CLASSES, write_pairs
from PIL import Image
from process_helpers import run_forked
from sampling_helpers import read, sample_images
from training_helpers import assert_resumes_bit_equal, losses, run_in_process, same_weights

from trainkit.errors import UserError

UNET = "unet/diffusion_pytorch_model.safetensors"
IMAGE = {"condition": "image", "conditioning_dropout": 0.3, "max_train_steps": 4, "checkpointing_steps": 2}
ONCE = {"checkpointing_steps": 0, "save_images_epochs": 1000}


@pytest.fixture
def train(image_folder, latent_unet, vae, cache_dir, tmp_path, monkeypatch):
    """Run train_conditional.py on latents in this process; returns the output folder."""

    def call(name="out", **flags):
        arguments = latent_run(image_folder, latent_unet, cache_dir, tmp_path / name, vae, **IMAGE | flags)
        run_in_process(monkeypatch, "train_conditional", arguments)
        return tmp_path / name

    return call


@pytest.fixture
def photos(tmp_path):
    """Three pictures, and masks whose white part is a rectangle."""
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        mask = np.zeros((16, 16), dtype=np.uint8)
        mask[number + 1 : number + 8, 3:10] = 255
        for name, content in (("photos", pixels), ("masks", mask)):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(content).save(tmp_path / name / f"{number:06d}.png")
    return tmp_path / "photos", tmp_path / "masks"


@pytest.mark.slow
def test_inpainting_in_latents_keeps_the_known_pixels(train, photos, tmp_path):
    """And a run that was stopped half-way is the same run, bit for bit."""
    flags = {"condition_from": "mask", "validation_data_dir": photos[0]}
    out = train(**flags)
    config = json.loads((out / "unet" / "config.json").read_text())
    assert (config["in_channels"], config["out_channels"]) == (2 * LATENT_CHANNELS + 1, LATENT_CHANNELS)
    assert "Image-to-image latent diffusion model, 16 × 16 pixels" in (out / "README.md").read_text()
    grid = Image.open(out / "samples.png")
    assert abs(grid.width / grid.height - 3) < 0.3  # condition, sample, true image
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["validation_loss"] > 0 for row in rows if "validation_loss" in row] == [True]

    given = {"conditioning_dir": str(photos[0]), "mask_dir": str(photos[1]), "num_inference_steps": 2}
    sample_images(out, tmp_path / "samples", num_images=3, **given)
    made, known = read(tmp_path / "samples", 3), read(photos[0], 3)
    masks = read(photos[1], 3) > 0
    assert (made[~masks] == known[~masks]).all() and (made[masks] != known[masks]).any()

    pipeline = DiffusionPipeline.from_pretrained(out, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    image, mask = (Image.open(folder / "000000.png") for folder in photos)
    ours = np.asarray(pipeline(image=image, mask_image=mask, num_inference_steps=2).images[0])
    assert (ours[~masks[0]] == known[0][~masks[0]]).all()
    assert_resumes_bit_equal(train, out, flags, tmp_path / "before")


@pytest.mark.slow
def test_two_processes_and_micro_steps_are_the_same_run(train, image_folder, latent_unet, vae, cache_dir, tmp_path):
    """Of classes and small images; either one counts."""
    flags = {"condition": ["class", "image"], "condition_from": "downscale:2"} | ONCE
    whole = train("whole", **flags)
    halves = IMAGE | flags | {"train_batch_size": 2, "gradient_accumulation_steps": 2}
    run_forked(
        "train_conditional.py", *latent_run(image_folder, latent_unet, cache_dir, tmp_path / "two", vae, **halves),
        processes=2,
    )  # fmt: skip
    assert losses(tmp_path / "two") == pytest.approx(losses(whole), abs=1e-4)
    same_weights(tmp_path / "two" / UNET, whole / UNET, tolerance=1e-3)
    dropped = train("dropped", **flags | {"image_dropout": 1})
    assert losses(dropped) != losses(whole)


@pytest.mark.slow
def test_label_maps_and_pictures_to_latents(train, tmp_path):
    images, maps = write_pairs(tmp_path, height=16, width=16)
    pairs = {"train_data_dir": images, "conditioning_data_dir": maps, "train_batch_size": 4} | ONCE
    out = train("labels", conditioning_classes=CLASSES, **pairs)
    config = json.loads((out / "image_input" / "config.json").read_text())
    assert (config["classes"], config["latent_channels"], config["latent_factor"]) == (CLASSES, LATENT_CHANNELS, 2)
    assert json.loads((out / "unet" / "config.json").read_text())["in_channels"] == LATENT_CHANNELS + CLASSES
    sample_images(out, tmp_path / "samples", num_images=2, num_inference_steps=2, conditioning_dir=str(maps))
    assert read(tmp_path / "samples", 2).shape == (2, 16, 16, 3)
    grey = train("grey", conditioning_image_mode="L", **pairs)
    assert json.loads((grey / "unet" / "config.json").read_text())["in_channels"] == 2 * LATENT_CHANNELS


def test_pictures_that_the_autoencoder_cannot_encode_are_refused(train, tmp_path):
    images, maps = write_pairs(tmp_path, count=2)
    with pytest.raises(UserError, match="conditioning images have 4: use --conditioning_image_mode RGB") as error:
        train(train_data_dir=images, conditioning_data_dir=maps, conditioning_image_mode="RGBA")
    assert "\n" not in str(error.value)
