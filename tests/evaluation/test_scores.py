"""Scores agree with torchmetrics and with brute force on the same features, and their errors with repeated draws."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from trainkit.evaluation.frechet import FeatureMoments, fid_at_infinity, fit_intercept, frechet_distance_of
from trainkit.evaluation.images import ImageArray
from trainkit.evaluation.manifold import manifold_scores, nearest
from trainkit.evaluation.memorization import memorization
from trainkit.evaluation.metrics import _Identity, frechet_distance, kernel_distance, scores, squared_mmd
from trainkit.evaluation.reference import warn_of_few_images, warn_of_other_size


def gaussian(count, dimensions, seed, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimensions, dimensions, generator=torch.Generator().manual_seed(99)) / dimensions**0.5
    return torch.randn(count, dimensions, generator=generator) @ mixing * scale + shift


@pytest.mark.parametrize("count", [40, 300], ids=["fewer images than dimensions", "more"])
def test_fid_is_that_of_torchmetrics(count):
    real, made = gaussian(350, 64, 0), gaussian(count, 64, 1, 1.3, 0.2)
    metric = FrechetInceptionDistance(feature=_Identity(64))
    metric.update(real.double(), real=True)
    metric.update(made.double(), real=False)
    assert frechet_distance(real, made)["fid"] == pytest.approx(metric.compute().item(), rel=1e-3)


def test_kid_of_whole_sets_is_the_unbiased_estimator():
    real, made = gaussian(7, 3, 0).double().numpy(), gaussian(5, 3, 1, 2.0).double().numpy()

    def kernel(x, y):
        return (x @ y / 3 + 1) ** 3

    def off_diagonal(rows):
        pairs = [(i, j) for i in range(len(rows)) for j in range(len(rows)) if i != j]
        return np.mean([kernel(rows[i], rows[j]) for i, j in pairs])

    wanted = off_diagonal(real) + off_diagonal(made) - 2 * np.mean([kernel(x, y) for x in real for y in made])
    assert squared_mmd(torch.from_numpy(real), torch.from_numpy(made)) == pytest.approx(wanted)


@pytest.mark.slow
def test_standard_errors_are_the_spread_over_new_samples():
    real = gaussian(2000, 8, 0)
    found = [scores(real, gaussian(200, 8, seed, 1.2), ["fid", "precision"]) for seed in range(1, 25)]
    for name in ("fid", "precision"):
        spread = np.std([one[name] for one in found], ddof=1)
        claimed = np.mean([one[f"{name}_se"] for one in found])
        assert spread / 1.6 < claimed < 1.6 * spread, name
    kids = [kernel_distance(real[:200], gaussian(200, 8, seed, 1.2)) for seed in range(1, 9)]
    assert all(one["kid_se"] > 0 for one in kids)
    assert "kid_se" not in kernel_distance(real[:6], real[6:12])


def test_precision_recall_density_and_coverage_are_those_of_brute_force():
    real, made = gaussian(40, 4, 0).double(), gaussian(30, 4, 1, 1.5, 0.3).double()

    def distance(x, y):
        return math.dist(x.tolist(), y.tolist())

    def radius(rows, row, k):
        return sorted(distance(rows[row], other) for place, other in enumerate(rows) if place != row)[k - 1]

    real_3, real_5 = ([radius(real, row, k) for row in range(len(real))] for k in (3, 5))
    made_3 = [radius(made, row, 3) for row in range(len(made))]
    wanted = {
        "precision": np.mean([any(distance(x, y) <= r for y, r in zip(real, real_3, strict=True)) for x in made]),
        "recall": np.mean([any(distance(y, x) <= r for x, r in zip(made, made_3, strict=True)) for y in real]),
        "density": np.mean([sum(distance(x, y) <= r for y, r in zip(real, real_5, strict=True)) / 5 for x in made]),
        "coverage": np.mean([any(distance(x, y) <= r for x in made) for y, r in zip(real, real_5, strict=True)]),
    }
    found = manifold_scores(real, made)
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, abs=1e-9)
    assert 0 < wanted["precision"] < 1 and 0 < wanted["recall"] < 1 and 0 < wanted["coverage"] < 1
    same = manifold_scores(real, real)
    assert same["precision"] == same["recall"] == same["coverage"] == 1


def test_fid_at_infinity_is_nearer_to_the_true_distance_than_fid():
    real, made = gaussian(20_000, 16, 0), gaussian(400, 16, 1, 1.3)
    true = frechet_distance_of(FeatureMoments.of(real), FeatureMoments.of(gaussian(20_000, 16, 2, 1.3)))
    found = fid_at_infinity(real, made)
    fid = frechet_distance(real, made)["fid"]
    assert abs(found["fid_infinity"] - true) < abs(fid - true) and found["fid_infinity_se"] > 0
    assert fid_at_infinity(real, made[:20]) == {}


def test_the_intercept_of_a_line():
    inputs = torch.tensor([1.0, 2.0, 4.0, 5.0], dtype=torch.float64)
    values = 3 + 2 * inputs
    assert fit_intercept(inputs, values) == pytest.approx((3, 0), abs=1e-9)
    noisy = values + torch.tensor([0.1, -0.2, 0.2, -0.1], dtype=torch.float64)
    design = np.stack([np.ones(4), inputs.numpy()], 1)
    solution, residual, *_ = np.linalg.lstsq(design, noisy.numpy(), rcond=None)
    error = math.sqrt(residual[0] / 2 * np.linalg.inv(design.T @ design)[0, 0])
    assert fit_intercept(inputs, noisy) == pytest.approx((solution[0], error))


def test_copies_of_training_images_are_found():
    training, held_out, fresh = gaussian(300, 6, 0), gaussian(200, 6, 1), gaussian(100, 6, 2)
    copied = torch.cat([training[:50] + 1e-3, fresh[:50]])
    honest, copying = memorization(training, fresh, held_out), memorization(training, copied, held_out)
    assert honest["share_too_near"] < 0.06 and copying["share_too_near"] >= 0.5
    assert honest["num_copies"] == 0 and memorization(training, training[7:9], None)["num_copies"] == 2
    assert nearest(copied, training)[1][:50].tolist() == list(range(50))
    assert "share_too_near" not in memorization(training, fresh, None)
    distances, rows = nearest(training[5:7], training)
    assert rows.tolist() == [5, 6] and distances.max() < 1e-4


@pytest.mark.parametrize("reference, side, warns", [(256, 32, True), (32, 64, True), (32, 32, False), (32, 28, False)])
def test_a_reference_of_another_size_is_warned_about(reference, side, warns, capsys):
    warn_of_other_size(ImageArray(np.zeros((1, reference, reference // 2, 3), np.uint8)), side)
    assert (f"prepared at --resolution {side}" in "".join(capsys.readouterr())) == warns


def test_kid_of_few_images_is_warned_about(capsys):
    warn_of_few_images(["kid"], 5000, 42)
    assert "WARNING: KID of 42 images uses subsets of 21 (usual: 1,000)" in capsys.readouterr().out
    warn_of_few_images(["fid"], 42)
    warn_of_few_images(["kid"], 5000, 100)
    assert not capsys.readouterr().out
