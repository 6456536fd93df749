"""Does the device wait while sample.py draws noise and writes images, and do more processes give more images?

    python benchmarks/sampling.py
    python benchmarks/sampling.py --num_images 2000 --rounds 5

A UNet with random weights (recipes/mnist_unet) generates grey images of 28 px and RGB images of 64 px with the default
scheduler. First in one process with one thread for the network: images/s, and where the time goes, of a loop that
draws, generates, encodes and writes one batch after the other, and of what sample.py does. Then sample.py on two
processes of one thread against one process of two threads. Rounds alternate; medians are shown. On a busy machine the
figures mean little, most of all those of two threads, which wait for each other: the load is printed.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from trainkit.sampling.files import ImageFiles
from trainkit.sampling.generate import evaluation_mode, image_shape, noise_shape, sample_batch, to_uint8
from trainkit.sampling.load import load_pipeline
from trainkit.sampling.noise import draw
from trainkit.sampling.pipeline import save_pipeline
from trainkit.sampling.run import Sampler, run_units
from trainkit.sampling.schedulers import load_scheduler
from trainkit.sampling.team import Team, cut_units

ROOT = Path(__file__).resolve().parent.parent
SIZES = {28: 1, 64: 3}  # pixels -> channels
END = object()
ALTERNATIVES = {"1 process, 2 threads": (1, 2), "2 processes, 1 thread": (2, 1)}


def write_model(folder: Path, side: int, channels: int) -> None:
    """A pipeline with random weights."""
    torch.manual_seed(0)
    config = json.loads((ROOT / "recipes" / "mnist_unet" / "config.json").read_text())
    config |= {"sample_size": side, "in_channels": channels, "out_channels": channels}
    unet = UNet2DModel.from_config(config)
    save_pipeline(folder, DDPMPipeline(unet, DDPMScheduler(beta_schedule="squaredcos_cap_v2")), "Random weights.")


class Watch:
    """Adds up the seconds of the calls that it wraps."""

    def __init__(self):
        self.seconds = 0.0

    def timed(self, call: Callable) -> Callable:
        def wrapped(*arguments, **named):
            started = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                self.seconds += time.perf_counter() - started

        return wrapped


def one_after_the_other(pipeline, files: ImageFiles, arguments) -> float:
    """A loop without threads; returns the seconds in which it draws noise, encodes and writes."""
    watch, count, steps = Watch(), arguments.num_images, arguments.num_inference_steps
    parts = ((unit, unit) for unit in cut_units(count, arguments.sample_batch_size, set(range(count))))
    drawn = draw(parts, noise_shape(pipeline), pipeline.scheduler, steps)
    draw_next, write = watch.timed(lambda: next(drawn, END)), watch.timed(files.write)
    noise = iter(draw_next, END)
    for batch in noise:
        write(batch.numbers, to_uint8(sample_batch(pipeline, batch, noise, steps)).numpy())
    return watch.seconds


def with_threads(pipeline, files: ImageFiles, arguments) -> float:
    """What sample.py does; returns the seconds in which the main thread waits for the others."""
    sampler = Sampler(pipeline, arguments.num_inference_steps, 0, None, arguments.sample_batch_size)
    missing = set(range(arguments.num_images))
    units = cut_units(arguments.num_images, arguments.sample_batch_size, missing)
    speed = run_units(sampler, files, Team(Accelerator(cpu=True)), units, missing)
    waited = speed["waited_for_noise"] + speed["waited_for_writing"]
    return waited * arguments.num_images / speed["images_per_second"]


def measured(arm: Callable, model: Path, output_dir: Path, arguments) -> tuple[float, float, float]:
    """Images/s of an arm in this process, the share of its time in the UNet, and that for noise and files."""
    pipeline = load_pipeline(model, load_scheduler(model))
    output_dir.mkdir()
    files, network = ImageFiles(output_dir, "png", image_shape(pipeline)), Watch()
    pipeline.unet.forward = network.timed(pipeline.unet.forward)
    started = time.perf_counter()
    with torch.inference_mode(), evaluation_mode(pipeline):
        beside = arm(pipeline, files, arguments)
    seconds = time.perf_counter() - started
    return arguments.num_images / seconds, network.seconds / seconds, beside / seconds


def of_processes(model: Path, output_dir: Path, processes: int, threads: int, arguments) -> float:
    """Images/s of sample.py with so many processes of so many threads, without their start."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", processes, "--num_machines", 1,
               "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0,
               *(["--multi_gpu"] if processes > 1 else []), ROOT / "sample.py", "--model_name_or_path", model,
               "--output_dir", output_dir, "--num_images", arguments.num_images, "--cpu_threads", threads,
               "--sample_batch_size", arguments.sample_batch_size,
               "--num_inference_steps", arguments.num_inference_steps]  # fmt: skip
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(threads)}
    subprocess.run(list(map(str, command)), env=environment, stdout=subprocess.DEVNULL, check=True)
    return json.loads((output_dir / "sampling.json").read_text())["images_per_second"]


def rounds(names, number_of_rounds: int):
    """The names of the arms in the order of their turns, which is reversed in every second round."""
    for number in range(number_of_rounds):
        yield from list(names)[:: -1 if number % 2 else 1]


def compare_threads(model: Path, output_dir: Path, arguments) -> None:
    arms = {"one after the other": one_after_the_other, "sample.py": with_threads}
    found: dict[str, list] = {name: [] for name in arms}
    for name in rounds(arms, arguments.rounds):
        found[name].append(measured(arms[name], model, output_dir, arguments))
        shutil.rmtree(output_dir)
    print("| | images/s | in the UNet | in the solver | for noise, encoding and writing |\n|---|---|---|---|---|")
    for name in arms:
        speed, network, beside = (statistics.median(values) for values in zip(*found[name], strict=True))
        print(f"| {name} | {speed:.2f} | {network:.1%} | {1 - network - beside:.1%} | {beside:.1%} |", flush=True)


def compare_processes(model: Path, output_dir: Path, arguments) -> None:
    found: dict[str, list] = {name: [] for name in ALTERNATIVES}
    for name in rounds(ALTERNATIVES, arguments.rounds):
        found[name].append(of_processes(model, output_dir, *ALTERNATIVES[name], arguments))
        shutil.rmtree(output_dir)
    one, two = found.values()
    ratios = [b / a for a, b in zip(one, two, strict=True)]
    for name in ALTERNATIVES:
        print(f"{name}: {statistics.median(found[name]):.2f} images/s")
    print(
        f"ratio by round: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_images", type=int, default=512)
    parser.add_argument("--sample_batch_size", type=int, default=32)
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", type=int, nargs="+", default=list(SIZES), choices=list(SIZES))
    arguments = parser.parse_args()
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as work:
        for side in arguments.sides:
            model, output_dir = Path(work) / f"model-{side}", Path(work) / "samples"
            write_model(model, side, SIZES[side])
            print(f"\n{side} px, {arguments.num_images} images, {arguments.num_inference_steps} steps", flush=True)
            compare_threads(model, output_dir, arguments)
            compare_processes(model, output_dir, arguments)
            print(f"load {os.getloadavg()[0]:.1f}", flush=True)


if __name__ == "__main__":
    main()
