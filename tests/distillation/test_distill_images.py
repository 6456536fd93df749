"""distill.py with teachers that take another image: students save, load, sample and are swept."""

import json

import numpy as np
import pytest
import torch
from conditional_helpers import class_unet, text_parts
from diffusers import DDPMScheduler, UNet2DConditionModel
from distillation_helpers import images_of, load_student, run_distill, save_image_teacher
from evaluation_helpers import TinyExtractor, evaluate, write_images
from latent_helpers import LATENT_CHANNELS, make_vae
from PIL import Image
from sampling_helpers import read, sample_images

from pipelines.image_input import ImageInput
from trainkit.data.loading.loader import Batch
from trainkit.data.loading.order import Purpose
from trainkit.diffusion.combined import CombinedCondition
from trainkit.diffusion.image_condition import PictureCondition
from trainkit.diffusion.latents import latent_grid
from trainkit.distillation.stages import _without_condition
from trainkit.distillation.teacher import open_teacher
from trainkit.errors import UserError
from trainkit.options.distillation import DistillationOptions
from trainkit.sampling.pipeline import conditional_pipeline, save_pipeline


@pytest.fixture
def distill(image_folder, cache_dir, tmp_path, monkeypatch):
    def call(teacher, images=None, **flags):
        flags = {"num_steps": 2, "max_train_steps": 8} | flags
        return run_distill(monkeypatch, teacher, images or image_folder, cache_dir, tmp_path / "out", **flags)

    return call


@pytest.mark.slow
def test_a_student_of_classes_and_masks_keeps_the_known_pixels(distill, tmp_path):
    teacher = save_image_teacher(tmp_path / "teacher", "mask", num_class_embeds=3)
    out = distill(teacher, guidance_scale=2, random_flip=True)
    assert json.loads((out / "distillation.json").read_text())["complete"] == ["steps-4", "steps-2"]
    assert "image=picture, mask_image=mask, class_labels='square'" in (out / "README.md").read_text()
    assert Image.open(out / "samples.png").size[0] > 16
    pipeline = load_student(out)
    picture, mask = Image.new("RGB", (16, 16), "#123456"), Image.new("L", (16, 16))
    mask.paste(255, (4, 4, 12, 16))
    given = {"image": picture, "mask_image": mask}
    [one, other] = images_of(pipeline, 2, class_labels=["round", "square"], **{k: [v] * 2 for k, v in given.items()})
    assert len(pipeline.scheduler.timesteps) == 2
    hidden = np.asarray(mask) > 0
    assert np.allclose(one[~hidden] * 255, (0x12, 0x34, 0x56), atol=1e-3) and np.abs(one - other)[hidden].max() > 1e-4
    images = images_of(pipeline, 1, class_labels=["round"])  # without an image
    assert np.isfinite(images).all()
    with pytest.raises(ValueError, match="num_inference_steps"):
        pipeline(class_labels=["round"], num_inference_steps=20)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["progressive", "consistency"])
def test_a_student_of_an_upsampler_is_sampled_and_swept_beside_its_teacher(
    distill, tmp_path, monkeypatch, on_the_cpu_alone, method
):
    """Its small images have another size than those of training."""
    teacher = save_image_teacher(tmp_path / "teacher", "downscale", 2, 0.2)
    flags = {"method": method, "first_steps": None} if method == "consistency" else {}
    held_out = write_images(tmp_path / "held_out", 4)
    out = distill(teacher, validation_data_dir=held_out, validation_steps=4, **flags)
    (tmp_path / "small").mkdir()
    for number, colour in enumerate(("red", "green")):
        Image.new("RGB", (10, 6), colour).save(tmp_path / "small" / f"{number}.png")
    small = str(tmp_path / "small")
    sample_images(out, tmp_path / "samples", conditioning_dir=small, image_noise=0.1, num_images=4)
    samples = read(tmp_path / "samples", 4)
    assert samples.shape == (4, 12, 20, 3) and (samples[0] != samples[1]).any()
    assert json.loads((tmp_path / "samples" / "sampling.json").read_text())["num_inference_steps"] == 2

    monkeypatch.setattr("trainkit.evaluation.model.open_extractor", lambda *arguments: TinyExtractor())
    rows = "student:2;teacher/dpmsolver:2"
    flags = {"model_name_or_path": out, "conditioning_dir": small, "sweep": rows, "num_images": 4}
    reference = write_images(tmp_path / "real", 8)
    evaluate(monkeypatch, reference=reference, cache_dir=tmp_path / "cache", sample_batch_size=4, **flags)
    table = json.loads((out / "sampling_table.json").read_text())
    assert {cell["scheduler"] for cell in table["cells"]} == {"student", "teacher/dpmsolver"}


