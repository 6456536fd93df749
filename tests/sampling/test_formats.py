"""sample.py --output_format: the same images in every format, continued after a kill with the same bytes."""

import json
import tracemalloc

import numpy as np
import pytest
from conditional_helpers import NAMES, class_unet, text_parts, vector_unet
from datasets import load_from_disk
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image
from sampling_helpers import contents, interrupt_the_second_batch, read, sample, tiny_model

from trainkit.data.loading.dataset import PreparedImages
from trainkit.errors import UserError
from trainkit.evaluation.conditions import read_annotations
from trainkit.evaluation.images import open_images, read_sampling_record
from trainkit.sampling.npz import read_blocks, write_npz
from trainkit.sampling.pipeline import conditional_pipeline, save_pipeline

pytestmark = pytest.mark.usefixtures("on_the_cpu_alone")

FORMATS = ("png", "webp", "jpeg", "npz", "arrow")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_pipeline(folder / "plain", DDPMPipeline(tiny_model(), DDPMScheduler()), "")
    save_pipeline(folder / "alpha", DDPMPipeline(tiny_model(channels=4), DDPMScheduler()), "")
    save_pipeline(folder / "class", conditional_pipeline(class_unet(), DDPMScheduler(), id2label=NAMES), "")
    save_pipeline(folder / "vector", conditional_pipeline(vector_unet(), DDPMScheduler()), "")
    unet, parts = text_parts(folder)
    save_pipeline(folder / "text", conditional_pipeline(unet, DDPMScheduler(), prompt_length=8, **parts), "")
    return folder


@pytest.fixture(scope="module")
def samples(models, tmp_path_factory):
    """Seven images in each format."""
    folder = tmp_path_factory.mktemp("samples")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        for name in FORMATS:
            sample(models / "plain", folder / name, output_format=name)
    return folder


@pytest.mark.slow
def test_every_format_holds_the_same_images(samples):
    expected = read(samples / "png")
    assert np.array_equal(read(samples / "webp", extension="webp"), expected)
    jpeg = read(samples / "jpeg", extension="jpg")
    assert 0 < np.abs(jpeg - expected).mean() < 6
    with np.load(samples / "npz" / "samples.npz") as arrays:
        assert arrays.files == ["arr_0"] and arrays["arr_0"].dtype == np.uint8
        assert np.array_equal(arrays["arr_0"], expected)
    dataset = load_from_disk(str(samples / "arrow"))
    assert np.array_equal(np.array(dataset["image"]).reshape(expected.shape), expected)
    assert np.array_equal(PreparedImages(samples / "arrow").gather(np.arange(7)), expected)
    for name in FORMATS:
        assert Image.open(samples / name / "grid.png").width >= 400
        assert not [path for path in (samples / name).iterdir() if path.name in (".staging", "work")]
        lines = [json.loads(line) for line in (samples / name / "metadata.jsonl").read_text().splitlines()]
        assert [line["seed"] for line in lines] == list(range(3, 10))
        assert ("file_name" in lines[0]) is (name not in ("npz", "arrow"))


@pytest.mark.parametrize("name", FORMATS)
def test_evaluate_samples_opens_every_format(samples, name):
    images = open_images(str(samples / name), "--generated")
    assert len(images) == 7 and read_sampling_record(str(samples / name))["output_format"] == name
    [batch] = images.batches(np.arange(7), 7, side=16)
    assert np.abs(batch - read(samples / "png")).mean() < 6


def test_the_record_of_an_npz_file_is_found_beside_it(samples):
    assert read_sampling_record(str(samples / "npz" / "samples.npz"))["num_inference_steps"] == 5


