"""Encoders that come from the Hub, and conditional pipelines that are pushed there and loaded by somebody else."""

import shutil

import numpy as np
import pytest
from conditional_helpers import text_parts, vector_unet
from conftest import ROOT
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from hub_helpers import run_elsewhere, run_forked_with_hub
from hub_server import publish, serve_hub
from PIL import Image
from training_helpers import tiny_run

from trainkit.sampling.pipeline import conditional_pipeline, save_pipeline

ELSEWHERE = """
from diffusers import DiffusionPipeline

for name, asked in (("me/captions", {"prompt": ["a red square", None]}), ("me/vectors", {"vectors": [[1.0, 2, 3]]})):
    pipeline = DiffusionPipeline.from_pretrained(name, trust_remote_code=True)
    images = pipeline(**asked, num_inference_steps=2, guidance_scale=2.0, output_type="np").images
    print(images.shape, pipeline.vae is not None)
"""


@pytest.fixture
def hub(tmp_path):
    """A Hub with an encoder, a VAE that a pipeline holds, and a model of vectors."""
    _, parts = text_parts(tmp_path)
    for part in parts.values():
        part.save_pretrained(tmp_path / "encoder")
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=2,
    )  # fmt: skip
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    save_pipeline(tmp_path / "vectors", conditional_pipeline(vector_unet(), DDPMScheduler()), "")
    with serve_hub() as server:
        for name in ("encoder", "pipeline", "vectors"):
            publish(server, f"me/{name}", tmp_path / name)
        yield server


@pytest.mark.slow
def test_encoders_come_from_the_hub_and_the_pipeline_goes_there(hub, tmp_path):
    unet, _ = text_parts(tmp_path)
    config = {**unet.config, "in_channels": 2, "out_channels": 2}
    UNet2DConditionModel.from_config(config).save_config(tmp_path / "unet")
    (tmp_path / "images").mkdir()
    for number in range(8):
        pixels = np.full((16, 16, 3), 20 * number, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
        (tmp_path / "images" / f"{number}.txt").write_text("a red square")
    arguments = tiny_run(
        tmp_path / "images", tmp_path / "unet", tmp_path / "cache", tmp_path / "out", max_train_steps=1,
        condition="text", text_encoder_name_or_path="me/encoder", vae_name_or_path="me/pipeline", center_crop=True,
        push_to_hub=True, hub_model_id="me/captions", hub_token="hf_secret", save_images_epochs=1000,
    )  # fmt: skip
    done = run_forked_with_hub(hub, tmp_path / "home", "train_conditional", *arguments)
    assert f"pushed to {hub.url}/me/captions" in done.stdout, done.stdout[-1000:] + done.stderr[-2000:]
    pushed = hub.repositories["me/captions"]
    assert pushed["conditional.py"] == (ROOT / "pipelines" / "conditional.py").read_bytes()
    folders = {name.partition("/")[0] for name in pushed}
    assert folders >= {"text_encoder", "tokenizer", "vae", "unet", "scheduler", "schedulers", "model_index.json"}
    assert not [name for name in pushed if "checkpoint" in name or "optimizer" in name]

    shutil.rmtree(tmp_path / "out")
    done = run_elsewhere(ELSEWHERE, tmp_path, hub)
    assert done.stdout.split("\n")[:2] == ["(2, 16, 16, 3) True", "(1, 16, 16, 3) False"]
