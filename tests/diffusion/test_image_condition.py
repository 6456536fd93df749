"""The second image of training: made from the image, random as a function of (seed, step, row) alone."""

import numpy as np
import pytest
import torch
from conftest import TINY_UNET
from diffusers import UNet2DModel

from pipelines.image_input import ImageInput
from trainkit.data.loading.loader import BatchLoader, BatchShape
from trainkit.data.loading.masks import MAX_COVERED, draw_mask
from trainkit.data.loading.order import Purpose, row_generator
from trainkit.diffusion.image_condition import PictureCondition
from trainkit.diffusion.pretrained import load_pretrained

KINDS = {"downscale": {"factor": 4, "noise": 0.2}, "grayscale": {}, "mask": {}, "edges": {}}


class Images:
    """Forty images of 8x12 pixels."""

    height, width, channels, bit_depth, fixed_size, holds_latents = 8, 12, 3, 8, True, False
    stored_height, stored_width = 8, 12

    def __init__(self):
        self.pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 12, 3), dtype=np.uint8)

    def __len__(self):
        return len(self.pixels)

    def read_soon(self, indices):
        pass

    def gather(self, indices, crops=None):
        return self.pixels[indices]


def condition(kind, dropout=0.3):
    return PictureCondition(Images(), ImageInput(kind=kind, channels=3, **KINDS[kind]), dropout)


def batches(kind, shape, dropout=0.3, step=5, seed=3):
    made = condition(kind, dropout)
    loader = BatchLoader(
        made.images, BatchShape(*shape), seed, True, torch.device("cpu"), 0, condition=made, picture=made
    )
    return list(loader.iterate(step, step + 1))


@pytest.mark.parametrize("kind", KINDS)
def test_the_second_images_do_not_depend_on_how_the_global_batch_is_divided(kind):
    [whole] = batches(kind, (8, 1, 1, 0))
    for per_device, micro_steps, processes in ((2, 4, 1), (2, 2, 2), (2, 1, 4)):
        rows = {}
        for rank in range(processes):
            shape = BatchShape(per_device, micro_steps, processes, rank)
            for batch in batches(kind, (per_device, micro_steps, processes, rank)):
                rows |= dict(zip(shape.rows(batch.micro_step), batch.picture, strict=True))
        for row, picture in rows.items():
            torch.testing.assert_close(picture, whole.picture[row], rtol=0, atol=1e-6)
        assert sorted(rows) == list(range(8))
    assert not torch.equal(batches(kind, (8, 1, 1, 0), step=6)[0].picture, whole.picture)


@pytest.mark.parametrize("kind", KINDS)
def test_the_second_image_is_that_of_the_mirrored_image(kind):
    """Whatever moves an image moves what is made from it."""
    [batch], [plain] = batches(kind, (8, 1, 1, 0), dropout=0), batches(kind, (8, 1, 1, 0), dropout=0)
    made = condition(kind)
    stored = torch.from_numpy(made.images.pixels[batch.indices]).permute(0, 3, 1, 2) / 127.5 - 1
    flipped = [not torch.allclose(one, two, atol=1e-6) for one, two in zip(batch.images, stored, strict=True)]
    assert any(flipped) and not all(flipped)
    drawn = made.draw(3, 5, range(8), 8) | {"dropped": torch.zeros(8, dtype=torch.bool)}
    moved = torch.stack([one.flip(-1) if flip else one for one, flip in zip(stored, flipped, strict=True)])
    torch.testing.assert_close(batch.picture, made.channels(moved, drawn))
    assert torch.equal(batch.with_picture(batch.noise), torch.cat([batch.noise, plain.picture], dim=1))


@pytest.mark.parametrize("kind", KINDS)
def test_dropped_images_are_the_null_condition(kind):
    [none], [all_dropped] = batches(kind, (8, 1, 1, 0), dropout=0), batches(kind, (8, 1, 1, 0), dropout=1)
    null = torch.zeros_like(none.picture)
    if kind == "mask":
        null[:, 3] = 1
    assert torch.equal(all_dropped.picture, null)
    [some] = batches(kind, (400, 1, 1, 0), dropout=0.3)
    dropped = (some.picture == torch.cat([null[:1]] * 400)).flatten(1).all(dim=1)
    assert 80 < int(dropped.sum()) < 160
    [other] = batches(kind, (400, 1, 1, 0), dropout=0)
    assert torch.equal(some.picture[~dropped], other.picture[~dropped])


def test_a_small_image_has_noise_of_the_level_that_is_said():
    [batch] = batches("downscale", (400, 1, 1, 0), dropout=0)
    levels = batch.picture[:, 3, 0, 0]
    assert (batch.picture[:, 3] == levels[:, None, None]).all()
    assert 0 <= levels.min() < 0.01 and 0.19 < levels.max() <= 0.2
    clean = condition("downscale").image_input(condition("downscale").image_input.pictures(batch.images))
    spread = (batch.picture - clean)[:, :3].flatten(1).std(dim=1)
    assert np.corrcoef(spread, levels)[0, 1] > 0.9


def test_masks_hide_some_and_never_all():
    masks = [draw_mask(row_generator(0, 0, Purpose.MASK, row), 16, 24) for row in range(300)]
    covered = np.array([mask.mean() for mask in masks])
    assert covered.min() > 0 and covered.max() <= MAX_COVERED and 0.15 < covered.mean() < 0.5
    assert len({mask.tobytes() for mask in masks}) > 290
    assert np.array_equal(masks[7], draw_mask(row_generator(0, 0, Purpose.MASK, 7), 16, 24))


def test_new_input_channels_start_at_zero(tmp_path):
    """A model that starts from an unconditional one predicts what that does, whatever the second image."""
    config = {key: value for key, value in TINY_UNET.items() if not key.startswith("_")} | {"sample_size": 8}
    torch.manual_seed(0)
    old = UNet2DModel(**config).eval()
    old.save_pretrained(tmp_path / "unet")
    new = UNet2DModel(**config | {"in_channels": 7}).eval()
    assert "image channels 3 -> 7, new ones zero" in load_pretrained(new, str(tmp_path))
    sample, second = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        found = new(torch.cat([sample, second], dim=1), 10).sample
        torch.testing.assert_close(found, old(sample, 10).sample)


def test_the_pictures_of_previews_are_those_the_pipeline_would_be_given():
    made = condition("mask")
    conditions, _ = made.preview_conditions(3, seed=0)
    samples = np.zeros((3, 8, 12, 3), dtype=np.uint8)
    shown = made.beside(samples, seed=0).reshape(3, 3, 8, 12, 3)
    for given, (known, sample, truth) in zip(conditions, shown, strict=True):
        hidden = given["mask_image"] > 0.5
        assert np.array_equal(np.round(given["image"] * 255), truth) and not sample.any()
        assert np.array_equal(known[~hidden], truth[~hidden]) and (known[hidden] == 128).all()
