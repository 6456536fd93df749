"""Conditional training from start to saved pipeline: the same run on any processes, and what it leaves."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import DiffusionPipeline, UNet2DModel
from PIL import Image
from process_helpers import run_forked
from safetensors.torch import load_file
from training_helpers import (
    assert_resumes_bit_equal,
    losses,
    run_in_process,
    same_training_state,
    same_weights,
    tiny_run,
)

from trainkit.errors import UserError
from trainkit.training import learning_rate_finder as learning_rate

UNET, EMA = (f"{folder}/diffusion_pytorch_model.safetensors" for folder in ("unet", "unet_ema"))
EMBEDDING, STEPS = "vector_embedding/diffusion_pytorch_model.safetensors", 8


@pytest.fixture(scope="module")
def photos(image_folder, tmp_path_factory):
    """The images of two classes, a third of a third one, and a vector next to each."""
    folder = tmp_path_factory.mktemp("photos") / "train"
    shutil.copytree(image_folder, folder)
    (folder / "third").mkdir()
    for path in sorted((folder / "round").iterdir())[:6]:
        path.rename(folder / "third" / path.name)
    for number, path in enumerate(sorted(path for path in folder.rglob("*.*"))):
        np.save(path.with_suffix(".npy"), np.float32([number, 100 + number % 3, -3, 0.01 * number]))
    return folder


@pytest.fixture
def train(photos, tiny_unet, cache_dir, tmp_path, monkeypatch):
    """Run the script's main in this process with flags over those of the tiny run; returns the output folder."""

    def call(name="out", **flags):
        arguments = arguments_of(photos, tiny_unet, cache_dir, tmp_path / name, **flags)
        run_in_process(monkeypatch, "train_conditional", arguments)
        return tmp_path / name

    return call


def arguments_of(photos, tiny_unet, cache_dir, output_dir, **flags):
    flags = {"max_train_steps": STEPS, "checkpointing_steps": 4, "conditioning_dropout": 0.3} | flags
    return tiny_run(photos, tiny_unet, cache_dir, output_dir, **flags)