@pytest.mark.parametrize("name", FORMATS)
def test_an_interrupted_run_continues_to_the_same_bytes(models, samples, tmp_path, monkeypatch, capsys, name):
    interrupt_the_second_batch(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        sample(models / "plain", tmp_path, output_format=name)
    assert not json.loads((tmp_path / "sampling.json").read_text())["complete"]
    sample(models / "plain", tmp_path, output_format=name, num_images=2)  # fewer are there already
    record = json.loads((tmp_path / "sampling.json").read_text())
    assert record["complete"] and record["num_images"] == len(open_images(str(tmp_path), "--generated")) == 4
    if name in ("png", "webp", "jpeg"):
        lost = next(tmp_path.glob("000001.*"))  # of a batch that was written in part
        lost.unlink()
    sample(models / "plain", tmp_path, output_format=name)
    assert f"{4 if name in ('png', 'webp', 'jpeg') else 3} generated now" in capsys.readouterr().out
    assert contents(tmp_path) == contents(samples / name)


@pytest.mark.parametrize("name", ["npz", "arrow"])
def test_more_images_are_added_to_one_file(models, samples, tmp_path, capsys, name):
    sample(models / "plain", tmp_path, output_format=name, num_images=4)
    sample(models / "plain", tmp_path, output_format=name)
    assert "7 images, 3 generated now" in capsys.readouterr().out
    assert contents(tmp_path) == contents(samples / name)
    sample(models / "plain", tmp_path, output_format=name)
    sample(models / "plain", tmp_path, output_format=name, num_images=2)
    assert capsys.readouterr().out.count(" 0 generated now") == 2
    assert contents(tmp_path) == contents(samples / name)


def test_formats_do_not_mix_in_a_folder(models, samples):
    with pytest.raises(UserError, match="holds samples of --output_format png, not npz; use another --output_dir"):
        sample(models / "plain", samples / "png", output_format="npz")
    with pytest.raises(UserError, match="holds samples of --output_format arrow, not webp"):
        sample(models / "plain", samples / "arrow", output_format="webp")


@pytest.mark.slow
def test_jpeg_has_no_transparency(models, tmp_path):
    with pytest.raises(UserError, match="--output_format jpeg stores no transparency"):
        sample(models / "alpha", tmp_path / "out", output_format="jpeg")
    assert not (tmp_path / "out").exists()
    for name in ("png", "webp", "arrow"):
        sample(models / "alpha", tmp_path / name, output_format=name, num_images=2)
    transparent = read(tmp_path / "png", 2)
    assert transparent.shape[-1] == 4 and np.array_equal(read(tmp_path / "webp", 2, "webp"), transparent)
    assert np.array_equal(PreparedImages(tmp_path / "arrow").gather(np.arange(2)), transparent)


def test_classes_are_arr_1_and_a_column(models, tmp_path):
    asked = {"class_labels": ["cat", "null", "7"], "num_images": 5}
    for name in ("npz", "arrow"):
        sample(models / "class", tmp_path / name, output_format=name, **asked)
    with np.load(tmp_path / "npz" / "samples.npz") as arrays:
        assert arrays["arr_1"].tolist() == [0, -1, 2, 0, -1] and arrays["arr_1"].dtype == np.int64
    dataset = load_from_disk(str(tmp_path / "arrow"))
    assert dataset["label"] == [0, -1, 2, 0, -1] and dataset.features["label"].names == ["cat", "dog", "7"]
    found = read_annotations(open_images(str(tmp_path / "arrow"), "--generated"), "--generated")
    assert found.labels == ["cat", None, "7", "cat", None]


@pytest.mark.slow
def test_prompts_and_vectors_are_columns(models, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red square\n\nblue circle\n")
    np.save(tmp_path / "vectors.npy", np.array([[1, 2, 3], [4, 5, 6]], np.float32))
    asked = {"output_format": "arrow", "num_images": 4}
    sample(models / "text", tmp_path / "text", prompts_file=str(tmp_path / "prompts.txt"), **asked)
    assert load_from_disk(str(tmp_path / "text"))["text"] == ["a red square", "", "blue circle", "a red square"]
    sample(models / "vector", tmp_path / "vector", vectors_file=str(tmp_path / "vectors.npy"), **asked)
    assert load_from_disk(str(tmp_path / "vector"))["vector"][:] == [[1, 2, 3], [4, 5, 6]] * 2
    np.save(tmp_path / "null.npy", np.array([[1, 2, 3], [np.nan] * 3], np.float32))
    with pytest.raises(UserError, match="--output_format arrow cannot hold a null vector"):
        sample(models / "vector", tmp_path / "null", vectors_file=str(tmp_path / "null.npy"), **asked)


def test_a_large_npz_is_written_and_read_in_flat_memory(tmp_path):
    block = np.zeros((64, 64, 64, 3), np.uint8)
    tracemalloc.start()
    write_npz(tmp_path / "samples.npz", (64 * 200, 64, 64, 3), (block for _ in range(200)))
    assert sum(map(len, read_blocks(tmp_path / "samples.npz"))) == 64 * 200
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "samples.npz").stat().st_size > 150e6 and peak < 40e6


def test_a_damaged_npz_is_one_line(models, samples, tmp_path):
    sample(models / "plain", tmp_path, output_format="npz", num_images=1)
    (tmp_path / "samples.npz").write_bytes(b"PK no archive")
    with pytest.raises(UserError, match=r"samples.npz is damaged .*; delete it"):
        sample(models / "plain", tmp_path, output_format="npz", num_images=1)
