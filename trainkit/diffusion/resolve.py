"""Objective and noise schedule where the options leave them to the pretrained model or to the defaults."""

from dataclasses import replace
from typing import TypeVar

import torch
from diffusers import DDPMScheduler

from trainkit.diffusion.noise_schedule import (
    BETA_SCHEDULES,
    DEFAULT_BETA_SCHEDULE,
    DEFAULT_PREDICTION_TYPE,
    PRETRAINED_SCHEDULE,
    NoiseScheduler,
    build_noise_scheduler,
    is_flow,
    prediction_type_of,
    saved_noise_scheduler,
)
from trainkit.diffusion.pretrained import FLAG
from trainkit.diffusion.unet import find_unet
from trainkit.errors import UserError
from trainkit.options.script import TrainingOptions

T = TypeVar("T", bound=TrainingOptions)


def resolve_objective(options: T) -> T:
    """Fill in prediction type, loss weighting and noise schedule where they were not given; `options` is unchanged.

    They follow `--pretrained_model_name_or_path`, if any. Otherwise the image is predicted over the default schedule.

    Raises:
        UserError: the pretrained pipeline cannot be read, or was trained for something else than the options ask for.
    """
    name = options.pretrained_model_name_or_path
    if name is not None:
        if find_unet(name, FLAG)[0].get("time_embedding_type") == "learned":
            raise UserError(f"{FLAG} {name} is a few-step student with timesteps of its own: start from its teacher")
        saved = saved_noise_scheduler(name)
        if saved is None:
            _check_objective_is_given(options)
        else:
            options = _follow_pretrained(options, name, saved)
    elif options.ddpm_beta_schedule == PRETRAINED_SCHEDULE:
        raise UserError(f"--ddpm_beta_schedule {PRETRAINED_SCHEDULE} needs {FLAG}, whose noise schedule it keeps")
    options = _with_prediction_type(options, DEFAULT_PREDICTION_TYPE)
    if options.ddpm_beta_schedule is None and options.prediction_type != "flow_prediction":
        options = replace(options, ddpm_beta_schedule=DEFAULT_BETA_SCHEDULE)
    return options


def _with_prediction_type(options: T, prediction_type: str, zero_snr: bool = False) -> T:
    """Predict `prediction_type` unless the options name one; choose the weighting that suits the image.

    soft_min_snr scored best (benchmarks/results.md). Over a schedule that ends in pure noise (`zero_snr`) its weight
    at the end is 0, so edm is used there.
    """
    if options.prediction_type is not None:
        return options
    weighting = options.loss_weighting
    if prediction_type == "sample" and weighting is None and options.snr_gamma is None:
        weighting = "edm" if zero_snr or options.rescale_betas_zero_snr else "soft_min_snr"
    return replace(options, prediction_type=prediction_type, loss_weighting=weighting)


def _follow_pretrained(options: T, name: str, saved: NoiseScheduler) -> T:
    """Continue with the objective and noise schedule of the pipeline `name`, which was trained over `saved`."""
    trained_for = prediction_type_of(saved)
    zero_snr = not is_flow(saved) and saved.alphas_cumprod[-1].item() == 0
    options = _with_prediction_type(options, trained_for, zero_snr)
    if trained_for != options.prediction_type:
        raise UserError(
            f"--prediction_type {options.prediction_type}, but {FLAG} {name} was trained for {trained_for}: give "
            f"--prediction_type {trained_for}"
        )
    num_steps = saved.config.num_train_timesteps
    if is_flow(saved):
        shift = saved.config.shift if options.noise_shift == 1 else options.noise_shift
        return replace(options, ddpm_num_steps=num_steps, noise_shift=shift)
    if options.ddpm_beta_schedule is None:
        options = replace(options, ddpm_num_steps=num_steps)
        return replace(options, ddpm_beta_schedule=_continued_schedule(options, saved))
    return options


def _check_objective_is_given(options: TrainingOptions) -> None:
    """Raise `UserError` unless the options say what a pipeline without a scheduler was trained for."""
    is_given = {
        "--prediction_type": options.prediction_type is not None,
        "--ddpm_beta_schedule": options.ddpm_beta_schedule not in (None, PRETRAINED_SCHEDULE)
        or options.prediction_type == "flow_prediction",
    }
    if missing := [flag for flag, given in is_given.items() if not given]:
        raise UserError(
            f"{FLAG} {options.pretrained_model_name_or_path} has no scheduler that says what it was trained for: "
            f"give {' and '.join(missing)}"
        )


def _continued_schedule(options: TrainingOptions, saved: DDPMScheduler) -> str:
    """The `--ddpm_beta_schedule` that continues `saved` once the other flags have changed it.

    This is the name of `saved`, if it is that schedule, unchanged or changed by these same flags.

    Raises:
        UserError: the flags would change the schedule a second time.
    """
    named = saved.config.beta_schedule
    if named in BETA_SCHEDULES:
        plain = DDPMScheduler(saved.config.num_train_timesteps, beta_schedule=named)
        changed = build_noise_scheduler(replace(options, ddpm_beta_schedule=named))
        if any(torch.allclose(same.betas, saved.betas, atol=1e-7) for same in (plain, changed)):
            return named
    changes = {"--noise_shift": options.noise_shift != 1, "--rescale_betas_zero_snr": options.rescale_betas_zero_snr}
    for flag, given in changes.items():
        if given:
            raise UserError(
                f"{flag}: {FLAG} {options.pretrained_model_name_or_path} was trained over a noise schedule that was "
                f"moved already; leave {flag} out to keep it, or give --ddpm_beta_schedule for another"
            )
    return PRETRAINED_SCHEDULE
