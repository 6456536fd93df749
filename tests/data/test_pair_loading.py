"""Batches of pairs: geometry moves an image and its conditioning image alike, and colours change the image alone."""

import shutil

import numpy as np
import pytest
import torch
from pair_helpers import CLASSES, MAPS, prepared_pairs, write_pairs

from trainkit.data.loading.augment_draws import Augmentation
from trainkit.data.loading.loader import BatchLoader, BatchShape
from trainkit.data.settings import PreparationSettings
from trainkit.diffusion.paired_condition import PairedCondition


@pytest.fixture(scope="module", params=["pixels", "png"])
def datasets(request, tmp_path_factory):
    """Label maps, and pictures that equal their images, of eight images stored whole."""
    folder = tmp_path_factory.mktemp(request.param)
    images, maps = write_pairs(folder / "in")
    settings = PreparationSettings(16, 16, storage=request.param)
    labelled = prepared_pairs(images, folder / "maps", settings, conditioning_data_dir=str(maps), **MAPS)[0]
    shutil.copytree(images, folder / "copy")
    return labelled, prepared_pairs(images, folder / "same", settings, conditioning_data_dir=str(folder / "copy"))[0]


def batches(images, shape=(8, 1, 1, 0), dropout=0.0, step=5, augmentation=None, flip=True, threads=0):
    made = PairedCondition(images, dropout)
    device = torch.device("cpu")
    loader = BatchLoader(
        images, BatchShape(*shape), 3, flip, device, threads, augmentation=augmentation, condition=made, picture=made
    )
    return list(loader.iterate(step, step + 1))


MOVES = {
    "flip": None,
    "rotation": Augmentation(rotation=40, translation=0.2),
    "crop": Augmentation(crop_area=(0.3, 0.9)),
    "some": Augmentation(scale=1.5, probability=0.5),
}


@pytest.mark.parametrize("move", MOVES)
def test_whatever_moves_an_image_moves_its_conditioning_image(datasets, move):
    """The picture is the image itself, so both stay equal."""
    _, same = datasets
    [batch], [still] = batches(same, augmentation=MOVES[move]), batches(same, flip=False)
    assert torch.equal(batch.picture, batch.images) and not torch.equal(batch.images, still.images)


def test_a_flip_mirrors_both(datasets):
    labelled, same = datasets
    [batch], [still] = batches(same), batches(same, flip=False)
    mirrored = [torch.equal(one.flip(-1), two) for one, two in zip(still.images, batch.images, strict=True)]
    assert any(mirrored) and not all(mirrored)
    [maps], [unmoved] = batches(labelled), batches(labelled, flip=False)
    for number, is_mirrored in enumerate(mirrored):
        wanted = unmoved.picture[number].flip(-1) if is_mirrored else unmoved.picture[number]
        assert torch.equal(maps.picture[number], wanted)
    assert not torch.equal(maps.picture, unmoved.picture)


@pytest.mark.parametrize("move", [*MOVES, "shrunk"])
def test_label_maps_are_never_mixed(datasets, move):
    """Each pixel has one class, at the place where the image shows it: its red is 60 times the id."""
    labelled, _ = datasets
    if move == "shrunk":
        labelled = type(labelled)(labelled.folder, (12, 12))
    [batch] = batches(labelled, augmentation=MOVES.get(move))
    assert batch.picture.shape == (8, CLASSES, *batch.images.shape[2:])
    assert torch.equal(batch.picture.sum(dim=1), torch.ones_like(batch.picture[:, 0]))
    assert set(batch.picture.unique().tolist()) == {0.0, 1.0}
    shown = ((batch.images[:, 0] + 1) * 127.5 / 60).round()
    assert (shown == batch.picture.argmax(dim=1)).float().mean() > 0.75


def test_colours_change_the_image_alone(datasets):
    _, same = datasets
    colours = Augmentation(brightness=0.4, contrast=0.4, saturation=0.4, hue=90)
    [plain], [changed] = batches(same), batches(same, augmentation=colours)
    assert torch.equal(changed.picture, plain.picture) and not torch.allclose(changed.images, plain.images, atol=0.1)


def test_pairs_do_not_depend_on_how_the_global_batch_is_divided(datasets):
    labelled, _ = datasets
    [whole] = batches(labelled, (8, 1, 1, 0), 0.3, augmentation=MOVES["rotation"])
    for per_device, micro_steps, processes in ((2, 4, 1), (2, 2, 2), (2, 1, 4)):
        rows = {}
        for rank in range(processes):
            shape = (per_device, micro_steps, processes, rank)
            for batch in batches(labelled, shape, 0.3, augmentation=MOVES["rotation"], threads=rank):
                rows |= dict(zip(BatchShape(*shape).rows(batch.micro_step), batch.picture, strict=True))
        assert sorted(rows) == list(range(8))
        assert all(torch.equal(picture, whole.picture[row]) for row, picture in rows.items())


def test_dropped_conditioning_images_are_zero(datasets):
    labelled, _ = datasets
    [whole], [some] = batches(labelled, (200, 1, 1, 0)), batches(labelled, (200, 1, 1, 0), dropout=0.3)
    dropped = (some.picture == 0).flatten(1).all(dim=1)
    assert 35 < int(dropped.sum()) < 85 and torch.equal(some.picture[~dropped], whole.picture[~dropped])


def test_previews_show_condition_sample_and_truth(datasets):
    labelled, same = datasets
    samples = np.zeros((3, 16, 16, 3), dtype=np.uint8)
    for images in (labelled, same):
        made = PairedCondition(images)
        conditions, _ = made.preview_conditions(3, seed=0)
        shown = made.beside(samples, seed=0).reshape(3, 3, 16, 16, 3)
        for given, (condition, sample, truth) in zip(conditions, shown, strict=True):
            assert not sample.any() and truth[..., 1].std() > 20
            if images is same:
                assert np.array_equal(condition, truth) and np.allclose(given["image"] * 255, truth, atol=0.01)
            else:
                assert given["image"].dtype == np.uint8 and given["image"].max() < CLASSES
                assert not condition[given["image"] == 0].any() and condition[given["image"] > 0].any(axis=-1).all()
