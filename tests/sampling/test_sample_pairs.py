"""sample.py, evaluate_samples.py and make_conditions.py with models that were trained on pairs."""

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
from trainkit.sampling.pipeline import conditional_pipeline, save_pipeline

pytestmark = pytest.mark.usefixtures("on_the_cpu_alone")
sample = partial(sample_images, num_images=4, num_inference_steps=2)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for kind, settings in {"labels": {"classes": 4}, "picture": {"picture_channels": 4}}.items():
        pipeline = image_pipeline(kind, **settings)
        parts = {"image_input": pipeline.image_input}
        save_pipeline(folder / kind, conditional_pipeline(pipeline.unet, DDPMScheduler(), **parts), "")
    return folder


def make(monkeypatch, images, output, kind):
    words = [images, output, "--condition_from", kind, "--resolution", 16]
    monkeypatch.setattr("sys.argv", ["make_conditions.py", *map(str, words)])
    make_conditions.main()


def read(path):
    return np.asarray(Image.open(path)).astype(int)


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Label maps of four levels of grey, and their images, as tools/make_conditions.py makes them."""
    make(monkeypatch, write_images(tmp_path / "images", 4), tmp_path / "made", "levels:4")
    return tmp_path / "made"


def test_levels_of_grey_become_label_maps(made, tmp_path, monkeypatch):
    for number in range(4):
        ids, truth = (read(made / kind / f"{number:06d}.png") for kind in ("conditions", "truth"))
        luma = truth @ [0.299, 0.587, 0.114]
        assert ids.shape == (16, 16) and (np.abs(ids - np.floor(luma / 255 * 4).clip(0, 3)) > 0).mean() < 0.02
    for wrong in ("levels", "levels:1", "levels:257", "levels:x"):
        with pytest.raises(UserError, match=f"--condition_from {wrong}: give the number of levels, 2 to 256"):
            make(monkeypatch, tmp_path / "images", tmp_path / "other", wrong)


@pytest.mark.slow
def test_samples_of_label_maps_are_scored_against_their_images(models, made, tmp_path, monkeypatch, capsys):
    sample(models / "labels", tmp_path / "out", num_images=5, conditioning_dir=str(made / "conditions"))
    rows = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert [row["conditioning_image"] for row in rows] == [f"{number:06d}.png" for number in (0, 1, 2, 3, 0)]
    flags = {"reference": made / "truth", "metrics": "kid", "output_file": tmp_path / "scores.json"}
    evaluate(monkeypatch, generated=tmp_path / "out", paired=True, **flags)
    assert "5 samples of 4 conditions" in capsys.readouterr().out
    found = json.loads((tmp_path / "scores.json").read_text())["paired"]
    assert found["psnr"] > 0 and found["num_conditions"] == 4

    # the same ids in another form give the same samples, and other ids others
    for kind in ("palette", "other"):
        (tmp_path / kind).mkdir()
        for number in range(4):
            ids = read(made / "conditions" / f"{number:06d}.png").astype(np.uint8)
            picture = Image.fromarray(3 - ids if kind == "other" else ids).convert("P")
            picture.putdata((3 - ids if kind == "other" else ids).reshape(-1))
            picture.save(tmp_path / kind / f"{number:06d}.png")
        sample(models / "labels", tmp_path / f"{kind}-out", conditioning_dir=str(tmp_path / kind))
    first = [read(tmp_path / folder / "000000.png") for folder in ("out", "palette-out", "other-out")]
    assert np.array_equal(first[0], first[1]) and not np.array_equal(first[0], first[2])


def test_pictures_are_read_in_the_mode_of_the_model(models, tmp_path):
    Image.new("RGBA", (20, 12), (255, 0, 0, 9)).save(tmp_path / "a.png")
    for name, mode in (("seen", "RGBA"), ("opaque", "RGB")):
        (tmp_path / name).mkdir()
        Image.open(tmp_path / "a.png").convert(mode).save(tmp_path / name / "a.png")
        sample(models / "picture", tmp_path / f"{name}-out", conditioning_dir=str(tmp_path / name))
    seen, opaque = (read(tmp_path / f"{name}-out" / "000000.png") for name in ("seen", "opaque"))
    assert seen.shape == (12, 20, 3) and not np.array_equal(seen, opaque)


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("ids", "--conditioning_dir: ids/b.png is not used: it holds the id 4, and the ids of 4 classes are 0 to 3"),
        ("colours", "--conditioning_dir: colours/a.png is not used: it has 3 channels .RGB., and a label map has one"),
        ("lossy", "--conditioning_dir: lossy/a.jpg is not used: JPEG changes ids: save label maps as PNG"),
        ("sizes", "sizes/b.png is 8x8 .*a.png is 16x16"),
        ("odd", "odd/a.png: image is 15x15 .*multiples of 2"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_written(models, tmp_path, monkeypatch, folder, message):
    monkeypatch.chdir(tmp_path)
    pictures = {
        "ids": {"a.png": ("L", 16, 3), "b.png": ("L", 16, 4)}, "colours": {"a.png": ("RGB", 16, "red")},
        "lossy": {"a.jpg": ("L", 16, 0)}, "sizes": {"a.png": ("L", 16, 0), "b.png": ("L", 8, 0)},
        "odd": {"a.png": ("L", 15, 0)},
    }  # fmt: skip
    (tmp_path / folder).mkdir()
    for name, (mode, side, colour) in pictures[folder].items():
        Image.new(mode, (side, side), colour).save(tmp_path / folder / name)
    with pytest.raises(UserError, match=message) as refused:
        sample(models / "labels", tmp_path / "out", conditioning_dir=folder)
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()
