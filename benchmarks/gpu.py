"""Everything that is to be measured on a GPU, in one command: a Markdown section for benchmarks/results.md.

    python benchmarks/gpu.py                      # pieces that are done are kept; run it again after an interruption
    python benchmarks/gpu.py --rehearse           # the same on a CPU, tiny: does every piece run?
    python benchmarks/gpu.py --only resume        # one piece; --again repeats it

Each piece ends after at most `--timeout_s`. Its figures are kept in OUTPUT_DIR/NAME.json, its output in
OUTPUT_DIR/NAME.log, and the section in OUTPUT_DIR/results.md. A piece that fails is a line of the section.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
AIM = 1.8  # times the diffusers example's loop
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
FULL = {
    "train32": {"unet": "ddpm_cifar10", "resolution": 32, "batch_size": 128, "rounds": 5, "steps": 30},
    "train64": {"unet": "example", "resolution": 64, "batch_size": 64, "rounds": 4, "steps": 20},
    "sampling": {"num_images": 512, "num_inference_steps": 20, "sample_batch_size": 256},
}
TINY = {
    "train32": {"unet": "tiny", "resolution": 16, "batch_size": 4, "rounds": 1, "steps": 1, "cpu_threads": 1},
    "train64": {"unet": "tiny", "resolution": 16, "batch_size": 2, "rounds": 1, "steps": 1, "cpu_threads": 1},
    "sampling": {"num_images": 4, "num_inference_steps": 2, "sample_batch_size": 4, "cpu_threads": 1},
}


class Benchmark:
    """The pieces; each runs commands with `run` and returns its figures."""

    def __init__(self, folder: Path, rehearse: bool, timeout_s: float):
        import torch

        self.folder, self.rehearse, self.timeout_s = folder, rehearse, timeout_s
        self.sizes, self.on_cuda = TINY if rehearse else FULL, torch.cuda.is_available() and not rehearse
        self.num_gpus = torch.cuda.device_count() if self.on_cuda else 0
        self.card = torch.cuda.get_device_name() if self.on_cuda else "cpu"
        self.precision = "bf16" if self.on_cuda else "no"
        self.environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        if rehearse:
            self.environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.log, self.deadline = folder / "log", 0.0

    def run(self, *words, environment: dict[str, str] | None = None) -> None:
        """Run Python with `words`. Raises `CalledProcessError` and `TimeoutExpired`."""
        with self.log.open("a", encoding="utf-8") as log:
            print("$ python", *words, file=log, flush=True)
            left_s = self.deadline - time.monotonic()
            subprocess.run(
                [sys.executable, *map(str, words)], env=self.environment | (environment or {}), cwd=ROOT, stdout=log,
                stderr=subprocess.STDOUT, check=True, timeout=max(1.0, left_s),
            )  # fmt: skip

    def piece(self, name: str) -> dict:
        """Run one piece; its figures, or `error`."""
        self.log, self.deadline = self.folder / f"{name}.log", time.monotonic() + self.timeout_s
        self.log.unlink(missing_ok=True)
        started = time.perf_counter()
        try:
            found = PIECES[name](self)
        except (subprocess.SubprocessError, OSError, ValueError, KeyError) as error:
            last = (self.log.read_text(encoding="utf-8").strip().splitlines() or [""])[-1] if self.log.exists() else ""
            found = {"error": f"{type(error).__name__}: {last[:200]}"}
        return found | {"card": self.card, "date": time.strftime("%Y-%m-%d"), "seconds": time.perf_counter() - started}

    def images(self) -> Path:
        """A folder of 64 noise images, which is made once."""
        import numpy as np
        from PIL import Image

        folder = self.folder / "images"
        if not folder.exists():
            folder.mkdir()
            pixels = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
            for number, image in enumerate(pixels):
                Image.fromarray(image).save(folder / f"{number:02d}.png")
        return folder

    def unet(self) -> Path:
        """A folder with the config of the 32 px UNet."""
        from train import UNETS

        folder = self.folder / "unet"
        folder.mkdir(exist_ok=True)
        config = {"_class_name": "UNet2DModel"} | UNETS[self.sizes["train32"]["unet"]]
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return folder

    def training(self, output_dir: Path, steps: int, *flags) -> list:
        """The words of a short run of train_unconditional.py with the default optimizer and objective."""
        batch = 4 if self.rehearse else 32
        return [
            ROOT / "train_unconditional.py", "--train_data_dir", self.images(), "--resolution", 32, "--center_crop",
            "--model_config_name_or_path", self.unet(), "--cache_dir", self.folder / "cache", "--output_dir",
            output_dir, "--train_batch_size", batch, "--max_train_steps", steps, "--checkpointing_steps", steps,
            "--mixed_precision", self.precision, "--logger", "none", "--ddpm_num_inference_steps", 2,
            "--eval_batch_size", 4, "--num_proc", 1, "--cpu_threads", int(self.rehearse), *flags,
        ]  # fmt: skip


def train(benchmark: Benchmark, name: str, *flags) -> dict:
    """benchmarks/train.py with the sizes of the piece `name`."""
    file = benchmark.folder / "train.json"
    file.unlink(missing_ok=True)
    words = [word for key, value in benchmark.sizes[name].items() for word in (f"--{key}", value)]
    words += ["--mixed_precision", benchmark.precision, "--no_memory", "--json_file", file]
    benchmark.run(ROOT / "benchmarks" / "train.py", *words, *flags)
    return json.loads(file.read_text(encoding="utf-8"))


def not_compiled(benchmark: Benchmark) -> dict:
    return train(benchmark, "train32", "--no_compile", "--loops", "engine", "defaults")


def resume(benchmark: Benchmark) -> dict:
    """Is a run that was stopped and resumed, with --deterministic, the uninterrupted one bit for bit?"""
    from safetensors.torch import load_file

    half, steps = (2, 4) if benchmark.rehearse else (10, 20)
    whole, parts = benchmark.folder / "whole", benchmark.folder / "parts"
    for folder in (whole, parts):
        shutil.rmtree(folder, ignore_errors=True)
    flags = ["--deterministic", "--no_compile", "--checkpointing_steps", half]
    benchmark.run(*benchmark.training(whole, steps, *flags))
    benchmark.run(*benchmark.training(parts, steps, *flags))
    shutil.rmtree(parts / f"checkpoint-{steps}")
    benchmark.run(*benchmark.training(parts, steps, *flags, "--resume_from_checkpoint", "latest"))
    one, other = (load_file(folder / f"checkpoint-{steps}" / WEIGHTS) for folder in (whole, parts))
    differs = max((one[name] - other[name]).abs().max().item() for name in one)
    return {"resumed_at": half, "steps": steps, "largest_difference": differs}


def shard(benchmark: Benchmark) -> dict:
    """Does --shard_weights start and train on two devices?"""
    if not benchmark.rehearse and benchmark.num_gpus < 2:
        return {"skipped": "needs two GPUs"}
    output_dir = benchmark.folder / "sharded"
    shutil.rmtree(output_dir, ignore_errors=True)
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--num_machines", 1]
    launcher += ["--mixed_precision", benchmark.precision, "--dynamo_backend", "no", "--main_process_port", 0]
    benchmark.run(*launcher, *benchmark.training(output_dir, 3, "--shard_weights"))
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {"losses": [row["loss"] for row in rows if "loss" in row]}


def sampling(benchmark: Benchmark) -> dict:
    """images/s of sample.py with the 32 px UNet of a short run."""
    model, samples, sizes = benchmark.folder / "model", benchmark.folder / "samples", benchmark.sizes["sampling"]
    for folder in (model, samples):
        shutil.rmtree(folder, ignore_errors=True)
    benchmark.run(*benchmark.training(model, 2, "--no_compile"))
    words = [word for key, value in sizes.items() for word in (f"--{key}", value)]
    words += ["--mixed_precision", benchmark.precision]
    benchmark.run(ROOT / "sample.py", "--model_name_or_path", model, "--output_dir", samples, *words)
    record = json.loads((samples / "sampling.json").read_text(encoding="utf-8"))
    return sizes | {"images_per_s": record["images_per_second"]}


PIECES: dict[str, Callable[[Benchmark], dict]] = {
    "train32": lambda benchmark: train(benchmark, "train32"),
    "train64": lambda benchmark: train(benchmark, "train64"),
    "not_compiled": not_compiled,
    "resume": resume,
    "shard": shard,
    "sampling": sampling,
}


def training_lines(name: str, found: dict, sizes: dict) -> list[str]:
    """A table of images/s, and the ratio to the example's loop against the aim."""
    from statistics import median

    setting = f"{sizes['unet']}, {sizes['resolution']} px, {sizes['batch_size']} images per step"
    lines = [f"**{name}**: {setting}, {found['gflop_per_image']:.1f} GFLOP per image", ""]
    lines += ["| loop | images/s | range | MFU |", "|---|---|---|---|"]
    for loop, speeds in found["images_per_s"].items():
        flops = median(speeds) * found["gflop_per_image"] / 1e3  # TFLOP/s
        mfu = f"{flops / found['peak_tflops']:.1%}" if found["peak_tflops"] else ""
        lines.append(f"| {loop} | {median(speeds):,.1f} | {min(speeds):,.1f} to {max(speeds):,.1f} | {mfu} |")
    lines += ["", "Ratios: " + ", ".join(f"{names} {ratio:.2f}" for names, ratio in found["ratios"].items()) + "."]
    if "engine / example" in found["ratios"]:
        met = "met" if found["ratios"]["engine / example"] >= AIM else "**missed**"
        lines.append(f"The aim of {AIM} times the example's loop is {met}.")
    waits = "met" if found["wait_share"] < 0.01 else "**missed**"
    return [*lines, f"Waiting for data: {found['wait_share']:.2%} (aim: less than 1 %, {waits}).", ""]


