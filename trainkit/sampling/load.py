"""The parts of a saved pipeline, from a local folder or the Hub, without executing anything in it."""

import json
import re
from pathlib import Path
from typing import Any

import transformers
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel, UNet2DModel

from pipelines.conditional import ConditionalPipeline
from pipelines.image_input import ImageInput
from pipelines.unconditional import UnconditionalPipeline
from pipelines.vector_embedding import VectorEmbedding
from trainkit.diffusion.unet import load_any_variant
from trainkit.errors import UserError, one_line
from trainkit.sampling.generate import Pipeline
from trainkit.sampling.weights import CONDITIONAL_FILES, CONFIG_NAME, WEIGHTS_STEM, unet_folder

FLAG = "--model_name_or_path"
VAE_CLASSES = {"AutoencoderKL": AutoencoderKL}
# What is fetched from the Hub. Older pipelines keep UNet and scheduler at the top of the repository.
HUB_FILES = [
    "model_index.json",
    f"unet/{CONFIG_NAME}",
    f"unet/{WEIGHTS_STEM}*.safetensors*",
    "scheduler/*.json",
    "schedulers/*/*.json",
    CONFIG_NAME,
    f"{WEIGHTS_STEM}*.safetensors*",
    "scheduler_config.json",
    "sampling_table.json",
]
STOCK_PIPELINES = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline")  # all of the same two parts: unet and scheduler
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
PICKLED = [f"unet/{WEIGHTS_STEM}.bin", f"{WEIGHTS_STEM}.bin"]


def find_pipeline(name_or_path: str) -> Path:
    """The local folder of a pipeline; a Hub id is downloaded into the Hub's cache first.

    Raises:
        UserError: there is no such folder or repository, or it holds another kind of pipeline.
    """
    folder = Path(name_or_path) if Path(name_or_path).is_dir() else _download(name_or_path)
    _check_pipeline_class(folder)
    if hint := _another_folder(folder):
        raise UserError(f"{FLAG} {name_or_path} {hint}")
    if not (unet_folder(folder) / CONFIG_NAME).is_file():
        raise UserError(f"{FLAG} {name_or_path}: no unet/{CONFIG_NAME} there; use the folder of a saved pipeline")
    return folder


def _another_folder(folder: Path) -> str | None:
    """What a folder without a saved pipeline is, and which folder is probably meant; None for every other folder."""
    folder = folder.absolute()
    if (folder / "model_index.json").is_file():
        return None
    if (folder.parent / "model_index.json").is_file() and (folder / CONFIG_NAME).is_file():
        return f"is a part of a saved pipeline: give {folder.parent}"
    if (folder / "training_state.json").is_file():
        if (folder.parent / "model_index.json").is_file():
            return f"is a checkpoint, which is for resuming: give {folder.parent}, where the pipeline is saved"
        return (
            "is a checkpoint of a run that has not saved a pipeline yet: resume the run with "
            f"--output_dir {folder.parent} --resume_from_checkpoint latest, or set --save_model_epochs"
        )
    if (folder / "preparation.json").is_file():
        return "is a prepared dataset: give the --output_dir of a training run"
    if any(folder.glob("checkpoint-*/training_state.json")):
        return (
            "is the folder of a run that has not saved a pipeline yet: it does so every --save_model_epochs and at "
            "the end"
        )
    return None


def load_pipeline(folder: Path, scheduler: SchedulerMixin) -> Pipeline:
    """The pipeline of a saved folder with `scheduler`, in evaluation mode, float32, on the CPU.

    Our own classes around the saved components: no code in the folder is executed.

    Raises:
        UserError: a component has an unsupported class, or cannot be read.
    """
    path = folder / "model_index.json"
    index = _read_json(path) if path.is_file() else {}
    if _class_name(index) == ConditionalPipeline.__name__:
        return _load_conditional_pipeline(folder, index, scheduler)
    vae = _load_component(folder, index, "vae", VAE_CLASSES)
    return UnconditionalPipeline(_load_unet(folder, vae), scheduler, vae)


