"""Distances between two sets of image features, each with a standard error."""

# N reference images, M generated images, D dimensions of a feature

import math
import warnings

import torch
from torch import Tensor, nn
from torchmetrics.image.kid import KernelInceptionDistance

from trainkit.evaluation.frechet import FeatureMoments, RunningMoments, fid_at_infinity, frechet_distance_of
from trainkit.evaluation.manifold import manifold_scores

KID_SUBSET_SIZE, KID_SUBSETS = 1000, 100
JACKKNIFE_GROUPS = 10
ONE_RANK = {"sync_on_compute": False}  # each process holds all features; torchmetrics would wait for other ranks


class _Identity(nn.Module):
    """Lets torchmetrics accept features instead of images, so that each image goes through the network once."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def kernel_distance(reference: Tensor, generated: Tensor, seed: int = 0) -> dict[str, float]:
    """KID of features (N, D) and (M, D), float: unbiased for any N, M (Binkowski et al. 2018, Eq. 4).

    `kid` is the mean over `KID_SUBSETS` random subsets and `kid_std` their standard deviation. A subset holds
    `KID_SUBSET_SIZE` images, or half of the smaller set. `kid_se` is the standard error of KID, from the deviation
    over disjoint blocks of the data (Zaremba et al. 2013, B-test); it is missing for fewer than 8 images.
    """
    smaller = min(len(reference), len(generated))
    subset_size = min(KID_SUBSET_SIZE, max(2, smaller // 2))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # about keeping the features in memory
        torch.manual_seed(seed)
        metric = KernelInceptionDistance(
            feature=_Identity(reference.shape[1]), subsets=KID_SUBSETS, subset_size=subset_size, **ONE_RANK
        )
        metric.update(reference, real=True)
        metric.update(generated, real=False)
        mean, deviation = metric.compute()
    found = {"kid": mean.item(), "kid_std": deviation.item()}
    blocks = min(JACKKNIFE_GROUPS, smaller // 4)
    if blocks >= 2:
        pairs = zip(_shuffled_blocks(reference, blocks, seed), _shuffled_blocks(generated, blocks, seed), strict=True)
        values = torch.tensor([squared_mmd(real, made) for real, made in pairs], dtype=torch.float64)
        found["kid_se"] = values.std().item() / math.sqrt(blocks)
    return found


def squared_mmd(reference: Tensor, generated: Tensor) -> float:
    """Unbiased squared MMD with the kernel (x y / D + 1)^3 of (N, D) and (M, D) (Binkowski et al. 2018, Eq. 4)."""
    dimensions = reference.shape[1]

    def kernel(one: Tensor, other: Tensor) -> Tensor:
        return (one.double() @ other.double().T / dimensions + 1) ** 3

    def mean_off_diagonal(matrix: Tensor) -> Tensor:
        return (matrix.sum() - matrix.trace()) / (len(matrix) * (len(matrix) - 1))

    within = mean_off_diagonal(kernel(reference, reference)) + mean_off_diagonal(kernel(generated, generated))
    return (within - 2 * kernel(reference, generated).mean()).item()


def frechet_distance(reference: Tensor, generated: Tensor) -> dict[str, float]:
    """FID of features (N, D) and (M, D) (Heusel et al. 2017, Eq. 6): biased upwards for small N and M.

    `fid_se` is its standard error over the generated images, by a jackknife that leaves out one tenth of them at a
    time. It is missing for fewer than 20 generated images.
    """
    moments = FeatureMoments.of(reference)
    found = {"fid": frechet_distance_of(moments, FeatureMoments.of(generated))}
    if len(generated) < 2 * JACKKNIFE_GROUPS:
        return found
    groups = torch.arange(len(generated)) % JACKKNIFE_GROUPS
    left_out = [
        frechet_distance_of(moments, FeatureMoments.of(generated[groups != number]))
        for number in range(JACKKNIFE_GROUPS)
    ]
    return found | {"fid_se": _jackknife_error(left_out)}


def frechet_distance_of_groups(reference: Tensor, groups: list[RunningMoments]) -> dict[str, float]:
    """As `frechet_distance` of features (N, D), for generated ones added in turn to `JACKKNIFE_GROUPS` sums."""
    moments, width = FeatureMoments.of(reference), reference.shape[1]
    together = torch.stack([group.sums for group in groups]).sum(dim=0)

    def without(sums: Tensor | float) -> float:
        return frechet_distance_of(moments, RunningMoments(width, together - sums).moments())

    found = {"fid": without(0.0)}
    if together[0] < 2 * JACKKNIFE_GROUPS:
        return found
    return found | {"fid_se": _jackknife_error([without(group.sums) for group in groups])}


def _jackknife_error(left_out: list[float]) -> float:
    """The standard error of a score, from its values without one group at a time."""
    values = torch.tensor(left_out, dtype=torch.float64)
    return ((len(values) - 1) / len(values) * (values - values.mean()).square().sum()).sqrt().item()


def scores(reference: Tensor, generated: Tensor, names: list[str], seed: int = 0) -> dict[str, float]:
    """The metrics `names` of features (N, D) and (M, D), with standard errors as `<name>_se`."""
    found: dict[str, float] = {}
    if "kid" in names:
        found |= kernel_distance(reference, generated, seed)
    if "fid" in names:
        found |= frechet_distance(reference, generated)
    if "fid_infinity" in names:
        found |= fid_at_infinity(reference, generated, seed)
    if manifold := [name for name in names if name in ("precision", "recall", "density", "coverage")]:
        values = manifold_scores(reference, generated)
        found |= {key: values[key] for name in manifold for key in (name, f"{name}_se")}
    return found


def noise_floor(reference: Tensor, count: int, names: list[str], seed: int = 0) -> tuple[dict[str, float], int]:
    """The scores of two disjoint random sets of real images, and the size of each: `count`, or half of `reference`."""
    size = min(count, len(reference) // 2)
    order = torch.randperm(len(reference), generator=torch.Generator().manual_seed(seed))
    return scores(reference[order[:size]], reference[order[size : 2 * size]], names, seed), size


def _shuffled_blocks(features: Tensor, blocks: int, seed: int) -> list[Tensor]:
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    return list(features[order].tensor_split(blocks))
