"""Pipelines of models that were trained on pairs: pictures of any mode, and label maps as maps of ids."""

import numpy as np
import pytest
import torch
from conditional_helpers import image_pipeline
from diffusers import DDPMScheduler, DiffusionPipeline
from PIL import Image

from trainkit.sampling.pipeline import conditional_pipeline, save_pipeline

QUICK = {"num_inference_steps": 2, "output_type": "np"}


@pytest.fixture(scope="module")
def labelled():
    return image_pipeline("labels", classes=5)


@pytest.fixture(scope="module")
def grey_from_colour():
    return image_pipeline("picture", channels=1, picture_channels=3)


def ids(side=16, seed=0):
    return np.random.default_rng(seed).integers(0, 5, (side, side)).astype(np.uint8)


def made(pipeline, image, seed=1, **settings):
    return pipeline(image=image, generator=torch.Generator().manual_seed(seed), **QUICK | settings).images


@pytest.mark.slow
def test_a_label_map_may_be_an_image_an_array_or_a_tensor(labelled):
    one, palette = ids(), Image.fromarray(ids()).convert("P")
    palette.putdata(one.reshape(-1))
    given = [
        one, one[..., None], one[None], one.astype(np.int64), torch.from_numpy(one), torch.from_numpy(one)[None],
        torch.from_numpy(one).long(), Image.fromarray(one), palette, Image.fromarray(one.astype(np.uint16)), [one],
        (Image.fromarray(one),),
    ]  # fmt: skip
    wanted = made(labelled, one)
    assert wanted.shape == (1, 16, 16, 3) and not np.allclose(made(labelled, ids(seed=1)), wanted)
    for each in given:
        assert np.array_equal(made(labelled, each), wanted)
    assert made(labelled, np.stack([one, ids(seed=1)])).shape == made(labelled, [one, None]).shape == (2, 16, 16, 3)
    assert made(labelled, ids(20), num_images_per_prompt=2, guidance_scale=2.0).shape == (2, 20, 20, 3)


def test_the_channels_are_one_per_class_and_zero_without_a_map(labelled):
    channels, null, _ = labelled.image_input.encode([ids(), None])
    assert channels.shape == (2, 5, 16, 16) and not null.any() and not channels[1].any()
    assert torch.equal(channels[0].argmax(dim=0), torch.from_numpy(ids()).long())
    assert torch.equal(channels[0].sum(dim=0), torch.ones(16, 16))


def test_pictures_have_their_own_channels(grey_from_colour):
    colour = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    wanted = made(grey_from_colour, colour)
    assert wanted.shape == (1, 16, 16, 1)
    pixels = np.asarray(colour)
    for each in (pixels, pixels / 255, torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None], colour.convert("RGBA")):
        assert np.allclose(made(grey_from_colour, each), wanted, atol=1e-5)
    assert not np.allclose(made(grey_from_colour, colour.convert("L")), wanted)


@pytest.mark.parametrize("name", ["labelled", "grey_from_colour"])
def test_a_saved_model_needs_nothing_but_diffusers(name, request, tmp_path):
    pipeline = request.getfixturevalue(name)
    parts = {"image_input": pipeline.image_input}
    save_pipeline(tmp_path, conditional_pipeline(pipeline.unet, DDPMScheduler(), **parts), "")
    loaded = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    loaded.set_progress_bar_config(disable=True)
    assert "trainkit" not in (tmp_path / "image_input" / "image_input.py").read_text()
    image = ids() if name == "labelled" else Image.fromarray(ids() * 50)
    loaded.scheduler = pipeline.scheduler
    assert np.allclose(made(loaded, image), made(pipeline, image), atol=1e-5)
    assert loaded.image_input.num_channels == pipeline.image_input.num_channels


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (ids() + 1, "image: a label map holds the id 5, the model has 0 to 4"),
        (ids().astype(np.int16) - 1, "image: a label map holds the id -1, the model has 0 to 4"),
        (ids() / 5, "image: float64 is no label map: give a picture, an array or a tensor of whole numbers"),
        (Image.new("RGB", (16, 16)), "image: a picture of mode RGB is no label map"),
        (np.zeros((16, 16, 3), dtype=np.uint8), "image has shape .16, 16, 3.: a label map is .height, width."),
        (ids(15), "image is 15x15 .HxW.: the sides of the result must be multiples of 2"),
        ([ids(), ids(8)], "pictures of 8x8 and of 16x16"),
        ("map.png", "image: str is no label map"),
    ],
)
def test_what_is_no_label_map_is_refused(labelled, image, message):
    with pytest.raises(ValueError, match=message):
        labelled(image=image)


def test_a_picture_with_other_channels_is_refused(grey_from_colour):
    with pytest.raises(ValueError, match=r"image has shape \(1, 16, 16\) .*, the model accepts 3 channels"):
        grey_from_colour(image=ids())
    with pytest.raises(ValueError, match="mask_image: this model accepts image"):
        grey_from_colour(image=Image.new("RGB", (16, 16)), mask_image=ids())
