"""The Frechet distance of Gaussians fitted to image features (FID), and its limit for infinitely many images."""

# N images, D dimensions of a feature, R rank of a covariance: at most D and N - 1

from typing import NamedTuple

import torch
from torch import Tensor

SIZES, SMALLEST_SHARE = 15, 0.25  # of the extrapolation: Chong & Forsyth 2020 use 15 sizes
MIN_IMAGES_TO_EXTRAPOLATE = 40


class FeatureMoments(NamedTuple):
    """Mean (D,) and a factor (R, D) of the covariance, which is factor^T factor; float64."""

    mean: Tensor
    factor: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "FeatureMoments":
        """The moments of features (N, D), N at least 2."""
        features = features.double()
        mean = features.mean(dim=0)
        centred = (features - mean) / (len(features) - 1) ** 0.5
        if len(features) <= features.shape[1]:
            return cls(mean, centred)
        values, vectors = torch.linalg.eigh(centred.T @ centred)
        return cls(mean, values.clamp(min=0).sqrt()[:, None] * vectors.T)


class RunningMoments:
    """Sums over features that come in batches, float64: memory does not grow with their number.

    `sums` is a vector of 1 + D + D * D numbers: the count, the sum of the features and that of their outer products.
    Sums of parts add up to those of the whole, so they can be reduced over processes.
    """

    def __init__(self, num_features: int, sums: Tensor | None = None):
        self.num_features = num_features
        size = 1 + num_features + num_features**2
        self.sums = torch.zeros(size, dtype=torch.float64) if sums is None else sums

    def add(self, features: Tensor) -> None:
        """Add features (B, D)."""
        features = features.double()
        parts = torch.tensor([float(len(features))]), features.sum(dim=0), (features.T @ features).flatten()
        self.sums += torch.cat([part.double() for part in parts])

    @property
    def count(self) -> int:
        return int(self.sums[0].item())

    def moments(self) -> FeatureMoments:
        """The moments of all that was added, at least 2 features."""
        width, count = self.num_features, self.sums[0]
        mean = self.sums[1 : 1 + width] / count
        covariance = (self.sums[1 + width :].reshape(width, width) - count * torch.outer(mean, mean)) / (count - 1)
        values, vectors = torch.linalg.eigh(covariance)
        return FeatureMoments(mean, values.clamp(min=0).sqrt()[:, None] * vectors.T)


def frechet_distance_of(one: FeatureMoments, other: FeatureMoments) -> float:
    """The squared Frechet distance of two Gaussians (Heusel et al. 2017, Eq. 6).

    |m1 - m2|^2 + trace(C1) + trace(C2) - 2 trace((C1 C2)^1/2). With C = F^T F the last trace is the sum of the
    singular values of F1 F2^T, which are the roots of the eigenvalues of its Gram matrix.
    """
    cross = one.factor @ other.factor.T
    gram = cross @ cross.T if cross.shape[0] <= cross.shape[1] else cross.T @ cross
    root_trace = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum()
    traces = one.factor.square().sum() + other.factor.square().sum()
    return ((one.mean - other.mean).square().sum() + traces - 2 * root_trace).clamp(min=0).item()


def fid_at_infinity(reference: Tensor, generated: Tensor, seed: int = 0) -> dict[str, float]:
    """FID for infinitely many generated images, by a line through FID against 1 / n (Chong & Forsyth 2020, Eq. 7).

    `SIZES` subsets of the generated images are scored against all of the reference. `fid_infinity_se` is the standard
    error of the intercept. Both are missing for fewer than `MIN_IMAGES_TO_EXTRAPOLATE` generated images.
    """
    if len(generated) < MIN_IMAGES_TO_EXTRAPOLATE:
        return {}
    moments, generator = FeatureMoments.of(reference), torch.Generator().manual_seed(seed)
    sizes = torch.linspace(max(10, SMALLEST_SHARE * len(generated)), len(generated), SIZES).long().unique()
    values = []
    for size in sizes.tolist():
        chosen = torch.randperm(len(generated), generator=generator)[:size]
        values.append(frechet_distance_of(moments, FeatureMoments.of(generated[chosen])))
    intercept, error = fit_intercept(1 / sizes.double(), torch.tensor(values, dtype=torch.float64))
    return {"fid_infinity": intercept, "fid_infinity_se": error}


def fit_intercept(inputs: Tensor, values: Tensor) -> tuple[float, float]:
    """The intercept of the least-squares line through `values` (K,) at `inputs` (K,), and its standard error."""
    centre, count = inputs.mean(), len(inputs)
    spread = (inputs - centre).square().sum()
    slope = ((inputs - centre) * values).sum() / spread
    intercept = values.mean() - slope * centre
    residuals = values - intercept - slope * inputs
    variance = residuals.square().sum() / (count - 2)
    return intercept.item(), (variance * (1 / count + centre.square() / spread)).sqrt().item()
