"""Tiny runs of distill.py in the process of a test."""

import torch
from conditional_helpers import image_pipeline
from diffusers import DDPMScheduler, DiffusionPipeline
from training_helpers import run_in_process, tiny_run

from trainkit.sampling.pipeline import conditional_pipeline, save_pipeline

NAMES = {0: "square", 1: "round"}

FLAGS = {
    "model_config_name_or_path": None, "max_train_steps": 18, "first_steps": 4, "num_steps": 1, "random_flip": None,
    "lr_warmup_steps": 1, "checkpointing_steps": 2, "ddpm_num_inference_steps": None, "save_model_epochs": 0,
    "save_images_epochs": 0,
}  # fmt: skip


def run_distill(monkeypatch, teacher, images, cache_dir, output_dir, **flags):
    """Run distill.py with flags over those of a tiny run; returns the output folder."""
    flags = FLAGS | {"teacher_model_name_or_path": teacher} | flags
    run_in_process(monkeypatch, "distill", tiny_run(images, None, cache_dir, output_dir, **flags))
    return output_dir


def save_image_teacher(folder, kind, *settings, names=None, **changes):
    """A teacher that takes another image of this `kind`, and classes with `num_class_embeds`; returns its folder."""
    made = image_pipeline(kind, *settings, **changes)
    names = names or (NAMES if "num_class_embeds" in changes else None)
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    save_pipeline(folder, conditional_pipeline(made.unet, scheduler, image_input=made.image_input, id2label=names), "")
    return folder


def load_student(folder):
    """The student as anybody loads it, with diffusers."""
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def images_of(pipeline, count, **conditions):
    """Images (count, H, W, C) in [0, 1] of these conditions, all from the same noise, in the default steps."""
    generators = [torch.Generator().manual_seed(0) for _ in range(count)]
    return pipeline(**conditions, generator=generators, output_type="np").images
