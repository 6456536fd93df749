"""Every shipped scheduler samples two distributions whose exact denoiser is known, in stock DDPMPipeline if it can."""

from functools import cache

import numpy as np
import pytest
import torch
from conftest import slow_after
from diffusers import DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from exact_denoiser import ExactUNet, PixelMixture

from pipelines.unconditional import UnconditionalPipeline
from trainkit.diffusion.noise_schedule import build_noise_scheduler, is_flow
from trainkit.errors import UserError
from trainkit.options.model import ObjectiveOptions
from trainkit.sampling.catalogue import CATALOGUE, DEFAULT_SCHEDULER, FLOW_SCHEDULER_NAMES, SCHEDULER_NAMES
from trainkit.sampling.schedulers import check_steps, load_scheduler, save_bundle, scheduler_bundle

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
STEPS = dict.fromkeys(CATALOGUE, 20) | {"ddim": 50, "euler": 50, "flow_euler": 50, "ddpm": 250}
MODEL_ERROR = 0.02  # root mean square: dividing by sqrt(alpha_bar) must not turn it into noise

# Dark, middle and bright pixels.
PIXELS = PixelMixture.of([0.4, 0.35, 0.25], [-1.0, -0.2, 0.9], [0.004, 0.2, 0.04])
# Images near one of four prototypes of different brightness: which one is decided at high noise.
IMAGE_SHAPE, IMAGE_WEIGHTS, IMAGE_DEVIATION = (3, 4, 4), torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64), 0.1
_brightness = torch.tensor([-0.7, 0.6, 0.0, 0.15], dtype=torch.float64)[:, None]
_texture = 0.25 * torch.randn(4, 48, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
PROTOTYPES = (_brightness + _texture).clamp(-1, 1)


def best_images(noisy, alpha, sigma):
    """E[x_0 | x_t] for images."""
    variance = (alpha * IMAGE_DEVIATION) ** 2 + sigma**2
    distance = noisy.flatten(1)[:, None] - alpha * PROTOTYPES
    posterior = torch.softmax(IMAGE_WEIGHTS.log() - (distance**2).sum(-1) / (2 * variance), dim=-1)
    means = PROTOTYPES + alpha * IMAGE_DEVIATION**2 / variance * distance
    return (posterior[..., None] * means).sum(1).reshape(noisy.shape)


def flawed(noise_scheduler, best, shape):
    return ExactUNet(noise_scheduler, best, shape, MODEL_ERROR)


def draw(unet, scheduler, count, steps, name=DEFAULT_SCHEDULER):
    pipeline_class = DDPMPipeline if CATALOGUE[name].in_stock_pipeline else UnconditionalPipeline
    pipeline = pipeline_class(unet=unet, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(count, torch.Generator().manual_seed(0), steps, output_type="pt").images
    return images.double() * 2 - 1


@cache
def true_pixels(count):
    """`count` quantiles of the true distribution of a pixel, in ascending order."""
    rng = np.random.default_rng(1)
    mode = rng.choice(3, 200_000, p=PIXELS.weights.numpy())
    true = PIXELS.means.numpy()[mode] + PIXELS.deviations.numpy()[mode] * rng.standard_normal(len(mode))
    return np.quantile(true.clip(-1, 1), (np.arange(count) + 0.5) / count)


def distance_of_pixels(samples):
    """Wasserstein-1 distance to the true distribution of a pixel."""
    return np.abs(np.sort(samples.flatten().numpy()) - true_pixels(samples.numel())).mean()


def modes_of_images(samples):
    """Total variation distance of the prototypes' shares to the true ones, and the deviation around a prototype."""
    flat = samples.flatten(1)
    nearest = torch.cdist(flat, PROTOTYPES).argmin(1)
    shares = torch.bincount(nearest, minlength=4) / len(flat)
    return (shares - IMAGE_WEIGHTS).abs().sum().item() / 2, (flat - PROTOTYPES[nearest]).std().item()


@pytest.fixture(scope="module")
def saved_bundles(tmp_path_factory):
    """Bundles as a user gets them: written to disk and read again."""

    def bundle(schedule, prediction):
        noise_scheduler = DDPMScheduler(beta_schedule=schedule, prediction_type=prediction)
        folder = tmp_path_factory.mktemp("bundle")
        save_bundle(folder, scheduler_bundle(noise_scheduler))
        return noise_scheduler, {name: load_scheduler(folder, name) for name in SCHEDULER_NAMES}

    return {
        (schedule, prediction): bundle(schedule, prediction) for schedule in SCHEDULES for prediction in PREDICTIONS
    }


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("name", SCHEDULER_NAMES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_samples_follow_the_data(saved_bundles, schedule, prediction, name):
    noise_scheduler, bundle = saved_bundles[schedule, prediction]
    pixels = draw(flawed(noise_scheduler, PIXELS.best, (1, 8, 8)), bundle[name], 64, STEPS[name], name)
    images = draw(flawed(noise_scheduler, best_images, IMAGE_SHAPE), bundle[name], 400, STEPS[name], name)
    shares_off, deviation = modes_of_images(images)
    # measured over all combinations: pixels 0.010 to 0.035, shares 0.015 to 0.053, deviation 0.058 to 0.116
    assert distance_of_pixels(pixels) < 0.05
    assert shares_off < 0.1
    assert 0.05 < deviation < 0.13
    if name in (DEFAULT_SCHEDULER, "dpmsolver"):
        assert 0.085 < deviation < 0.125  # neither smoothed nor noisy


# Of what `--help` offers beyond the above: schedules that were moved, and flow matching.
MOVED = [
    {"prediction_type": prediction, "ddpm_beta_schedule": schedule, **moved}
    for schedule, prediction, moved in (
        ("linear", "sample", {"rescale_betas_zero_snr": True, "noise_shift": 2.0}),
        ("scaled_linear", "v_prediction", {"rescale_betas_zero_snr": True}),
        ("squaredcos_cap_v2", "epsilon", {"noise_shift": 0.5}),
        ("sigmoid", "v_prediction", {"noise_shift": 4.0}),
    )
]
FLOWS = [{"prediction_type": "flow_prediction", "noise_shift": shift} for shift in (1.0, 4.0)]


@pytest.mark.parametrize(
    "settings", slow_after(3, FLOWS + MOVED), ids=lambda settings: "-".join(map(str, settings.values()))
)
def test_moved_schedules_and_flow_matching_are_sampled_too(settings, tmp_path):
    """Saved, and read again by diffusers' classes alone."""
    noise_scheduler = build_noise_scheduler(ObjectiveOptions(**settings))
    bundle = scheduler_bundle(noise_scheduler)
    save_bundle(tmp_path, bundle)
    assert tuple(bundle) == (FLOW_SCHEDULER_NAMES if is_flow(noise_scheduler) else SCHEDULER_NAMES)
    for name in bundle:
        if name == "ddpm":  # 250 steps; test_unusual_noise_schedules_run has it
            continue
        stock = type(bundle[name]).from_pretrained(tmp_path, subfolder=f"schedulers/{name}")
        pixels = draw(flawed(noise_scheduler, PIXELS.best, (1, 8, 8)), stock, 32, STEPS[name], name)
        images = draw(flawed(noise_scheduler, best_images, IMAGE_SHAPE), stock, 250, STEPS[name], name)
        shares_off, deviation = modes_of_images(images)
        # measured: pixels 0.013 to 0.049, shares 0.008 to 0.096, deviation 0.064 to 0.111; ddim, of first order, takes
        # long strides at low noise where the shift is 4: 0.040 and more
        assert distance_of_pixels(pixels) < 0.06, name
        assert shares_off < 0.12, name
        assert (0.035 if name == "ddim" else 0.055) < deviation < 0.13, name


def test_flow_runs_at_any_number_of_steps():
    noise_scheduler = build_noise_scheduler(ObjectiveOptions(prediction_type="flow_prediction"))
    for name, scheduler in scheduler_bundle(noise_scheduler).items():
        for steps in (1, 2, 7, 61):
            check_steps(scheduler, steps)
            samples = draw(flawed(noise_scheduler, PIXELS.best, (1, 2, 2)), scheduler, 2, steps, name)
            assert samples.isfinite().all(), (name, steps)


@pytest.mark.slow
def test_ddim_does_not_drift_over_many_steps(saved_bundles):
    noise_scheduler, bundle = saved_bundles["linear", "epsilon"]
    assert distance_of_pixels(draw(flawed(noise_scheduler, PIXELS.best, (1, 8, 8)), bundle["ddim"], 64, 1000)) < 0.05


@pytest.mark.slow(4)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_runs_at_any_number_of_steps(saved_bundles, schedule):
    noise_scheduler, bundle = saved_bundles[schedule, "epsilon"]
    unet = flawed(noise_scheduler, PIXELS.best, (1, 2, 2))
    # 1000 is the default of DDPMPipeline; on cosine betas, whose last noise levels are the hardest to tell apart
    most = 1000 if schedule == "squaredcos_cap_v2" else 100
    for name, scheduler in bundle.items():
        for steps in (1, 2, 3, 7, 61, most):
            if name == "ddim" and steps in (7, 61):
                continue
            check_steps(scheduler, steps)
            assert draw(unet, scheduler, 2, steps, name).isfinite().all(), (name, steps)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"num_train_timesteps": 100}, {"rescale_betas_zero_snr": True}])
