"""Each augmentation against a direct reference: torch, Pillow or a closed form."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from torch.nn import functional

from trainkit.data.loading import augment as module
from trainkit.data.loading.augment import augment
from trainkit.data.loading.augment_draws import (
    Augmentation,
    Parameters,
    affine_matrices,
    colour_matrices,
    draw_parameters,
)

ALL = Augmentation(
    rotation=20, translation=0.2, scale=0.3, crop_area=(0.4, 1.0), crop_aspect=(0.75, 1.33), brightness=0.2,
    contrast=0.3, saturation=0.5, hue=40, with_labels=True,
)  # fmt: skip
WHOLE = np.array([[1.0, 1.0, 0.0, 0.0]])


def smooth_images(count=2, channels=3, height=24, width=24):
    """Noise without fine detail, which bilinear interpolation keeps within 0.02."""
    coarse = torch.rand(count, channels, 5, 5, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=False).clamp(-1, 1)


def moved(images, size=None, flip=False, zoom=1.0, degrees=0.0, shift=(0.0, 0.0), crop=WHOLE, oversampling=1):
    """`images` with one movement applied to each."""
    size = size or images.shape[-2:]
    values = [np.array([flip]), np.array([zoom]), np.radians([degrees]), np.array([shift]), np.asarray(crop)]
    matrix = torch.from_numpy(affine_matrices(size, *values).astype(np.float32))
    return augment(images, Parameters(matrix.expand(len(images), 2, 3), None, None, None, oversampling), tuple(size))


def recoloured(images, brightness=0.0, contrast=1.0, saturation=1.0, degrees=0.0):
    values = [np.array([value]) for value in (brightness, contrast, saturation, np.radians(degrees))]
    matrix = torch.from_numpy(colour_matrices(*values).astype(np.float32))
    return augment(images, Parameters(None, matrix.expand(len(images), 4, 4), None, None, 1), images.shape[-2:])


def close(one, other, tolerance=1e-5):
    torch.testing.assert_close(one, other, atol=tolerance, rtol=0)


@pytest.mark.parametrize("turns", [1, 2, 3, -1])
def test_quarter_turns_are_those_of_torch(turns):
    images = torch.rand(2, 3, 15, 15)
    close(moved(images, degrees=90 * turns), torch.rot90(images, turns, (2, 3)))


def test_a_rotation_is_that_of_pillow():
    image = smooth_images(1)
    pixels = Image.fromarray(((image[0, 0] + 1) * 127.5).numpy().astype("float32"), "F")
    expected = torch.from_numpy(np.array(pixels.rotate(30, Image.Resampling.BILINEAR))) / 127.5 - 1
    close(moved(image, degrees=30)[0, 0, 6:18, 6:18], expected[6:18, 6:18], 1e-4)  # the corners come from outside


def test_shifts_by_whole_pixels_move_them_and_mirror_the_edge():
    images = torch.rand(2, 3, 8, 10)
    shifted = moved(images, shift=(0.3, -0.25))  # 3 right, 2 up
    close(shifted[:, :, :6, 3:], images[:, :, 2:, :7])
    close(shifted[:, :, :6, :3], images[:, :, 2:, :3].flip(3))
    close(shifted[:, :, 6:, 3:], images[:, :, 6:, :7].flip(2))


def test_zooms_are_about_the_centre():
    images = smooth_images(height=16, width=16)
    enlarged = functional.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False)
    close(moved(images, zoom=2.0), enlarged[:, :, 8:24, 8:24])
    halves = functional.avg_pool2d(images, 2)
    close(moved(images, zoom=0.5, oversampling=2)[:, :, 4:12, 4:12], halves)


def test_a_flip_is_the_mirror_image_alone_and_with_others():
    images = torch.rand(2, 3, 8, 10)
    close(moved(images, flip=True), images.flip(3))
    both = moved(images, flip=True, shift=(0.2, 0.0))  # mirrored first
    close(both[..., 2:], images.flip(3)[..., :-2])


def test_a_crop_is_cut_out_and_resized():
    images = smooth_images(height=32, width=32)
    corner = [[0.5, 0.25, -0.5, 0.75]]  # 16 wide and 8 high, in the lower left
    cut = images[:, :, 24:, :16]
    close(moved(images, (8, 16), crop=corner), cut)
    enlarged = functional.interpolate(cut, scale_factor=2, mode="bilinear", align_corners=False)
    close(moved(images, (16, 32), crop=corner)[:, :, 1:-1, 1:-1], enlarged[:, :, 1:-1, 1:-1])


def test_a_turned_oblong_keeps_its_shapes():
    """A disc stays a disc in images that are no squares."""
    y, x = torch.meshgrid(torch.arange(20) - 9.5, torch.arange(40) - 19.5, indexing="ij")
    disc = (36 - x**2 - y**2).div(36).clamp(-1, 1)[None, None]
    for degrees in (30, 90, 135):
        close(moved(disc, degrees=degrees)[..., 4:-4, 14:-14], disc[..., 4:-4, 14:-14], 0.03)


def test_fine_detail_does_not_alias_where_an_image_shrinks():
    """Stripes of one pixel become grey; one sample a pixel would make them black, white or a moire."""
    stripes = torch.arange(64).remainder(2).mul(2).sub(1).float().expand(64, 3, 64, 64)
    augmentation = Augmentation(rotation=10, scale=0.1)
    drawn = draw_parameters(augmentation, 0, 0, 64, slice(0, 64), (16, 16), (64, 64), None)
    aliased = augment(stripes, Parameters(drawn.geometry, None, None, None, 1), (16, 16))
    assert augment(stripes, drawn, (16, 16)).std() < aliased.std() / 4


def test_brightness_and_contrast_have_their_closed_forms():
    images = torch.rand(2, 3, 4, 4) - 0.5
    close(recoloured(images, brightness=0.2), images + 0.2)
    close(recoloured(images, contrast=1.5), images * 1.5)
    close(recoloured(images, brightness=0.2, contrast=1.5), ((images + 0.2) * 1.5).clamp(-1, 1))
    assert recoloured(images, brightness=2.0).max() == 1 and recoloured(images, brightness=-2.0).min() == -1


@pytest.mark.parametrize("factor", [0.0, 0.4, 1.5])
def test_contrast_of_an_image_of_mean_mid_grey_is_that_of_pillow(factor):
    rng = np.random.default_rng(0)
    half = rng.integers(60, 128, (8, 16))
    pixels = np.repeat(np.concatenate([half, 255 - half])[..., None], 3, axis=2).astype(np.uint8)  # mean 127.5
    expected = np.array(ImageEnhance.Contrast(Image.fromarray(pixels)).enhance(factor))
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    found = (recoloured(image, contrast=factor) + 1) * 127.5
    assert (found[0].permute(1, 2, 0) - torch.from_numpy(expected)).abs().max() <= 1.5  # it rounds twice


def test_saturation_is_that_of_pillow_but_for_its_unequal_weights():
    """Blue and red are given such parts that the mean of the channels and Pillow's weighted grey are one."""
    rng = np.random.default_rng(0)
    grey, red = rng.integers(80, 160, (2, 8, 8)) - np.array([0, 120])[:, None, None]
    blue = red * (0.299 - 0.587) / (0.587 - 0.114)  # and green makes up for both
    pixels = np.stack([grey + red, grey - red - blue, grey + blue], axis=-1).round().clip(0, 255).astype(np.uint8)
    for factor in (0.0, 0.5, 1.4):
        expected = np.array(ImageEnhance.Color(Image.fromarray(pixels)).enhance(factor)).astype(np.float32)
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
        found = ((recoloured(image, saturation=factor) + 1) * 127.5)[0].permute(1, 2, 0)
        assert (found - torch.from_numpy(expected)).abs().max() <= 2.5


