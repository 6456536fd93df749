"""Images from class labels, vectors, prompts or other images. This file is saved inside the models it belongs to:

pipeline = DiffusionPipeline.from_pretrained("folder or Hub id", trust_remote_code=True)
images = pipeline(class_labels=["cat", 3], guidance_scale=2.0).images
"""  # needs torch, diffusers, numpy and, for prompts, transformers

# B images, C channels, H/W pixels or latents, D numbers of a vector, L tokens, K classes

import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, UNet2DConditionModel, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor

from .guidance import callback_tensors, check_guide, check_output, checked_interval, noise_level, rescaled
from .labels_and_vectors import check_counts, label_ids, vector_rows
from .prompts import encode_prompts

FILES = ("conditional.py", "guidance.py", "labels_and_vectors.py", "prompts.py")


def _call(unet, sample: torch.Tensor, timestep, image: torch.Tensor | None = None, **condition) -> torch.Tensor:
    """The UNet's prediction (B, C, H, W) float32; `image` (B, K, H, W) is concatenated to its input."""
    sample = sample if image is None else torch.cat([sample, image.to(sample.dtype)], dim=1)
    return unet(sample.to(unet.dtype), timestep, **condition).sample.float()


class ConditionalPipeline(DiffusionPipeline):
    """Samples a UNet that was trained with one or more conditions, in pixels or, with a `vae`, in latents.

    Args:
        unet: a UNet2DModel for labels (`num_class_embeds` is K + 1, the last one null) and vectors (`class_embed_type`
            "identity"), both together, or a UNet2DConditionModel for prompts.
        scheduler: any scheduler of diffusers that matches the training.
        vector_embedding: vectors, or classes and vectors, to the UNet's embedding; NaN is null.
        text_encoder, tokenizer: from transformers. The null prompt is the empty string. vae: of latents.
        guidance_unet: a weaker UNet to guide away from (Karras et al. 2024), instead of from the null condition.
        guidance_vector_embedding: the guide's embedding of vectors; None if it shares `vector_embedding`.
        image_input: turns other images into further input channels of the UNet.
        id2label: names of the classes. prompt_length: tokens of padded prompts; None for the encoder's limit.
        unet_timesteps: timesteps of the UNet by those of the scheduler, if they differ (few-step students).
    """

    model_cpu_offload_seq = "text_encoder->vector_embedding->image_input->unet->vae"
    _optional_components = [
        "vector_embedding", "text_encoder", "tokenizer", "vae", "guidance_unet", "guidance_vector_embedding",
        "image_input",
    ]  # fmt: skip
    _callback_tensor_inputs = ["latents"]
    # kept: diffusers overwrites its copies of loaded files
    _sources = {name: Path(__file__).with_name(name).read_text(encoding="utf-8") for name in FILES}

    def __init__(
        self,
        unet: UNet2DModel | UNet2DConditionModel,
        scheduler,
        vector_embedding: torch.nn.Module | None = None,
        text_encoder: torch.nn.Module | None = None,
        tokenizer=None,
        vae: AutoencoderKL | None = None,
        guidance_unet: UNet2DModel | UNet2DConditionModel | None = None,
        guidance_vector_embedding: torch.nn.Module | None = None,
        image_input: torch.nn.Module | None = None,
        id2label: dict | None = None,
        prompt_length: int | None = None,
        unet_timesteps: list[int] | None = None,
    ):
        super().__init__()
        self.register_modules(
            unet=unet, scheduler=scheduler, vector_embedding=vector_embedding, text_encoder=text_encoder,
            tokenizer=tokenizer, vae=vae, guidance_unet=guidance_unet,
            guidance_vector_embedding=guidance_vector_embedding, image_input=image_input,
        )  # fmt: skip
        names = None if id2label is None else {int(label): str(name) for label, name in id2label.items()}
        self._size: tuple[int, int] | None = None
        self.register_to_config(id2label=names, prompt_length=prompt_length, unet_timesteps=unet_timesteps)

    @property
    def conditions(self) -> tuple[str, ...]:
        """The names of the arguments with conditions: class_labels, vectors, prompt, image, mask_image."""
        accepted = {
            "class_labels": self.unet.config.num_class_embeds is not None,
            "vectors": self.vector_embedding is not None,
            "prompt": self.text_encoder is not None,
            "image": self.image_input is not None,
            "mask_image": self.image_input is not None and self.image_input.kind == "mask",
        }
        return tuple(name for name, is_accepted in accepted.items() if is_accepted)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of what the UNet generates unless an image decides."""
        size = self._size or self.unet.config.sample_size
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels of what is generated unless an image decides."""
        height, width = self.size
        return height * self.latent_factor, width * self.latent_factor

    @image_size.setter
    def image_size(self, size: tuple[int, int]) -> None:
        self._size = size[0] // self.latent_factor, size[1] // self.latent_factor

    @property
    def latent_factor(self) -> int:
        """Pixels of a latent along a side; 1 without `vae`."""
        return 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def image_divisor(self) -> int:
        """What height and width of an image must be multiples of."""
        return self.latent_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)

    @property
    def num_classes(self) -> int:
        return self.unet.config.num_class_embeds - 1

    def to_json_string(self) -> str:
        """The content of model_index.json, with the classes saved in this folder named by their files."""
        config = json.loads(super().to_json_string())
        config.pop("_name_or_path", None)  # a path of the machine it was loaded on
        config["_class_name"] = ["conditional", "ConditionalPipeline"]
        own = {"vector_embedding": "VectorEmbedding", "image_input": "ImageInput"}
        for name in ("vector_embedding", "guidance_vector_embedding", "image_input"):
            if config[name][0] is not None:
                file = name.removeprefix("guidance_")
                config[name] = [file, own[file]]
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def save_config(self, save_directory, push_to_hub: bool = False, **kwargs) -> None:
        """Write model_index.json and copies of this file and of those that it imports."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        for name, source in self._sources.items():
            (Path(save_directory) / name).write_text(source, encoding="utf-8")
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    def encode_labels(self, labels) -> torch.Tensor:
        """Labels (B,) from ids, names and None (null): see `label_ids`."""
        return torch.tensor(label_ids(labels, self.num_classes, self.config.id2label), device=self._execution_device)

    def check_vectors(self, vectors) -> torch.Tensor:
        """Vectors (B, D) float32 from one or several; None or all NaN is null: see `vector_rows`."""
        return vector_rows(vectors, self.vector_embedding.config.vector_length).to(self._execution_device)

    def encode(
        self, copies: int = 1, image_noise: float = 0.0, generator=None, **conditions
    ) -> tuple[list[dict], int, torch.Tensor | None]:
        """The UNet's inputs for the conditions, for null conditions and for `guidance_unet`, B, and known pixels.

        `conditions` has one entry or B for each of `self.conditions`; one that is missing is null. "image" in the
        result is concatenated to the UNet's input. The pixels are for `_finish`.
        """
        if (guide := self.guidance_unet) is not None:
            check_guide(self.unet, guide, self.vector_embedding, self.guidance_vector_embedding)
        labels, vectors, prompt = (conditions.get(name, [None]) for name in ("class_labels", "vectors", "prompt"))
        parts = []
        if self.vector_embedding is not None:
            parts.append(self._encode_vectors(vectors, labels))
        elif "class_labels" in self.conditions:
            parts.append(self._encode_labels(labels))
        if self.text_encoder is not None:
            parts.append(self._encode_prompts(prompt))
        pixels = None
        if self.image_input is not None:
            image, mask_image = conditions.get("image", [None]), conditions.get("mask_image")
            own = generator[::copies] if isinstance(generator, list) else generator
            given = image, mask_image, self.image_size, self.image_divisor, image_noise, own
            channels, null, pixels = self.image_input.encode(*given, vae=self.vae, device=self._execution_device)
            parts.append([{"image": one} for one in (channels, null, channels)])
        counts = [len(next(iter(part[0].values()))) for part in parts]
        check_counts(*counts)
        encoded = [{name: value for part in parts for name, value in part[role].items()} for role in range(3)]
        if guide is not None and guide.class_embedding is None:
            encoded[2].pop("class_labels", None)
        if guide is not None and guide.config.in_channels == guide.config.out_channels:
            encoded[2].pop("image", None)
        rows = torch.arange(max(counts)).repeat_interleave(copies).to(self._execution_device)
        encoded = [{name: value[rows % len(value)] for name, value in one.items()} for one in encoded]
        return encoded, len(rows), None if pixels is None else pixels[rows % len(pixels)]

    def _encode_labels(self, labels) -> list[dict]:
        labels = self.encode_labels(labels)
        null = torch.full_like(labels, self.num_classes)
        return [{"class_labels": rows} for rows in (labels, null, labels)]

    def _encode_vectors(self, vectors, labels) -> list[dict]:
        """Of vectors and, if the model takes both, classes, which the UNet gets as one embedding."""
        rows = self.check_vectors(vectors)
        if "class_labels" in self.conditions:
            ids = self.encode_labels(labels)[:, None].float()
            check_counts(len(ids), len(rows))
            count = max(len(ids), len(rows))
            rows = torch.cat([ids.expand(count, -1), rows.expand(count, -1)], dim=1)
        null = torch.full_like(rows, torch.nan)
        weak = self.guidance_vector_embedding or self.vector_embedding
        pairs = ((self.vector_embedding, rows), (self.vector_embedding, null), (weak, rows))
        return [{"class_labels": embed(given)} for embed, given in pairs]

    def _encode_prompts(self, prompts) -> list[dict]:
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        text = self._encode_text(["" if prompt is None else prompt for prompt in prompts])
        empty = self._encode_text([""])
        return [text, {name: rows.expand_as(text[name]) for name, rows in empty.items()}, text]

    def _encode_text(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        parts = self.tokenizer, self.text_encoder, prompts, self.config.prompt_length
        states, mask = encode_prompts(*parts, device=self._execution_device)
        return {"encoder_hidden_states": states.to(self.unet.dtype), "encoder_attention_mask": mask}

    def _given(self, **arguments) -> dict:
        """The conditions that are given; `ValueError` if none is, or if one is not accepted."""
        given = {name: value for name, value in arguments.items() if value is not None}
        for name, value in given.items():
            if name not in self.conditions:
                raise ValueError(f"{name}: this model accepts {' and '.join(self.conditions)}")
            if (isinstance(value, list | tuple) and not value) or getattr(value, "shape", ())[:1] == (0,):
                raise ValueError(f"{name}: the list is empty")
        if not given:
            missing = " and ".join(self.conditions)
            raise ValueError(f"{missing} is missing: say what to make ([None] for the null condition)")
        return given

    def _start(self, batch_size: int, generator, latents: torch.Tensor | None, image=None) -> torch.Tensor:
        size = self.size if image is None else image.shape[-2:]
        shape = (batch_size, self.unet.config.out_channels, *size)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"generator: {len(generator)} generators for {batch_size} images")
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents: shape {tuple(latents.shape)}, expected {shape}")
        return latents.to(self._execution_device, torch.float32) * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def _predict(self, sample, timestep, encoded: list[dict], guided: bool, rescale: float) -> torch.Tensor:
        """The UNet's prediction (B, C, H, W) float32, guided by the null condition or by `guidance_unet`."""
        if self.config.unet_timesteps is not None:
            timestep = torch.tensor(self.config.unet_timesteps, device=timestep.device)[timestep]
        condition, null, weak = encoded
        if not guided:
            return _call(self.unet, sample, timestep, **condition)
        if self.guidance_unet is None:
            both = {name: torch.cat([null[name], condition[name]]) for name in condition}
            reference, conditional = _call(self.unet, torch.cat([sample, sample]), timestep, **both).chunk(2)
        else:
            conditional = _call(self.unet, sample, timestep, **condition)
            reference = _call(self.guidance_unet, sample, timestep, **weak)
        prediction = reference + self._guidance_scale * (conditional - reference)  # Ho & Salimans 2022, Eq. 6
        return rescaled(prediction, conditional, rescale) if rescale else prediction

    def _set_timesteps(self, num_inference_steps: int | None) -> torch.Tensor:
        most = self.scheduler.config.get("original_inference_steps") or self.scheduler.config.num_train_timesteps
        self.scheduler.set_timesteps(num_inference_steps or min(20, most), device=self._execution_device)
        self.num_timesteps = len(self.scheduler.timesteps)
        return self.scheduler.timesteps

    def _step_arguments(self, **arguments) -> dict:
        """Those of `arguments` that the scheduler accepts."""
        accepted = inspect.signature(self.scheduler.step).parameters
        return {name: value for name, value in arguments.items() if name in accepted}

    def _finish(self, latents: torch.Tensor, output_type: str, pixels: torch.Tensor | None = None):
        if self.vae is not None and output_type == "latent":
            return latents
        if self.vae is not None:
            latents = latents / self.vae.config.scaling_factor + (self.vae.config.get("shift_factor") or 0.0)
            latents = self.vae.decode(latents.to(self.vae.dtype)).sample.float()
        if pixels is not None:
            latents = self.image_input.keep_known(latents, pixels)
        if output_type == "latent":
            return latents
        images = (latents / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        arrays = images.permute(0, 2, 3, 1).cpu().numpy()
        return arrays if output_type == "np" else self.numpy_to_pil(arrays)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence | torch.Tensor | None = None,
        vectors: Sequence | np.ndarray | torch.Tensor | None = None,
        prompt: str | Sequence[str] | None = None,
        image=None,
        mask_image=None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float = 0.0,
        image_noise: float = 0.0,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Generate `num_images_per_prompt` images per condition; None in a list is the null condition.

        Args:
            image, mask_image: PIL images, arrays or tensors, one or several: see `ImageInput`. White is generated.
            num_inference_steps: None for 20, or for all steps of a few-step student.
            guidance_scale: 1 means no guidance and needs one UNet call per step; larger scales need two.
            guidance_interval: noise levels sigma to guide at, low < sigma <= high (Kynkaanniemi et al. 2024).
            guidance_rescale: 0 to 1, against the over-exposure of high scales (Lin et al. 2023, section 3.4).
            image_noise: deviation of noise to add to small images, against their faults. eta: of DDIM.
            generator: a list has one per image, which makes images independent of each other.
            output_type: pil, np (B, H, W, C) and pt (B, C, H, W) in [0, 1], or latent, the output of the UNet.
            callback_on_step_end: called as (pipeline, step, timestep, tensors) and returns tensors, as in diffusers.
        """
        pictures = {"image": image, "mask_image": mask_image}
        conditions = self._given(class_labels=class_labels, vectors=vectors, prompt=prompt, **pictures)
        low, high = checked_interval(guidance_scale, guidance_interval, guidance_rescale)
        tensor_names = callback_tensors(callback_on_step_end, callback_on_step_end_tensor_inputs)
        check_output(num_images_per_prompt, num_inference_steps, output_type)
        self._guidance_scale, self._interrupt = guidance_scale, False
        encoded, batch_size, pixels = self.encode(num_images_per_prompt, image_noise, generator, **conditions)
        timesteps = self._set_timesteps(num_inference_steps)
        latents = self._start(batch_size, generator, latents, encoded[0].get("image"))
        extra = self._step_arguments(generator=generator, eta=eta)
        scale = getattr(self.scheduler, "scale_model_input", lambda sample, timestep: sample)
        with self.progress_bar(total=len(timesteps)) as bar:
            for index, timestep in enumerate(timesteps):
                if self._interrupt:
                    continue
                guided = self._guidance_scale > 1 and low < noise_level(self.scheduler, index, timestep) <= high
                prediction = self._predict(scale(latents, timestep), timestep, encoded, guided, guidance_rescale)
                latents = self.scheduler.step(prediction, timestep, latents, **extra, return_dict=False)[0]
                if callback_on_step_end is not None:
                    tensors = {"latents": latents} if tensor_names else {}
                    latents = (callback_on_step_end(self, index, timestep, tensors) or {}).get("latents", latents)
                bar.update()
        images = self._finish(latents, output_type, pixels)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
