"""Training with a second image from start to saved pipeline: the same run on any processes, and what it leaves."""

import shutil

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from PIL import Image
from process_helpers import run_forked
from safetensors.torch import load_file
from training_helpers import (
    assert_resumes_bit_equal,
    assert_trained_on_images,
    losses,
    run_in_process,
    same_weights,
    tiny_run,
)

from trainkit.errors import UserError

UNET = "unet/diffusion_pytorch_model.safetensors"
STEPS = 4
IMAGE = {"condition": "image", "conditioning_dropout": 0.3, "max_train_steps": STEPS, "checkpointing_steps": 2}


@pytest.fixture
def train(image_folder, tiny_unet, cache_dir, tmp_path, monkeypatch):
    """Run the script's main in this process with flags over those of the tiny run; returns the output folder."""

    def call(name="out", **flags):
        arguments = tiny_run(image_folder, tiny_unet, cache_dir, tmp_path / name, **IMAGE | flags)
        run_in_process(monkeypatch, "train_conditional", arguments)
        return tmp_path / name

    return call


@pytest.mark.slow
def test_inpainting_from_training_to_the_saved_pipeline(train, image_folder, tmp_path, capsys):
    """And a run that was stopped half-way is the same run, bit for bit."""
    shutil.copytree(image_folder / "round", tmp_path / "held-out")
    flags = {"condition_from": "mask", "validation_data_dir": tmp_path / "held-out", "eval_batch_size": 4}
    out = train(**flags)
    assert_trained_on_images(out, in_channels=7, arguments="image=picture, mask_image=mask")

    pipeline = DiffusionPipeline.from_pretrained(out, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    image, mask = Image.new("RGB", (16, 16), "#123456"), Image.new("L", (16, 16))
    mask.paste(255, (4, 4, 9, 9))
    made = np.asarray(pipeline(image=image, mask_image=mask, num_inference_steps=2).images[0])
    hidden = np.asarray(mask) > 0
    assert (made[~hidden] == (0x12, 0x34, 0x56)).all() and (made[hidden] != (0x12, 0x34, 0x56)).any()

    assert_resumes_bit_equal(train, out, flags, tmp_path / "before")
    assert "2 of 4 steps done" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_and_micro_steps_are_the_same_run(train, image_folder, tiny_unet, cache_dir, tmp_path):
    flags = {"condition_from": "downscale:2", "checkpointing_steps": 0, "save_images_epochs": 1000}
    whole = train("whole", **flags)
    halves = {"train_batch_size": 2, "gradient_accumulation_steps": 2} | flags
    arguments = tiny_run(image_folder, tiny_unet, cache_dir, tmp_path / "two", **IMAGE | halves)
    run_forked("train_conditional.py", *arguments, processes=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(whole), abs=1e-4)
    same_weights(tmp_path / "two" / UNET, whole / UNET, tolerance=1e-3)


@pytest.mark.slow
def test_the_second_image_goes_into_the_loss_and_a_pipeline_is_its_start(train, capsys):
    short = {"checkpointing_steps": 0, "save_images_epochs": 1000}
    grey = train("grey", condition_from="grayscale", **short)
    dropped = [train(kind, condition_from=kind, conditioning_dropout=1, **short) for kind in ("grayscale", "edges")]
    assert losses(dropped[0]) == losses(dropped[1]) != losses(grey)
    edges = train("more", condition_from="mask", pretrained_model_name_or_path=grey, learning_rate=1e-12, **short)
    assert "image channels 4 -> 7, new ones zero" in capsys.readouterr().out
    old, new = (load_file(folder / UNET)["conv_in.weight"] for folder in (grey, edges))
    torch.testing.assert_close(new[:, :4], old, atol=1e-6, rtol=0)
    assert new[:, 4:].abs().max() < 1e-6


@pytest.mark.slow
def test_classes_and_images_together(train):
    """Each has its own dropout, and the pipeline takes both, one or the other."""
    short = {"checkpointing_steps": 0, "save_images_epochs": 1000, "condition_from": "downscale:2"}
    both = {"condition": ["class", "image"]} | short
    out = train("both", **both)
    config = UNet2DModel.load_config(out / "unet")
    assert (config["in_channels"], config["out_channels"], config["num_class_embeds"]) == (7, 3, 3)
    assert "image=picture, class_labels='round'" in (out / "README.md").read_text()
    without = [
        losses(train(str(number), **both | dropout))
        for number, dropout in enumerate(({"image_dropout": 1}, {"conditioning_dropout": 1, "image_dropout": 0.3}))
    ]
    assert without[0] != losses(out) != without[1] != without[0]

    pipeline = DiffusionPipeline.from_pretrained(out, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    small = Image.new("RGB", (8, 8), "red")
    given = (
        {"class_labels": "square", "image": [small, small]},
        {"image": [small]},
        {"class_labels": ["square", None]},
    )
    for arguments, count in zip(given, (2, 1, 2), strict=True):
        images = pipeline(**arguments, num_inference_steps=2, guidance_scale=2.0, output_type="np").images
        assert images.shape == (count, 16, 16, 3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"condition_from": None},
            "--condition image needs --condition_from: downscale:FACTOR, grayscale, mask, edges",
        ),
        ({"condition_from": "blur"}, "--condition_from blur is none of"),
        ({"condition_from": "mask:2"}, "--condition_from mask:2 is none of"),
        ({"condition_from": "downscale"}, "--condition_from downscale: give the factor"),
        ({"condition_from": "downscale:1"}, "--condition_from downscale:1: give the factor"),
        ({"condition_from": "downscale:3"}, "--condition_from downscale:3: images of 16x16 .* cannot be made 3 times"),
        ({"condition_from": "mask", "condition": "class"}, "--condition_from mask needs --condition image"),
        ({"condition": "class", "image_dropout": 0.5}, "--image_dropout 0.5 needs --condition image"),
        (
            {"condition": ["image", "class"]},
            "--condition image class: give class, vector, class vector or text, alone",
        ),
        ({"condition": ["vector", "class"]}, "--condition vector class: give class, vector, class vector or text"),
        ({"condition": ["class", "text"]}, "--condition class text: give class, vector, class vector or text, alone"),
        ({"condition": ["class"], "vector_dropout": 0.2}, "--vector_dropout 0.2 needs --condition vector, or class"),
        ({"condition_from": "mask", "conditioning_noise": 0.1}, "--conditioning_noise 0.1 is noise in a small image"),
        ({"condition_from": "grayscale", "image_mode": "L"}, "--condition_from grayscale: with --image_mode L"),
        (
            {"condition_from": "mask", "conditioning_dropout": 0, "preview_guidance_scale": 2},
            "--preview_guidance_scale",
        ),
    ],
)
def test_one_line_error(train, flags, message):
    with pytest.raises(UserError, match=message) as error:
        train(**flags)
    assert "\n" not in str(error.value)