def test_hue_turns_about_the_axis_of_greys():
    images = torch.rand(2, 3, 4, 4) * 0.6 - 0.3
    close(recoloured(images, degrees=120), images[:, [2, 0, 1]])  # red becomes green
    close(recoloured(images, degrees=240), images[:, [1, 2, 0]])
    turned = recoloured(images, degrees=37)
    close(turned.mean(1), images.mean(1))
    close(turned.norm(dim=1), images.norm(dim=1))
    grey = images[:, :1].expand(-1, 3, -1, -1)
    close(recoloured(grey, saturation=0.3, degrees=77), grey)


def test_one_channel_has_brightness_and_contrast_and_alpha_stays_as_it_is():
    images = torch.rand(2, 4, 4, 4) - 0.5
    strong = {"brightness": 0.3, "contrast": 1.3, "saturation": 0.4, "degrees": 50}
    changed = recoloured(images, **strong)
    assert torch.equal(changed[:, 3], images[:, 3]) and torch.equal(
        changed[:, :3], recoloured(images[:, :3], **strong)
    )
    close(recoloured(images[:, :1], brightness=0.3, contrast=1.3), ((images[:, :1] + 0.3) * 1.3).clamp(-1, 1))
    close(moved(images, degrees=90), torch.rot90(images, 1, (2, 3)))  # alpha moves with the rest


def test_nothing_done_is_exactly_nothing():
    images = torch.rand(2, 3, 7, 13)
    assert torch.equal(recoloured(images), images)
    assert augment(images, None, (7, 13)) is images
    rare = draw_parameters(
        Augmentation(20, 0.2, 0.3, (0.4, 1.0), (0.75, 1.33), 0.2, 0.3, 0.5, 40, 1e-9, True),
        0, 0, 2, slice(0, 2), (7, 13), (7, 13), None,
    )  # fmt: skip
    assert torch.equal(augment(images, rare, (7, 13)), images) and not rare.labels.any()
    larger = torch.rand(2, 3, 14, 26)
    assert torch.equal(augment(larger, rare, (7, 13)), augment(larger, None, (7, 13)))


def test_one_resampling_whatever_is_on(monkeypatch):
    calls = []
    sample = functional.grid_sample
    monkeypatch.setattr(
        module.functional, "grid_sample", lambda *words, **how: calls.append(1) or sample(*words, **how)
    )
    for augmentation, expected in ((Augmentation(rotation=5), 1), (ALL, 1), (Augmentation(hue=5, contrast=0.1), 0)):
        calls.clear()
        drawn = draw_parameters(augmentation, 0, 0, 4, slice(0, 4), (8, 8), (12, 12), np.ones(4, dtype=bool))
        assert augment(torch.rand(4, 3, 12, 12), drawn, (8, 8)).shape == (4, 3, 8, 8)
        assert len(calls) == expected
