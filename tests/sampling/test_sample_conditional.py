"""sample.py and conditional pipelines: what each image should show, the same for any division of the work."""

import json
import math
import shutil
from functools import partial

import numpy as np
import pytest
from conditional_helpers import NAMES, class_unet, text_parts, vector_unet
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image
from process_helpers import run_forked
from sampling_helpers import sample_flags, sample_images

from trainkit.errors import UserError
from trainkit.sampling.pipeline import conditional_pipeline, save_pipeline

pytestmark = pytest.mark.usefixtures("on_the_cpu_alone")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_pipeline(folder / "class", conditional_pipeline(class_unet(), DDPMScheduler(), id2label=NAMES), "")
    save_pipeline(folder / "vector", conditional_pipeline(vector_unet(), DDPMScheduler()), "")
    both = conditional_pipeline(vector_unet(4), DDPMScheduler(), id2label=NAMES)
    save_pipeline(folder / "both", both, "")
    unet, parts = text_parts(folder)
    save_pipeline(folder / "text", conditional_pipeline(unet, DDPMScheduler(), prompt_length=8, **parts), "")
    save_pipeline(folder / "plain", DDPMPipeline(class_unet(num_class_embeds=None), DDPMScheduler()), "")
    return folder


FEW = {"num_images": 6, "num_inference_steps": 3}
flags, sample = partial(sample_flags, **FEW), partial(sample_images, **FEW)


