import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainkit.data.loading.order import (
    WINDOW_BLOCKS,
    Purpose,
    SampleOrder,
    normal_draws,
    sample_indices,
    uniform_draws,
)


@pytest.mark.parametrize("num_samples", [1, 2, 3, 10, 1000, 4097])
def test_every_epoch_is_a_permutation_of_its_own(num_samples):
    epochs = [sample_indices(np.arange(num_samples) + e * num_samples, num_samples, seed=3) for e in range(3)]
    for indices in epochs:
        assert sorted(indices) == list(range(num_samples))
    if num_samples > 3:
        assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])


@given(st.integers(1, 3000), st.integers(0, 2**63 - 1), st.integers(0, 10**9), st.data())
def test_any_epoch_of_any_size_is_a_permutation_that_can_be_entered_anywhere(num_samples, seed, epoch, data):
    positions = epoch * num_samples + np.arange(num_samples)
    whole = sample_indices(positions, num_samples, seed)
    assert np.array_equal(np.sort(whole), np.arange(num_samples))
    place = data.draw(st.integers(0, num_samples - 1))
    assert np.array_equal(sample_indices(positions[place:], num_samples, seed), whole[place:])


def test_a_position_does_not_depend_on_what_else_is_asked():
    whole = sample_indices(np.arange(2500), 1000, seed=0)
    assert np.array_equal(whole[1234:1300], sample_indices(np.arange(1234, 1300), 1000, seed=0))
    assert whole[777] == sample_indices(np.array([777]), 1000, seed=0)[0]


def test_seeds_differ_and_the_order_looks_random():
    a, b = (sample_indices(np.arange(20000), 20000, seed=seed) for seed in (0, 1))
    assert (a == b).mean() < 0.01
    assert abs(np.corrcoef(np.arange(20000), a)[0, 1]) < 0.03
    assert abs(np.corrcoef(a[:-1], a[1:])[0, 1]) < 0.03


def test_all_orders_of_a_small_set_are_about_as_frequent():
    orders = [tuple(sample_indices(np.arange(4), 4, seed)) for seed in range(4800)]
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 24 and counts.min() > 140 and counts.max() < 260  # 200 expected, sigma 14


def test_a_billion_images_cost_no_more_than_a_batch():
    indices = sample_indices(10**12 + np.arange(512), 10**9, seed=0)
    assert len(set(indices.tolist())) == 512 and 0 <= indices.min() and indices.max() < 10**9


def test_each_place_of_an_epoch_sees_every_image_as_often():
    """Chi-square over places and images of 4,000 epochs, and the same for what follows what."""
    for order in (SampleOrder(12, seed=1), SampleOrder(12, seed=1, block_size=2), SampleOrder(13, 5, block_size=4)):
        size, epochs = order.num_samples, 4000
        orders = order.indices(np.arange(size * epochs)).reshape(epochs, size)
        counts = np.stack([np.bincount(column, minlength=size) for column in orders.T])
        expected = epochs / size
        statistic, freedom = ((counts - expected) ** 2 / expected).sum(), (size - 1) ** 2
        assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom), order


@pytest.mark.parametrize("num_samples", [1, 2, 7, 64, 1000, 4097])
@pytest.mark.parametrize("block_size", [1, 3, 8, 64, 5000])
def test_blocks_visit_every_image_once_an_epoch(num_samples, block_size):
    order = SampleOrder(num_samples, seed=3, block_size=block_size)
    epochs = order.indices(np.arange(3 * num_samples)).reshape(3, num_samples)
    for indices in epochs:
        assert sorted(indices) == list(range(num_samples))
    if num_samples > 7:
        assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])
    assert order.indices(np.array([num_samples // 2])) == epochs[0][num_samples // 2]


@pytest.mark.parametrize(("num_samples", "block_size"), [(1000, 7), (4096, 16), (100, 100), (103, 50), (20, 64)])
def test_a_window_reads_what_it_says_and_nothing_else(num_samples, block_size):
    order = SampleOrder(num_samples, seed=3, block_size=block_size)
    position = 0
    while position < 2 * num_samples:
        first, end = order.window(position)
        assert first == position and order.window(end - 1) == (first, end)
        assert end - first <= WINDOW_BLOCKS * block_size
        ranges = order.ranges(first, end)
        assert len(ranges) <= WINDOW_BLOCKS + 2
        read = [row for start, stop in ranges for row in range(start, stop)]
        assert sorted(order.indices(np.arange(first, end))) == sorted(read)
        position = end
    assert position == 2 * num_samples


def test_inside_a_window_neighbours_are_parted():
    order = SampleOrder(64_000, seed=0, block_size=100)
    indices = order.indices(np.arange(64_000))
    assert (np.abs(np.diff(indices)) < 100).mean() < 1.5 / WINDOW_BLOCKS  # by chance: 1 in WINDOW_BLOCKS


def test_a_billion_images_in_blocks_cost_no_more_than_a_batch():
    order = SampleOrder(10**9, seed=0, block_size=2048)
    indices = order.indices(10**12 + np.arange(512))
    assert len(set(indices.tolist())) == 512 and 0 <= indices.min() and indices.max() < 10**9
    first, end = order.window(10**12)
    assert end - first == 2048 * WINDOW_BLOCKS and len(order.ranges(first, end)) == WINDOW_BLOCKS


def test_noise_of_a_row_does_not_depend_on_the_division_of_the_batch():
    whole = normal_draws(5, 7, range(8), (3, 16, 16))
    parts = np.concatenate(
        [normal_draws(5, 7, range(0, 3), (3, 16, 16)), normal_draws(5, 7, range(3, 8), (3, 16, 16))]
    )
    assert np.array_equal(whole, parts)
    assert abs(whole.mean()) < 0.05 and abs(whole.std() - 1) < 0.05
    assert not np.array_equal(whole[0], whole[1])


@pytest.mark.parametrize("other", [(6, 7, 0), (5, 8, 0)])
def test_noise_differs_with_seed_and_step(other):
    seed, step, _ = other
    assert not np.array_equal(normal_draws(5, 7, range(1), (64,)), normal_draws(seed, step, range(1), (64,)))


def test_purposes_are_streams_of_their_own():
    streams = {purpose: tuple(uniform_draws(1, 2, purpose, 4)) for purpose in Purpose}
    assert len(set(streams.values())) == len(Purpose)
    values = np.concatenate([uniform_draws(0, step, Purpose.TIMESTEPS, 64) for step in range(200)])
    assert values.min() >= 0 and values.max() < 1 and abs(values.mean() - 0.5) < 0.01