def section(results: dict[str, dict], sizes: dict, command: str) -> str:
    """The Markdown of all `results`."""
    lines = ["## On a GPU", ""]
    for name, found in results.items():
        head = f"`{command} --only {name}` ({found['date']}, {found['card']}, {found['seconds']:.0f} s)"
        if "error" in found or "skipped" in found:
            lines += [head, "", f"**{name}**: " + found.get("skipped", f"failed: {found.get('error')}"), ""]
            continue
        lines += [head, ""]
        if "images_per_s" in found and isinstance(found["images_per_s"], dict):
            lines += training_lines(name, found, sizes["train64" if name == "train64" else "train32"])
        elif name == "resume":
            equal = found["largest_difference"] == 0
            lines += [
                f"**resume**: resumed at step {found['resumed_at']} of {found['steps']} with --deterministic, the "
                + ("weights are equal bit for bit." if equal else
                   f"weights **differ** by up to {found['largest_difference']:.2g}."), "",
            ]  # fmt: skip
        elif name == "shard":
            lines += ["**shard**: --shard_weights on two devices trains; losses " + str(found["losses"]), ""]
        else:
            lines += [
                f"**sampling**: {found['images_per_s']:,.1f} images/s ({found['num_images']} images, "
                f"{found['num_inference_steps']} steps, {found['sample_batch_size']} per batch)", "",
            ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("gpu_benchmark"), help="folder for all figures")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU: check that all pieces run")
    parser.add_argument("--only", nargs="+", choices=tuple(PIECES), default=list(PIECES), help="pieces to run")
    parser.add_argument("--again", action="store_true", help="run pieces that are done already once more")
    parser.add_argument("--timeout_s", type=float, default=580, help="maximum seconds per piece")
    arguments = parser.parse_args()
    folder = (arguments.output_dir / "rehearsal" if arguments.rehearse else arguments.output_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    benchmark = Benchmark(folder, arguments.rehearse, arguments.timeout_s)
    if not benchmark.on_cuda and not arguments.rehearse:
        sys.exit("error: there is no CUDA GPU: use --rehearse to try the pieces on the CPU")
    for name in arguments.only:
        file = folder / f"{name}.json"
        if file.exists() and not arguments.again and "error" not in json.loads(file.read_text(encoding="utf-8")):
            continue
        print(f"{name} ...", flush=True)
        file.write_text(json.dumps(benchmark.piece(name), indent=1), encoding="utf-8")
    done = {name: folder / f"{name}.json" for name in PIECES}
    results = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in done.items() if file.exists()}
    text = section(results, benchmark.sizes, "python benchmarks/gpu.py" + " --rehearse" * arguments.rehearse)
    (folder / "results.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    sys.exit(any("error" in found for found in results.values()))


if __name__ == "__main__":
    main()
