"""Precision and recall, density and coverage: are samples realistic, and do they cover the real images?"""

# N reference images, M generated images, D dimensions of a feature, k nearest neighbours

import torch
from torch import Tensor

PRECISION_NEIGHBOURS = 3  # Kynkaanniemi et al. 2019, section 2
DENSITY_NEIGHBOURS = 5  # Naeem et al. 2020, section 4
ROWS_PER_BLOCK = 1024


def manifold_scores(reference: Tensor, generated: Tensor) -> dict[str, float]:
    """Precision, recall, density and coverage of generated features (M, D) against reference features (N, D).

    precision  share of generated images within the k-th neighbour distance of some real image
    recall     share of real images within the k-th neighbour distance of some generated image
               (both Kynkaanniemi et al. 2019, Eq. 2, k = 3)
    density    number of real neighbourhoods that hold a generated image, over k; may exceed 1
    coverage   share of real images whose neighbourhood holds a generated image
               (both Naeem et al. 2020, Eq. 3 and 4, k = 5)

    `<name>_se` is the standard error over the images that are averaged, for fixed neighbourhoods. With few images k is
    at most the number of other images.
    """
    reference, generated = reference.double(), generated.double()
    precision_radii, density_radii = neighbour_distances(reference, PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS)
    (generated_radii,) = neighbour_distances(generated, PRECISION_NEIGHBOURS)
    precise, dense = [], []
    recalled = torch.zeros(len(reference), dtype=torch.bool)
    covered = torch.zeros(len(reference), dtype=torch.bool)
    density_neighbours = min(DENSITY_NEIGHBOURS, len(reference) - 1)
    for start in range(0, len(generated), ROWS_PER_BLOCK):
        block = slice(start, start + ROWS_PER_BLOCK)
        distances = _distances(generated[block], reference)
        precise.append((distances <= precision_radii).any(dim=1))
        inside = distances <= density_radii
        dense.append(inside.sum(dim=1).double() / density_neighbours)
        covered |= inside.any(dim=0)
        recalled |= (distances <= generated_radii[block, None]).any(dim=0)
    found = {"precision": torch.cat(precise), "recall": recalled, "density": torch.cat(dense), "coverage": covered}
    means = {name: values.double().mean().item() for name, values in found.items()}
    errors = {f"{name}_se": _standard_error(values) for name, values in found.items()}
    return means | errors


def neighbour_distances(features: Tensor, *neighbours: int) -> list[Tensor]:
    """For each k of `neighbours` the distances (N,) of `features` (N, D) to their k-th nearest among the others."""
    columns = [min(k, len(features) - 1) for k in neighbours]  # column 0 is the distance of the image to itself
    blocks = (features[start : start + ROWS_PER_BLOCK] for start in range(0, len(features), ROWS_PER_BLOCK))
    found = torch.cat([_distances(block, features).topk(max(columns) + 1, largest=False).values for block in blocks])
    return [found[:, column] for column in columns]


def nearest(queries: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Distance (M,) and row (M,) of the nearest of `features` (N, D) for each of `queries` (M, D)."""
    blocks = (queries[start : start + ROWS_PER_BLOCK] for start in range(0, len(queries), ROWS_PER_BLOCK))
    found = [_distances(block, features).min(dim=1) for block in blocks]
    return torch.cat([block.values for block in found]), torch.cat([block.indices for block in found])


def _distances(one: Tensor, other: Tensor) -> Tensor:
    """Euclidean distances (B, N) of rows (B, D) and (N, D), in float64: float32 would lose the smallest ones."""
    one, other = one.double(), other.double()
    squares = one.square().sum(dim=1)[:, None] + other.square().sum(dim=1) - 2 * one @ other.T
    return squares.clamp(min=0).sqrt()


def _standard_error(values: Tensor) -> float:
    return values.double().std().item() / len(values) ** 0.5 if len(values) > 1 else float("nan")
