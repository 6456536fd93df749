"""Training speed: this engine against a plain loop around the same UNet, and against the diffusers example's loop.

    python benchmarks/train.py --rounds 6 --steps 20

The three take turns on the same images, UNet, batch, optimizer, EMA and precision, `--steps` optimizer steps a turn:
- plain: images in memory as float tensors, autocast, AdamW, clipping, EMA, nothing else
- example: the loop of diffusers' train_unconditional.py, its DataLoader over PNG files included
- engine: this project's Run, as train_unconditional.py drives it
Prints images/s of each (median over rounds) and the ratios of the engine to both.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trainkit.config import option, parse_options  # noqa: E402
from trainkit.errors import run_script  # noqa: E402

SIDE, NUM_IMAGES = 32, 2000
UNET = {
    "sample_size": SIDE,
    "layers_per_block": 1,
    "block_out_channels": (32, 64, 128),
    "down_block_types": ("DownBlock2D",) * 3,
    "up_block_types": ("UpBlock2D",) * 3,
    "norm_num_groups": 8,
}


@dataclass
class BenchmarkOptions:
    """benchmark"""

    rounds: int = option(6, "turns each loop takes")
    steps: int = option(20, "optimizer steps a turn")
    batch_size: int = option(32, "images a step")
    mixed_precision: str = option("bf16", "autocast of all three", choices=("no", "bf16"))


def engine(options, files: Path, work: Path) -> Iterator[None]:
    """Optimizer steps of this project's Run, one a `next`."""
    from train_unconditional import Options
    from trainkit.data.cache import open_or_prepare
    from trainkit.diffusion.noise_schedule import build_noise_scheduler, uniform_timesteps
    from trainkit.diffusion.objective import denoising_errors
    from trainkit.diffusion.unet import build_unet
    from trainkit.training.launch import start_accelerator
    from trainkit.training.run import Run

    (work / "unet").mkdir()
    (work / "unet" / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"} | UNET))
    settings = Options(
        train_data_dir=str(files), cache_dir=str(work / "cache"), resolution=str(SIDE), center_crop=True,
        model_config_name_or_path=str(work / "unet"), output_dir=str(work / "model"),
        train_batch_size=options.batch_size, max_train_steps=10**6, checkpointing_steps=0, logger="none",
        mixed_precision=options.mixed_precision,
    )  # fmt: skip
    images = open_or_prepare(settings)
    accelerator = start_accelerator(settings.mixed_precision)
    noise_scheduler = build_noise_scheduler(settings)
    run = Run(settings, accelerator, build_unet(settings, SIDE, SIDE, 3), images)
    for batch in run.batches():
        timesteps = uniform_timesteps(batch.uniforms, settings.ddpm_num_steps)
        noisy_images = noise_scheduler.add_noise(batch.images, batch.noise, timesteps)
        prediction = run.model(noisy_images, timesteps).sample
        errors = denoising_errors(noise_scheduler, prediction, batch.images, batch.noise, timesteps)
        run.update(errors.mean())
        yield


def plain(options, files: Path, work: Path) -> Iterator[None]:
    """A textbook loop over images that are already float tensors in memory."""
    import numpy as np
    import torch
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.training_utils import EMAModel
    from PIL import Image

    images = np.stack([np.array(Image.open(path)) for path in sorted(files.iterdir())])
    images = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    unet, scheduler = UNet2DModel(**UNET), DDPMScheduler()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
    ema = EMAModel(unet.parameters(), use_ema_warmup=True, power=0.75)
    while True:
        batch = images[torch.randint(len(images), (options.batch_size,))]
        noise, timesteps = torch.randn_like(batch), torch.randint(1000, (options.batch_size,))
        noisy_images = scheduler.add_noise(batch, noise, timesteps)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.mixed_precision == "bf16"):
            prediction = unet(noisy_images, timesteps).sample
        torch.nn.functional.mse_loss(prediction.float(), noise).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        yield


def example(options, files: Path, work: Path) -> Iterator[None]:
    """What diffusers' example does in a step, torchvision's transforms told in Pillow and torch."""
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
            image = Image.open(paths[i]).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
            return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255).sub(0.5).div(0.5)

    accelerator = Accelerator(mixed_precision=options.mixed_precision)
    unet, scheduler = UNet2DModel(**UNET), DDPMScheduler()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
    loader = torch.utils.data.DataLoader(Images(), batch_size=options.batch_size, shuffle=True, drop_last=True)
    rates = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=10**6)
    unet, optimizer, loader, rates = accelerator.prepare(unet, optimizer, loader, rates)
    ema = EMAModel(unet.parameters(), use_ema_warmup=True, power=0.75)
    while True:
        for batch in loader:
            noise, timesteps = torch.randn_like(batch), torch.randint(1000, (options.batch_size,)).long()
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
            yield


def main() -> None:
    options = parse_options(BenchmarkOptions, __doc__)
    import numpy as np
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        work, files = Path(folder), Path(folder) / "images"
        files.mkdir()
        pixels = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, SIDE, SIDE, 3), dtype=np.uint8)
        for i, image in enumerate(pixels):
            Image.fromarray(image).save(files / f"{i:05d}.png")
        loops = {loop.__name__: loop(options, files, work) for loop in (engine, plain, example)}
        speeds: dict[str, list[float]] = {name: [] for name in loops}
        for turn in range(options.rounds + 1):
            for name, loop in loops.items():
                started = time.perf_counter()
                for _ in range(options.steps):
                    next(loop)
                if turn:  # the first turn warms up
                    speeds[name].append(options.steps * options.batch_size / (time.perf_counter() - started))
        for loop in loops.values():
            loop.close()
    median = {name: statistics.median(values) for name, values in speeds.items()}
    for name, values in speeds.items():
        print(f"{name:8} {median[name]:7.1f} images/s (from {min(values):.1f} to {max(values):.1f})")
    for peer in ("plain", "example"):
        ratio = statistics.median(a / b for a, b in zip(speeds["engine"], speeds[peer], strict=True))
        print(f"engine / {peer}: {ratio:.3f} (median over {options.rounds} turns)")


if __name__ == "__main__":
    run_script(main)
