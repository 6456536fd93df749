"""train_unconditional.py on latents: what it saves, resume, processes, and every script that takes the result."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DModel, VQModel
from latent_helpers import LATENT_CHANNELS, latent_run, save_vae
from PIL import Image
from process_helpers import run_code, run_forked
from sampling_helpers import read, sample_images
from training_helpers import losses, run_in_process, same_training_state, same_weights

import reconstruct_ema
from pipelines.unconditional import UnconditionalPipeline
from trainkit.errors import UserError
from trainkit.sampling.generate import generate
from trainkit.sampling.load import find_pipeline, load_pipeline
from trainkit.sampling.schedulers import load_scheduler

WEIGHTS = "diffusion_pytorch_model.safetensors"
STEPS, SEEDS = 3, (7, 8, 9)
AVERAGES = {"ema_power_lengths": [0.05, 0.1], "ema_snapshot_steps": 3}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def held_out(image_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("held_out")
    for file in sorted(image_folder.rglob("*.png"))[::4]:
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def whole(image_folder, latent_unet, vae, cache, held_out, tmp_path_factory):
    """Six steps of eight images on one process, with a checkpoint after the third."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    flags = AVERAGES | {"validation_data_dir": held_out, "score_steps": 3, "score_images": 4}
    with pytest.MonkeyPatch.context() as patch:
        arguments = latent_run(image_folder, latent_unet, cache, folder, vae, **flags)
        run_in_process(patch, "train_unconditional", arguments)
    return folder


@pytest.fixture
def train(image_folder, latent_unet, vae, cache, monkeypatch):
    """train_unconditional.py on latents in this process."""

    def call(output_dir, **flags):
        arguments = latent_run(image_folder, latent_unet, cache, output_dir, vae, **flags)
        run_in_process(monkeypatch, "train_unconditional", arguments)

    return call


def our_images(folder):
    """Images (N, H, W, C) of `SEEDS` by the pipeline that the scripts load."""
    pipeline = load_pipeline(find_pipeline(str(folder)), load_scheduler(folder))
    assert type(pipeline) is UnconditionalPipeline and pipeline.vae is not None
    return np.concatenate(list(generate(pipeline, SEEDS, STEPS, 2)))


@pytest.mark.slow
def test_diffusers_alone_loads_it_in_a_line_and_decodes_as_we_do(whole, vae, tmp_path):
    index = json.loads((whole / "model_index.json").read_text())
    assert index["_class_name"] == ["unconditional", "UnconditionalPipeline"]
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    same_weights(whole / "vae" / WEIGHTS, vae / WEIGHTS)
    for folder in ("scheduler", "schedulers/unipc"):
        assert not json.loads((whole / folder / "scheduler_config.json").read_text())["thresholding"]
    np.save(tmp_path / "ours.npy", our_images(whole))
    program = f"""
import sys, numpy, torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained({str(whole)!r}, trust_remote_code=True)
generators = [torch.Generator().manual_seed(seed) for seed in {SEEDS}]
images = pipeline(batch_size=3, num_inference_steps={STEPS}, generator=generators, output_type="np").images
assert numpy.abs(images * 255 - numpy.load("ours.npy").astype(float)).max() < 1.01
assert images.std() > 0.01 and "trainkit" not in sys.modules
pipeline.enable_model_cpu_offload(device="cpu")
assert pipeline(num_inference_steps=1).images[0].size == (16, 16)
"""
    done = run_code(program, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_the_card_the_grid_and_the_log(whole):
    card = (whole / "README.md").read_text()
    assert "Unconditional latent diffusion model, 16 × 16 pixels" in card
    assert 'from_pretrained("whole", trust_remote_code=True)' in card and "`unconditional.py` in this folder" in card
    assert "conditional.py`" in card and "custom_pipeline" not in card
    assert Image.open(whole / "samples.png").width >= 32
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert sum("validation_loss" in row for row in rows) == 1 and sum("kid" in row for row in rows) == 2


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(whole, train, tmp_path):
    shutil.copytree(whole / "checkpoint-3", tmp_path / "out" / "checkpoint-3")
    shutil.copy(whole / "metrics.jsonl", tmp_path / "out")
    train(tmp_path / "out", resume_from_checkpoint="latest", **AVERAGES)
    same_training_state(tmp_path / "out" / "checkpoint-6", whole / "checkpoint-6")
    assert losses(tmp_path / "out") == losses(whole)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", [{}, {"shard_weights": True}], ids=["replicated", "sharded"])
def test_two_processes_train_as_one(sharding, whole, image_folder, latent_unet, vae, cache, tmp_path):
    flags = {"train_batch_size": 2, "gradient_accumulation_steps": 2} | sharding
    arguments = latent_run(image_folder, latent_unet, cache, tmp_path / "out", vae, **flags)
    run_forked("train_unconditional.py", *arguments, processes=2)
    assert losses(tmp_path / "out") == pytest.approx(losses(whole), abs=1e-4)
    same_weights(tmp_path / "out" / "unet" / WEIGHTS, whole / "unet" / WEIGHTS, tolerance=1e-4)
    assert (tmp_path / "out" / "vae").is_dir()


@pytest.mark.slow
def test_samples_are_those_of_the_pipeline(whole, tmp_path, on_the_cpu_alone):
    flags = {"num_images": 3, "seed": SEEDS[0], "num_inference_steps": STEPS, "sample_batch_size": 2}
    sample_images(whole, tmp_path / "samples", scheduler="sde_dpmsolver", **flags)
    assert np.abs(read(tmp_path / "samples", 3) - our_images(whole)).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["progressive", "consistency"])