def _load_unet(folder: Path, vae: AutoencoderKL | None) -> UNet2DModel:
    """The UNet of a saved pipeline, in evaluation mode, float32, on the CPU.

    Raises:
        UserError: it is not a UNet2DModel for L, RGB or RGBA images or the latents of `vae`, or its weights cannot be
            read.
    """
    source = unet_folder(folder)
    class_name = _read_json(source / CONFIG_NAME).get("_class_name")
    if class_name != "UNet2DModel":
        raise UserError(f"{FLAG} {folder}: its UNet is a {class_name}; only a UNet2DModel samples without a condition")
    try:
        unet = load_any_variant(UNet2DModel, source, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{FLAG} {folder}: the UNet cannot be loaded: {one_line(error)}") from None
    if unet.class_embedding is not None:
        raise UserError(f"{FLAG} {folder}: its UNet needs a condition, but the pipeline class provides none")
    channels, out_channels = unet.config.in_channels, unet.config.out_channels
    accepted = (1, 3, 4) if vae is None else (vae.config.latent_channels,)
    if channels not in accepted or channels != out_channels:
        wanted = "the same 1, 3 or 4" if vae is None else f"{accepted[0]}, the channels of its vae's latents"
        raise UserError(f"{FLAG} {folder}: its UNet maps {channels} channels to {out_channels}; both must be {wanted}")
    if unet.config.sample_size is None:
        raise UserError(f"{FLAG} {folder}: its unet/{CONFIG_NAME} has no sample_size; add the resolution")
    return unet.eval()


def _load_conditional_pipeline(folder: Path, index: dict, scheduler: SchedulerMixin) -> ConditionalPipeline:
    """Our own ConditionalPipeline around the components in `folder`, in evaluation mode, float32, on the CPU.

    Raises:
        UserError: a component has an unsupported class, or cannot be read.
    """
    unets = {"UNet2DModel": UNet2DModel, "UNet2DConditionModel": UNet2DConditionModel}
    classes = {
        "unet": unets,
        "guidance_unet": unets,
        "vector_embedding": {"VectorEmbedding": VectorEmbedding},
        "guidance_vector_embedding": {"VectorEmbedding": VectorEmbedding},
        "image_input": {"ImageInput": ImageInput},
        "vae": VAE_CLASSES,
        "text_encoder": transformers,
        "tokenizer": transformers,
    }
    loaded = {name: _load_component(folder, index, name, known) for name, known in classes.items()}
    parts = {name: part for name, part in loaded.items() if part is not None}
    settings = {name: index.get(name) for name in ("id2label", "prompt_length", "unet_timesteps")}
    return ConditionalPipeline(scheduler=scheduler, **parts, **settings)


def _load_component(folder: Path, index: dict, name: str, known: Any) -> Any:
    """The component `name` of model_index.json (`index`), of a class in the dict or module `known`; None if absent."""
    class_name = (index.get(name) or [None, None])[1]
    if class_name is None:
        return None
    component_class = known.get(class_name) if isinstance(known, dict) else getattr(known, class_name, None)
    if component_class is None or not hasattr(component_class, "from_pretrained"):
        raise UserError(f"{FLAG} {folder}: its {name} is a {class_name}, which is not supported")
    try:
        if name == "tokenizer":
            return component_class.from_pretrained(folder / name, local_files_only=True)
        return load_any_variant(component_class, folder / name, local_files_only=True, use_safetensors=True).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{FLAG} {folder}: {name} cannot be loaded: {one_line(error)}") from None


def is_stock_pipeline(folder: Path) -> bool:
    """Whether diffusers' DDPMPipeline can hold the model in `folder`: no conditions and no autoencoder."""
    index = folder / "model_index.json"
    return not index.is_file() or _class_name(_read_json(index)) in STOCK_PIPELINES


def _check_pipeline_class(folder: Path) -> None:
    if is_stock_pipeline(folder):
        return
    name = _class_name(_read_json(folder / "model_index.json"))
    if name not in (UnconditionalPipeline.__name__, ConditionalPipeline.__name__):
        raise UserError(f"{FLAG} {folder}: a {name}; only DDPMPipeline and ConditionalPipeline can be sampled")


def _class_name(index: dict) -> str | None:
    """The pipeline's class; a pipeline with its own file stores [file, class]."""
    name: Any = index.get("_class_name")
    return name[-1] if isinstance(name, list) and name else name


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{FLAG}: {path} is not readable JSON") from None
    return content if isinstance(content, dict) else {}


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    if not HUB_ID.fullmatch(name):
        raise UserError(f"{FLAG} {name} does not exist: give the folder of a saved pipeline, or a Hub id")
    try:
        folder = Path(snapshot_download(name, allow_patterns=HUB_FILES + CONDITIONAL_FILES))
        if not any(unet_folder(folder).glob(f"{WEIGHTS_STEM}*")):
            folder = Path(snapshot_download(name, allow_patterns=HUB_FILES + PICKLED))
    except (HFValidationError, OSError) as error:  # also what huggingface_hub raises without a connection
        response = getattr(error, "response", None)
        why = "the Hub cannot be reached" if response is None else f"the Hub answers: {one_line(error, 150)}"
        if response is not None and response.status_code in (401, 403, 404):
            why = "the Hub has no such model, or does not show it without a token"
        raise UserError(
            f"{FLAG} {name}: there is no such folder, and {why}; give the folder of a saved pipeline, or a Hub id "
            "such as google/ddpm-cifar10-32"
        ) from None
    return folder
