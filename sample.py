#!/usr/bin/env python
"""Generate images from a saved pipeline, on all processes.

    python sample.py --model_name_or_path ddpm-model-64 --output_dir samples --num_images 64
    accelerate launch sample.py --model_name_or_path google/ddpm-cifar10-32 --output_dir samples \\
        --num_images 10000 --sample_batch_size 256 --scheduler ddim --num_inference_steps 50
    accelerate launch sample.py --model_name_or_path conditional-cifar10-32 --output_dir samples --num_images 1000 \\
        --class_labels all --guidance_scale 2

Image i uses the seed --seed + i and, for a conditional pipeline, condition i of the requested ones, which repeat. It
does not depend on the batch size or the number of processes. Writes 000000.png ..., grid.png, sampling.json and
metadata.jsonl (seed and condition of each image). Run the same command again to generate only the missing images.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from trainkit.errors import UserError, run_script
from trainkit.options.fields import option
from trainkit.options.parsing import parse_options
from trainkit.sampling.catalogue import CATALOGUE, outside_stock_pipeline
from trainkit.sampling.conditions import ConditionOptions, read_conditions

GRID_IMAGES = 100


@dataclass
class PipelineOptions:
    """pipeline: the model to sample"""

    model_name_or_path: str | None = option(None, "folder of a saved pipeline, or a Hub id; nothing in it is executed")
    scheduler: str | None = option(
        None,
        f"{', '.join(CATALOGUE)}; default: the best for the steps in the model's sampling_table.json, else the "
        f"recommended one. All run here; diffusers' DDPMPipeline cannot run {outside_stock_pipeline()}",
    )
    num_inference_steps: int = option(20, "scheduler steps: calls of the UNet per image", within="[1, inf)")
    list_schedulers: bool = option(False, "print the schedulers of the model, and its sampling table, and exit")


@dataclass
class OutputOptions:
    """output: number of images, seeds and folder"""

    output_dir: str = option("samples", "folder for 000000.png ..., grid.png, sampling.json and metadata.jsonl")
    num_images: int = option(64, "images in all, over all processes", within="[1, inf)")
    seed: int = option(0, "seed of the first image; image i has seed + i", within="[0, inf)")


@dataclass
class ComputeOptions:
    """hardware: batch size, precision, threads"""

    sample_batch_size: int = option(16, "images per process and batch; does not change the images", within="[1, inf)")
    mixed_precision: str | None = option(
        None, "autocast of the UNet; default: what `accelerate launch` says, else no", choices=("no", "fp16", "bf16")
    )
    cpu_threads: int = option(
        0, "threads a process computes with on a CPU; 0: the cores shared by its processes", within="[0, inf)"
    )


@dataclass
class Options(PipelineOptions, ConditionOptions, OutputOptions, ComputeOptions):
    """The options of sample.py."""


def sample(options: Options) -> None:
    from trainkit.sampling.load import find_pipeline, load_pipeline
    from trainkit.sampling.schedulers import check_steps
    from trainkit.sampling.table import named_scheduler
    from trainkit.training.launch import start_accelerator

    accelerator = start_accelerator(options.mixed_precision, options.cpu_threads)
    with accelerator.main_process_first():
        model_folder = find_pipeline(options.model_name_or_path)
    options.scheduler, scheduler, why = named_scheduler(model_folder, options.scheduler, options.num_inference_steps)
    accelerator.print(why)
    check_steps(scheduler, options.num_inference_steps)
    pipeline = load_pipeline(model_folder, scheduler)
    conditions = read_conditions(options, pipeline)

    record, missing = plan(options, accelerator, model_folder, pipeline, conditions)
    started = time.perf_counter()
    try:
        generate_missing(options, accelerator, pipeline, conditions, missing)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            report(options, record, conditions, len(missing), time.perf_counter() - started)
    except OSError as error:
        raise UserError(
            f"--output_dir {options.output_dir} cannot be written ({error.strerror}): free some space and run the "
            "same command again, which generates only the missing images"
        ) from None
    accelerator.end_training()


def plan(options: Options, accelerator, model_folder: Path, pipeline, conditions) -> tuple[dict, list[int]]:
    """The record of the folder, and the numbers of the images that it lacks. Raises `UserError` for another record."""
    from trainkit.sampling.generate import image_shape
    from trainkit.sampling.load import weights_digest
    from trainkit.sampling.record import image_path, read_record, start_record, versions
    from trainkit.sampling.schedulers import describe_scheduler

    folder = Path(options.output_dir)
    settings = {  # what the images depend on
        "weights_sha256": weights_digest(model_folder),
        "scheduler": describe_scheduler(pipeline.scheduler),
        "num_inference_steps": options.num_inference_steps,
        "seed": options.seed,
        "mixed_precision": accelerator.mixed_precision,
        "height_width": list(image_shape(pipeline)[:2]),
        **({} if conditions is None else conditions.settings()),
    }
    earlier = read_record(folder, settings)
    missing = [index for index in range(options.num_images) if not image_path(folder, index).exists()]
    accelerator.wait_for_everyone()  # no process writes before all have seen what is missing
    record = settings | {
        "model": options.model_name_or_path,
        "scheduler_name": options.scheduler,
        "num_images": max(options.num_images, earlier.get("num_images", 0)),
        "num_processes": accelerator.num_processes,
        "sample_batch_size": options.sample_batch_size,
        "images_per_second": earlier.get("images_per_second"),
        "versions": versions(),
    }
    if accelerator.is_main_process:
        start_record(folder, record)
    accelerator.wait_for_everyone()
    return record, missing


def generate_missing(options: Options, accelerator, pipeline, conditions, missing: list[int]) -> None:
    """Generate this process's share of the images `missing` and write each as it is done."""
    import torch
    from tqdm.auto import tqdm

    from trainkit.sampling.generate import generate
    from trainkit.sampling.grid import save_image, to_pil
    from trainkit.sampling.record import image_path

    share = missing[accelerator.process_index :: accelerator.num_processes]
    batches = generate(
        pipeline.to(accelerator.device),
        [options.seed + index for index in share],
        options.num_inference_steps,
        options.sample_batch_size,
        None if conditions is None else conditions.for_images(share),
        **({} if conditions is None else conditions.guidance),
    )
    numbers = iter(share)
    bar = tqdm(total=len(missing), unit="img", desc="sampling", disable=not accelerator.is_main_process)
    with torch.inference_mode(), accelerator.autocast(), bar:
        for images in batches:
            for image in images:
                save_image(to_pil(image), image_path(Path(options.output_dir), next(numbers)))
            bar.update(min(len(images) * accelerator.num_processes, len(missing) - bar.n))