def test_a_student_has_the_teacher_s_autoencoder(method, whole, image_folder, cache, tmp_path, monkeypatch):
    flags = {
        "teacher_model_name_or_path": whole, "method": method, "num_steps": 2, "max_train_steps": 4,
        "ddpm_num_inference_steps": None, "model_config_name_or_path": None, "vae_name_or_path": None,
    }  # fmt: skip
    run_in_process(monkeypatch, "distill", latent_run(image_folder, None, cache, tmp_path / "out", None, **flags))
    same_weights(tmp_path / "out" / "vae" / WEIGHTS, whole / "vae" / WEIGHTS)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert pipeline().images[0].size == (16, 16), "its own number of steps by default"
    assert len(pipeline.scheduler.timesteps) == 2 and not pipeline.scheduler.config.clip_sample
    assert "unconditional.py" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_a_reconstructed_average_has_the_autoencoder(whole, tmp_path, monkeypatch):
    words = ["--model_dir", str(whole), "--sigma_rel", "0.1", "--output_dir", str(tmp_path / "made")]
    monkeypatch.setattr("sys.argv", ["reconstruct_ema.py", *words])
    reconstruct_ema.main()
    same_weights(tmp_path / "made" / "vae" / WEIGHTS, whole / "vae" / WEIGHTS)
    assert our_images(tmp_path / "made").shape == (3, 16, 16, 3)


@pytest.mark.slow
def test_training_starts_from_it_on_latents_only(whole, train, tmp_path, capsys):
    flags = {"pretrained_model_name_or_path": whole, "model_config_name_or_path": None, "max_train_steps": 1}
    train(tmp_path / "next", vae_name_or_path=whole, **flags)
    assert f"started from {whole}" in capsys.readouterr().out and (tmp_path / "next" / "vae").is_dir()
    with pytest.raises(UserError, match=f"was trained on the latents of its vae: add --vae_name_or_path {whole}"):
        train(tmp_path / "pixels", vae_name_or_path=None, **flags)


def unet_folder(folder):
    UNet2DModel(
        block_out_channels=(8, 8), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
    ).save_pretrained(folder)  # fmt: skip


def vq_pipeline(folder):
    VQModel(block_out_channels=(8,), norm_num_groups=4).save_pretrained(folder / "vae")