@pytest.mark.slow
def test_a_student_of_prompts_and_edges(distill, image_folder, tmp_path):
    folder = tmp_path / "captioned" / "train"
    folder.mkdir(parents=True)
    for number, path in enumerate(sorted(image_folder.rglob("*.png"))[:12]):
        (folder / f"{number}.png").write_bytes(path.read_bytes())
        (folder / f"{number}.txt").write_text(["a red square", "a blue circle"][number % 2])
    unet, parts = text_parts(tmp_path)
    unet = UNet2DConditionModel.from_config({**unet.config, "in_channels": 4})
    parts["image_input"] = ImageInput(kind="edges", channels=3)
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    save_pipeline(tmp_path / "teacher", conditional_pipeline(unet, scheduler, prompt_length=8, **parts), "")
    out = distill(tmp_path / "teacher", images=folder, train_batch_size=4)
    pictures = [np.zeros((16, 16, 1), np.uint8), np.full((16, 16, 1), 255, np.uint8)]
    [flat, steep] = images_of(load_student(out), 2, prompt=["a red square"] * 2, image=pictures)
    assert np.abs(flat - steep).max() > 1e-4


def test_guidance_leads_away_from_both_null_conditions():
    class Classes:
        argument, names, picture, dropout = "class_labels", None, None, 0.1

        def inputs(self, indices, draws):
            drawn = torch.from_numpy(draws(Purpose.CONDITION_DROPOUT))
            return {"class_labels": torch.where(drawn < self.dropout, 9, 1)}

    masks = PictureCondition(None, ImageInput(kind="mask", channels=3), 0.1)
    size = torch.ones(2, 3, 4, 4)
    batch = Batch(size, size, None, np.arange(2), 0, 0, condition={"class_labels": torch.ones(2)})
    batch.picture = torch.full((2, 4, 4, 4), 0.5)
    null = _without_condition(CombinedCondition([Classes(), masks]), torch.device("cpu"))(batch)
    assert null.inputs["class_labels"].tolist() == [9, 9] and batch.inputs["class_labels"].tolist() == [1, 1]
    assert (null.picture[:, :3] == 0).all() and (null.picture[:, 3] == 1).all() and (batch.picture == 0.5).all()
    assert (_without_condition(masks, torch.device("cpu"))(batch).picture == null.picture).all()


def test_images_of_a_kind_that_the_data_does_not_have_are_refused(tmp_path):
    teacher = save_image_teacher(tmp_path / "teacher", "grayscale")
    assert open_teacher(DistillationOptions(teacher_model_name_or_path=str(teacher))).conditions == ["image"]
    config = json.loads((teacher / "image_input" / "config.json").read_text())
    (teacher / "image_input" / "config.json").write_text(json.dumps(config | {"kind": "depth"}))
    with pytest.raises(UserError, match="--teacher_model_name_or_path .* is conditioned on images of the kind depth"):
        open_teacher(DistillationOptions(teacher_model_name_or_path=str(teacher)))


@pytest.mark.slow
def test_a_student_of_latents_keeps_the_known_pixels(distill, image_folder, tmp_path):
    """The second image is encoded by the teacher's autoencoder."""
    vae = make_vae()
    image_input = ImageInput(kind="mask", channels=3, **latent_grid(vae))
    channels = {"in_channels": LATENT_CHANNELS + image_input.num_channels, "out_channels": LATENT_CHANNELS}
    unet = class_unet(num_class_embeds=None, sample_size=8, **channels)
    parts = {"image_input": image_input, "vae": vae}
    scheduler = DDPMScheduler(prediction_type="v_prediction", clip_sample=False)
    save_pipeline(tmp_path / "teacher", conditional_pipeline(unet, scheduler, **parts), "")
    pipeline = load_student(distill(tmp_path / "teacher", guidance_scale=2, random_flip=True, center_crop=True))
    mask = Image.new("L", (16, 16))
    mask.paste(255, (4, 4, 12, 16))
    [made] = images_of(pipeline, 1, image=Image.new("RGB", (16, 16), "#123456"), mask_image=mask)
    hidden = np.asarray(mask) > 0
    assert np.allclose(made[~hidden] * 255, (0x12, 0x34, 0x56), atol=1e-3)
    assert np.abs(made[hidden] * 255 - (0x12, 0x34, 0x56)).max() > 1
