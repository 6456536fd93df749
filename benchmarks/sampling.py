"""Does the device wait while sample.py draws noise and writes images, and do more processes give more images?

    python benchmarks/sampling.py
    python benchmarks/sampling.py --num_images 2000 --rounds 5

A UNet with random weights (recipes/mnist_unet) generates grey images of 28 px and RGB images of 64 px with the default
scheduler. First in one process with one thread for the network: images/s and the share of time outside the UNet, of
a loop that draws, generates, encodes and writes one batch after the other, and of what sample.py does. Then sample.py
on two processes of one thread against one process of two threads. Rounds alternate; medians are shown. On a busy
machine the figures mean little: the load is printed.
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
from trainkit.sampling.generate import generate, image_shape
from trainkit.sampling.load import load_pipeline
from trainkit.sampling.pipeline import save_pipeline
from trainkit.sampling.run import Sampler, run_units
from trainkit.sampling.schedulers import load_scheduler
from trainkit.sampling.team import Team, cut_units

ROOT = Path(__file__).resolve().parent.parent
SIZES = {28: 1, 64: 3}  # pixels -> channels
ALTERNATIVES = {"1 process, 2 threads": (1, 2), "2 processes, 1 thread": (2, 1)}


def write_model(folder: Path, side: int, channels: int) -> None:
    """A pipeline with random weights."""
    torch.manual_seed(0)
    config = json.loads((ROOT / "recipes" / "mnist_unet" / "config.json").read_text())
    config |= {"sample_size": side, "in_channels": channels, "out_channels": channels}
    unet = UNet2DModel.from_config(config)
    save_pipeline(folder, DDPMPipeline(unet, DDPMScheduler(beta_schedule="squaredcos_cap_v2")), "Random weights.")


class NetworkTime:
    """How much of a `with` block is not spent in the UNet, on a CPU: `outside` of its time, `outside_cpu` of the
    processor time of all threads, which another program on the machine disturbs less."""

    def __enter__(self) -> "NetworkTime":
        self._seconds = self._cpu_seconds = 0.0
        self._forward, self._started = UNet2DModel.forward, (time.perf_counter(), time.process_time())
        forward = self._forward

        def timed(*arguments, **named):
            started, cpu_started = time.perf_counter(), time.thread_time()
            try:
                return forward(*arguments, **named)
            finally:
                self._seconds += time.perf_counter() - started
                self._cpu_seconds += time.thread_time() - cpu_started

        UNet2DModel.forward = timed
        return self

    def __exit__(self, *error) -> None:
        UNet2DModel.forward = self._forward
        self.seconds = time.perf_counter() - self._started[0]
        self.outside = 1 - self._seconds / self.seconds
        self.outside_cpu = 1 - self._cpu_seconds / (time.process_time() - self._started[1])


def one_after_the_other(pipeline, files: ImageFiles, arguments) -> None:
    """A loop without threads."""
    done = 0
    for images in generate(
        pipeline, range(arguments.num_images), arguments.num_inference_steps, arguments.sample_batch_size
    ):
        files.write(range(done, done + len(images)), images)
        done += len(images)


def with_threads(pipeline, files: ImageFiles, arguments) -> None:
    """What sample.py does."""
    sampler = Sampler(pipeline, arguments.num_inference_steps, 0, None, arguments.sample_batch_size)
    missing = set(range(arguments.num_images))
    units = cut_units(arguments.num_images, arguments.sample_batch_size, missing)
    run_units(sampler, files, Team(Accelerator(cpu=True)), units, missing)


def measured(arm: Callable, model: Path, output_dir: Path, arguments) -> tuple[float, float, float]:
    """Images/s of an arm in this process, and the shares of time and processor time outside the UNet."""
    pipeline = load_pipeline(model, load_scheduler(model))
    output_dir.mkdir()
    files = ImageFiles(output_dir, "png", image_shape(pipeline))
    with torch.inference_mode(), NetworkTime() as network:
        arm(pipeline, files, arguments)
    return arguments.num_images / network.seconds, network.outside, network.outside_cpu


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
    print("| | images/s | time outside the UNet | processor time outside the UNet |\n|---|---|---|---|")
    for name in arms:
        speed, outside, outside_cpu = (statistics.median(values) for values in zip(*found[name], strict=True))
        print(f"| {name} | {speed:.1f} | {outside:.1%} | {outside_cpu:.1%} |", flush=True)


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
