"""Objectives, noise schedules, weights and timesteps against closed forms and figures of their papers."""

import math

import pytest
import torch
from scipy.stats import kstest, norm

from trainkit.diffusion.noise_schedule import add_noise, alpha_sigma, build_noise_scheduler, signal_to_noise
from trainkit.diffusion.objective import (
    check_objective,
    denoising_errors,
    loss_weights,
    prediction_target,
)
from trainkit.diffusion.timesteps import draw_timesteps
from trainkit.errors import UserError
from trainkit.options.model import ObjectiveOptions

PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow_prediction")
WEIGHTINGS = ("none", "min_snr", "soft_min_snr", "edm")
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
DEVIATION = 0.7  # of the data, a normal distribution around 0
EVENLY = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000


def scheduler(**options):
    return build_noise_scheduler(ObjectiveOptions(**options))


def weight_of_image(weighting, prediction, snr):
    """What the error of the image costs, from the papers' formulas."""
    return {
        "none": {"epsilon": snr, "sample": snr, "v_prediction": snr + 1, "flow_prediction": (1 + snr.sqrt()) ** 2}[
            prediction
        ],
        "min_snr": snr.clamp(max=5),
        "soft_min_snr": snr * torch.sigmoid(math.log(5) - snr.log()),
        "edm": (1 / snr + 0.25) / (0.25 / snr),
    }[weighting]


def best_image(noisy, alpha, sigma):
    """E[image | noisy] of the data."""
    return alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2) * noisy


def as_prediction(prediction, image, noisy, alpha, sigma):
    """What a network that has the image `image` in mind predicts."""
    noise = (noisy - alpha * image) / sigma
    return {
        "epsilon": noise,
        "sample": image,
        "v_prediction": alpha * noise - sigma * image,
        "flow_prediction": noise - image,
    }[prediction]


