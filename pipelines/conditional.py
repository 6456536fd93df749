"""Images from class labels, vectors or prompts. This file is saved inside the models it belongs to:

pipeline = DiffusionPipeline.from_pretrained("folder or Hub id", trust_remote_code=True)
images = pipeline(class_labels=["cat", 3], guidance_scale=2.0).images
"""  # needs torch, diffusers, numpy and, for prompts, transformers

# B images, C channels, H/W pixels or latents, D numbers of a vector, L tokens, K classes

import difflib
import inspect
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, UNet2DConditionModel, UNet2DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils.torch_utils import randn_tensor

MAX_PROMPT_LENGTH = 512  # tokens, for an encoder without a limit


def encode_prompts(
    tokenizer, text_encoder, prompts: Sequence[str], prompt_length: int | None = None, device=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states (B, L, width) of a transformers encoder, and the mask (B, L) of tokens that are not padding.

    Every prompt is padded to `prompt_length` tokens (None: the encoder's limit), so its encoding does not depend on
    the others. `device` is where the encoder runs, if its weights are stored elsewhere (offloading).

    Raises:
        ValueError: a prompt has more tokens than that.
    """
    length = check_prompts(tokenizer, text_encoder, prompts, prompt_length)
    tokens = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    device = device or next(text_encoder.parameters()).device
    mask = tokens.attention_mask.to(device)
    with torch.no_grad():
        states = text_encoder(input_ids=tokens.input_ids.to(device), attention_mask=mask).last_hidden_state
    return states, mask


def check_prompts(tokenizer, text_encoder, prompts: Sequence[str], prompt_length: int | None = None) -> int:
    """The tokens L that every prompt is padded to; `ValueError` for a prompt that has more."""
    positions = getattr(text_encoder.config, "max_position_embeddings", None) or MAX_PROMPT_LENGTH
    length = prompt_length or min(tokenizer.model_max_length, positions, MAX_PROMPT_LENGTH)
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise ValueError(f"prompt: {prompt!r} is not a string")
        tokens = len(tokenizer(prompt, truncation=False, verbose=False).input_ids)
        if tokens > length:
            raise ValueError(f"prompt: {prompt[:40]!r} has {tokens} tokens, the model accepts {length}: shorten it")
    return length


def noise_level(scheduler, index: int, timestep: torch.Tensor) -> float:
    """The noise level at a step: sigma of Karras et al. 2022, noise relative to the image."""
    if "FlowMatch" in type(scheduler).__name__ or scheduler.config.get("use_flow_sigmas"):
        sigma = float(scheduler.sigmas[index])
        return math.inf if sigma >= 1 else sigma / (1 - sigma)
    if hasattr(scheduler, "alphas_cumprod"):
        alphas_cumprod = scheduler.alphas_cumprod.cpu().double().numpy()  # MPS has no float64
        alpha = np.interp(float(timestep), np.arange(len(alphas_cumprod)), alphas_cumprod)
        return math.inf if alpha <= 0 else math.sqrt((1 - alpha) / alpha)
    return float(scheduler.sigmas[index])


def checked_interval(scale: float, interval: Sequence[float] | None, rescale: float) -> tuple[float, float]:
    """The noise levels (low, high) to guide between; `ValueError` for invalid guidance."""
    if not 1 <= scale < math.inf:
        raise ValueError(f"guidance_scale {scale} must be at least 1 (no guidance)")
    if not 0 <= rescale <= 1:
        raise ValueError(f"guidance_rescale {rescale} must be 0 to 1")
    if interval is None:
        return 0.0, math.inf
    if len(interval) != 2 or not 0 <= interval[0] < interval[1]:
        raise ValueError(f"guidance_interval {interval}: give two noise levels, the lower first, both at least 0")
    return interval[0], interval[1]


def check_output(num_images_per_prompt: int, num_inference_steps: int | None, output_type: str, tensors: set) -> None:
    """Raise `ValueError` for counts below 1, unknown output types and unknown callback tensors."""
    if num_images_per_prompt < 1 or (num_inference_steps is not None and num_inference_steps < 1):
        raise ValueError("num_images_per_prompt and num_inference_steps must be at least 1")
    if output_type not in ("pil", "np", "pt", "latent"):
        raise ValueError(f"output_type {output_type!r} is none of pil, np, pt, latent")
    if not tensors <= {"latents"}:
        raise ValueError("callback_on_step_end_tensor_inputs: only ['latents'] can be given")


def rescaled(guided: torch.Tensor, conditional: torch.Tensor, factor: float) -> torch.Tensor:
    """`guided` with its contrast rescaled towards that of `conditional` (Lin et al. 2023, Eq. 15 and 16)."""
    axes = list(range(1, guided.ndim))
    matched = guided * (conditional.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True))
    return factor * matched + (1 - factor) * guided


class ConditionalPipeline(DiffusionPipeline):
    """Samples a UNet that was trained with class labels, vectors or prompts, in pixels or, with a `vae`, in latents.

    Args:
        unet: a UNet2DModel for labels (`num_class_embeds` is K + 1, the last one null) and vectors (`class_embed_type`
            "identity"), a UNet2DConditionModel for prompts.
        scheduler: any scheduler of diffusers that matches the training.
        vector_embedding: vectors to the UNet's embedding; a row of NaN is null.
        text_encoder, tokenizer: from transformers. The null prompt is the empty string. vae: decodes latents.
        guidance_unet: a weaker UNet to guide away from (Karras et al. 2024), instead of from the null condition.
        guidance_vector_embedding: the guide's embedding of vectors; None if it shares `vector_embedding`.
        id2label: names of the classes. prompt_length: tokens of padded prompts; None for the encoder's limit.
        unet_timesteps: timesteps of the UNet by those of the scheduler, if they differ (few-step students).
    """

    model_cpu_offload_seq = "text_encoder->vector_embedding->unet->vae"
    _optional_components = [
        "vector_embedding", "text_encoder", "tokenizer", "vae", "guidance_unet", "guidance_vector_embedding",
    ]  # fmt: skip
    _callback_tensor_inputs = ["latents"]
    _source = Path(__file__).read_text(encoding="utf-8")  # kept: diffusers overwrites its copy of a loaded file

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
        id2label: dict | None = None,
        prompt_length: int | None = None,
        unet_timesteps: list[int] | None = None,
    ):
        super().__init__()
        self.register_modules(
            unet=unet, scheduler=scheduler, vector_embedding=vector_embedding, text_encoder=text_encoder,
            tokenizer=tokenizer, vae=vae, guidance_unet=guidance_unet,
            guidance_vector_embedding=guidance_vector_embedding,
        )  # fmt: skip
        names = None if id2label is None else {int(label): str(name) for label, name in id2label.items()}
        self.register_to_config(id2label=names, prompt_length=prompt_length, unet_timesteps=unet_timesteps)

    @property
    def condition(self) -> str:
        """The name of the argument with the condition: "class_labels", "vectors" or "prompt"."""
        if self.text_encoder is not None:
            return "prompt"
        return "class_labels" if self.vector_embedding is None else "vectors"

    @property
    def num_classes(self) -> int:
        return self.unet.config.num_class_embeds - 1

    def to_json_string(self) -> str:
        """The content of model_index.json, with the classes saved in this folder named by their files."""
        config = json.loads(super().to_json_string())
        config.pop("_name_or_path", None)  # a path of the machine it was loaded on
        config["_class_name"] = ["conditional", "ConditionalPipeline"]
        for name in ("vector_embedding", "guidance_vector_embedding"):
            if config[name][0] is not None:
                config[name] = ["vector_embedding", "VectorEmbedding"]
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def save_config(self, save_directory, push_to_hub: bool = False, **kwargs) -> None:
        """Write model_index.json and a copy of this file."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / "conditional.py").write_text(self._source, encoding="utf-8")
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    def encode_labels(self, labels) -> torch.Tensor:
        """Labels (B,) from ids, names and None (null), one or several; a number that is not a name is an id."""
        labels = labels.reshape(-1).tolist() if isinstance(labels, torch.Tensor | np.ndarray) else labels
        labels = list(labels) if isinstance(labels, list | tuple | range) else [labels]
        ids = {name: label for label, name in (self.config.id2label or {}).items()}
        return torch.tensor([self._label_id(label, ids) for label in labels], device=self._execution_device)

    def _label_id(self, label, ids: dict[str, int]) -> int:
        if label is None:
            return self.num_classes
        if isinstance(label, str) and label in ids:
            return int(ids[label])
        if isinstance(label, str) and not label.isdecimal():
            nearest = difflib.get_close_matches(label, ids, n=1, cutoff=0)
            hint = f"did you mean {nearest[0]!r}?" if nearest else "the model has no names, give ids"
            raise ValueError(f"class_labels: no class is called {label!r}: {hint}")
        if not isinstance(label, str) and (np.ndim(label) or not math.isfinite(label) or label != int(label)):
            raise ValueError(f"class_labels: {label} is not a whole number")
        if not 0 <= int(label) < self.num_classes:
            raise ValueError(f"class_labels: {label} must be 0 to {self.num_classes - 1} (None is the null class)")
        return int(label)

    def check_vectors(self, vectors) -> torch.Tensor:
        """Vectors (B, D) float32 from one or several, in a tensor, an array or lists; None or all NaN is null."""
        length = self.vector_embedding.config.vector_length
        if isinstance(vectors, list | tuple):
            given = vectors if any(row is None or np.ndim(row) > 0 for row in vectors) else [vectors]
            rows = [np.full(length, np.nan) if row is None else np.asarray(row, dtype=np.float64) for row in given]
            wrong = next((row for row in rows if row.shape != (length,)), None)
            if wrong is not None:
                raise ValueError(f"vectors: {wrong.size} numbers in a vector, the model accepts {length}")
            vectors = np.stack(rows)
        vectors = torch.as_tensor(vectors, dtype=torch.float32, device=self._execution_device)
        vectors = vectors[None] if vectors.ndim == 1 else vectors
        if vectors.ndim != 2 or vectors.shape[1] != length:
            raise ValueError(f"vectors: shape {tuple(vectors.shape)}, the model accepts (images, {length})")
        if not (vectors.isfinite().all(dim=1) | vectors.isnan().all(dim=1)).all():
            raise ValueError("vectors: every number must be finite; None, or a row of NaN, is the null condition")
        return vectors

    def encode(self, conditions, copies: int = 1) -> tuple[list[dict], int]:
        """The UNet's arguments for the condition, the null condition and the condition of `guidance_unet`, and B."""
        if self.condition == "prompt":
            prompts = [conditions] if isinstance(conditions, str) else list(conditions)
            text = self._encode_text(["" if prompt is None else prompt for prompt in prompts])
            empty = self._encode_text([""])
            encoded = [text, {name: rows.expand_as(text[name]) for name, rows in empty.items()}, text]
        elif self.condition == "vectors":
            vectors = self.check_vectors(conditions)
            null = torch.full_like(vectors, torch.nan)
            weak = self.guidance_vector_embedding or self.vector_embedding
            pairs = ((self.vector_embedding, vectors), (self.vector_embedding, null), (weak, vectors))
            encoded = [{"class_labels": embed(rows)} for embed, rows in pairs]
        else:
            labels = self.encode_labels(conditions)
            null = torch.full_like(labels, self.num_classes)
            encoded = [{"class_labels": rows} for rows in (labels, null, labels)]
        guide = self.guidance_unet
        if guide is not None and self.condition != "prompt" and guide.class_embedding is None:  # unconditional
            encoded[2] = {}
        encoded = [{name: rows.repeat_interleave(copies, 0) for name, rows in one.items()} for one in encoded]
        return encoded, len(next(iter(encoded[0].values())))

    def _encode_text(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        parts = self.tokenizer, self.text_encoder, prompts, self.config.prompt_length
        states, mask = encode_prompts(*parts, device=self._execution_device)
        return {"encoder_hidden_states": states.to(self.unet.dtype), "encoder_attention_mask": mask}

    def _given(self, **arguments):
        """The condition that the model accepts; `ValueError` if it is missing or another one is given."""
        for name, value in arguments.items():
            if value is not None and name != self.condition:
                raise ValueError(f"{name}: this model accepts {self.condition}")
        if (given := arguments[self.condition]) is None:
            raise ValueError(f"{self.condition} is missing: say what to make ([None] for the null condition)")
        if (isinstance(given, list | tuple) and not given) or getattr(given, "shape", ())[:1] == (0,):
            raise ValueError(f"{self.condition}: the list is empty")
        return given

    def _start(self, batch_size: int, generator, latents: torch.Tensor | None) -> torch.Tensor:
        size = self.unet.config.sample_size
        shape = (batch_size, self.unet.config.in_channels, *((size, size) if isinstance(size, int) else size))
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
        sample, (condition, null, weak) = sample.to(self.unet.dtype), encoded
        if not guided:
            return self.unet(sample, timestep, **condition).sample.float()
        if self.guidance_unet is None:
            both = {name: torch.cat([null[name], condition[name]]) for name in condition}
            reference, conditional = self.unet(torch.cat([sample, sample]), timestep, **both).sample.float().chunk(2)
        else:
            conditional = self.unet(sample, timestep, **condition).sample.float()
            reference = self.guidance_unet(sample, timestep, **weak).sample.float()
        prediction = reference + self._guidance_scale * (conditional - reference)  # Ho & Salimans 2022, Eq. 6
        return rescaled(prediction, conditional, rescale) if rescale else prediction

    def _finish(self, latents: torch.Tensor, output_type: str):
        if output_type == "latent":
            return latents
        if self.vae is not None:
            latents = latents / self.vae.config.scaling_factor + (self.vae.config.get("shift_factor") or 0.0)
            latents = self.vae.decode(latents.to(self.vae.dtype)).sample.float()
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
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float = 0.0,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Generate `num_images_per_prompt` images per label, vector or prompt; None in a list is the null condition.

        Args:
            num_inference_steps: None for 20, or for all steps of a few-step student.
            guidance_scale: 1 means no guidance and needs one UNet call per step; larger scales need two.
            guidance_interval: noise levels sigma to guide at, low < sigma <= high (Kynkaanniemi et al. 2024).
            guidance_rescale: 0 to 1, against the over-exposure of high scales (Lin et al. 2023, section 3.4).
            eta: of DDIM; 0 is deterministic. generator: a list has one per image, which makes images independent.
            output_type: "pil", "np" (B, H, W, C) and "pt" (B, C, H, W) in [0, 1], or "latent", the output of the UNet.
            callback_on_step_end: called as (pipeline, step, timestep, tensors) and returns tensors, as in diffusers.
        """
        conditions = self._given(class_labels=class_labels, vectors=vectors, prompt=prompt)
        low, high = checked_interval(guidance_scale, guidance_interval, guidance_rescale)
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        tensor_names = set(callback_on_step_end_tensor_inputs or ())
        check_output(num_images_per_prompt, num_inference_steps, output_type, tensor_names)
        self._guidance_scale, self._interrupt = guidance_scale, False
        encoded, batch_size = self.encode(conditions, num_images_per_prompt)
        most = self.scheduler.config.get("original_inference_steps") or self.scheduler.config.num_train_timesteps
        self.scheduler.set_timesteps(num_inference_steps or min(20, most), device=self._execution_device)
        latents = self._start(batch_size, generator, latents)
        accepted = inspect.signature(self.scheduler.step).parameters
        extra = {name: value for name, value in (("generator", generator), ("eta", eta)) if name in accepted}
        self.num_timesteps = len(timesteps := self.scheduler.timesteps)
        scale_model_input = getattr(self.scheduler, "scale_model_input", lambda sample, timestep: sample)
        with self.progress_bar(total=len(timesteps)) as bar:
            for index, timestep in enumerate(timesteps):
                if self._interrupt:
                    continue
                guided = self._guidance_scale > 1 and low < noise_level(self.scheduler, index, timestep) <= high
                scaled = scale_model_input(latents, timestep)
                prediction = self._predict(scaled, timestep, encoded, guided, guidance_rescale)
                latents = self.scheduler.step(prediction, timestep, latents, **extra, return_dict=False)[0]
                if callback_on_step_end is not None:
                    tensors = {"latents": latents} if tensor_names else {}
                    latents = (callback_on_step_end(self, index, timestep, tensors) or {}).get("latents", latents)
                bar.update()
        images = self._finish(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
