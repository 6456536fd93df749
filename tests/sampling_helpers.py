"""Runs of sample.py in the process of a test."""

from sample import Options
from sample import sample as run_sample


def sample_flags(model, output_dir, **changes):
    values = {"model_name_or_path": str(model), "output_dir": str(output_dir), "seed": 3, "sample_batch_size": 4}
    return values | {"cpu_threads": 1} | changes


def sample_images(model, output_dir, **changes):
    run_sample(Options(**sample_flags(model, output_dir, **changes)))
