"""The files of a saved model, and the digest of its weights that identifies it."""

import hashlib
from pathlib import Path

CONFIG_NAME, WEIGHTS_STEM = "config.json", "diffusion_pytorch_model"
COMPANIONS = (
    "vector_embedding", "text_encoder", "tokenizer", "vae", "guidance_unet", "guidance_vector_embedding",
    "image_input",
)  # fmt: skip
CONDITIONAL_FILES = [f"{part}/*.{end}" for part in COMPANIONS for end in ("json", "safetensors", "txt", "model")]


def weights_digest(folder: Path) -> str:
    """SHA-256 of the configuration and weight files of the UNet and its companions: it identifies a model."""
    digest, source = hashlib.sha256(), unet_folder(folder)
    companions = [path for pattern in CONDITIONAL_FILES for path in sorted(folder.glob(pattern))]
    for path in [source / CONFIG_NAME, *sorted(source.glob(f"{WEIGHTS_STEM}*")), *companions]:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def unet_folder(folder: Path) -> Path:
    return folder / "unet" if (folder / "unet").is_dir() else folder