@pytest.mark.slow
def test_classes_from_training_to_the_saved_pipeline(train, photos, capsys):
    """And a run that was stopped half-way is the same run, bit for bit."""
    flags = {"class_balance": "inverse", "validation_data_dir": photos.parent / "held-out", "eval_batch_size": 5}
    flags |= {"score_steps": 100, "score_images": 4}
    shutil.copytree(photos / "third", photos.parent / "held-out" / "third", dirs_exist_ok=True)
    shutil.copytree(photos / "square", photos.parent / "held-out" / "square", dirs_exist_ok=True)
    out = train(**flags)
    same_weights(out / UNET, out / f"checkpoint-{STEPS}" / EMA)
    index = json.loads((out / "model_index.json").read_text())
    assert index["id2label"] == {"0": "round", "1": "square", "2": "third"}
    assert UNet2DModel.load_config(out / "unet")["num_class_embeds"] == 4
    assert "class_labels='round'" in (out / "README.md").read_text()
    first, last = (load_file(out / f"checkpoint-{step}" / UNET)["class_embedding.weight"] for step in (4, STEPS))
    assert ((first - last).abs().amax(1) > 1e-5).all()  # each class and the null one are learned
    grid = Image.open(out / "samples.png")
    assert grid.height / (grid.width - 2 * grid.height / 3) > 3  # one row per class, two columns, and their names
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["validation_loss"] > 0 for row in rows if "validation_loss" in row] == [True]
    assert [row["kid_n"] for row in rows if "kid" in row] == [4]

    pipeline = DiffusionPipeline.from_pretrained(out, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    made = [
        pipeline(class_labels=name, num_inference_steps=2, guidance_scale=4.0, output_type="np",
                 generator=torch.Generator().manual_seed(0)).images
        for name in ("round", "third")
    ]  # fmt: skip
    assert made[0].shape == (1, 16, 16, 3) and not np.allclose(*made)

    before = out.parent / "before"
    shutil.copytree(out, before)
    shutil.rmtree(out / f"checkpoint-{STEPS}")
    train(**flags, resume_from_checkpoint="latest")
    assert "4 of 8 steps done" in capsys.readouterr().out
    same_training_state(out / f"checkpoint-{STEPS}", before / f"checkpoint-{STEPS}")
    same_weights(out / UNET, before / UNET)
    assert losses(out) == losses(before)
    kids = [[json.loads(line).get("kid") for line in (folder / "metrics.jsonl").open()] for folder in (out, before)]
    assert kids[0] == kids[1]


@pytest.mark.slow
def test_labels_go_into_the_loss(train, monkeypatch):
    """Other labels, another run; all of them dropped, the run of one class."""
    from trainkit.data.loading.dataset import PreparedImages

    short = {"max_train_steps": 3, "checkpointing_steps": 0, "lr_warmup_steps": 1}
    plain, dropped = train("plain", **short), train("dropped", conditioning_dropout=1, **short)
    monkeypatch.setattr(PreparedImages, "labels", lambda images, indices: 1 - np.minimum(indices % 2, 1))
    other, dropped_too = train("other", **short), train("dropped_too", conditioning_dropout=1, **short)
    assert losses(plain) != pytest.approx(losses(other), abs=1e-4)
    assert losses(dropped) == losses(dropped_too)


@pytest.mark.slow
def test_two_processes_and_micro_steps_are_the_same_run(train, photos, tiny_unet, cache_dir, tmp_path):
    flags = {"class_balance": "sqrt", "checkpointing_steps": 0, "save_images_epochs": 1000}
    whole = train("whole", **flags)
    halves = {"train_batch_size": 2, "gradient_accumulation_steps": 2} | flags
    arguments = arguments_of(photos, tiny_unet, cache_dir, tmp_path / "two", **halves)
    run_forked("train_conditional.py", *arguments, processes=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(whole), abs=1e-4)
    same_weights(tmp_path / "two" / UNET, whole / UNET, tolerance=1e-3)
    grids = [np.asarray(Image.open(folder / "samples.png")).astype(int) for folder in (tmp_path / "two", whole)]
    assert np.abs(grids[0] - grids[1]).mean() < 2


@pytest.mark.slow(9)
def test_two_processes_find_the_learning_rate_of_one(train, photos, smaller_unet, cache_dir, tmp_path, monkeypatch):
    """Replicated or divided, with labels and micro-steps: the same curve up to the rates at which training fails."""
    smaller = {"STEPS": 12, "LEAST_RATE": 1e-4, "PROBE_IMAGES": 8}
    for name, value in smaller.items():
        monkeypatch.setattr(learning_rate, name, value)
    shorter = tmp_path / "shorter.py"
    shorter.write_text(
        "from trainkit.training import learning_rate_finder as learning_rate\n"
        f"vars(learning_rate).update({smaller})\n"
        "import train_conditional\n"
        "train_conditional.main()\n"
    )

    def found(folder):
        return json.loads((folder / "learning_rate.json").read_text())

    one = found(train("one", model_config_name_or_path=smaller_unet, find_learning_rate=True))
    useful = sum(rate <= one["learning_rate"] for rate in one["rates"])
    assert useful > 4 and min(one["losses"]) < 0.9 * one["losses"][0]
    for name, divided in (("replicated", {}), ("divided", {"shard_weights": True})):
        flags = {"find_learning_rate": True, "train_batch_size": 2, "gradient_accumulation_steps": 2} | divided
        arguments = arguments_of(photos, smaller_unet, cache_dir, tmp_path / name, **flags)
        run_forked(shorter, *arguments, processes=2, environment={"PYTHONPATH": str(ROOT)})
        two = found(tmp_path / name)
        assert two["learning_rate"] == one["learning_rate"]
        assert two["losses"][:useful] == pytest.approx(one["losses"][:useful], rel=2e-3)


@pytest.mark.slow(8)
def test_vectors_with_divided_weights_are_the_same_run(train, photos, smaller_unet, cache_dir, tmp_path):
    """Saved as a stock UNet and an embedding with its statistics; and a checkpoint resumes in one process."""
    flags = {"condition": "vector", "save_images_epochs": 1000, "max_train_steps": 4, "checkpointing_steps": 2}
    flags["model_config_name_or_path"] = smaller_unet
    whole = train("whole", **flags)
    halves = {"train_batch_size": 4, "shard_weights": True, "find_batch_size": True} | flags
    arguments = arguments_of(photos, smaller_unet, cache_dir, tmp_path / "two", **halves)
    run_forked("train_conditional.py", *arguments, processes=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(whole), abs=1e-4)
    for file in (UNET, EMBEDDING):
        same_weights(tmp_path / "two" / file, whole / file, tolerance=1e-3)
    shutil.rmtree(tmp_path / "two" / "checkpoint-4")
    train("two", **flags, resume_from_checkpoint="latest")
    assert losses(tmp_path / "two") == pytest.approx(losses(whole), abs=1e-4)

    unet, embedding = load_file(whole / UNET), load_file(whole / EMBEDDING)
    assert not [name for name in unet if name.startswith("class_embedding")]
    vectors = np.stack([np.load(path) for path in photos.rglob("*.npy")]).astype(np.float64)
    assert embedding["mean"].numpy() == pytest.approx(vectors.mean(0), rel=1e-4)
    assert embedding["std"].numpy() == pytest.approx([*vectors.std(0)[:2], 1, vectors.std(0)[3]], rel=1e-4)
    averages = load_file(whole / "checkpoint-4" / EMA)
    assert torch.equal(averages["class_embedding.null_embedding"], embedding["null_embedding"])
    assert embedding["null_embedding"].any() and embedding["output.weight"].any()
    grid = Image.open(whole / "samples.png")
    assert grid.width == pytest.approx(grid.height, rel=0.05)


CLASS_AND_VECTOR = {"condition": ["class", "vector"], "vector_dropout": 0.4, "max_train_steps": 4}


@pytest.mark.slow
def test_classes_and_vectors_from_training_to_the_saved_pipeline(train, tmp_path):
    """One embedding of both, each condition may be null; and a resumed run is the same, bit for bit."""
    flags = CLASS_AND_VECTOR | {"checkpointing_steps": 2, "eval_batch_size": 5}
    out = train(**flags)
    assert "class_labels='round', vectors=[" in (out / "README.md").read_text()
    unet, embedding = load_file(out / UNET), load_file(out / EMBEDDING)
    assert not [name for name in unet if name.startswith("class_embedding")]
    assert embedding["weight"].shape == (4, 32) and embedding["output.weight"].any()
    pipeline = DiffusionPipeline.from_pretrained(out, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    vector, made = [1.0, 100, -3, 0.1], []
    for asked in ({"class_labels": "third", "vectors": vector}, {"class_labels": ["third"]}, {"vectors": [vector]}):
        generator = torch.Generator().manual_seed(0)
        values = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "np", "generator": generator}
        made.append(pipeline(**asked, **values).images)
    assert made[0].shape == (1, 16, 16, 3) and not np.allclose(made[0], made[1]) and not np.allclose(made[0], made[2])
    with pytest.raises(ValueError, match="conditions: 2, 3 rows were given"):
        pipeline(class_labels=[0, 1], vectors=[vector] * 3)
    assert_resumes_bit_equal(train, out, flags, tmp_path / "before")


@pytest.mark.slow
def test_classes_vectors_and_images_are_the_same_run_on_two_processes(train, photos, tiny_unet, cache_dir, tmp_path):
    """Each of the three counts: without one of them it is another run."""
    three = CLASS_AND_VECTOR | {"condition": ["class", "vector", "image"], "condition_from": "edges"}
    three |= {"checkpointing_steps": 0, "save_images_epochs": 1000}
    whole = train("whole", **three)
    halves = {"train_batch_size": 2, "gradient_accumulation_steps": 2}
    run_forked(
        "train_conditional.py", *arguments_of(photos, tiny_unet, cache_dir, tmp_path / "two", **three | halves),
        processes=2,
    )  # fmt: skip
    assert losses(tmp_path / "two") == pytest.approx(losses(whole), abs=1e-4)
    for file in (UNET, EMBEDDING):
        same_weights(tmp_path / "two" / file, whole / file, tolerance=1e-3)
    assert (whole / "README.md").read_text().count("image=picture, class_labels='round', vectors=[") == 1
    dropped = [
        losses(train(name, **three | {name: 1}))
        for name in ("conditioning_dropout", "vector_dropout", "image_dropout")
    ]
    assert len({tuple(run) for run in [*dropped, losses(whole)]}) == 4


@pytest.mark.slow
def test_a_pipeline_is_the_start_of_another(train, capsys):
    """An unconditional one of the other script, by the flag that both have, at another resolution."""
    import train_unconditional

    flags = {"max_train_steps": 2, "checkpointing_steps": 0, "save_images_epochs": 1000}
    classes = train("classes", **flags)
    train("vectors", condition="vector", pretrained_model_name_or_path=classes, resolution=24, **flags)
    assert f"started from {classes}: " in (output := capsys.readouterr().out) and "vectors added at zero" in output
    sys.argv[0] = "train_unconditional.py"
    for flag in ("--condition", "--conditioning_dropout"):
        del sys.argv[sys.argv.index(flag) : sys.argv.index(flag) + 2]
    sys.argv += ["--overwrite_output_dir"]
    train_unconditional.main()
    assert f"started from {classes}: " in capsys.readouterr().out
    assert json.loads((classes.parent / "vectors" / "model_index.json").read_text())["_class_name"] == "DDPMPipeline"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"conditioning_dropout": 1.5}, "--conditioning_dropout 1.5 must be 0 to 1"),
        ({"conditioning_dropout": 0}, "--preview_guidance_scale 2.0 guides away from a null condition"),
        ({"preview_guidance_scale": 0.5}, "--preview_guidance_scale 0.5 must be at least 1"),
        ({"class_balance": "sqrt", "shuffle_block_size": 8}, "--class_balance sqrt picks images one by one"),
        ({"pretrained_model_name_or_path": "/nowhere"}, "--pretrained_model_name_or_path /nowhere"),
    ],
)
def test_one_line_error(train, flags, message):
    with pytest.raises(UserError, match=message) as error:
        train(**flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("condition", ["class", "vector"])
def test_images_without_a_condition_are_refused(train, photos, tmp_path, condition):
    (tmp_path / "flat").mkdir()
    for path in sorted((photos / "square").glob("*.png"))[:4]:
        shutil.copy(path, tmp_path / "flat")
    with pytest.raises(UserError, match=f"--condition {condition}: .*flat has no"):
        train(train_data_dir=tmp_path / "flat", condition=condition)
