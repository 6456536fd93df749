"""Losses of short runs, one per configuration, against those in tests/golden/: a change of the training shows here.

After a change that is meant to change losses, write them anew and give the reason in the commit:

    make golden      (python -m pytest tests/training/test_golden.py --write_golden)
"""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from conditional_helpers import text_parts
from conftest import ROOT, TINY_UNET, slow_after
from diffusers import AutoencoderKL
from process_helpers import run_forked
from training_helpers import golden, losses, run_in_process, tiny_run

SHORT = {"max_train_steps": 8, "checkpointing_steps": 0, "save_images_epochs": 1000}
# What makes each run its own, besides the flags of the tiny run, which `unconditional` is with AdamW.
CONFIGURATIONS = {
    "unconditional": {},
    "flow": SHORT | {"prediction_type": "flow_prediction", "timestep_sampling": "logit_normal"},
    "muon": SHORT | {"optimizer": "muon"},
    "class": SHORT | {"condition": "class", "conditioning_dropout": 0.3, "class_balance": "sqrt"},
    "vector": SHORT | {"condition": "vector", "conditioning_dropout": 0.3},
    "text": SHORT | {"condition": "text", "conditioning_dropout": 0.3},
    "latents": SHORT | {"condition": "class", "center_crop": True},
}
SHARDED = SHORT | {"shard_weights": True, "train_batch_size": 2, "gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def described(image_folder, tmp_path_factory):
    """The images with a vector and a caption next to each."""
    folder = shutil.copytree(image_folder, tmp_path_factory.mktemp("described") / "images")
    for number, path in enumerate(sorted(path for path in folder.rglob("*.*"))):
        np.save(path.with_suffix(".npy"), np.float32([number, 100 + number % 3, 0.01 * number]))
        path.with_suffix(".txt").write_text(f"a {('red', 'blue')[number % 2]} square", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Flags of the model that a configuration needs."""
    folder = tmp_path_factory.mktemp("models")
    unet, parts = text_parts(folder)
    unet.save_config(folder / "text_unet")
    for part in parts.values():
        part.save_pretrained(folder / "encoder")
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=2, sample_size=16, scaling_factor=0.7,
    ).save_pretrained(folder / "vae")  # fmt: skip
    (folder / "latent_unet").mkdir()
    config = json.dumps(TINY_UNET | {"in_channels": 2, "out_channels": 2})
    (folder / "latent_unet" / "config.json").write_text(config, encoding="utf-8")
    return {
        "text": {"model_config_name_or_path": folder / "text_unet", "text_encoder_name_or_path": folder / "encoder"},
        "latents": {"model_config_name_or_path": folder / "latent_unet", "vae_name_or_path": folder / "vae"},
    }


def check(name, found, request):
    """Compare with the file, or write it."""
    if request.config.getoption("--write_golden"):
        text = json.dumps([round(loss, 5) for loss in found], indent=1) + "\n"
        (ROOT / "tests" / "golden" / f"{name}.json").write_text(text, encoding="utf-8")
    assert found == pytest.approx(golden(name), rel=2e-3)


@pytest.mark.parametrize("name", slow_after(1, CONFIGURATIONS))
def test_losses_are_those_on_file(name, described, tiny_unet, models, cache_dir, tmp_path, monkeypatch, request):
    import train_conditional
    import train_unconditional

    flags = CONFIGURATIONS[name] | models.get(name, {})
    script = train_conditional if "condition" in flags else train_unconditional
    arguments = tiny_run(described, tiny_unet, cache_dir, tmp_path, **flags)
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *arguments])
    script.main()
    check(name, losses(tmp_path), request)


@pytest.mark.slow
def test_accumulated_micro_steps_are_averaged(described, tiny_unet, cache_dir, tmp_path, monkeypatch):
    """Losses and norms of gradients: Adam alone would hide gradients of twice the size."""

    found = {}
    for micro_steps in (1, 2):
        flags = SHORT | {"max_train_steps": 3, "train_batch_size": 8 // micro_steps}
        flags["gradient_accumulation_steps"] = micro_steps
        arguments = tiny_run(described, tiny_unet, cache_dir, tmp_path / str(micro_steps), **flags)
        run_in_process(monkeypatch, "train_unconditional", arguments)
        rows = [json.loads(line) for line in (tmp_path / str(micro_steps) / "metrics.jsonl").open(encoding="utf-8")]
        found[micro_steps] = [(row["loss"], row["grad_norm"]) for row in rows if "loss" in row]
    assert np.asarray(found[1]) == pytest.approx(np.asarray(found[2]), rel=1e-3)


@pytest.mark.slow(9)
def test_sharded_losses_are_those_on_file(described, tiny_unet, cache_dir, tmp_path, request):
    arguments = tiny_run(described, tiny_unet, cache_dir, tmp_path, **SHARDED)
    run_forked("train_unconditional.py", *arguments, processes=2)
    check("sharded", losses(tmp_path), request)