def report(options: Options, record: dict, conditions, num_generated: int, seconds: float) -> None:
    """Complete the record, write metadata.jsonl and the grid, and print a summary."""
    from trainkit.atomic import write_json
    from trainkit.sampling.record import GRID_NAME, RECORD_NAME, write_grid, write_metadata

    folder, speed = Path(options.output_dir), ""
    if num_generated:
        record["images_per_second"] = round(num_generated / seconds, 2)
        speed = f" at {record['images_per_second']:.1f} images/s"
    write_json(folder / RECORD_NAME, record | {"complete": True})
    rows = [{} if conditions is None else conditions.row(index) for index in range(record["num_images"])]
    write_metadata(folder, [{"seed": options.seed + index} | row for index, row in enumerate(rows)])
    write_grid(folder, min(options.num_images, GRID_IMAGES))
    print(f"{folder}: {options.num_images} images, {num_generated} generated now{speed}; see {folder / GRID_NAME}")


def list_schedulers(options: Options) -> None:
    """Print the schedulers that fit the model, with the rows of its table."""
    from trainkit.sampling.load import find_pipeline, weights_digest
    from trainkit.sampling.schedulers import available_schedulers
    from trainkit.sampling.table import list_lines, read_table

    folder = find_pipeline(options.model_name_or_path)
    print("\n".join(list_lines(available_schedulers(folder), read_table(folder, weights_digest(folder)))))


def main() -> None:
    options = parse_options(Options, __doc__)
    if options.model_name_or_path is None:
        raise UserError("--model_name_or_path is missing: give the folder of a saved pipeline, or a Hub id")
    list_schedulers(options) if options.list_schedulers else sample(options)


if __name__ == "__main__":
    run_script(main)
