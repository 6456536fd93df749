"""sample.py and evaluate_samples.py with models that take another image."""

import json
from functools import partial

import numpy as np
import pytest
from conditional_helpers import image_pipeline
from diffusers import DDPMScheduler
from evaluation_helpers import evaluate, write_images
from PIL import Image
from sampling_helpers import sample_images

from tools import make_conditions
from trainkit.errors import UserError
from trainkit.evaluation.pairs import psnr, ssim
from trainkit.sampling.pictures import list_images
from trainkit.sampling.pipeline import conditional_pipeline, save_pipeline

pytestmark = pytest.mark.usefixtures("on_the_cpu_alone")
sample = partial(sample_images, num_images=4, num_inference_steps=2)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for kind, settings in {"mask": {}, "downscale": {"factor": 2, "noise": 0.2}}.items():
        pipeline = image_pipeline(kind, **settings)
        parts = {"image_input": pipeline.image_input}
        save_pipeline(folder / kind, conditional_pipeline(pipeline.unet, DDPMScheduler(), **parts), "")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What tools/make_conditions.py writes for both kinds, of four images of 24 px at 16 px."""
    folder = tmp_path_factory.mktemp("made")
    write_images(folder / "images", 4)
    for kind in ("mask", "downscale:2"):
        with pytest.MonkeyPatch.context() as patch:
            words = [folder / "images", folder / kind[:4], "--condition_from", kind, "--resolution", 16]
            patch.setattr("sys.argv", ["make_conditions.py", *map(str, words)])
            make_conditions.main()
    return folder


def read(path):
    return np.asarray(Image.open(path)).astype(int)


def test_known_pixels_are_in_the_files_and_others_are_made(models, made, tmp_path):
    folders = {"conditioning_dir": str(made / "mask" / "conditions"), "mask_dir": str(made / "mask" / "masks")}
    sample(models / "mask", tmp_path / "out", num_images=5, **folders)
    rows = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert [row["conditioning_image"] for row in rows] == [f"{number:06d}.png" for number in (0, 1, 2, 3, 0)]
    samples = [read(tmp_path / "out" / f"{number:06d}.png") for number in range(5)]
    for number, found in enumerate(samples):
        truth, hidden = (read(made / "mask" / kind / f"{number % 4:06d}.png") for kind in ("truth", "masks"))
        assert np.array_equal(found[hidden == 0], truth[hidden == 0])
        assert not np.array_equal(found[hidden > 0], truth[hidden > 0])
    assert not np.array_equal(samples[0], samples[4]), "another seed"

    for number in range(2):  # transparency says the same as a mask
        picture = Image.open(made / "mask" / "conditions" / f"{number:06d}.png").convert("RGBA")
        picture.putalpha(Image.fromarray((255 - read(made / "mask" / "masks" / f"{number:06d}.png")).astype("uint8")))
        (tmp_path / "alpha").mkdir(exist_ok=True)
        picture.save(tmp_path / "alpha" / f"{number}.png")
    sample(models / "mask", tmp_path / "other", conditioning_dir=str(tmp_path / "alpha"), num_images=2)
    assert all(np.array_equal(read(tmp_path / "other" / f"{i:06d}.png"), samples[i]) for i in range(2))


@pytest.mark.slow
def test_the_size_of_the_small_images_decides_and_the_samples_are_scored(models, made, tmp_path, monkeypatch, capsys):
    wide = {"conditioning_dir": str(tmp_path / "wide"), "image_noise": 0.1, "sample_batch_size": 3}
    (tmp_path / "wide").mkdir()
    Image.new("RGB", (20, 6), "red").save(tmp_path / "wide" / "a.png")
    sample(models / "downscale", tmp_path / "wide_out", **wide)
    assert read(tmp_path / "wide_out" / "000000.png").shape == (12, 40, 3)

    sample(models / "downscale", tmp_path / "out", conditioning_dir=str(made / "down" / "conditions"), num_images=8)
    flags = {"reference": made / "down" / "truth", "metrics": "kid", "output_file": tmp_path / "scores.json"}
    evaluate(monkeypatch, generated=tmp_path / "out", paired=True, **flags)
    assert "against the true images" in (line := capsys.readouterr().out) and "8 samples of 4 conditions" in line
    found = json.loads((tmp_path / "scores.json").read_text())["paired"]
    truth = [read(made / "down" / "truth" / f"{number:06d}.png").astype(np.float32) for number in range(4)]
    samples = [read(tmp_path / "out" / f"{number:06d}.png").astype(np.float32) for number in range(8)]
    assert found["psnr"] == pytest.approx(np.mean([psnr(samples[i], truth[i % 4]) for i in range(8)]))
    assert found["ssim"] == pytest.approx(np.mean([ssim(samples[i], truth[i % 4]) for i in range(8)]))
    means = [psnr((samples[i] + samples[i + 4]) / 2, truth[i]) for i in range(4)]
    assert found["psnr_of_mean"] == pytest.approx(np.mean(means)) and found["deviation"] > 0

    evaluate(monkeypatch, generated=made / "down" / "bicubic", paired=True, **flags)
    bicubic = json.loads((tmp_path / "scores.json").read_text())["paired"]
    assert bicubic["psnr"] > found["psnr"] and "psnr_of_mean" not in bicubic
    with pytest.raises(UserError, match="--paired: a sample is 16x16 .*, its true image in --reference 24x24"):
        evaluate(monkeypatch, generated=tmp_path / "out", paired=True, **flags | {"reference": made / "images"})


def test_the_samples_of_another_model_are_conditions_without_their_grid(tmp_path):
    for name in ("000000.png", "000001.png", "grid.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    assert len(list_images(tmp_path, "--conditioning_dir")) == 3
    (tmp_path / "sampling.json").write_text("{}")
    names = [file.name for file in list_images(tmp_path, "--conditioning_dir")]
    assert names == ["000000.png", "000001.png"]


def test_psnr_is_that_of_the_definition():
    one = np.zeros((16, 16, 3), dtype=np.float32)
    assert psnr(one + 5, one) == pytest.approx(20 * np.log10(255 / 5), abs=1e-3)
    assert psnr(one, one) == 100 and ssim(one, one) == pytest.approx(1)


@pytest.mark.parametrize(
    ("kind", "flags", "message"),
    [
        ("mask", {}, "--conditioning_dir is missing"),
        ("mask", {"conditioning_dir": "nowhere"}, "--conditioning_dir nowhere is not a folder"),
        ("mask", {"conditioning_dir": "empty"}, "--conditioning_dir empty holds no images"),
        ("mask", {"conditioning_dir": "images"}, "images/a.png: mask_image is black everywhere.*without --mask_dir"),
        ("mask", {"conditioning_dir": "images", "mask_dir": "white"}, "white/a.png: mask_image is white everywhere"),
        ("mask", {"conditioning_dir": "images", "mask_dir": "empty"}, "--mask_dir empty holds no images"),
        ("mask", {"conditioning_dir": "images", "mask_dir": "other"}, "--mask_dir other has no mask a.png"),
        ("mask", {"conditioning_dir": "images", "mask_dir": "small"}, "small/a.png is 8x8 .* a.png is 16x16"),
        ("mask", {"conditioning_dir": "sizes", "mask_dir": "sizes"}, "sizes/b.png is 8x8 .* a.png is 16x16"),
        ("mask", {"conditioning_dir": "broken"}, "broken/a.png cannot be read"),
        ("mask", {"conditioning_dir": "odd"}, "odd/a.png: image is 15x15 .*multiples of 2"),
        ("mask", {"mask_dir": "white", "class_labels": ["all"]}, "--class_labels: this pipeline is conditioned by"),
        ("downscale", {"conditioning_dir": "images", "mask_dir": "white"}, "--mask_dir: this pipeline is conditioned"),
        ("downscale", {"conditioning_dir": "images", "image_noise": 0.5}, "--image_noise 0.5: .* noise of 0 to 0.2"),
        ("mask", {"conditioning_dir": "images", "image_noise": 0.5}, "--image_noise 0.5: this model takes no noise"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_written(models, tmp_path, monkeypatch, kind, flags, message):
    monkeypatch.chdir(tmp_path)
    pictures = {
        "images": [(16, "red")], "white": [(16, "white")], "small": [(8, "red")], "sizes": [(16, "red"), (8, "red")],
    }  # fmt: skip
    for folder in (*pictures, "empty", "other", "broken", "odd"):
        (tmp_path / folder).mkdir()
    for folder, content in pictures.items():
        for name, (side, colour) in zip("ab", content, strict=False):
            Image.new("RGB", (side, side), colour).save(tmp_path / folder / f"{name}.png")
    Image.new("L", (16, 16)).save(tmp_path / "other" / "b.png")
    odd = Image.new("RGBA", (15, 15), "red")
    odd.paste((0, 0, 0, 0), (2, 2, 6, 6))
    odd.save(tmp_path / "odd" / "a.png")
    (tmp_path / "broken" / "a.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=message) as refused:
        sample(models / kind, tmp_path / "out", **flags)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()
