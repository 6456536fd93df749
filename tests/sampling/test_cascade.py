"""sample.py --upsampler_name_or_path: a model and its upsamplers in one command."""

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conditional_helpers import NAMES, class_unet, image_pipeline, text_parts, vector_unet
from conftest import slow_after
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from latent_helpers import LATENT_CHANNELS, make_vae
from PIL import Image
from process_helpers import run_forked
from sampling_helpers import contents, interrupt_the_second_batch, read, sample_flags, sample_images, tiny_model, words

from evaluate_samples import Options as EvaluationOptions
from evaluate_samples import check
from trainkit.diffusion.few_step import progressive_scheduler
from trainkit.errors import UserError
from trainkit.evaluation.model import sample_model
from trainkit.sampling.noise import STAGE_SEEDS
from trainkit.sampling.pipeline import conditional_pipeline, save_pipeline, unconditional_pipeline

pytestmark = pytest.mark.usefixtures("on_the_cpu_alone")

STEPS = {"num_inference_steps": 3, "upsampler_num_inference_steps": [2]}


def save_upsampler(folder, size, channels=3, factor=2, kind="downscale", scheduler=None, **changes):
    noise = 0.2 if kind == "downscale" else 0.0
    made = image_pipeline(kind, factor, noise, channels, sample_size=size, **changes)
    parts = {"image_input": made.image_input} | ({"id2label": NAMES} if "num_class_embeds" in changes else {})
    save_pipeline(folder, conditional_pipeline(made.unet, scheduler or DDPMScheduler(), **parts), "")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models of 8 px, upsamplers to 16 and 32 px, and some that do not fit."""
    folder = tmp_path_factory.mktemp("models")
    save_pipeline(folder / "plain", DDPMPipeline(tiny_model(sample_size=8), DDPMScheduler()), "")
    student = progressive_scheduler(DDPMScheduler().alphas_cumprod.double(), 3, "sample")
    save_pipeline(folder / "student", DDPMPipeline(tiny_model(sample_size=8), student), "")
    latents = tiny_model(LATENT_CHANNELS, 4), DDPMScheduler(clip_sample=False), make_vae()
    save_pipeline(folder / "latents", unconditional_pipeline(*latents), "")
    small = {"sample_size": 8}
    classes = conditional_pipeline(class_unet(**small), DDPMScheduler(), id2label=NAMES)
    save_pipeline(folder / "class", classes, "")
    vectors = vector_unet()
    vectors.register_to_config(**small)
    save_pipeline(folder / "vector", conditional_pipeline(vectors, DDPMScheduler()), "")
    unet, parts = text_parts(folder)
    unet.register_to_config(**small)
    save_pipeline(folder / "text", conditional_pipeline(unet, DDPMScheduler(), prompt_length=8, **parts), "")

    save_upsampler(folder / "from4", 8)
    save_upsampler(folder / "from8", 16)
    save_upsampler(folder / "from16", 32, seed=1)
    save_upsampler(folder / "from8_class", 16, num_class_embeds=4)
    save_upsampler(folder / "from8_other_classes", 16, num_class_embeds=6)
    save_upsampler(folder / "from8_student", 16, scheduler=student)
    save_upsampler(folder / "from8_grey", 16, channels=1)
    save_upsampler(folder / "fills_masks", 8, kind="mask", factor=1)
    (folder / "pictures").mkdir()
    for number, colour in enumerate(("red", "green")):
        Image.new("RGB", (4, 4), colour).save(folder / "pictures" / f"{number}.png")
    np.save(folder / "vectors.npy", np.array([[1, 2, 3], [4, 5, 6]], np.float32))
    (folder / "prompts.txt").write_text("a red square\nblue circle\n")
    return folder


def cascade(models, base, out, *upsamplers, **changes):
    names = [str(models / name) for name in upsamplers] or None
    values = {"num_images": 5, "sample_batch_size": 2, "upsampler_name_or_path": names} | STEPS
    sample_images(models / base, out, **values | changes)


def two_commands(models, base, folder, upsampler, image_noise=0.0, **changes):
    """The samples of `base` in files, then enlarged: what one command must make."""
    many = {"num_images": 5, "sample_batch_size": 2}
    sample_images(models / base, folder / "small", num_inference_steps=3, **many, **changes)
    own = {"conditioning_dir": str(folder / "small"), "image_noise": image_noise, "seed": 3 + STAGE_SEEDS}
    sample_images(models / upsampler, folder / "large", num_inference_steps=2, **own, **many)
    return folder / "large"


@pytest.mark.parametrize(
    "base, conditions",
    slow_after(
        1,
        [
            ("plain", {}),
            ("student", {}),
            ("latents", {}),
            ("class", {"class_labels": ["all"], "guidance_scale": 2.0}),
            ("vector", {"vectors_file": "vectors.npy"}),
            ("text", {"prompts_file": "prompts.txt"}),
            ("from4", {"conditioning_dir": "pictures"}),
        ],
    ),
)
def test_one_command_makes_what_two_make(models, tmp_path, base, conditions):
    given = {key: str(models / value) if key.endswith(("file", "dir")) else value for key, value in conditions.items()}
    cascade(models, base, tmp_path / "one", "from8", upsampler_image_noise=[0.1], **given)
    assert read(tmp_path / "one", 5).shape == (5, 16, 16, 3)
    assert contents(tmp_path / "one") == contents(two_commands(models, base, tmp_path, "from8", 0.1, **given))


@pytest.mark.slow
def test_three_models_in_a_row_and_their_record(models, tmp_path):
    changes = {"class_labels": ["cat", "7"], "upsampler_num_inference_steps": [2, 3]}
    changes |= {"upsampler_scheduler": ["ddpm", "unipc"], "upsampler_guidance_scale": [1.5]}
    cascade(models, "class", tmp_path / "out", "from8", "from16", **changes)
    assert read(tmp_path / "out", 5).shape == (5, 32, 32, 3)
    record = json.loads((tmp_path / "out" / "sampling.json").read_text())
    assert record["model"] == str(models / "class") and record["height_width"] == [32, 32]
    assert record["upsampler_models"] == [str(models / name) for name in ("from8", "from16")]
    assert record["upsampler_scheduler_names"] == ["ddpm", "unipc"]
    first, second = record["upsamplers"]
    assert (first["num_inference_steps"], second["num_inference_steps"]) == (2, 3)
    assert (first["scheduler"]["class"], second["scheduler"]["class"]) == ("DDPMScheduler", "UniPCMultistepScheduler")
    assert first["weights_sha256"] != second["weights_sha256"]
    assert first["guidance_scale"] == second["guidance_scale"] == 1.5
    rows = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert [(row["seed"], row["label"]) for row in rows[:3]] == [(3, "cat"), (4, "7"), (5, "cat")]

    del changes["upsampler_scheduler"], changes["upsampler_guidance_scale"]
    for other in (["from8", "from16"], ["from8"], []):
        changes["upsampler_num_inference_steps"] = [2] if other else None
        with pytest.raises(UserError, match="holds images of other upsamplers"):
            cascade(models, "class", tmp_path / "out", *other, **changes)


@pytest.mark.slow
def test_an_upsampler_takes_the_classes_of_the_first_model(models, tmp_path, capsys):
    cascade(models, "class", tmp_path / "cat", "from8_class", class_labels=["cat"])
    cascade(models, "class", tmp_path / "null", "from8_class", class_labels=["null"])
    assert "samples without" not in capsys.readouterr().out
    cascade(models, "plain", tmp_path / "plain", "from8_class")
    assert "from8_class: samples without class_labels, which the first model does not take" in capsys.readouterr().out
    own = {"num_images": 5, "sample_batch_size": 2, "num_inference_steps": 2, "seed": 3 + STAGE_SEEDS}
    sample_images(models / "class", tmp_path / "small", num_images=5, sample_batch_size=2, num_inference_steps=3,
                  class_labels=["cat"])  # fmt: skip
    own["conditioning_dir"] = str(tmp_path / "small")
    sample_images(models / "from8_class", tmp_path / "both", class_labels=["cat"], **own)
    sample_images(models / "from8_class", tmp_path / "image", **own)
    assert contents(tmp_path / "both") == contents(tmp_path / "cat") != contents(tmp_path / "image")


SLOW_FORMATS = [pytest.param(name, marks=pytest.mark.slow) for name in ("webp", "jpeg", "npz", "arrow")]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["png", *SLOW_FORMATS])
def test_an_interrupted_run_continues_to_the_same_bytes(models, tmp_path, monkeypatch, capsys, name):
    cascade(models, "plain", tmp_path / "whole", "from8", output_format=name)
    interrupt_the_second_batch(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        cascade(models, "plain", tmp_path / "killed", "from8", output_format=name)
    capsys.readouterr()
    cascade(models, "plain", tmp_path / "killed", "from8", output_format=name, num_images=4)
    assert "4 images, 2 generated now" in capsys.readouterr().out
    cascade(models, "plain", tmp_path / "killed", "from8", output_format=name)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_batches_are_halved_where_an_upsampler_does_not_fit(models, tmp_path, monkeypatch):
    cascade(models, "plain", tmp_path / "whole", "from8", sample_batch_size=1)
    forward, refused = UNet2DModel.forward, []

    def small_memory(self, images, *rest, **named):
        if len(images) > 1 and images.shape[-1] == 16:
            refused.append(len(images))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, images, *rest, **named)

    monkeypatch.setattr(UNet2DModel, "forward", small_memory)
    cascade(models, "plain", tmp_path / "found", "from8", sample_batch_size=4, find_batch_size=True)
    assert refused == [4, 2, 2]
    assert np.abs(read(tmp_path / "found", 5) - read(tmp_path / "whole", 5)).max() <= 1
    assert json.loads((tmp_path / "found" / "sampling.json").read_text())["batch_size"] == 1


def test_a_few_step_upsampler_takes_its_own_steps(models, tmp_path):
    cascade(models, "plain", tmp_path / "out", "from8_student", upsampler_num_inference_steps=None)
    [facts] = json.loads((tmp_path / "out" / "sampling.json").read_text())["upsamplers"]
    assert facts["num_inference_steps"] == 3


@pytest.mark.slow
def test_two_processes_make_the_images_of_one(models, tmp_path):
    cascade(models, "plain", tmp_path / "one", "from8", "from16")
    values = sample_flags(models / "plain", tmp_path / "two", num_images=5, sample_batch_size=2, num_inference_steps=3)
    names = ["--upsampler_name_or_path", str(models / "from8"), str(models / "from16")]
    run_forked("sample.py", *words(values), *names, "--upsampler_num_inference_steps", 2, processes=2)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.slow
def test_evaluate_samples_scores_the_enlarged_images(models, tmp_path):
    names = [str(models / "from8")]
    flags = {"model_name_or_path": str(models / "class"), "upsampler_name_or_path": names, "seed": 3, "num_images": 4}
    options = EvaluationOptions(reference="real", sample_batch_size=2, **flags, **STEPS)
    check(options)
    record, images = sample_model(options, Accelerator())
    cascade(models, "class", tmp_path / "out", "from8", class_labels=["all"], num_images=4)
    [batch] = images.batches(np.arange(4), 4, side=16)
    assert np.abs(batch - read(tmp_path / "out", 4)).max() <= 1
    assert record["upsampler_models"] == names and record["upsamplers"][0]["num_inference_steps"] == 2
    with pytest.raises(UserError, match="--upsampler_name_or_path does nothing with --sweep"):
        check(EvaluationOptions(reference="real", sweep=[], **flags))


@pytest.mark.parametrize(
    "upsamplers, changes, message",
    [
        (["plain"], {}, r"_name_or_path \S+plain is not a super-resolution model \(it has no small images\)"),
        (
            ["fills_masks"],
            {},
            r"not a super-resolution model \(it makes images from another kind, mask\): train one with",
        ),
        (["from16"], {}, "enlarges images of 16x16 .* 3 channels, but those before it have 8x8 .*on images of 16x16"),
        (["from8", "from8"], {}, "enlarges images of 8x8 .* but those before it have 16x16"),
        (["from8_grey"], {}, "1 channels, but those before it have 8x8 pixels .* and 3 channels"),
        (["from8_other_classes"], {"class_labels": ["cat"]}, "has other classes than the first model"),
        (
            ["from8"],
            {"upsampler_image_noise": [0.5]},
            "--upsampler_image_noise 0.5: .* with noise of 0 to 0.2",
        ),
        (["from8"], {"upsampler_scheduler": ["nope"]}, "--upsampler_scheduler nope must be one of"),
        (["from8"], {"upsampler_num_inference_steps": [2, 3]}, "steps 2 3: give one value, or one for each of the 1"),
        (["from8"], {"upsampler_num_inference_steps": [9999]}, "--upsampler_num_inference_steps 9999 must be 1 to"),
        (["nowhere"], {}, "--upsampler_name_or_path .*nowhere(: there is no such folder| does not exist)"),
        ([], {"upsampler_image_noise": [0.1]}, "--upsampler_image_noise needs --upsampler_name_or_path"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_written(models, tmp_path, upsamplers, changes, message):
    base = "class" if "class_labels" in changes else "plain"
    given = {} if upsamplers else {"upsampler_num_inference_steps": None}
    with pytest.raises(UserError, match=message) as refused:
        cascade(models, base, tmp_path / "out", *upsamplers, **given | changes)
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()
