"""Training speed: this engine against a plain loop around the same UNet, and against the diffusers example's loop.

    python benchmarks/train.py --rounds 6 --steps 20

They take turns on the same images, UNet, batch, EMA and precision, `--steps` optimizer steps per turn:
- plain: images in the device's memory as float tensors, autocast, AdamW, clipping, EMA, nothing else
- example: the loop of diffusers' train_unconditional.py, its DataLoader over PNG files included
- engine: this project's Run, as train_unconditional.py drives it, with AdamW and the objective of the other two; on
  CUDA with --compile (--no_compile here: without)
- defaults: the same with its default optimizer and objective (Muon, the image), which cost more per step
Prints images/s of each (median over rounds) and the ratios of our two to the others, the share of its time that the
engine waits for data, FLOP/s and, on a device whose peak is known, the share of that. Memory is the peak of a process
that runs one loop alone, a few steps of it: of the device on CUDA, else all of the process.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainkit.diffusion.unet import EXAMPLE_UNET
from trainkit.errors import run_script
from trainkit.options.fields import option
from trainkit.options.parsing import parse_options

NUM_IMAGES = 2000
UNETS = {
    "tiny": {  # to rehearse
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "attention_head_dim": 8,
    },
    "small": {
        "layers_per_block": 1,
        "block_out_channels": (32, 64, 128),
        "down_block_types": ("DownBlock2D",) * 3,
        "up_block_types": ("UpBlock2D",) * 3,
        "norm_num_groups": 8,
    },
    # Ho et al. 2020, appendix B: 35.7 M parameters, one head of attention at 16 pixels.
    "ddpm_cifar10": {
        "layers_per_block": 2,
        "block_out_channels": (128, 256, 256, 256),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": None,
        "dropout": 0.1,
    },
    "example": EXAMPLE_UNET,  # of diffusers' train_unconditional.py: 113.7 M parameters
}
LOOPS = ("engine", "defaults", "plain", "example")


@dataclass
class BenchmarkOptions:
    """benchmark"""

    rounds: int = option(6, "turns each loop takes")
    steps: int = option(20, "optimizer steps a turn")
    unet: str | None = option(None, "the UNet; default: ddpm_cifar10 on CUDA, else small", choices=tuple(UNETS))
    batch_size: int | None = option(None, "images a step; default: 128 on CUDA, else 32")
    resolution: int = option(32, "height and width of the images")
    mixed_precision: str = option("auto", "autocast of all loops", choices=("auto", "no", "bf16"))
    compile: bool | None = option(None, "let the engine compile its UNet; default: on CUDA")
    cpu_threads: int = option(0, "threads on a CPU; 0: all cores")
    memory: bool = option(True, "measure memory, each loop in a separate process")
    loops: list[str] = option(list(LOOPS), "the loops to compare", choices=LOOPS, nargs="+")
    only: str | None = option(None, "run this loop alone and print its peak memory in MiB", choices=LOOPS)
    json_file: str | None = option(None, "also write the figures to this file")

    def resolve(self) -> None:
        """Fill in what depends on the device."""
        import torch

        from trainkit.training.precision import resolve_precision

        if self.cpu_threads:
            torch.set_num_threads(self.cpu_threads)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        on_cuda = self.device.type == "cuda"
        self.unet = self.unet or ("ddpm_cifar10" if on_cuda else "small")
        self.batch_size = self.batch_size or (128 if on_cuda else 32)
        self.mixed_precision = resolve_precision(self.mixed_precision)
        self.compile = on_cuda if self.compile is None else self.compile
        self.unet_config = {"sample_size": self.resolution} | UNETS[self.unet]


def engine(options, files: Path, work: Path) -> Iterator[float]:
    """Optimizer steps of this project's Run, one a `next`, which gives the seconds waited for data so far."""
    yield from _run(options, files, work / "engine", optimizer="adamw", prediction_type="epsilon")


def defaults(options, files: Path, work: Path) -> Iterator[float]:
    """The same with the default optimizer and objective."""
    yield from _run(options, files, work / "defaults")


