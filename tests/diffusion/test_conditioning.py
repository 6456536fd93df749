"""Conditions as inputs of a model, their draws and their order."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from trainkit.data.loading.class_order import ClassBalancedOrder, balanced_order, class_shares
from trainkit.data.loading.loader import BatchLoader, BatchShape
from trainkit.data.loading.order import Purpose, uniform_draws
from trainkit.data.loading.statistics import mean_and_std, vector_statistics
from trainkit.diffusion.combined import CombinedCondition
from trainkit.diffusion.conditioning import (
    ClassCondition,
    VectorCondition,
    open_condition,
)
from trainkit.errors import UserError
from trainkit.options.script import ConditionalTrainingOptions

COUNTS, UNKNOWN = (60, 25, 9, 0), 6
LABELS = np.random.default_rng(1).permutation(np.repeat([0, 1, 2, -1], [*COUNTS[:3], UNKNOWN]))


class Labelled:
    """A hundred images of 4x4 of known classes and vectors, as a prepared dataset gives them."""

    height = width = 4
    channels, bit_depth, fixed_size, holds_latents = 1, 8, True, False
    label_names, vector_length, preparation = ["cat", "dog", "elk", "fox"], 3, {}

    def __len__(self):
        return len(LABELS)

    def read_soon(self, indices):
        pass

    def gather(self, indices, crops):
        return np.zeros((len(indices), 4, 4, 1), dtype=np.uint8)

    def labels(self, indices):
        return LABELS[indices]

    def vectors(self, indices):
        return np.stack([indices, indices * 0 + 5, -indices], axis=1).astype(np.float32)

    def column(self, name):
        everything = np.arange(len(self))
        yield from np.array_split(self.labels(everything) if name == "label" else self.vectors(everything), 3)


def test_classes_as_inputs():
    condition = ClassCondition(Labelled(), Labelled.label_names, dropout=0.3)
    assert condition.unet_config == {"num_class_embeds": 5}
    indices = np.array([np.flatnonzero(LABELS == label)[0] for label in (0, 1, 2, -1)])
    assert condition.inputs(indices)["class_labels"].tolist() == [0, 1, 2, 4]  # an unknown one is null
    draws = np.array([0.29, 0.31, 0.0, 0.9])
    assert condition.inputs(indices, lambda purpose: draws)["class_labels"].tolist() == [4, 1, 4, 4]
    assert condition.pipeline_conditions(indices) == [0, 1, 2, None]
    assert condition.preview_conditions(8, seed=0) == ([0, 0, 1, 1, 2, 2, 3, 3], 2)


def test_held_out_images_may_number_their_classes_otherwise():
    held_out = Labelled()
    held_out.label_names = ["fox", "cat", "dog"]
    condition = ClassCondition(Labelled(), Labelled.label_names, dropout=0.5).for_images(held_out)
    indices = np.array([np.flatnonzero(LABELS == label)[0] for label in (0, 1, 2, -1)])
    assert condition.inputs(indices, lambda purpose: np.ones(4))["class_labels"].tolist() == [3, 0, 1, 4]
    held_out.label_names = ["cat", "yak", "dog"]
    with pytest.raises(UserError, match="--validation_data_dir has the class yak"):
        condition.for_images(held_out)


def test_vectors_as_inputs():
    condition = VectorCondition(Labelled(), dropout=0.5)
    vectors = condition.inputs(np.array([3, 4]), lambda purpose: np.array([0.6, 0.4]))["class_labels"]
    assert vectors[0].tolist() == [3, 5, -3] and vectors[1].isnan().all()
    assert torch.equal(condition.inputs(np.array([3]))["class_labels"], vectors[:1])


def class_and_vector(images=None, dropout=0.25):
    images = images or Labelled()
    classes = ClassCondition(images, Labelled.label_names, dropout)
    return CombinedCondition([classes, VectorCondition(images, dropout, Purpose.VECTOR_DROPOUT)])


def test_classes_and_vectors_as_inputs():
    """A row of the class and the vector, which are dropped by draws of their own."""
    condition = class_and_vector(dropout=0.5)
    assert condition.unet_config == {"num_class_embeds": 5, "class_embed_type": "identity"}
    indices = np.array([np.flatnonzero(LABELS == label)[0] for label in (0, 1, 2, -1)])
    draws = {Purpose.CONDITION_DROPOUT: np.array([0.4, 0.6, 0.6, 0.6])}
    draws[Purpose.VECTOR_DROPOUT] = np.array([0.6, 0.4, 0.6, 0.6])
    rows = condition.inputs(indices, draws.__getitem__)["class_labels"]
    assert rows.dtype == torch.float32 and rows[:, 0].tolist() == [4, 1, 2, 4]
    assert rows[:, 1:].isnan().all(dim=1).tolist() == [False, True, False, False]
    assert rows[2].tolist() == [2, indices[2], 5, -indices[2]]
    [one, *_, last] = condition.pipeline_conditions(indices)
    assert one["class_labels"] == 0 and one["vectors"].tolist() == rows[0, 1:].tolist()
    assert last["class_labels"] is None
    assert condition.example() == "'cat', vectors=[0.0, 5.0, 0.0]"


UNEVEN = {"account": {"reason why folders are not classes": {"count": 1, "examples": ["a/1.png is deeper"]}}}


@pytest.mark.parametrize(
    ("what", "options", "message"),
    [
        ({"label_names": None}, {}, "--condition class: photos has no classes; give it one folder per class"),
        ({"label_names": None, "preparation": UNEVEN}, {}, r"photos has no classes \(a/1.png is deeper\); give"),
        ({"label_names": ["cat"]}, {}, r"has only one class \(cat\)"),
        ({"column": lambda name: iter([np.full(9, -1)])}, {}, "gives no image a class"),
        ({"vector_length": None}, {"condition": ["vector"]}, "--condition vector: photos has no vectors"),
    ],
)
def test_images_without_the_condition_are_refused(what, options, message):
    images = Labelled()
    for name, value in what.items():
        setattr(images, name, value)
    with pytest.raises(UserError, match=message):
        open_condition(ConditionalTrainingOptions(train_data_dir="photos", **options), images)


def test_dropout_is_a_draw_of_each_row_of_the_global_batch():
    """Whatever the division, and as often as the flag says."""

    def labels(per_device, micro_steps, ranks):
        found = []
        for micro_step in range(micro_steps):
            for rank in range(ranks):
                shape = BatchShape(per_device, micro_steps, ranks, rank)
                condition = ClassCondition(Labelled(), Labelled.label_names, dropout=0.25)
                loader = BatchLoader(Labelled(), shape, 3, False, torch.device("cpu"), 0, condition=condition)
                found.append(loader.make(5, micro_step)["condition"]["class_labels"])
        return torch.cat(found)

    whole = labels(400, 1, 1)
    assert torch.equal(labels(100, 4, 1), whole) and torch.equal(labels(100, 2, 2), whole)
    dropped = uniform_draws(3, 5, Purpose.CONDITION_DROPOUT, 400) < 0.25
    assert (whole[dropped] == 4).all() and 70 < dropped.sum() < 130
    assert 10 < (whole[~dropped] == 4).sum() < 40  # of unknown class


def test_class_and_vector_are_dropped_independently_whatever_the_division():
    def rows(per_device, micro_steps):
        shape = BatchShape(per_device, micro_steps, 1, 0)
        loader = BatchLoader(Labelled(), shape, 3, False, torch.device("cpu"), 0, condition=class_and_vector())
        return torch.cat([loader.make(5, number)["condition"]["class_labels"] for number in range(micro_steps)])

    whole = rows(400, 1)
    torch.testing.assert_close(rows(100, 4), whole, equal_nan=True, rtol=0, atol=0)
    purposes = Purpose.CONDITION_DROPOUT, Purpose.VECTOR_DROPOUT
    no_class, no_vector = (uniform_draws(3, 5, purpose, 400) < 0.25 for purpose in purposes)
    assert (whole[no_class, 0] == 4).all() and torch.equal(whole[:, 1].isnan(), torch.from_numpy(no_vector))
    assert 10 < (no_class & no_vector).sum() < 45 < (no_class & ~no_vector).sum()


def test_mean_and_deviation_in_one_pass():
    rows = np.random.default_rng(0).normal([1e5, -2, 0], [0.1, 3, 0], (1000, 3)).astype(np.float32)
    mean, std = mean_and_std([rows[:1], rows[1:700], rows[700:]])
    assert mean == pytest.approx(rows.mean(0, dtype=np.float64), rel=1e-6)
    assert std == pytest.approx([*rows.std(0, dtype=np.float64)[:2], 1], rel=1e-4)


def test_statistics_are_taken_once(tmp_path):
    images = Labelled()
    images.fingerprint = "abc"
    mean, std = vector_statistics(images, SimpleNamespace(cache_dir=tmp_path))
    assert mean == pytest.approx([49.5, 5, -49.5]) and std[1] == 1
    images.column = None
    again = vector_statistics(images, SimpleNamespace(cache_dir=tmp_path))
    assert np.array_equal(again, [mean, std])


def test_shares_of_classes():
    counts = np.array(COUNTS)
    assert class_shares(counts, "none").tolist() == [60, 25, 9, 0]
    assert sorted(class_shares(counts, "inverse").tolist()) == [0, 31, 31, 32]
    root = class_shares(counts, "sqrt")
    assert root.sum() == 94 and root[0] / root[2] == pytest.approx((60 / 9) ** 0.5, rel=0.1)


@pytest.mark.parametrize("balance", ["none", "sqrt", "inverse"])
def test_every_epoch_has_its_share_of_each_class_and_every_image_its_turn(balance):
    order, size = ClassBalancedOrder(LABELS, 4, seed=5, balance=balance), len(LABELS)
    visits = order.indices(np.arange(9 * size))
    shares = np.append(class_shares(np.array(COUNTS), balance), UNKNOWN)
    for epoch in np.split(LABELS[visits], 9):
        assert np.bincount(np.where(epoch == -1, 4, epoch), minlength=5).tolist() == shares.tolist()
    times = np.bincount(visits, minlength=size)
    for label in (0, 1, 2, -1):
        assert np.ptp(times[label == LABELS]) <= 1
    if balance == "none":
        assert (times == 9).all()
    first, second = visits[:size], visits[size : 2 * size]
    assert not np.array_equal(first, second) and not np.array_equal(first, np.sort(first))
    jumbled = np.random.default_rng(0).permutation(9 * size)
    assert np.array_equal(order.indices(jumbled), visits[jumbled])  # a function of the position alone
    assert not np.array_equal(ClassBalancedOrder(LABELS, 4, 6, balance).indices(np.arange(size)), first)


def test_balance_that_cannot_be_is_refused():
    images = Labelled()
    assert balanced_order(images, SimpleNamespace(class_balance="none")) is None
    with pytest.raises(UserError, match="--shuffle_block_size 64"):
        balanced_order(images, SimpleNamespace(class_balance="sqrt", shuffle_block_size=64))
    images.label_names = None
    with pytest.raises(UserError, match="--class_balance sqrt needs images with classes"):
        balanced_order(images, SimpleNamespace(class_balance="sqrt", shuffle_block_size=0))


# Weights of a model of other conditions
