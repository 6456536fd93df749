"""Distances between two sets of image features, computed by torchmetrics."""

# N, M images, D dimensions of a feature

import warnings

import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

KID_SUBSET_SIZE, KID_SUBSETS = 1000, 100
PUBLISHED_MINIMUM = 10_000
ONE_RANK = {"sync_on_compute": False}  # features are whole where they are; torchmetrics would wait for other ranks


class _AsTheyAre(nn.Module):
    """Lets torchmetrics take features in the place of images, so that each image goes through the network once."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def kernel_distance(reference: torch.Tensor, generated: torch.Tensor, seed: int = 0) -> dict[str, float]:
    """KID of features (N, D) and (M, D), float: unbiased for any N, M (Binkowski et al. 2018, Eq. 4).

    `kid` is the mean over `KID_SUBSETS` random subsets, `kid_std` their deviation. A subset holds `KID_SUBSET_SIZE`
    images, or half of the smaller set: of whole sets there would be no deviation to see.
    """
    subset_size = min(KID_SUBSET_SIZE, max(2, min(len(reference), len(generated)) // 2))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # that it keeps the features in memory
        torch.manual_seed(seed)
        metric = KernelInceptionDistance(
            feature=_AsTheyAre(reference.shape[1]), subsets=KID_SUBSETS, subset_size=subset_size, **ONE_RANK
        )
        metric.update(reference, real=True)
        metric.update(generated, real=False)
        mean, deviation = metric.compute()
    return {"kid": mean.item(), "kid_std": deviation.item()}


def frechet_distance(reference: torch.Tensor, generated: torch.Tensor) -> dict[str, float]:
    """FID of features (N, D) and (M, D) (Heusel et al. 2017, Eq. 6): grows as N and M fall, much so below 2 D."""
    metric = FrechetInceptionDistance(feature=_AsTheyAre(reference.shape[1]), **ONE_RANK)
    metric.update(reference.double(), real=True)
    metric.update(generated.double(), real=False)
    return {"fid": metric.compute().item()}


def scores(reference: torch.Tensor, generated: torch.Tensor, names: list[str], seed: int = 0) -> dict[str, float]:
    """The metrics `names` (of kid, fid) of features (N, D) and (M, D)."""
    found: dict[str, float] = {}
    if "kid" in names:
        found |= kernel_distance(reference, generated, seed)
    if "fid" in names:
        found |= frechet_distance(reference, generated)
    return found


def noise_floor(reference: torch.Tensor, count: int, names: list[str], seed: int = 0) -> tuple[dict[str, float], int]:
    """What two disjoint random sets of real images score, and the size of each: `count`, or half of `reference`."""
    size = min(count, len(reference) // 2)
    order = torch.randperm(len(reference), generator=torch.Generator().manual_seed(seed))
    return scores(reference[order[:size]], reference[order[size : 2 * size]], names, seed), size


def why_not_comparable(num_images: int) -> str:
    """Why a score over `num_images` is not to be set beside published ones."""
    reason = f"n < {PUBLISHED_MINIMUM:,}" if num_images < PUBLISHED_MINIMUM else "those use Inception features"
    return f"not comparable with published figures ({reason})"
