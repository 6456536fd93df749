"""Each scheduler of the catalogue, with the exact denoiser: its order, what noise it leaves, and its first level."""

import functools
import math

import pytest
import torch
from exact_denoiser import ExactUNet, PixelMixture

from pipelines.unconditional import solve
from trainkit.diffusion.noise_schedule import build_noise_scheduler
from trainkit.options.model import ObjectiveOptions
from trainkit.sampling.catalogue import CATALOGUE, FLOW_SCHEDULER_NAMES, SCHEDULER_NAMES
from trainkit.sampling.schedulers import scheduler_bundle

# Well within [-1, 1], so that no clamp is active; smooth, so that high orders can be seen.
SMOOTH = PixelMixture.of([0.4, 0.35, 0.25], [-0.45, 0.1, 0.45], [0.12, 0.1, 0.12])
POINTS = PixelMixture.of([0.4, 0.35, 0.25], [-0.9, -0.2, 0.8], [0.0, 0.0, 0.0])  # all deviation is residual noise
SCHEDULES = {
    "linear": {"ddpm_beta_schedule": "linear"},
    "scaled_linear": {"ddpm_beta_schedule": "scaled_linear"},
    "cosine": {"ddpm_beta_schedule": "squaredcos_cap_v2"},
    "shifted": {"ddpm_beta_schedule": "squaredcos_cap_v2", "noise_shift": 4.0},
    "zero_snr": {"ddpm_beta_schedule": "linear", "rescale_betas_zero_snr": True},
}
FLOWS = {"flow": {"prediction_type": "flow_prediction"}}
QUICK = [*((schedule, "v_prediction") for schedule in SCHEDULES), ("cosine", "epsilon"), ("cosine", "sample")]
OBJECTIVES = [
    (schedule, prediction)
    for schedule in SCHEDULES
    for prediction in ("epsilon", "sample", "v_prediction")
    if (schedule, prediction) != ("zero_snr", "epsilon")  # refused in training: no image remains at the last timestep
]
CASES = [
    pytest.param(*objective, name, marks=() if objective in QUICK else pytest.mark.slow)
    for objective in OBJECTIVES
    for name in SCHEDULER_NAMES
]
CASES += [pytest.param("flow", "flow_prediction", name) for name in FLOW_SCHEDULER_NAMES]
DETERMINISTIC = [case for case in CASES if not CATALOGUE[case.values[2]].stochastic]
STEPS = {"dpmsolver_3m": (20, 40), "flow": (40, 80)}
STEPS_TO_END = {"ddpm": 100, "ddim": 100, "sasolver": 50}


@functools.cache
def schedulers(schedule, prediction):
    """The noise schedule of training, and its bundle."""
    settings = (SCHEDULES | FLOWS)[schedule] | {"prediction_type": prediction}
    noise_scheduler = build_noise_scheduler(ObjectiveOptions(**settings))
    return noise_scheduler, scheduler_bundle(noise_scheduler)


def sampled(schedule, prediction, name, mixture, steps):
    """Samples (N,) of quantiles of the noise, and where the exact flow carries them."""
    noise_scheduler, bundle = schedulers(schedule, prediction)
    scheduler = bundle[name]
    unet = ExactUNet(noise_scheduler, mixture.best, (1, 1, 1))
    noise = torch.special.ndtri((torch.arange(200, dtype=torch.float64) + 0.5) / 200)
    scheduler.set_timesteps(steps)
    made = solve(
        scheduler,
        lambda call, timestep, sample: unet(sample, timestep).sample,
        noise.float().reshape(-1, 1, 1, 1),
        torch.Generator().manual_seed(0),
    )
    return made.flatten().double(), mixture.flow_to_data(noise, first_level(scheduler))


def first_level(scheduler):
    """sigma / alpha where the scheduler starts; None if no image is left there."""
    if not hasattr(scheduler, "sigmas"):
        alpha_bar = float(scheduler.alphas_cumprod[int(scheduler.timesteps[0])])
        return math.sqrt((1 - alpha_bar) / alpha_bar) if alpha_bar > 0 else None
    sigma = float(scheduler.sigmas[0])
    if scheduler.config.get("use_flow_sigmas") or "FlowMatch" in type(scheduler).__name__:
        return None if sigma > 0.9999 else sigma / (1 - sigma)
    return sigma


@pytest.mark.parametrize("schedule, prediction, name", DETERMINISTIC)
def test_the_error_falls_with_the_order_of_the_solver(schedule, prediction, name):
    few, many = STEPS.get(name) or STEPS.get(schedule) or (20, 40)
    errors = [
        (made - exact).square().mean().sqrt().item()
        for made, exact in (sampled(schedule, prediction, name, SMOOTH, steps) for steps in (few, many))
    ]
    order = CATALOGUE[name].order
    assert errors[1] < 0.07 / order**2, errors
    if schedule != "shifted":  # there the first training timestep has so much noise that the last step limits them
        assert math.log2(errors[0] / errors[1]) > order - 0.6, errors


@pytest.mark.parametrize("schedule, prediction, name", CASES)
def test_no_noise_is_left_at_the_end(schedule, prediction, name):
    made, _ = sampled(schedule, prediction, name, POINTS, STEPS_TO_END.get(name, 20))
    distances = (made[:, None] - POINTS.means).abs().amin(dim=1).sort().values
    left = distances[: len(distances) * 49 // 50].square().mean().sqrt().item()  # without pixels between two modes
    allowed = 2e-3
    if name == "sasolver":  # it ends at the noise level of the first training timestep
        alpha_bar = schedulers(schedule, prediction)[0].alphas_cumprod[0]
        allowed = 1.2 * ((1 - alpha_bar) / alpha_bar).sqrt().item()
    assert left < allowed
