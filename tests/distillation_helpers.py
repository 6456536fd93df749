"""Tiny runs of distill.py in the process of a test."""

from training_helpers import run_in_process, tiny_run

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
