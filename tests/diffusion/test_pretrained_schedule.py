"""Fine-tuning keeps the noise schedule of the pretrained pipeline."""

import shutil

import pytest
import torch
from conftest import TINY_UNET
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel

from trainkit.diffusion.noise_schedule import (
    alpha_sigma,
    build_noise_scheduler,
    prediction_type_of,
    saved_noise_scheduler,
)
from trainkit.diffusion.resolve import resolve_objective
from trainkit.errors import UserError
from trainkit.options.script import TrainingOptions
from trainkit.sampling.pipeline import save_pipeline
from trainkit.training.start import check_options, resolve_options

SCHEDULE_FLAGS = [
    {},
    {"ddpm_beta_schedule": "linear", "prediction_type": "epsilon"},
    {"ddpm_beta_schedule": "sigmoid", "prediction_type": "sample"},
    {"noise_shift": 2.0},
    {"rescale_betas_zero_snr": True, "ddpm_beta_schedule": "scaled_linear"},
    {"ddpm_num_steps": 400},
    {"prediction_type": "flow_prediction", "noise_shift": 3.0},
]


def make_unet():
    return UNet2DModel(**{key: value for key, value in TINY_UNET.items() if not key.startswith("_")}, sample_size=8)


def schedule_options(name, **flags):
    options = TrainingOptions(pretrained_model_name_or_path=name and str(name))
    for flag, value in flags.items():
        setattr(options, flag, value)
    return resolve_objective(options)


def objective_of(name, **flags):
    """Prediction and weight that a script's options come down to."""
    options = resolve_options(
        TrainingOptions(
            pretrained_model_name_or_path=name and str(name), logger="none", overwrite_output_dir=True, **flags
        )
    )
    check_options(options)
    return options.prediction_type, options.loss_weighting


def test_what_is_predicted_is_that_of_the_pipeline_else_the_image_with_the_weight_that_suits_it(tmp_path):
    assert objective_of(None) == ("sample", "soft_min_snr")
    assert objective_of(None, rescale_betas_zero_snr=True) == ("sample", "edm")
    assert objective_of(None, prediction_type="sample") == ("sample", None)  # as diffusers' example weighs it
    assert objective_of(None, snr_gamma=5.0) == ("sample", None)  # which is min_snr
    assert objective_of(None, loss_weighting="none") == ("sample", "none")
    assert objective_of(None, prediction_type="epsilon") == ("epsilon", None)
    for number, prediction in enumerate(("epsilon", "sample", "v_prediction")):
        folder = tmp_path / str(number)
        DDPMPipeline(make_unet(), DDPMScheduler(prediction_type=prediction)).save_pretrained(folder)
        assert objective_of(folder) == (prediction, "soft_min_snr" if prediction == "sample" else None)
    options = TrainingOptions(rescale_betas_zero_snr=True)
    save_pipeline(tmp_path / "zero", DDPMPipeline(make_unet(), build_noise_scheduler(options)), "")
    assert objective_of(tmp_path / "zero") == ("sample", "edm")


@pytest.mark.parametrize("flags", SCHEDULE_FLAGS, ids=str)
def test_a_pipeline_of_ours_is_trained_on_over_its_own_noise_schedule(flags, tmp_path):
    """Without a flag, by name, and with the flags that it was trained with."""
    trained_over = build_noise_scheduler(schedule_options(None, **flags))
    save_pipeline(tmp_path, DDPMPipeline(make_unet(), trained_over), "")
    for again in ({}, flags):
        options = schedule_options(tmp_path, **again)
        goes_on = build_noise_scheduler(options)
        save_pipeline(tmp_path / "next", DDPMPipeline(make_unet(), goes_on), "")
        timesteps = torch.arange(options.ddpm_num_steps)
        for scheduler in (goes_on, saved_noise_scheduler(str(tmp_path / "next"))):
            assert type(scheduler) is type(trained_over)
            assert prediction_type_of(scheduler) == options.prediction_type
            assert scheduler.config.num_train_timesteps == trained_over.config.num_train_timesteps == len(timesteps)
            assert scheduler.config.get("shift") == trained_over.config.get("shift")
            for level, wanted in zip(
                *(alpha_sigma(each, timesteps) for each in (scheduler, trained_over)), strict=True
            ):
                torch.testing.assert_close(level, wanted, atol=1e-6, rtol=0)


