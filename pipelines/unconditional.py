"""Images from an unconditional UNet, by any scheduler of diffusers. This file is saved beside the models it can sample:

pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline="unconditional", trust_remote_code=True)
pipeline.scheduler = UniPCMultistepScheduler.from_pretrained(folder, subfolder="schedulers/unipc")
images = pipeline(batch_size=16, num_inference_steps=10).images

DDPMPipeline loads the same folder, but it cannot run schedulers that take no generator (UniPC, DEIS, Heun), and it
samples garbage with those that scale the noise or the model's input (Euler, Heun).
"""  # needs torch and diffusers

# B images, C channels, H/W pixels

import inspect
import json
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor


def solve(
    scheduler,
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    noise: torch.Tensor,
    num_inference_steps: int,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> torch.Tensor:
    """The samples (B, C, H, W) that `scheduler` makes of `noise` (B, C, H, W), drawn from a standard normal.

    `predict(sample, timestep)` returns the model's prediction (B, C, H, W); `timestep` is a tensor without dimensions.
    The noise and the model's input are scaled as the scheduler requires, which does nothing for most of them.
    `generator` draws the noise of stochastic schedulers: a list has one per image.
    """
    scheduler.set_timesteps(num_inference_steps, device=noise.device)
    accepted = inspect.signature(scheduler.step).parameters
    extra = {"generator": generator} if "generator" in accepted else {}
    scale_model_input = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
    sample = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for timestep in scheduler.timesteps:
        prediction = predict(scale_model_input(sample, timestep), timestep)
        sample = scheduler.step(prediction, timestep, sample, **extra, return_dict=False)[0]
    return sample


class UnconditionalPipeline(DiffusionPipeline):
    """Generates images from noise with a UNet2DModel and any scheduler of diffusers.

    The images are bit for bit those of DDPMPipeline with the schedulers that it can run.
    """

    model_cpu_offload_seq = "unet"
    _source = Path(__file__).read_text(encoding="utf-8")  # kept: diffusers overwrites its copy of a loaded file

    def __init__(self, unet: UNet2DModel, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

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
        num_inference_steps: int = 20,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Generate `batch_size` images.

        Args:
            generator: a list has one per image, so that images do not depend on each other.
            output_type: "pil", "np" (B, H, W, C) or "pt" (B, C, H, W) in [0, 1].
        """
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type {output_type}: use pil, np or pt")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"generator: {len(generator)} generators for {batch_size} images")
        size = self.unet.config.sample_size
        shape = (batch_size, self.unet.config.in_channels, *((size, size) if isinstance(size, int) else size))
        noise = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        order = getattr(self.scheduler, "order", 1)  # of Heun 2: two calls in each step but the last
        with self.progress_bar(total=order * num_inference_steps - (order - 1)) as bar:

            def predict(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
                bar.update()
                return self.unet(sample.to(self.unet.dtype), timestep).sample.float()

            images = solve(self.scheduler, predict, noise, num_inference_steps, generator)
        images = (images / 2 + 0.5).clamp(0, 1)
        self.maybe_free_model_hooks()
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)
