"""Power-function averages of the weights, and any other length from snapshots of a few (Karras et al. 2024).

"Analyzing and Improving the Training Dynamics of Diffusion Models", section 3 and appendix C. At step t the average of
exponent gamma weights the model of each earlier time tau in proportion to tau ** gamma: its length grows with the
training, so it needs no warm-up and forgets the start. `sigma_rel` is the standard deviation of this weighting over
tau, as a fraction of t.

An average is linear in the model's weights, and so is a sum of averages. A sum whose profile (its weighting over tau)
is close to the profile of another average therefore approximates that average.

K snapshots, each with a time t in optimizer steps and an exponent gamma
"""

import math

import numpy as np
from numpy.typing import ArrayLike

# At gamma 0 all steps since the start count equally; a negative gamma would count the first of them most.
LONGEST = math.sqrt(1 / 12)


def gamma_of(sigma_rel: float) -> float:
    """The exponent of the average of relative length `sigma_rel`, more than 0 and at most `LONGEST`.

    tau / t is distributed as Beta(gamma + 1, 1), of variance (gamma + 1) / ((gamma + 2) ** 2 (gamma + 3)): the largest
    root of the resulting cubic. Raises `ValueError` outside the range.
    """
    if not 0 < sigma_rel <= LONGEST:
        raise ValueError(f"{sigma_rel} must be more than 0 and at most {LONGEST:.3f}, which weights all steps equally")
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def sigma_rel_of(gamma: float) -> float:
    """The relative length of the average of exponent `gamma`."""
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def decay_at(step: int, gamma: float) -> float:
    """The decay of optimizer step `step`, from 1: 0 (a plain copy) at the first."""
    return (1 - 1 / step) ** (gamma + 1)


def inner_products(steps: ArrayLike, gammas: ArrayLike, other_steps: ArrayLike, other_gammas: ArrayLike) -> np.ndarray:
    """The integral over tau of the product of the profiles (K,) of one set and (L,) of another: (K, L) float64.

    A profile is (gamma + 1) tau ** gamma / t ** (gamma + 1) up to its t, and 0 after. Powers are
    taken only of the ratio of the two times, which is at most 1: powers of the times would overflow.
    """
    t_i, gamma_i = (np.asarray(values, dtype=np.float64)[:, None] for values in (steps, gammas))
    t_j, gamma_j = (np.asarray(values, dtype=np.float64)[None] for values in (other_steps, other_gammas))
    ratio = np.minimum(t_i, t_j) / np.maximum(t_i, t_j)
    later = np.where(t_i < t_j, gamma_j, gamma_i)
    return (gamma_i + 1) * (gamma_j + 1) * ratio**later / ((gamma_i + gamma_j + 1) * np.maximum(t_i, t_j))


def combination(steps: np.ndarray, gammas: np.ndarray, step: float, gamma: float) -> tuple[np.ndarray, float]:
    """The coefficients (K,) of the sum of snapshots nearest to the average (`step`, `gamma`), and its error.

    Least squares under the condition that they sum to 1, so that constant weights are reproduced. The second
    value is the norm of the difference between the profiles, relative to the norm of the wanted one: 0 if exact.
    """
    gram = inner_products(steps, gammas, steps, gammas)
    wanted = inner_products(steps, gammas, [step], [gamma])[:, 0]
    norm = inner_products([step], [gamma], [step], [gamma])[0, 0]
    count = len(wanted)
    scale = 1 / np.sqrt(np.diag(gram))
    system = np.ones((count + 1, count + 1))
    system[:count, :count], system[count, count] = gram * np.outer(scale, scale), 0
    system[count, :count] = system[:count, count] = scale
    found = np.linalg.lstsq(system, np.append(wanted * scale, 1), rcond=1e-13)[0][:count] * scale
    squared_error = found @ gram @ found - 2 * found @ wanted + norm
    return found, math.sqrt(max(squared_error, 0) / norm)