def test_a_noise_schedule_is_not_moved_twice(tmp_path):
    save_pipeline(
        tmp_path, DDPMPipeline(make_unet(), build_noise_scheduler(schedule_options(None, noise_shift=2.0))), ""
    )
    with pytest.raises(UserError, match="--noise_shift: .* was moved already; leave --noise_shift out"):
        schedule_options(tmp_path, noise_shift=4.0)
    options = schedule_options(tmp_path, noise_shift=4.0, ddpm_beta_schedule="squaredcos_cap_v2")
    wanted = build_noise_scheduler(schedule_options(None, noise_shift=4.0))
    assert torch.equal(build_noise_scheduler(options).betas, wanted.betas)


def test_a_pipeline_of_diffusers_is_trained_on_over_its_own_noise_schedule(tmp_path):
    """Under scheduler/, at the root as in the first pipelines, with given betas; a solver's betas too."""
    betas = torch.linspace(1e-3, 3e-2, 500).tolist()
    for number, scheduler in enumerate(
        (
            DDPMScheduler(beta_schedule="scaled_linear"),
            DDPMScheduler(trained_betas=betas, num_train_timesteps=500),
            DDIMScheduler(beta_start=0.002, beta_schedule="linear"),
        )
    ):
        folder = tmp_path / str(number)
        DDPMPipeline(make_unet(), DDPMScheduler()).save_pretrained(folder)
        shutil.rmtree(folder / "scheduler")
        scheduler.save_pretrained(folder if number == 1 else folder / "scheduler")
        options = schedule_options(folder, prediction_type="epsilon")
        assert options.ddpm_beta_schedule == ("scaled_linear" if number == 0 else "pretrained")
        assert torch.equal(build_noise_scheduler(options).betas, scheduler.betas)
        assert (
            schedule_options(folder, prediction_type="epsilon", ddpm_beta_schedule="linear").ddpm_beta_schedule
            == "linear"
        )
    shutil.rmtree(tmp_path / "0" / "scheduler")
    with pytest.raises(UserError, match="has no scheduler that says what it was trained for: give --ddpm_beta_sch"):
        schedule_options(tmp_path / "0", prediction_type="epsilon")
    with pytest.raises(UserError, match="give --prediction_type and --ddpm_beta_schedule"):
        schedule_options(tmp_path / "0")
    with pytest.raises(UserError, match="--ddpm_beta_schedule pretrained needs --pretrained_model_name_or_path"):
        schedule_options(None, ddpm_beta_schedule="pretrained")
    with pytest.raises(UserError, match="give --prediction_type epsilon"):
        schedule_options(tmp_path / "1", prediction_type="sample")
    with pytest.raises(UserError, match="--pretrained_model_name_or_path /nowhere: no config.json to read"):
        schedule_options("/nowhere")
    (tmp_path / "2" / "scheduler" / "scheduler_config.json").write_text('{"beta_schedule": "of tomorrow"}')
    with pytest.raises(UserError, match="has no scheduler that says"):
        schedule_options(tmp_path / "2", prediction_type="epsilon")


def test_a_schedule_that_is_not_there_is_refused_before_it_is_moved(tmp_path):
    flags = {"noise_shift": 0.5, "ddpm_beta_schedule": "pretrained", "logger": "none", "output_dir": str(tmp_path)}
    with pytest.raises(UserError, match="--ddpm_beta_schedule pretrained needs --pretrained_model_name_or_path"):
        resolve_options(TrainingOptions(**flags))
