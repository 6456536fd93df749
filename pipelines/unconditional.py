"""Images from an unconditional UNet, by any scheduler of diffusers. This file is saved inside the models it samples:

pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline="unconditional", trust_remote_code=True)
pipeline.scheduler = UniPCMultistepScheduler.from_pretrained(folder, subfolder="schedulers/unipc")
images = pipeline(batch_size=16, num_inference_steps=10).images

DDPMPipeline loads the same folder, but it cannot run schedulers that take no generator (UniPC, DEIS, Heun), and it
samples garbage with those that scale the noise or the model's input (Euler, Heun).

A model of latents names this file in its model_index.json, so `custom_pipeline` is not needed. LDMPipeline of
diffusers does not fit: it ignores the VAE's `shift_factor` and, in stochastic schedulers, the generator. It raises for
flow-matching schedulers, for latents that are not square, and with CPU offload.
"""  # needs torch and diffusers

# B images, C channels, H/W pixels or latents

import inspect
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor


def solve(
    scheduler,
    predict: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor],
    start: torch.Tensor,
    generators: torch.Generator | list[torch.Generator] | None = None,
    step_noise: Iterable[torch.Tensor | None] | None = None,
) -> torch.Tensor:
    """Run `scheduler`, whose timesteps are set, from `start`, standard normal noise; returns the samples (B, C, H, W).

    `predict(call, timestep, sample)` returns the model's prediction (B, C, H, W); `call` counts from 0 and `timestep`
    is a tensor without dimensions. Noise and input are scaled as the scheduler requires. `generators` draw the noise
    of a stochastic scheduler, one per image in a list; or `step_noise` yields it, one entry per timestep.
    """
    for sample in solve_steps(scheduler, predict, start, generators, step_noise):  # noqa: B007
        pass
    return sample


def solve_steps(
    scheduler,
    predict: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor],
    start: torch.Tensor,
    generators: torch.Generator | list[torch.Generator] | None = None,
    step_noise: Iterable[torch.Tensor | None] | None = None,
) -> Iterator[torch.Tensor]:
    """Yield the sample (B, C, H, W) after each timestep of `solve`, whose arguments it takes."""
    accepted = inspect.signature(scheduler.step).parameters
    extra = {"generator": generators} if "generator" in accepted else {}
    scale_model_input = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
    noises = None if step_noise is None else iter(step_noise)
    sample = start * getattr(scheduler, "init_noise_sigma", 1.0)
    for call, timestep in enumerate(scheduler.timesteps):
        noise = None if noises is None else next(noises)
        given = {} if noise is None else {"variance_noise": noise.to(sample.device, non_blocking=True)}
        prediction = predict(call, timestep, scale_model_input(sample, timestep))
        sample = scheduler.step(prediction, timestep, sample, **extra, **given, return_dict=False)[0]
        yield sample


class UnconditionalPipeline(DiffusionPipeline):
    """Generates images from noise with a UNet2DModel, in pixels or in the latents of a `vae`, and any scheduler.

    In pixels they are bit for bit those of DDPMPipeline with the schedulers that it can run.
    """

    model_cpu_offload_seq = "unet->vae"
    _optional_components = ["vae"]
    _source = Path(__file__).read_text(encoding="utf-8")  # kept: diffusers overwrites its copy of a loaded file

    def __init__(self, unet: UNet2DModel, scheduler, vae: AutoencoderKL | None = None):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)

    def to_json_string(self) -> str:
        """The content of model_index.json, with this class named by its file in the same folder."""
        config = json.loads(super().to_json_string())
        config.pop("_name_or_path", None)  # a path of the machine it was loaded on
        return json.dumps(config | {"_class_name": ["unconditional", "UnconditionalPipeline"]}, indent=2) + "\n"

    def save_config(self, save_directory, push_to_hub: bool = False, **kwargs) -> None:
        """Write model_index.json and a copy of this file."""
        self.save_source(Path(save_directory))
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def save_source(cls, folder: Path) -> None:
        """Write this file to `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "unconditional.py").write_text(cls._source, encoding="utf-8")

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Generate `batch_size` images.

        Args:
            generator: a list has one per image, so that images do not depend on each other.
            num_inference_steps: None for 20, or for all steps of a few-step student.
            output_type: "pil", "np" (B, H, W, C) and "pt" (B, C, H, W) in [0, 1], or "latent", the output of the UNet.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type {output_type}: use pil, np, pt or latent")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"generator: {len(generator)} generators for {batch_size} images")
        size = self.unet.config.sample_size
        shape = (batch_size, self.unet.config.in_channels, *((size, size) if isinstance(size, int) else size))
        noise = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        most = self.scheduler.config.get("original_inference_steps") or self.scheduler.config.num_train_timesteps
        self.scheduler.set_timesteps(num_inference_steps or min(20, most), device=self._execution_device)
        with self.progress_bar(total=len(self.scheduler.timesteps)) as bar:

            def predict(call: int, timestep: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
                bar.update()
                return self.unet(sample.to(self.unet.dtype), timestep).sample.float()

            images = solve(self.scheduler, predict, noise, generator)
        made = self._finish(images, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=made) if return_dict else (made,)

    def _finish(self, samples: torch.Tensor, output_type: str):
        if output_type == "latent":
            return samples
        if self.vae is not None:
            config = self.vae.config
            samples = samples / config.scaling_factor + (config.get("shift_factor") or 0.0)
            samples = self.vae.decode(samples.to(self.vae.dtype)).sample.float()
        images = (samples / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        arrays = images.permute(0, 2, 3, 1).cpu().numpy()
        return arrays if output_type == "np" else self.numpy_to_pil(arrays)
