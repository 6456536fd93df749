"""The second image of a model of latents: made from the pixels, moved like the latents, encoded at each visit."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from latent_helpers import LATENT_CHANNELS, SCALE, SHIFT, make_vae, save_vae
from pair_helpers import CLASSES, MAPS, prepared_pairs, write_pairs

from trainkit.data.loading.loader import BatchLoader, BatchShape
from trainkit.data.loading.order import Purpose, uniform_draws
from trainkit.diffusion.image_condition import PictureCondition, image_input_of
from trainkit.diffusion.latents import check_pictures, latent_grid, open_latents
from trainkit.diffusion.paired_condition import PairedCondition
from trainkit.errors import UserError

KINDS = ("downscale:2", "grayscale", "mask", "edges", "labels")
SEED, STEP, COUNT = 3, 5, 8


@pytest.fixture(scope="module")
def latents(latent_unet, tmp_path_factory):
    """The latents of eight images of 16 pixels with label maps, and of the mirrored images."""
    folder = tmp_path_factory.mktemp("pairs")
    images, maps = write_pairs(folder)
    prepared, _, _ = prepared_pairs(images, folder / "prepared", conditioning_data_dir=str(maps), **MAPS)
    given = {"vae_name_or_path": str(save_vae(folder / "vae")), "model_config_name_or_path": str(latent_unet)}
    given |= {"pretrained_model_name_or_path": None, "condition": ["image"], "cache_dir": str(folder)}
    return open_latents(SimpleNamespace(**given), prepared, flips=True)


def condition(latents, kind, dropout=0.0):
    if kind == "labels":
        return PairedCondition(latents.images, dropout, latents.vae)
    image_input = image_input_of(kind, 16, 16, 3, 0.2, **latent_grid(latents.vae))
    return PictureCondition(latents.images, image_input, dropout, latents.vae)


def batches(latents, made, per_device=COUNT, micro_steps=1, ranks=1, rank=0):
    shape = BatchShape(per_device, micro_steps, ranks, rank)
    loader = BatchLoader(latents, shape, SEED, True, torch.device("cpu"), 0, condition=made, picture=made)
    return list(loader.iterate(STEP, STEP + 1))


@pytest.mark.parametrize("kind", KINDS)
def test_the_second_image_is_that_of_the_mirrored_pixels(latents, kind):
    """As the latents that are trained on are those of the mirrored image."""
    made = condition(latents, kind)
    [batch] = batches(latents, made)
    assert batch.picture.shape == (COUNT, made.image_input.num_channels, 8, 8)
    assert made.unet_config == {"in_channels": LATENT_CHANNELS + made.image_input.num_channels}
    flip = torch.from_numpy(uniform_draws(SEED, STEP, Purpose.FLIP, COUNT) < 0.5)[:, None, None, None]
    assert flip.any() and not flip.all()
    pixels = made.source(batch.images, batch.indices)
    drawn = made.draw(SEED, STEP, range(COUNT), COUNT)
    expected = made.channels(torch.where(flip, pixels.flip(-1), pixels), drawn)
    torch.testing.assert_close(batch.picture, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(batch.picture, made.channels(pixels, drawn), atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_it_does_not_depend_on_how_the_global_batch_is_divided(latents, kind):
    made = condition(latents, kind, dropout=0.3)
    [whole] = batches(latents, made)
    for rank in range(2):
        for batch in batches(latents, made, 2, 2, 2, rank):
            rows = BatchShape(2, 2, 2, rank).rows(batch.micro_step)
            torch.testing.assert_close(batch.picture, whole.picture[list(rows)], rtol=0, atol=1e-5)
    [dropped] = batches(latents, condition(latents, kind, dropout=1))
    assert torch.equal(dropped.picture, made.image_input.null(whole.picture))


def test_pictures_are_encoded_like_images_and_masks_are_averaged(latents):
    vae, made = make_vae(), condition(latents, "mask")
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    masks = torch.zeros(2, 1, 16, 16, dtype=torch.bool)
    masks[:, :, 3:8, 4:9] = True
    drawn = {"masks": masks, "dropped": torch.zeros(2, dtype=torch.bool)}
    found = made.channels(images, drawn)
    with torch.no_grad():
        modes = vae.encode(torch.where(masks, 0.0, images)).latent_dist.mode()
    torch.testing.assert_close(found[:, :-1], (modes - SHIFT) * SCALE)
    expected = masks.float().reshape(2, 1, 8, 2, 8, 2).mean(dim=(3, 5))
    assert torch.equal(found[:, -1:], expected) and {0.0, 0.25, 0.5, 1.0} == {*expected.unique().tolist()}


def test_grey_pictures_are_repeated_and_classes_are_shares(latents):
    grey = condition(latents, "grayscale")
    pixels = torch.rand(1, 1, 16, 16)
    three = grey.image_input.on_latents(pixels, latents.vae)
    colours = image_input_of("downscale:2", 16, 16, 3, **latent_grid(latents.vae))
    torch.testing.assert_close(colours.on_latents(pixels.expand(1, 3, -1, -1), latents.vae), three)
    [batch] = batches(latents, condition(latents, "labels"))
    assert batch.picture.shape[1] == CLASSES and torch.equal(batch.picture.sum(1), torch.ones(COUNT, 8, 8))


def test_previews_and_held_out_losses_see_pixels(latents):
    made = condition(latents, "mask")
    [given, *_], _ = made.preview_conditions(4, 0)
    assert given["image"].shape == (16, 16, 3) and given["mask_image"].shape == (16, 16)
    assert made.beside(np.zeros((4, 16, 16, 3), np.uint8), 0).shape == (12, 16, 16, 3)
    assert made.for_images(latents.images).vae is latents.vae


def test_pictures_that_cannot_be_encoded_are_refused():
    check_pictures({"in_channels": 3}, 1)
    with pytest.raises(UserError, match="images of 3 channels, but the conditioning images have 4: use .* RGB"):
        check_pictures({"in_channels": 3}, 4)
