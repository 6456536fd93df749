import pytest
import torch
from diffusers import DDPMScheduler

from trainkit.diffusion.noise_schedule import build_noise_scheduler, signal_to_noise, uniform_timesteps
from trainkit.diffusion.objective import denoising_errors, loss_weights, prediction_target
from trainkit.diffusion.unet import build_unet, check_resolution
from trainkit.errors import UserError
from trainkit.options.model import ModelOptions, ObjectiveOptions

IMAGES, NOISE = torch.rand(6, 3, 8, 8) * 2 - 1, torch.randn(6, 3, 8, 8)
TIMESTEPS = torch.tensor([0, 10, 100, 300, 700, 990])


def scheduler(prediction_type):
    return DDPMScheduler(prediction_type=prediction_type, beta_schedule="squaredcos_cap_v2")


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_the_exact_prediction_has_no_loss(prediction_type):
    target = prediction_target(scheduler(prediction_type), IMAGES, NOISE, TIMESTEPS)
    errors = denoising_errors(scheduler(prediction_type), target, IMAGES, NOISE, TIMESTEPS, snr_gamma=5.0)
    assert not errors.any()


@pytest.mark.parametrize("snr_gamma", [5.0, 1.0])
def test_min_snr_weighs_the_image_error_the_same_whatever_is_predicted(snr_gamma):
    """An image error costs the same as the equal error of the noise or the velocity (Hang et al. 2023)."""
    image_error = torch.randn(IMAGES.shape) * 0.1
    snr = signal_to_noise(scheduler("sample"), TIMESTEPS)[:, None, None, None]
    errors = {
        "sample": image_error,
        "epsilon": image_error * snr.sqrt(),
        "v_prediction": image_error * (snr + 1).sqrt(),
    }
    losses = []
    for prediction_type, error in errors.items():
        noise_scheduler = scheduler(prediction_type)
        prediction = prediction_target(noise_scheduler, IMAGES, NOISE, TIMESTEPS) + error
        errors = denoising_errors(noise_scheduler, prediction, IMAGES, NOISE, TIMESTEPS, snr_gamma)
        losses.append(errors.mean().item())
    expected = (snr.flatten().clamp(max=snr_gamma) * image_error.square().flatten(1).mean(1)).mean().item()
    assert losses == pytest.approx([expected] * 3, rel=1e-4)


def test_weights_without_gamma_are_the_examples():
    snr = signal_to_noise(scheduler("sample"), TIMESTEPS)
    assert torch.equal(loss_weights(scheduler("epsilon"), TIMESTEPS, None), torch.ones(6))
    assert torch.allclose(loss_weights(scheduler("sample"), TIMESTEPS, None), snr)


def test_timesteps_cover_the_schedule():
    assert uniform_timesteps(torch.tensor([0.0, 0.4999, 0.5, 1 - 1e-16]), 1000).tolist() == [0, 499, 500, 999]


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
def test_every_beta_schedule_builds(beta_schedule):
    options = ObjectiveOptions(ddpm_num_steps=100, ddpm_beta_schedule=beta_schedule)
    alphas = build_noise_scheduler(options).alphas_cumprod
    assert len(alphas) == 100 and (alphas.diff() < 0).all()


def test_resolution_the_unet_cannot_halve():
    with pytest.raises(
        UserError, match=r"--resolution 50 must be divisible by 8 \(the UNet halves it 3 times\): use 48"
    ):
        check_resolution(50, 50, 3)
    check_resolution(48, 64, 4)


def test_example_unet_has_the_examples_size():
    options = ModelOptions()
    with torch.device("meta"):
        unet = build_unet(options, 64, 64, 3)
    assert round(sum(p.numel() for p in unet.parameters()) / 1e6, 1) == 113.7
