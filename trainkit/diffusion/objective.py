"""What the network predicts, and how its error is weighted.

B batch, C channels, H/W pixels; images in [-1, 1]; x_t = alpha image + sigma noise, SNR = alpha^2 / sigma^2.
"""

import torch

from trainkit.diffusion.noise_schedule import NoiseScheduler, alpha_sigma, build_noise_scheduler, prediction_type_of
from trainkit.errors import UserError
from trainkit.options.script import TrainingOptions

DEFAULT_GAMMA = 5.0  # Hang et al. 2023, section 4
SIGMA_DATA = 0.5  # standard deviation of images in [-1, 1] (Karras et al. 2022, table 1)
MAX_IMAGE_AT_END = 0.15  # scaled_linear ends at 0.07


def check_objective(options: TrainingOptions) -> None:
    """Raise `UserError` for objectives that cannot be trained or sampled."""
    flow, gamma = options.prediction_type == "flow_prediction", options.snr_gamma
    weighting = _weighting(options.loss_weighting, gamma)
    for name in ("noise_shift", "logit_std", "edm_p_std"):
        if not 0 < getattr(options, name) < float("inf"):
            raise UserError(f"--{name} {getattr(options, name)} must be more than 0")
    if gamma is not None and gamma <= 0:
        raise UserError(f"--snr_gamma {gamma} must be more than 0: Hang et al. 2023 use 5")
    if gamma is not None and weighting not in ("min_snr", "soft_min_snr"):
        raise UserError(
            f"--snr_gamma {gamma} belongs to --loss_weighting min_snr or soft_min_snr, not {weighting}: leave one out"
        )
    if flow and options.ddpm_beta_schedule is not None:
        raise UserError(
            f"--ddpm_beta_schedule {options.ddpm_beta_schedule}: --prediction_type flow_prediction has no betas, only "
            "--noise_shift; leave it out"
        )
    if not options.rescale_betas_zero_snr:
        if options.noise_shift < 1 and not flow:
            _check_end(options)
        return
    if flow:
        raise UserError(
            "--rescale_betas_zero_snr: --prediction_type flow_prediction ends in pure noise by itself; leave it out"
        )
    if options.prediction_type == "epsilon":
        raise UserError(
            "--rescale_betas_zero_snr needs --prediction_type v_prediction or sample: predicting epsilon from pure "
            "noise says nothing about the image"
        )
    if weighting in ("min_snr", "soft_min_snr") or (weighting == "none" and options.prediction_type == "sample"):
        raise UserError(
            f"--rescale_betas_zero_snr: {options.prediction_type} with --loss_weighting {weighting} has no weight "
            "where the SNR is 0, so the first step of sampling would not be trained; use --loss_weighting edm, or "
            "v_prediction with none"
        )
    if options.timestep_sampling == "edm_lognormal":
        raise UserError(
            "--rescale_betas_zero_snr: --timestep_sampling edm_lognormal never draws the last timestep, whose noise "
            "level is infinite; use uniform or logit_normal"
        )


def prediction_target(
    scheduler: NoiseScheduler, images: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """The training target (B, C, H, W) of the scheduler's prediction type: noise, image, or velocity.

    The velocity is sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) image (Salimans & Ho 2022, appendix D). The
    velocity of flow matching is noise - image (Liu et al. 2023, Eq. 1, whose time runs the other way).
    """
    prediction_type = prediction_type_of(scheduler)
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return images
    if prediction_type == "v_prediction":
        return scheduler.get_velocity(images, noise, timesteps)
    if prediction_type == "flow_prediction":
        return noise - images
    raise ValueError(f"unknown prediction_type {prediction_type}")


def denoising_errors(
    scheduler: NoiseScheduler,
    prediction: torch.Tensor,
    images: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    snr_gamma: float | None = None,
    loss_weighting: str | None = None,
) -> torch.Tensor:
    """Squared error of each `prediction` (B, C, H, W) against its target, mean over pixels, weighted: (B,) float32."""
    target = prediction_target(scheduler, images, noise, timesteps)
    errors = (prediction.float() - target).square().flatten(1).mean(1)
    return loss_weights(scheduler, timesteps, snr_gamma, loss_weighting) * errors


def loss_weights(
    scheduler: NoiseScheduler,
    timesteps: torch.Tensor,
    snr_gamma: float | None = None,
    loss_weighting: str | None = None,
) -> torch.Tensor:
    """Weights (B,) float32 of the squared error at `timesteps`.

    none: 1 for epsilon (Ho et al. 2020, Eq. 14) and for velocities. For sample it is the SNR, as in diffusers'
    example, which makes the loss equal to that of epsilon. The others weight the error of the image, for any
    prediction type:

    min_snr       min(SNR, gamma) (Hang et al. 2023, section 3.4)
    soft_min_snr  SNR gamma / (SNR + gamma) (Crowson et al. 2024, section 3.4), which is the sigmoid weight of Kingma &
                  Gao 2023 with a bias of ln gamma
    edm           (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 at the noise level sigma = 1 / sqrt(SNR)
                  (Karras et al. 2022, table 1)
    """
    prediction_type, weighting = prediction_type_of(scheduler), _weighting(loss_weighting, snr_gamma)
    if weighting == "none" and prediction_type != "sample":
        return torch.ones_like(timesteps, dtype=torch.float32)
    alpha2, sigma2 = (factor.square() for factor in alpha_sigma(scheduler, timesteps))
    gamma = DEFAULT_GAMMA if snr_gamma is None else snr_gamma
    # sigma^2 times the weight of the image's error: finite without noise (SNR infinite) and without image (SNR 0)
    if weighting == "none":
        image_weight = alpha2
    elif weighting == "min_snr":
        image_weight = torch.minimum(alpha2, gamma * sigma2)
    elif weighting == "soft_min_snr":
        image_weight = gamma * alpha2 * sigma2 / (alpha2 + gamma * sigma2)
    elif weighting == "edm":
        image_weight = alpha2 + sigma2 / SIGMA_DATA**2
    else:
        raise ValueError(f"unknown loss_weighting {weighting}")
    # image - image' = (sigma / alpha) (eps' - eps) = sigma (velocity' - velocity), of both kinds of velocity
    return image_weight / {"sample": sigma2, "epsilon": alpha2}.get(prediction_type, 1)


def _check_end(options: TrainingOptions) -> None:
    """Refuse a shift below 1 that leaves the image visible at the last timestep: sampling starts from pure noise."""
    scheduler = build_noise_scheduler(options)
    remaining = scheduler.alphas_cumprod[-1].sqrt().item()
    if remaining > MAX_IMAGE_AT_END:
        schedule = scheduler.config.beta_schedule
        raise UserError(
            f"--noise_shift {options.noise_shift}: the last timestep of {schedule} would still hold "
            f"{remaining:.0%} of the image, and sampling starts from pure noise; use a larger shift, or "
            "--ddpm_beta_schedule squaredcos_cap_v2"
        )


def _weighting(loss_weighting: str | None, snr_gamma: float | None) -> str:
    """The weighting that the two flags select: `--snr_gamma` alone is min_snr, as in diffusers' example."""
    return loss_weighting or ("none" if snr_gamma is None else "min_snr")
