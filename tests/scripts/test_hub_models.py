"""Models of every kind, pushed by push.py and loaded by somebody who has diffusers alone."""

import sys

import pytest
import torch
from conditional_helpers import class_unet, text_parts, vector_unet
from conftest import TINY_UNET
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from hub_helpers import SECRET, run_elsewhere

import push
from trainkit.diffusion import few_step
from trainkit.distillation.stages import student_pipeline
from trainkit.sampling.pipeline import conditional_pipeline, save_pipeline

ELSEWHERE = """
from diffusers import DiffusionPipeline

asked = {
    "unconditional": ({"batch_size": 2}, {}),
    "class": ({"class_labels": ["dog", 0]}, {"trust_remote_code": True}),
    "vector": ({"vectors": [[1.0, 2, 3]] * 2}, {"trust_remote_code": True}),
    "text": ({"prompt": ["a red square", None]}, {"trust_remote_code": True}),
    "student": ({"batch_size": 2}, {}),
}
for name, (inputs, settings) in asked.items():
    pipeline = DiffusionPipeline.from_pretrained(f"me/{name}", **settings)
    images = pipeline(**inputs, num_inference_steps=2, output_type="np").images
    print(name, images.shape)
"""


def pipelines(folder):
    """A tiny model of each kind."""
    schedule = DDPMScheduler()
    unet = UNet2DModel(**{key: value for key, value in TINY_UNET.items() if key[0] != "_"}, sample_size=16).eval()
    alphas_cumprod = few_step.student_schedule(schedule)
    student = few_step.progressive_scheduler(alphas_cumprod, 2, "v_prediction")
    timesteps = few_step.step_timesteps(len(alphas_cumprod), 2)
    text_unet, parts = text_parts(folder)
    return {
        "unconditional": DDPMPipeline(unet, schedule),
        "class": conditional_pipeline(class_unet(), schedule, id2label={0: "cat", 1: "dog", 2: "7"}),
        "vector": conditional_pipeline(vector_unet(), schedule),
        "text": conditional_pipeline(text_unet, schedule, **parts, prompt_length=8),
        "student": student_pipeline(DDPMPipeline(unet, schedule), unet, student, timesteps),
    }


@pytest.mark.slow
def test_every_kind_of_model_loads_from_the_hub_elsewhere(as_client, tmp_path, monkeypatch):
    torch.manual_seed(0)
    built = pipelines(tmp_path)
    for name, pipeline in built.items():
        save_pipeline(tmp_path / name, pipeline, f"---\nlibrary_name: diffusers\n---\n# {name}\n")
        monkeypatch.setattr(sys, "argv", ["push.py", str(tmp_path / name), "--hub_token", SECRET])
        push.main()
    assert {f"me/{name}" for name in built} == as_client.repositories.keys()
    done = run_elsewhere(ELSEWHERE, tmp_path, as_client)
    assert done.stdout.splitlines() == [f"{name} (2, 16, 16, 3)" for name in built]
