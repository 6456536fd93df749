import numpy as np
import pytest

from trainkit.data.order import Purpose, normal_draws, sample_indices, uniform_draws


@pytest.mark.parametrize("num_samples", [1, 2, 3, 10, 1000, 4097])
def test_every_epoch_is_a_permutation_of_its_own(num_samples):
    epochs = [sample_indices(np.arange(num_samples) + e * num_samples, num_samples, seed=3) for e in range(3)]
    for indices in epochs:
        assert sorted(indices) == list(range(num_samples))
    if num_samples > 3:
        assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])


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


def test_a_hundred_million_images_cost_no_more_than_a_batch():
    indices = sample_indices(10**12 + np.arange(512), 10**8, seed=0)
    assert len(set(indices.tolist())) == 512 and 0 <= indices.min() and indices.max() < 10**8


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
