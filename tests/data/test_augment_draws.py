"""What augmentation draws: in its ranges, independent, and the same however the batch is divided."""

import numpy as np
import pytest
import torch
from test_augment import ALL, close

from trainkit.data.loading import augment as module
from trainkit.data.loading.augment import build_augmentation
from trainkit.data.loading.augment_draws import LABELS, Augmentation, draw_parameters
from trainkit.data.loading.loader import BatchLoader, BatchShape
from trainkit.errors import UserError
from trainkit.options.data import AugmentationOptions
from trainkit.options.parsing import parse_options


def drawn(augmentation, count=4000, step=0, seed=0, flipped=None):
    return draw_parameters(augmentation, seed, step, count, slice(0, count), (8, 8), (8, 8), flipped)


def test_strengths_are_the_largest_that_is_drawn():
    geometry = drawn(Augmentation(rotation=30)).geometry
    degrees = torch.rad2deg(torch.atan2(geometry[:, 1, 0], geometry[:, 0, 0]))
    assert 29 < degrees.max() < 30.001 and -30.001 < degrees.min() < -29 and abs(degrees.mean()) < 1
    shifts = drawn(Augmentation(translation=0.25)).geometry[:, :, 2]  # the range is 2 wide
    assert 0.49 < shifts.max() <= 0.5 and abs(np.corrcoef(shifts.T)[0, 1]) < 0.05
    zooms = 1 / drawn(Augmentation(scale=1.0)).geometry[:, 0, 0]
    assert 1.98 < zooms.max() <= 2 and 0.5 <= zooms.min() < 0.51 and abs(zooms.log().mean()) < 0.03
    crops = drawn(Augmentation(crop_area=(0.25, 0.5), crop_aspect=(0.5, 2.0))).geometry
    sides = crops[:, [0, 1], [0, 1]]
    areas, aspects = sides.prod(1), sides[:, 0] / sides[:, 1]
    assert 0.25 <= areas.min() + 1e-5 < 0.26 and 0.49 < areas.max() <= 0.5 + 1e-5
    assert 0.5 <= aspects.min() + 1e-5 < 0.51 and 1.98 < aspects.max() <= 2 + 1e-5
    assert (crops[:, :, 2].abs() + sides <= 1 + 1e-5).all(), "a crop stays inside"
    wide = drawn(Augmentation(crop_area=(0.9, 1.0), crop_aspect=(3.0, 3.0))).geometry
    close(wide[:, 0, 0] / wide[:, 1, 1], torch.full((4000,), 3.0), 1e-4)
    assert wide[:, 0, 0].max() <= 1
    colour = drawn(Augmentation(contrast=0.5)).colour[:, 0, 0]
    assert 0.5 <= colour.min() < 0.51 and 1.49 < colour.max() <= 1.5


def test_each_kind_is_applied_to_its_share_of_images_independently_and_flips_to_half():
    labels = drawn(Augmentation(**{**vars(ALL), "probability": 0.3}), flipped=np.arange(4000) % 2 == 0).labels
    kinds = [[1, 2], [3, 4], [5, 6], [7], [8, 9, 10, 11], [12], [13], [14]]
    applied = torch.stack([labels[:, kind].ne(0).any(1) for kind in kinds]).float()
    assert applied.shape[0] == 8 and (applied.mean(1) - 0.3).abs().max() < 0.03
    assert np.abs(np.corrcoef(applied.numpy()) - np.eye(8)).max() < 0.06
    assert labels[:, 0].mean() == 0.5
    # which images are chosen says nothing of how much is done to them
    turns = labels[:, 2][applied[0] > 0]
    assert abs(turns.mean()) < 0.03 and turns.min() < -0.33 and turns.max() > 0.33


def test_labels_tell_every_kind_apart_and_steps_and_seeds_differ():
    labels = drawn(ALL, flipped=np.arange(4000) % 2 == 0).labels
    assert labels.shape == (4000, LABELS) and labels.std(0).min() > 0.01 and labels.abs().max() <= 2
    assert not torch.equal(labels, drawn(ALL, step=1).labels) and not torch.equal(labels, drawn(ALL, seed=1).labels)
    for kind, columns in (("rotation", {1, 2}), ("hue", {3, 4}), ("contrast", {13})):
        alone = drawn(Augmentation(**{kind: getattr(ALL, kind)}, with_labels=True)).labels
        assert set(alone.abs().amax(0).nonzero().flatten().tolist()) == columns


# The loader


class Photographs:
    """30 random images, stored at `stored` pixels a side for training at 8 x 8."""

    height, width, channels, bit_depth, fixed_size, holds_latents = 8, 8, 3, 8, True, False

    def __init__(self, stored=8):
        self.pixels = np.random.default_rng(0).integers(0, 256, (30, stored, stored, 3), dtype=np.uint8)

    def __len__(self):
        return 30

    def read_soon(self, indices):
        pass

    def gather(self, indices, crops):
        return self.pixels[indices]