def _run(options, files: Path, work: Path, **settings) -> Iterator[float]:
    from trainkit.data.cache import open_or_prepare
    from trainkit.diffusion.noise_schedule import add_noise, build_noise_scheduler
    from trainkit.diffusion.objective import denoising_errors
    from trainkit.diffusion.timesteps import draw_timesteps
    from trainkit.diffusion.unet import build_unet
    from trainkit.options.script import TrainingOptions
    from trainkit.training.start import resolve_options, start_accelerator, start_run

    (work / "unet").mkdir(parents=True)
    (work / "unet" / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"} | options.unet_config))
    settings = TrainingOptions(
        train_data_dir=str(files), cache_dir=str(work / "cache"), resolution=str(options.resolution), center_crop=True,
        model_config_name_or_path=str(work / "unet"), output_dir=str(work / "model"),
        train_batch_size=options.batch_size, max_train_steps=10**6, checkpointing_steps=0, logger="none",
        mixed_precision=options.mixed_precision, compile=options.compile,
        cpu_threads=options.cpu_threads, **settings,
    )  # fmt: skip
    settings = resolve_options(settings)
    images = open_or_prepare(settings)
    accelerator = start_accelerator(settings)
    noise_scheduler = build_noise_scheduler(settings)
    run = start_run(settings, accelerator, build_unet(settings, options.resolution, options.resolution, 3), images)
    for batch in run.batches():
        timesteps = draw_timesteps(settings, noise_scheduler, batch.uniforms, batch.images.device)
        noisy_images = add_noise(noise_scheduler, batch.images, batch.noise, timesteps)
        prediction = run.model(noisy_images, timesteps).sample
        weighting = settings.snr_gamma, settings.loss_weighting
        errors = denoising_errors(noise_scheduler, prediction, batch.images, batch.noise, timesteps, *weighting)
        run.update(errors.mean())
        yield run.loader.wait_s


def plain(options, files: Path, work: Path) -> Iterator[float]:
    """A textbook loop over images that are already float tensors in the device's memory."""
    import numpy as np
    import torch
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.training_utils import EMAModel
    from PIL import Image

    images = np.stack([np.array(Image.open(path)) for path in sorted(files.iterdir())])
    images = torch.from_numpy(images).permute(0, 3, 1, 2).to(options.device).float() / 127.5 - 1
    unet, scheduler, device = UNet2DModel(**options.unet_config).to(options.device), DDPMScheduler(), options.device
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
    ema = EMAModel(unet.parameters(), use_ema_warmup=True, power=0.75)
    while True:
        batch = images[torch.randint(len(images), (options.batch_size,), device=device)]
        noise, timesteps = torch.randn_like(batch), torch.randint(1000, (options.batch_size,), device=device)
        noisy_images = scheduler.add_noise(batch, noise, timesteps)
        with torch.autocast(device.type, torch.bfloat16, enabled=options.mixed_precision == "bf16"):
            prediction = unet(noisy_images, timesteps).sample
        torch.nn.functional.mse_loss(prediction.float(), noise).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        yield 0.0


def example(options, files: Path, work: Path) -> Iterator[float]:
    """What diffusers' example does in a step, torchvision's transforms written with Pillow and torch."""
    import numpy as np
    import torch
    from accelerate import Accelerator
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel
    from PIL import Image

    paths = sorted(files.iterdir())

    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return len(paths)

        def __getitem__(self, i):
            image = Image.open(paths[i]).convert("RGB").resize((options.resolution,) * 2, Image.Resampling.BILINEAR)
            return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255).sub(0.5).div(0.5)

    accelerator = Accelerator(mixed_precision=options.mixed_precision)
    unet, scheduler = UNet2DModel(**options.unet_config), DDPMScheduler()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
    loader = torch.utils.data.DataLoader(Images(), batch_size=options.batch_size, shuffle=True, drop_last=True)
    rates = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=10**6)
    unet, optimizer, loader, rates = accelerator.prepare(unet, optimizer, loader, rates)
    ema = EMAModel(unet.parameters(), use_ema_warmup=True, power=0.75)
    while True:
        for batch in loader:
            noise = torch.randn_like(batch)
            timesteps = torch.randint(1000, (options.batch_size,), device=batch.device).long()
            noisy_images = scheduler.add_noise(batch, noise, timesteps)
            with accelerator.accumulate(unet):
                prediction = unet(noisy_images, timesteps).sample
                loss = torch.nn.functional.mse_loss(prediction.float(), noise)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(unet.parameters(), 1.0)
                optimizer.step()
                rates.step()
                optimizer.zero_grad()
            ema.step(unet.parameters())
            loss.detach().item()
            yield 0.0