@pytest.mark.parametrize("save, found", [(unet_folder, "UNet2DModel"), (vq_pipeline, "VQModel")])
def test_another_model_is_not_taken_for_an_autoencoder(save, found, train, tmp_path):
    """diffusers would load a UNet as an AutoencoderKL with random weights."""
    save(tmp_path / "other")
    with pytest.raises(UserError, match=rf"other is not an AutoencoderKL \(it holds a {found}\); give its folder"):
        train(tmp_path / "out", vae_name_or_path=tmp_path / "other")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"vae_name_or_path": "/nowhere"}, "--vae_name_or_path /nowhere: the folder does not exist"),
        ({"image_mode": "L"}, "expects 3 channels, but --image_mode L gives 1: change one of the two"),
        ({"resolution": 18}, "--resolution 18x18 must be divisible by 4: the VAE halves it 1 times"),
        ({"center_crop": None}, "--vae_name_or_path encodes each image once: add --center_crop"),
        ({"random_hue": 5}, "--random_flip is the only augmentation"),
    ],
)
def test_one_line_error_before_anything_is_prepared(flags, message, train, tmp_path, monkeypatch):
    monkeypatch.setattr("trainkit.data.cache.open_or_prepare", None)  # a call would raise
    with pytest.raises(UserError, match=message) as error:
        train(tmp_path / "out", **flags)
    assert "\n" not in str(error.value)


def test_a_unet_for_pixels_is_refused_before_anything_is_prepared(train, tiny_unet, tmp_path, monkeypatch):
    monkeypatch.setattr("trainkit.data.cache.open_or_prepare", None)
    message = f"has in_channels 3, but the latents of --vae_name_or_path have {LATENT_CHANNELS} channels"
    with pytest.raises(UserError, match=message):
        train(tmp_path / "out", model_config_name_or_path=tiny_unet)


@pytest.mark.slow
def test_another_autoencoder_is_other_data(train, tmp_path):
    """A checkpoint is not resumed on the latents of another one by mistake."""
    train(tmp_path / "out", max_train_steps=1, checkpointing_steps=1)
    flags = {"resume_from_checkpoint": "latest", "max_train_steps": 2}
    with pytest.raises(UserError, match="was trained on 37 images .* use the same images, or continue"):
        train(tmp_path / "out", vae_name_or_path=save_vae(tmp_path / "other", 1), **flags)


@pytest.mark.slow
def test_an_autoencoder_can_be_trained_without_the_hub(image_folder, cache, train, tmp_path, monkeypatch, capsys):
    from tools import train_autoencoder

    words = {
        "train_data_dir": image_folder, "cache_dir": cache, "resolution": 16, "center_crop": "true", "halvings": 1,
        "latent_channels": 2, "base_channels": 8, "max_train_steps": 3, "train_batch_size": 4, "cpu_threads": 1,
        "output_dir": tmp_path / "trained",
    }  # fmt: skip
    arguments = [word for name, value in words.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr("sys.argv", ["train_autoencoder.py", *arguments])
    train_autoencoder.main()
    trained = AutoencoderKL.from_pretrained(tmp_path / "trained")
    assert f"latents of 2x8x8, scaling_factor {trained.config.scaling_factor:.4g}; PSNR" in capsys.readouterr().out
    assert (tmp_path / "trained" / "reconstructions.png").is_file()
    torch.manual_seed(0)
    untrained = train_autoencoder.build(
        train_autoencoder.Options(halvings=1, latent_channels=2, base_channels=8), 3, 16
    )
    assert not torch.equal(trained.decoder.conv_out.weight, untrained.decoder.conv_out.weight)
    with pytest.raises(UserError, match="--output_dir .*trained is there already"):
        train_autoencoder.main()
    train(tmp_path / "out", vae_name_or_path=tmp_path / "trained", max_train_steps=1)
    assert (tmp_path / "out" / "vae").is_dir()