def batches(augmentation, per_device=8, micro_steps=1, processes=1, rank=0, first=3, last=5, flip=True, stored=8):
    shape = BatchShape(per_device, micro_steps, processes, rank)
    device = torch.device("cpu")
    return BatchLoader(
        Photographs(stored), shape, 3, flip, device, 0, augmentation=augmentation
    ).iterate(first, last)  # fmt: skip


@pytest.mark.parametrize("stored", [8, 20])
@pytest.mark.parametrize(("per_device", "micro_steps", "processes"), [(2, 4, 1), (2, 2, 2), (2, 1, 4), (1, 8, 1)])
def test_images_do_not_depend_on_the_division_of_the_batch_nor_on_a_resume(per_device, micro_steps, processes, stored):
    augmentation = Augmentation(**{**vars(ALL), "probability": 0.7})
    whole = list(batches(augmentation, stored=stored))[1]
    for rank in range(processes):
        for batch in batches(augmentation, per_device, micro_steps, processes, rank, first=4, stored=stored):
            rows = list(BatchShape(per_device, micro_steps, processes, rank).rows(batch.micro_step))
            assert torch.equal(batch.images, whole.images[rows])
            assert torch.equal(batch.augmentation, whole.augmentation[rows])
    plain = list(batches(None, stored=stored))[1]
    assert plain.augmentation is None and (whole.images - plain.images).abs().mean() > 0.05


def test_flips_alone_are_exact_and_the_same_with_other_augmentations(monkeypatch):
    plain = [batch.images for batch in batches(None, flip=False)]
    flipped = [batch.images for batch in batches(None)]
    labelled = list(batches(Augmentation(with_labels=True)))
    for straight, mirrored, batch in zip(plain, flipped, labelled, strict=True):
        mirror = batch.augmentation[:, 0, None, None, None] == 1
        assert 0 < mirror.sum() < 8 and torch.equal(mirrored, torch.where(mirror, straight.flip(3), straight))
        assert torch.equal(batch.images, mirrored) and not batch.augmentation[:, 1:].any()
    turned = list(batches(Augmentation(rotation=1e-4)))
    for mirrored, batch in zip(flipped, turned, strict=True):
        close(batch.images, mirrored, 1e-3)
    monkeypatch.setattr(module.functional, "grid_sample", None)  # flips and colours resample nothing
    assert len(list(batches(Augmentation(hue=30)))) == 2


# Options


def options(*arguments):
    return parse_options(AugmentationOptions, "", list(arguments))


def test_options_become_what_they_say():
    assert build_augmentation(options(), 3) is None and build_augmentation(options("--random_flip"), 3) is None
    built = build_augmentation(
        options(
            *"--random_rotation 10 --random_translation 0.1 --random_scale 0.2 --random_resized_crop 0.5 1".split(),
            *"--random_resized_crop_aspect 0.9 1.1 --random_brightness 0.1 --random_contrast 0.2".split(),
            *"--random_saturation 0.3 --random_hue 15 --augmentation_probability 0.4".split(),
            "--augmentation_conditioning",
        ),
        3,
    )
    assert built == Augmentation(10, 0.1, 0.2, (0.5, 1.0), (0.9, 1.1), 0.1, 0.2, 0.3, 15, 0.4, True)
    assert build_augmentation(options("--random_contrast", "0.1", "--random_scale", "1"), 1) is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--random_rotation 181", "--random_rotation 181 must be 0 to 180"),
        ("--random_rotation -1", "--random_rotation -1 must be 0 to 180"),
        ("--random_translation nan", "--random_translation nan must be 0 to 1"),
        ("--random_scale 5", "--random_scale 5 must be 0 to 4"),
        ("--random_contrast 1.5", "--random_contrast 1.5 must be 0 to 1"),
        ("--random_hue inf", "--random_hue inf must be 0 to 180"),
        ("--random_resized_crop 0.5", "--random_resized_crop 0.5 must be two areas"),
        ("--random_resized_crop 0 1", "--random_resized_crop 0 must be more than 0 and at most 1"),
        ("--random_resized_crop 1 0.5", "the smallest and the largest"),
        (
            "--random_resized_crop 0.5 1 --random_resized_crop_aspect nan 1",
            "--random_resized_crop_aspect nan must be more than 0",
        ),
        ("--augmentation_probability 0", "--augmentation_probability 0 must be more than 0 and at most 1"),
        ("--augmentation_probability 1.1", "--augmentation_probability 1.1"),
        ("--augmentation_conditioning", "--augmentation_conditioning needs an augmentation"),
    ],
)
def test_what_cannot_be_is_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        build_augmentation(options(*arguments.split()), 3)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flag", ["--random_hue", "--random_saturation"])
def test_grey_images_have_no_colour_to_change(flag):
    with pytest.raises(UserError, match=f"{flag} 0.5 changes nothing in grey images"):
        build_augmentation(options(flag, "0.5"), 1)