def test_unusual_noise_schedules_run(settings):
    noise_scheduler = DDPMScheduler(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2", **settings)
    for name, scheduler in scheduler_bundle(noise_scheduler).items():
        samples = draw(flawed(noise_scheduler, PIXELS.best, (1, 8, 8)), scheduler, 32, 50, name)
        assert distance_of_pixels(samples) < 0.1, name


def test_bad_numbers_of_steps_are_refused_with_a_good_one():
    bundle = scheduler_bundle(DDPMScheduler())
    for steps, instead in ((61, 50), (600, 500)):  # a timestep of -1; a stride of 1 where 1.67 is meant
        with pytest.raises(UserError, match=f"--num_inference_steps {steps}.*use {instead}"):
            check_steps(bundle["ddim"], steps)
        check_steps(bundle["ddpm"], steps)
    for steps in (0, 1001):
        with pytest.raises(UserError, match="must be 1 to 1000"):
            check_steps(bundle[DEFAULT_SCHEDULER], steps)


def test_a_scheduler_that_does_not_exist_is_named_with_those_that_do(tmp_path):
    save_bundle(tmp_path, scheduler_bundle(DDPMScheduler()))
    with pytest.raises(UserError, match="--scheduler plms must be one of ddim, ddpm, dpmsolver"):
        load_scheduler(tmp_path, "plms")


def test_a_scheduler_that_an_earlier_version_did_not_ship_fits_the_training_schedule(tmp_path):
    noise_scheduler = build_noise_scheduler(ObjectiveOptions(ddpm_beta_schedule="linear", noise_shift=2.0))
    bundle = scheduler_bundle(noise_scheduler)
    save_bundle(tmp_path, {name: bundle[name] for name in ("sde_dpmsolver", "ddpm")})
    assert dict(load_scheduler(tmp_path, "unipc").config) == dict(bundle["unipc"].config)


def test_a_pipeline_of_other_origin_gets_a_bundle(tmp_path):
    DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample").save_pretrained(tmp_path / "scheduler")
    for name in SCHEDULER_NAMES:
        assert load_scheduler(tmp_path, name).config.prediction_type == "sample"
    assert load_scheduler(tmp_path).config.use_karras_sigmas


def test_a_pipeline_of_flow_matching_gets_its_bundle(tmp_path):
    stock = FlowMatchEulerDiscreteScheduler(shift=4.0)
    stock.save_pretrained(tmp_path / "scheduler")
    for name in FLOW_SCHEDULER_NAMES:
        assert load_scheduler(tmp_path, name).config.num_train_timesteps == 1000
    assert load_scheduler(tmp_path).config.prediction_type == "flow_prediction"
    with pytest.raises(UserError, match="--scheduler ddim must be one of dpmsolver, dpmsolver_3m, flow_euler"):
        load_scheduler(tmp_path, "ddim")


@pytest.mark.parametrize("name", ["sde_dpmsolver", "dpmsolver", "dpmsolver_3m", "unipc", "sasolver"])
@pytest.mark.parametrize("clips", [True, False], ids=["pixels", "latents"])
def test_solvers_clip_predicted_pixels_and_no_latents(name, clips):
    scheduler = scheduler_bundle(DDPMScheduler(prediction_type="sample", clip_sample=clips))[name]
    scheduler.set_timesteps(5)
    sample, outside = torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), 3.0)
    predicted = scheduler.convert_model_output(outside, sample=sample)
    assert torch.equal(predicted, outside.clamp(-1, 1) if clips else outside)
