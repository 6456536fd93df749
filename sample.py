#!/usr/bin/env python
"""Generate images from a saved pipeline, on all processes.

    python sample.py --model_name_or_path ddpm-model-64 --output_dir samples --num_images 64
    accelerate launch sample.py --model_name_or_path google/ddpm-cifar10-32 --output_dir samples \\
        --num_images 10000 --sample_batch_size 256 --scheduler ddim --num_inference_steps 50
    accelerate launch sample.py --model_name_or_path conditional-cifar10-32 --output_dir samples --num_images 1000 \\
        --class_labels all --guidance_scale 2

    accelerate launch sample.py --model_name_or_path upsampler-64 --output_dir samples --conditioning_dir small

    # images of 64 pixels, enlarged to 128 and then to 256
    accelerate launch sample.py --model_name_or_path ddpm-model-64 --output_dir samples \\
        --upsampler_name_or_path upsampler-128 upsampler-256

Image i uses the seed --seed + i and, for a conditional pipeline, condition i of the requested ones, which repeat. It
does not depend on the batch size or the number of processes. Writes 000000.png ... (or what --output_format says),
grid.png, sampling.json and metadata.jsonl (seed and condition of each image). Run the same command again to generate
only the missing images.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainkit.errors import UserError, run_script
from trainkit.options.fields import option
from trainkit.options.parsing import parse_options
from trainkit.options.terminal import TerminalOptions
from trainkit.options.training import (
    channels_last_option,
    compile_mode_option,
    cpu_threads_option,
    mixed_precision_option,
)
from trainkit.sampling.cascade import Cascade, CascadeOptions, open_cascade
from trainkit.sampling.catalogue import CATALOGUE, outside_stock_pipeline
from trainkit.sampling.conditions import ConditionOptions, read_conditions
from trainkit.terminal import say, tell
from trainkit.versions import versions

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
    num_inference_steps: int | None = option(
        None, "scheduler steps: calls of the UNet per image; default: 20, or all of a few-step student",
        within="[1, inf)",
    )  # fmt: skip
    list_schedulers: bool = option(False, "print the schedulers of the model, and its sampling table, and exit")


@dataclass
class OutputOptions:
    """output: number of images, seeds and folder"""

    output_dir: str = option("samples", "folder for the images, grid.png, sampling.json and metadata.jsonl")
    output_format: str = option(
        "png",
        "png, webp (lossless), jpeg (quality 95): a file per image; npz: samples.npz, which ADM's evaluator reads; "
        "arrow: a prepared dataset",
        choices=("png", "webp", "jpeg", "npz", "arrow"),
    )
    num_images: int = option(64, "images in all, over all processes", within="[1, inf)")
    seed: int = option(0, "seed of the first image; image i has seed + i", within="[0, inf)")


@dataclass
class ComputeOptions:
    """hardware: batch size, precision, compilation, threads"""

    sample_batch_size: int = option(
        16, "images per batch of a process; does not change the images by more than rounding", within="[1, inf)"
    )
    find_batch_size: bool = option(
        False, "halve --sample_batch_size on each process until a batch fits into its memory"
    )
    mixed_precision: str | None = mixed_precision_option()
    compile: bool | None = option(
        None, "compile the UNet with torch.compile: minutes at the start, faster steps on GPUs; default: no"
    )
    compile_mode: str = compile_mode_option()
    channels_last: str = channels_last_option()
    cpu_threads: int = cpu_threads_option()


@dataclass
class Options(PipelineOptions, ConditionOptions, CascadeOptions, OutputOptions, ComputeOptions, TerminalOptions):
    """The options of sample.py."""


def sample(options: Options) -> None:
    from trainkit.processes import end_together, main_process_first
    from trainkit.sampling.choice import default_steps, named_scheduler
    from trainkit.sampling.load import find_pipeline, load_pipeline
    from trainkit.sampling.schedulers import check_steps
    from trainkit.training.launch import compile_as_launched, start_accelerator

    options = compile_as_launched(options)
    options = replace(options, compile=bool(options.compile))
    accelerator = start_accelerator(options.mixed_precision, options.cpu_threads)
    with main_process_first():
        model_folder = find_pipeline(options.model_name_or_path)
    steps = options.num_inference_steps or default_steps(model_folder)
    name, scheduler, why = named_scheduler(model_folder, options.scheduler, steps)
    say(why)
    check_steps(scheduler, steps)
    options = replace(options, scheduler=name, num_inference_steps=steps)
    pipeline = load_pipeline(model_folder, scheduler)
    conditions = read_conditions(options, pipeline)
    cascade = open_cascade(options, pipeline)

    record, samples, missing = plan(options, accelerator, model_folder, pipeline, conditions, cascade)
    try:
        speed = generate_missing(options, accelerator, pipeline, conditions, cascade, samples, missing)
        if accelerator.is_main_process:
            report(options, record | speed, samples, conditions, len(missing))
    except OSError as error:
        raise UserError(
            f"--output_dir {options.output_dir} cannot be written ({error.strerror}): free some space and run the "
            "same command again, which generates only the missing images"
        ) from None
    end_together(accelerator)


def plan(
    options: Options, accelerator, model_folder: Path, pipeline, conditions, cascade: Cascade
) -> tuple[dict, Any, set[int]]:
    """The record of the folder, its samples, and the numbers of the images that it lacks.

    Raises `UserError` for the record of other images.
    """
    from accelerate.utils import broadcast_object_list

    from trainkit.processes import wait_for_everyone
    from trainkit.sampling.generate import image_shape
    from trainkit.sampling.record import SPEED, open_samples, read_record, start_record
    from trainkit.sampling.schedulers import describe_scheduler
    from trainkit.sampling.weights import weights_digest

    folder, last = Path(options.output_dir), cascade.upsamplers[-1].pipeline if cascade.upsamplers else pipeline
    shape = image_shape(last)
    settings = {  # what the images depend on
        "weights_sha256": weights_digest(model_folder),
        "scheduler": describe_scheduler(pipeline.scheduler),
        "num_inference_steps": options.num_inference_steps,
        "seed": options.seed,
        "mixed_precision": accelerator.mixed_precision,
        "height_width": list(shape[:2]),
        **({} if conditions is None else conditions.settings()),
        **cascade.settings,
    }
    samples = open_samples(folder, options.output_format, shape, conditions, settings)
    earlier = read_record(folder, settings, options.output_format)
    record = (
        settings
        | cascade.names
        | {
            "model": options.model_name_or_path,
            "scheduler_name": options.scheduler,
            "output_format": options.output_format,
            "num_images": max(options.num_images, earlier.get("num_images", 0)),
            "num_processes": accelerator.num_processes,
            "sample_batch_size": options.sample_batch_size,
            "versions": versions(),
        }
        | {name: earlier[name] for name in SPEED if name in earlier}
    )
    wait_for_everyone()  # no process writes before all have read the record
    missing: set[int] = set()
    if accelerator.is_main_process:
        missing = set(range(options.num_images)) - samples.held()
        start_record(folder, record, samples)
    [missing] = broadcast_object_list([missing])  # one list for all, and nobody writes before the folder is there
    return record, samples, missing


def generate_missing(
    options: Options, accelerator, pipeline, conditions, cascade: Cascade, samples, missing: set[int]
) -> dict:
    """Generate and write the images `missing`; on the main process returns speed and waiting times of all processes.

    Processes take batches one after the other. The noise of the next one is drawn, and images are encoded and written,
    by threads beside the device.
    """
    import torch

    from trainkit.sampling.generate import limited_batch_size
    from trainkit.sampling.run import Sampler, run_units
    from trainkit.sampling.team import Team, cut_units
    from trainkit.training.device import compile_unet, memory_format

    if not missing:
        return {}
    layout = memory_format(options, accelerator.device)
    for one in (pipeline, *(upsampler.pipeline for upsampler in cascade.upsamplers)):
        one.to(accelerator.device).unet.to(memory_format=layout)
        compile_unet(one.unet, options, 1, accelerator.device)
    share = -(-options.num_images // accelerator.num_processes)  # so that every process has a batch
    batch_size = limited_batch_size(pipeline, min(options.sample_batch_size, share), cascade.upsamplers)
    units = cut_units(options.num_images, batch_size, missing, padded=options.compile)
    sampler = Sampler(
        pipeline, options.num_inference_steps, options.seed, conditions, batch_size, options.find_batch_size, layout,
        cascade.upsamplers,
    )  # fmt: skip
    with torch.inference_mode(), accelerator.autocast():
        return run_units(sampler, samples, Team(accelerator), units, missing) or {}


def report(options: Options, record: dict, samples, conditions, num_generated: int) -> None:
    """Put the images together, complete the record, write metadata.jsonl and the grid, and print a summary."""
    from trainkit.atomic import write_json
    from trainkit.sampling.files import num_leading
    from trainkit.sampling.record import GRID_NAME, RECORD_NAME, write_grid, write_metadata

    folder, speed = Path(options.output_dir), ""
    record["num_images"] = num_leading(samples.held())  # an earlier run may have made more
    samples.put_together(record["num_images"])
    write_json(folder / RECORD_NAME, record | {"complete": True})
    rows = [{} if conditions is None else conditions.row(index) for index in range(record["num_images"])]
    write_metadata(folder, samples, [{"seed": options.seed + index} | row for index, row in enumerate(rows)])
    write_grid(folder, samples, rows[: min(options.num_images, GRID_IMAGES)])
    if num_generated:
        speed = (
            f" at {record['images_per_second']:.1f} images/s; the device waited {record['waited_for_noise']:.1%} of "
            f"the time for noise and {record['waited_for_writing']:.1%} for writing"
        )
    tell(f"{folder}: {options.num_images} images, {num_generated} generated now{speed}; see {folder / GRID_NAME}")


def list_schedulers(options: Options) -> None:
    """Print the schedulers that fit the model, with the rows of its table."""
    from trainkit.sampling.load import find_pipeline, is_stock_pipeline
    from trainkit.sampling.schedulers import available_schedulers
    from trainkit.sampling.table import list_lines, read_table
    from trainkit.sampling.weights import weights_digest

    folder = find_pipeline(options.model_name_or_path)
    table = read_table(folder, weights_digest(folder))
    print("\n".join(list_lines(available_schedulers(folder), table, is_stock_pipeline(folder))))


def main() -> None:
    options = parse_options(Options, __doc__)
    if options.model_name_or_path is None:
        raise UserError("--model_name_or_path is missing: give the folder of a saved pipeline, or a Hub id")
    list_schedulers(options) if options.list_schedulers else sample(options)


if __name__ == "__main__":
    run_script(main)