def turn(loop: Iterator[float], options) -> tuple[float, float]:
    """images/s of `--steps` steps, and the seconds that the loop has waited for data by their end."""
    import torch

    started = time.perf_counter()
    for _ in range(options.steps):
        waited = next(loop)
    if options.device.type == "cuda":
        torch.cuda.synchronize()
    return options.steps * options.batch_size / (time.perf_counter() - started), waited


def peak_memory_mib(options, name: str) -> float:
    """The memory peak of a separate process that runs the loop `name`."""
    command = [sys.executable, __file__, "--only", name, "--rounds", 1, "--steps", 3, "--unet", options.unet]
    command += ["--batch_size", options.batch_size, "--mixed_precision", options.mixed_precision]
    command += [
        "--cpu_threads",
        options.cpu_threads,
        "--resolution",
        options.resolution,
        "--compile",
        str(options.compile).lower(),
    ]
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1])


def report(options, speeds: dict, wait_share: float, memory: dict) -> None:
    import torch
    from diffusers import UNet2DModel

    from trainkit.training.throughput import flops_of_image, peak_tflops

    device_name = torch.cuda.get_device_name() if options.device.type == "cuda" else "cpu"
    peak = peak_tflops(device_name, options.mixed_precision)
    flops = flops_of_image(UNet2DModel(**options.unet_config), (3, options.resolution, options.resolution))
    print(
        f"{device_name}, {options.mixed_precision}, UNet {options.unet}, {options.batch_size} images a step, "
        f"{flops / 1e9:.2f} GFLOPs an image, engine {'compiled' if options.compile else 'not compiled'}"
    )
    for name, values in speeds.items():
        speed = statistics.median(values)
        words = [f"{name:8} {speed:8.1f} images/s (from {min(values):.1f} to {max(values):.1f})"]
        words += [f"{speed * flops / 1e12:.3g} TFLOP/s"]
        words += [f"MFU {speed * flops / (peak * 1e12):.1%}"] if peak else []
        words += [f"peak memory {memory[name]:,.0f} MiB"] if memory else []
        print(", ".join(words))
    ratios = {}
    for ours in {"engine", "defaults"} & speeds.keys():
        for peer in {"plain", "example"} & speeds.keys():
            ratio = statistics.median(a / b for a, b in zip(speeds[ours], speeds[peer], strict=True))
            ratios[f"{ours} / {peer}"] = ratio
            print(f"{ours} / {peer}: {ratio:.3f} (median over {options.rounds} turns)")
    print(f"engine waits for data: {wait_share:.2%} of its time")
    if options.json_file is not None:
        found = {"device": device_name, "gflop_per_image": flops / 1e9, "peak_tflops": peak, "images_per_s": speeds}
        found |= {"ratios": ratios, "wait_share": wait_share, "memory_mib": memory}
        Path(options.json_file).write_text(json.dumps(found, indent=1), encoding="utf-8")


def main() -> None:
    options = parse_options(BenchmarkOptions, __doc__)
    options.resolve()
    import numpy as np
    from PIL import Image

    from trainkit.training.throughput import memory_peak_mib

    measured = options.loops if options.memory and not options.only else ()
    memory = {name: peak_memory_mib(options, name) for name in measured}
    with tempfile.TemporaryDirectory() as folder:
        work, files = Path(folder), Path(folder) / "images"
        files.mkdir()
        pixels = np.random.default_rng(0).integers(
            0, 256, (NUM_IMAGES, options.resolution, options.resolution, 3), dtype=np.uint8
        )
        for i, image in enumerate(pixels):
            Image.fromarray(image).save(files / f"{i:05d}.png")
        wanted = [options.only] if options.only else options.loops
        functions = (engine, defaults, plain, example)
        loops = {loop.__name__: loop(options, files, work) for loop in functions if loop.__name__ in wanted}
        speeds: dict[str, list[float]] = {name: [] for name in loops}
        wait_shares: list[float] = []
        waited_before = 0.0
        for round_number in range(options.rounds + 1):
            for name, loop in loops.items():
                speed, waited = turn(loop, options)
                if round_number:  # the first turn warms up
                    speeds[name].append(speed)
                if name == "engine":
                    seconds = options.steps * options.batch_size / speed
                    wait_shares.append((waited - waited_before) / seconds)
                    waited_before = waited
        for loop in loops.values():
            loop.close()
    if options.only:
        print(f"{memory_peak_mib(options.device):.1f}")
    else:
        report(options, speeds, statistics.median(wait_shares[1:] or [0.0]), memory)


if __name__ == "__main__":
    run_script(main)