def rows(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def read(folder, count=6):
    return np.stack([np.asarray(Image.open(folder / f"{i:06d}.png")).astype(int) for i in range(count)])


@pytest.fixture(scope="module")
def samples(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        sample(models / "class", folder, class_labels=["all"], guidance_scale=3.0)
    return folder


@pytest.mark.slow
def test_all_divides_the_images_evenly_and_says_what_each_shows(samples):
    metadata = rows(samples)
    assert [row["file_name"] for row in metadata] == [f"{index:06d}.png" for index in range(6)]
    assert [row["label"] for row in metadata] == ["cat", "dog", "7"] * 2
    assert [row["label_id"] for row in metadata] == [0, 1, 2] * 2
    record = json.loads((samples / "sampling.json").read_text())
    assert record["condition"] == "class_labels" and record["guidance_scale"] == 3.0 and record["complete"]


def test_imagefolder_of_datasets_has_the_labels(samples, tmp_path):
    from datasets import load_dataset

    dataset = load_dataset("imagefolder", data_dir=str(samples), split="train", cache_dir=str(tmp_path))
    assert dataset["label"] == ["cat", "dog", "7"] * 2
    assert np.array_equal(np.asarray(dataset[1]["image"]), read(samples)[1])


@pytest.mark.slow
def test_two_processes_and_other_batches_make_the_same_images(models, samples, tmp_path):
    values = flags(models / "class", tmp_path, sample_batch_size=2, guidance_scale=3.0)
    words = [word for name, value in values.items() for word in (f"--{name}", value)]
    run_forked("sample.py", *words, "--class_labels", "cat", "1", "7", processes=2)
    assert np.abs(read(tmp_path) - read(samples)).max() <= 1
    assert rows(tmp_path) == rows(samples)


def test_a_second_start_makes_what_is_missing_and_more(models, samples, capsys):
    before = read(samples)
    (samples / "000002.png").unlink()
    sample(models / "class", samples, class_labels=["all"], guidance_scale=3.0, num_images=7)
    assert "7 images, 2 generated now" in capsys.readouterr().out
    assert np.abs(read(samples) - before).max() <= 1
    assert rows(samples)[6]["label"] == "cat"


@pytest.mark.parametrize(
    "change, message",
    [({"class_labels": ["cat"]}, "another conditions_sha256"), ({"guidance_scale": 2.0}, "another guidance_scale")],
)
def test_other_conditions_do_not_mix_into_a_folder(models, samples, change, message):
    with pytest.raises(UserError, match=message):
        sample(models / "class", samples, **{"class_labels": ["all"], "guidance_scale": 3.0} | change)


@pytest.mark.slow
def test_classes_and_vectors_together_and_either_alone(models, tmp_path):
    """Each list repeats by itself; what is not given is null."""
    file = tmp_path / "vectors.csv"
    file.write_text("1,2,3\nnan,nan,nan\n0,0,0\n")
    lists = {"class_labels": ["dog", "null"], "vectors_file": str(file)}
    sample(models / "both", tmp_path / "both", guidance_scale=2.0, **lists)
    assert [row["label"] for row in rows(tmp_path / "both")] == ["dog", "null"] * 3
    assert [row["vector"] for row in rows(tmp_path / "both")] == [[1, 2, 3], None, [0, 0, 0]] * 2
    made = [read(tmp_path / "both")]
    for name, value in lists.items():
        sample(models / "both", tmp_path / name, guidance_scale=2.0, **{name: value})
        made.append(read(tmp_path / name))
    assert all((one != made[0]).any() for one in made[1:])
    assert np.abs(made[1] - made[0])[[1, 4]].max() <= 1, "their vector is null"
    with pytest.raises(UserError, match="--class_labels and --vectors_file are missing: they set what"):
        sample(models / "both", tmp_path / "none")


@pytest.mark.slow
def test_prompts_and_vectors_come_from_files(models, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red square\n\nblue circle\n")
    sample(models / "text", tmp_path / "text", prompts_file=str(tmp_path / "prompts.txt"), guidance_scale=2.0)
    assert [row["text"] for row in rows(tmp_path / "text")] == ["a red square", "", "blue circle"] * 2

    vectors = np.array([[1, 2, 3], [np.nan] * 3], np.float32)
    np.save(tmp_path / "vectors.npy", vectors)
    (tmp_path / "vectors.csv").write_text("size,slant,width\n1,2,3\nnan,nan,nan\n")
    for end in ("npy", "csv"):
        sample(models / "vector", tmp_path / end, vectors_file=str(tmp_path / f"vectors.{end}"), num_images=2)
        assert [row["vector"] for row in rows(tmp_path / end)] == [[1, 2, 3], None]
    assert np.array_equal(read(tmp_path / "npy", 2), read(tmp_path / "csv", 2))


def test_nothing_in_the_folder_is_executed(models, tmp_path):
    (models / "vector" / "conditional.py").write_text("raise SystemExit('executed')")
    (models / "vector" / "vector_embedding" / "vector_embedding.py").write_text("raise SystemExit('executed')")
    np.save(tmp_path / "vectors.npy", np.zeros((1, 3)))
    sample(models / "vector", tmp_path / "out", vectors_file=str(tmp_path / "vectors.npy"), num_images=1)


@pytest.mark.parametrize(
    "kind, change, message",
    [
        ("class", {}, "--class_labels is missing"),
        ("class", {"class_labels": ["3"]}, "--class_labels: 3 must be 0 to 2"),
        ("class", {"class_labels": ["dgo"]}, "--class_labels: no class is called 'dgo': did you mean 'dog'?"),
        ("class", {"class_labels": ["dgo"]}, "; the classes are cat, dog, "),
        (
            "class",
            {"class_labels": ["all"], "prompts_file": "x"},
            "--prompts_file: this pipeline is conditioned by --class_labels",
        ),
        ("class", {"class_labels": ["all"], "guidance_scale": 0.5}, "--guidance_scale 0.5 must be at least 1"),
        (
            "class",
            {"class_labels": ["all"], "guidance_scale": math.inf},
            "--guidance_scale inf must be at least 1",
        ),
        ("class", {"class_labels": ["all"], "guidance_interval": [3.0, 1.0]}, "--guidance_interval 3.0 1.0: give"),
        ("class", {"class_labels": ["all"], "guidance_interval": [3.0]}, "--guidance_interval 3.0: give two"),
        ("class", {"class_labels": ["all"], "guidance_rescale": 1.5}, "--guidance_rescale 1.5 must be 0 to 1"),
        ("vector", {"vectors_file": "short.npy"}, "the model accepts (images, 3)"),
        ("vector", {"vectors_file": "none.npy"}, "--vectors_file none.npy cannot be read"),
        ("vector", {"vectors_file": "words.csv"}, "--vectors_file words.csv cannot be read"),
        ("text", {"prompts_file": "long.txt"}, "has 22 tokens, the model accepts 8: shorten it"),
        ("text", {"prompts_file": "none.txt"}, "--prompts_file none.txt cannot be read"),
        ("text", {"prompts_file": "empty.txt"}, "--prompts_file empty.txt is empty"),
        ("plain", {"class_labels": ["0"]}, "--class_labels: this pipeline is unconditional; remove the flag"),
        ("plain", {"guidance_scale": 2.0}, "--guidance_scale: this pipeline is unconditional"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_written(models, tmp_path, monkeypatch, kind, change, message):
    monkeypatch.chdir(tmp_path)
    np.save("short.npy", np.zeros((2, 2)))
    (tmp_path / "words.csv").write_text("a,b,c\nd,e,f\n")
    (tmp_path / "long.txt").write_text("red " * 20)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError) as refused:
        sample(models / kind, tmp_path / "out", **change)
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_broken_weights_are_one_line(models, tmp_path):
    shutil.copytree(models / "class", tmp_path / "broken")
    (tmp_path / "broken" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match="unet cannot be loaded"):
        sample(tmp_path / "broken", tmp_path / "out", class_labels=["all"])
