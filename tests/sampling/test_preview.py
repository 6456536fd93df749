"""Previews: the denoised image of a step, and a last one that is the image itself."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from sampling_helpers import tiny_model

from pipelines.unconditional import UnconditionalPipeline
from trainkit.sampling.generate import evaluation_mode, generate, noise_shape, to_uint8
from trainkit.sampling.noise import draw
from trainkit.sampling.preview import denoised, preview_batch
from trainkit.sampling.schedulers import scheduler_bundle

STEPS = 6
BUNDLES = {
    kind: scheduler_bundle(DDPMScheduler(prediction_type=kind)) for kind in ("epsilon", "v_prediction", "sample")
}
BUNDLES["flow"] = scheduler_bundle(FlowMatchEulerDiscreteScheduler(shift=3.0))


@pytest.mark.parametrize("kind, name", [(kind, name) for kind, bundle in BUNDLES.items() for name in bundle])
def test_a_right_prediction_implies_the_image(kind, name):
    scheduler = BUNDLES[kind][name]
    scheduler.set_timesteps(STEPS)
    image, noise = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for call, timestep in enumerate(scheduler.timesteps):
        if kind == "flow":
            time = float(scheduler.sigmas[call])
            sample, prediction = (1 - time) * image + time * noise, noise - image
        else:
            table = scheduler.alphas_cumprod.double().numpy()
            alpha_bar = np.interp(float(timestep), np.arange(len(table)), table)
            alpha, sigma = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
            sample = alpha * image + sigma * noise
            prediction = {"epsilon": noise, "v_prediction": alpha * noise - sigma * image, "sample": image}[kind]
        found = denoised(scheduler, call, timestep, sample, prediction)
        assert torch.allclose(found, image, atol=2e-3), (call, float(timestep))


@pytest.mark.parametrize("num_previews", [1, 3, 50])
@pytest.mark.parametrize("name", ["sde_dpmsolver", "heun"])
def test_the_last_preview_is_the_image_and_others_come_before(name, num_previews):
    pipeline = UnconditionalPipeline(tiny_model(), BUNDLES["epsilon"][name])
    expected = next(generate(pipeline, [3, 4], STEPS, 2))
    noise = draw([([0, 1], [3, 4])], noise_shape(pipeline), pipeline.scheduler, STEPS)
    with evaluation_mode(pipeline):
        shown = list(preview_batch(pipeline, next(noise), noise, STEPS, num_previews))
    calls, images = [call for call, _ in shown], [to_uint8(image).numpy() for _, image in shown]
    total = len(pipeline.scheduler.timesteps)
    assert np.array_equal(images[-1], expected) and calls[-1] == total and calls == sorted(set(calls))
    assert len(calls) - 1 == total - 1 if num_previews == 50 else 1 <= len(calls) - 1 <= num_previews
    assert not np.array_equal(images[0], expected)