@pytest.mark.parametrize("timestep", [30, 300, 900])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_exact_denoiser_has_the_least_loss_and_an_error_of_the_image_its_weight(prediction, weighting, timestep):
    noise_scheduler, generator = scheduler(prediction_type=prediction), torch.Generator().manual_seed(0)
    timesteps = torch.full((8,), timestep)
    images = DEVIATION * torch.randn(8, 3, 32, 32, generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    noisy = add_noise(noise_scheduler, images, noise, timesteps)
    alpha, sigma = (value[0].double() for value in alpha_sigma(noise_scheduler, timesteps))
    weight = weight_of_image(weighting, prediction, alpha**2 / sigma**2).item()
    variance = (DEVIATION**2 * sigma**2 / (alpha**2 * DEVIATION**2 + sigma**2)).item()

    def loss_of(image):
        output = as_prediction(prediction, image, noisy, alpha, sigma)
        errors = denoising_errors(noise_scheduler, output, images, noise, timesteps, loss_weighting=weighting)
        return errors.mean().item()

    best = best_image(noisy, alpha, sigma)
    assert loss_of(images) == pytest.approx(0, abs=1e-6 * weight)
    assert loss_of(best) == pytest.approx(weight * variance, rel=0.02)  # what no network can know
    for error in (0.3, -0.3):
        assert loss_of(best + error) == pytest.approx(weight * (variance + 0.09), rel=0.04)


def test_weights_are_the_papers_at_given_ratios():
    noise_scheduler = scheduler(prediction_type="v_prediction", ddpm_beta_schedule="squaredcos_cap_v2")
    timesteps = torch.arange(1000)
    snr = signal_to_noise(noise_scheduler, timesteps)
    for ratio, min_snr, edm in ((20, 5 / 21, 24 / 21), (5, 5 / 6, 9 / 6), (1, 0.5, 2.5), (0.25, 0.2, 3.4)):
        here = (snr - ratio).abs().argmin()[None]
        assert loss_weights(noise_scheduler, here, 5.0).item() == pytest.approx(min_snr, rel=0.03)
        assert loss_weights(noise_scheduler, here, None, "edm").item() == pytest.approx(edm, rel=0.03)


def test_flow_weights_are_finite_from_image_to_noise():
    ends = torch.tensor([0.0, 500.0, 1000.0])
    for weighting in WEIGHTINGS:
        weights = loss_weights(scheduler(prediction_type="flow_prediction"), ends, None, weighting)
        assert weights.isfinite().all() and (weights >= 0).all()
    assert weights.tolist() == [1, 1.25, 4]  # (1 - t)^2 + 4 t^2


def test_flow_is_a_straight_line_and_its_velocity():
    noise_scheduler = scheduler(prediction_type="flow_prediction")
    images, noise = torch.randn(2, 2, 1, 4, 4)
    velocity = prediction_target(noise_scheduler, images, noise, None)
    for t in (0.0, 250.0, 1000.0):
        noisy = add_noise(noise_scheduler, images, noise, torch.full((2,), t))
        torch.testing.assert_close(noisy, images + t / 1000 * velocity)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_zero_terminal_snr_is_zero_and_the_first_is_kept(schedule):
    plain = scheduler(ddpm_beta_schedule=schedule, prediction_type="v_prediction")
    rescaled = scheduler(ddpm_beta_schedule=schedule, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert rescaled.alphas_cumprod[-1] == 0 and (rescaled.alphas_cumprod.diff() < 0).all()
    assert rescaled.alphas_cumprod[0].item() == pytest.approx(plain.alphas_cumprod[0].item(), abs=1e-6)


def test_zero_terminal_snr_is_diffusers_own():
    from diffusers import DDPMScheduler

    stock = DDPMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True)
    ours = scheduler(ddpm_beta_schedule="scaled_linear", prediction_type="sample", rescale_betas_zero_snr=True)
    torch.testing.assert_close(ours.alphas_cumprod, stock.alphas_cumprod, atol=1e-6, rtol=1e-4)


def test_the_shift_moves_log_snr_by_the_papers_amount():
    """A 256 px image: log SNR - 2 ln 4 at every timestep (Hoogeboom et al. 2023); t of flow: Esser et al. 2024."""
    plain, moved = (scheduler(ddpm_beta_schedule="squaredcos_cap_v2", noise_shift=shift) for shift in (1, 4))
    timesteps = torch.arange(10, 990)
    difference = signal_to_noise(moved, timesteps).log() - signal_to_noise(plain, timesteps).log()
    torch.testing.assert_close(difference, torch.full((980,), 2 * math.log(64 / 256)), atol=1e-3, rtol=0)
    options = ObjectiveOptions(prediction_type="flow_prediction", noise_shift=3)
    drawn = draw_timesteps(options, build_noise_scheduler(options), torch.tensor([0.0, 0.5, 0.9], dtype=torch.float64))
    assert drawn.tolist() == pytest.approx([0, 750, 1000 * 2.7 / 2.8])


@pytest.mark.parametrize("prediction", ["v_prediction", "flow_prediction"])
@pytest.mark.parametrize("sampling", ["uniform", "logit_normal", "edm_lognormal"])
def test_timesteps_are_distributed_as_said(prediction, sampling):
    options = ObjectiveOptions(
        prediction_type=prediction, timestep_sampling=sampling, logit_mean=0.4, logit_std=0.8, edm_p_mean=-0.5
    )
    noise_scheduler = build_noise_scheduler(options)
    drawn = draw_timesteps(options, noise_scheduler, EVENLY)
    assert drawn.min() >= 0 and drawn.max() < 1000 and (drawn.diff() >= 0).all()  # the inverse of a CDF
    assert drawn.dtype == (torch.float32 if prediction == "flow_prediction" else torch.int64)
    times = drawn.double() / 1000 + (0 if prediction == "flow_prediction" else 0.0005)
    alpha, sigma = alpha_sigma(noise_scheduler, drawn)
    value, expected = {
        "uniform": (times, "uniform"),
        "logit_normal": (times.logit(), norm(0.4, 0.8).cdf),
        "edm_lognormal": ((sigma / alpha).log(), norm(-0.5, 1.2).cdf),
    }[sampling]
    assert kstest(value.numpy(), expected).statistic < 0.01
    assert torch.equal(draw_timesteps(options, noise_scheduler, EVENLY[77:78]), drawn[77:78])  # row by row


def test_no_uniform_number_is_out_of_range():
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    for prediction in ("epsilon", "flow_prediction"):
        for sampling in ("uniform", "logit_normal", "edm_lognormal"):
            options = ObjectiveOptions(prediction_type=prediction, timestep_sampling=sampling, noise_shift=4)
            drawn = draw_timesteps(options, build_noise_scheduler(options), ends)
            assert drawn[0] == 0 and 990 < drawn[1] < 1000


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"prediction_type": "epsilon", "rescale_betas_zero_snr": True}, "needs --prediction_type v_prediction or"),
        ({"prediction_type": "sample", "rescale_betas_zero_snr": True}, "use --loss_weighting edm"),
        (
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "snr_gamma": 5.0},
            "min_snr has no weight where the SNR is 0",
        ),
        (
            {
                "prediction_type": "v_prediction",
                "rescale_betas_zero_snr": True,
                "timestep_sampling": "edm_lognormal",
            },
            "never draws the last timestep",
        ),
        ({"prediction_type": "flow_prediction", "rescale_betas_zero_snr": True}, "ends in pure noise by itself"),
        ({"prediction_type": "flow_prediction", "ddpm_beta_schedule": "sigmoid"}, "has no betas"),
        ({"loss_weighting": "edm", "snr_gamma": 5.0}, "--snr_gamma 5.0 belongs to"),
        ({"snr_gamma": 0.0}, "--snr_gamma 0.0 must be more than 0"),
        ({"noise_shift": 0.0}, "--noise_shift 0.0 must be more than 0"),
        ({"ddpm_beta_schedule": "scaled_linear", "noise_shift": 0.05}, "% of the image"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(flags, message):
    with pytest.raises(UserError, match="--") as refusal:
        check_objective(ObjectiveOptions(**flags))
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_every_other_pair_is_accepted():
    for prediction in PREDICTIONS:
        for weighting in WEIGHTINGS:
            for sampling in ("uniform", "logit_normal", "edm_lognormal"):
                check_objective(
                    ObjectiveOptions(
                        prediction_type=prediction, loss_weighting=weighting, timestep_sampling=sampling, noise_shift=2
                    )
                )
    for weighting, prediction in (("none", "v_prediction"), ("edm", "v_prediction"), ("edm", "sample")):
        check_objective(
            ObjectiveOptions(prediction_type=prediction, loss_weighting=weighting, rescale_betas_zero_snr=True)
        )
