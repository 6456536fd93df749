"""The solver loop, with noise drawn ahead in a thread, gives the images of the pipelines' own loops, bit for bit."""

import numpy as np
import pytest
import torch
from conditional_helpers import class_unet
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler
from sampling_helpers import tiny_model

from trainkit.sampling.background import Ahead
from trainkit.sampling.catalogue import CATALOGUE, FLOW_SCHEDULER_NAMES, SCHEDULER_NAMES
from trainkit.sampling.generate import evaluation_mode, generate, noise_shape, sample_batch
from trainkit.sampling.noise import draw
from trainkit.sampling.pipeline import conditional_pipeline
from trainkit.sampling.schedulers import scheduler_bundle

SEEDS, STEPS = [3, 4, 7], 5


def generators():
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


def by_own_loop(pipeline, conditions=None, **guidance):
    """The images, and the generators as the loop leaves them."""
    parts = iter([(range(len(SEEDS)), SEEDS)])
    with evaluation_mode(pipeline), Ahead(draw(parts, noise_shape(pipeline), pipeline.scheduler, STEPS)) as noise:
        batch = next(noise)
        images = sample_batch(pipeline, batch, noise, STEPS, conditions, **guidance)
    return images, batch.generators


def schedulers():
    bundle = scheduler_bundle(DDPMScheduler())
    flow = scheduler_bundle(FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert set(bundle) == set(SCHEDULER_NAMES) and set(flow) == set(FLOW_SCHEDULER_NAMES)
    found = {name: bundle[name] for name in bundle if CATALOGUE[name].in_stock_pipeline}
    found |= {f"flow {name}": flow[name] for name in flow if CATALOGUE[name].in_stock_pipeline}
    return found | {"lcm": LCMScheduler(), "plain ddim": DDIMScheduler(clip_sample=False)}


@pytest.mark.parametrize("name", schedulers())
def test_the_images_and_the_generators_are_those_of_the_stock_pipeline(name):
    pipeline, expected = DDPMPipeline(tiny_model(), schedulers()[name]), generators()
    pipeline.set_progress_bar_config(disable=True)
    call = {"batch_size": len(SEEDS), "num_inference_steps": STEPS, "output_type": "pt"}
    stock = pipeline(generator=expected, **call).images
    images, left = by_own_loop(pipeline)
    assert torch.equal(images, stock) and images.std() > 0.05
    assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(expected, left, strict=True))


@pytest.mark.parametrize("name", ["sde_dpmsolver", "ddpm"])
def test_the_images_are_those_of_the_conditional_pipeline(name):
    noise_schedule = DDPMScheduler()
    pipeline = conditional_pipeline(class_unet(), scheduler_bundle(noise_schedule)[name])
    pipeline.set_progress_bar_config(disable=True)
    guidance = {"guidance_scale": 3.0, "guidance_interval": (0.1, 5.0), "guidance_rescale": 0.5}
    call = {"num_inference_steps": STEPS, "output_type": "pt"} | guidance
    own = pipeline(class_labels=[0, None, 2], generator=generators(), **call).images
    images, _ = by_own_loop(pipeline, [0, None, 2], **guidance)
    assert torch.equal(images, own)


def test_weights_in_training_mode_come_back_as_they_were():
    unet = tiny_model().train()
    images = next(generate(DDPMPipeline(unet, scheduler_bundle(DDPMScheduler())["dpmsolver"]), [0], STEPS, 1))
    assert unet.training and images.shape == (1, 16, 16, 3) and images.dtype == np.uint8
