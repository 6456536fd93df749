"""distill.py with teachers that were trained on pairs: students learn from pairs, resume, sample and are swept."""

import json
import shutil

import numpy as np
import pytest
import torch
from distillation_helpers import FLAGS, images_of, load_student, run_distill, save_image_teacher
from evaluation_helpers import TinyExtractor, evaluate
from pair_helpers import CLASSES, label_map, write_pairs
from process_helpers import run_forked
from safetensors.torch import load_file
from sampling_helpers import read, sample_images
from training_helpers import same_training_state, same_weights, tiny_run

from trainkit.data.pairing import PairSettings
from trainkit.errors import UserError
from trainkit.training.signals import StopSignals

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
LENGTH = {"num_steps": 2, "max_train_steps": 9}  # 3 steps of the student of 4 steps, 6 of that of 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder / "held-out", 4)
    images, maps = write_pairs(folder, 16)
    return {"train_data_dir": images, "conditioning_data_dir": maps}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """A teacher of label maps, and one of grey pictures and classes."""
    folder = tmp_path_factory.mktemp("teachers")
    save_image_teacher(folder / "maps", "labels", classes=CLASSES)
    grey = {"picture_channels": 1, "num_class_embeds": 3, "names": {0: "a", 1: "b"}}
    save_image_teacher(folder / "greys", "picture", **grey)
    save_image_teacher(folder / "edges", "edges")
    return folder


@pytest.fixture
def distill(folders, teachers, cache_dir, tmp_path, monkeypatch):
    """Run distill.py in this process with flags over those of a tiny run; returns the output folder."""

    def call(teacher="maps", name="out", **flags):
        flags = LENGTH | folders | flags
        return run_distill(
            monkeypatch, teachers / teacher, flags.pop("train_data_dir"), cache_dir, tmp_path / name, **flags
        )

    return call


@pytest.mark.slow(15)
def test_label_maps_stopped_in_any_stage_and_on_two_processes(
    distill, folders, teachers, cache_dir, tmp_path, monkeypatch
):
    whole = distill("maps", "whole")
    agreed, calls = StopSignals.agreed, iter(range(1, 100))
    with monkeypatch.context() as patch:
        patch.setattr(StopSignals, "agreed", lambda self, step: next(calls) in (2, 6))
        distill()
        out = distill(resume_from_checkpoint="latest")
        assert (out / "stages/steps-4/model_index.json").exists() and not (out / "model_index.json").exists()
    assert StopSignals.agreed is agreed
    distill(resume_from_checkpoint="latest")
    same_training_state(out / "checkpoint-6", whole / "checkpoint-6")
    same_weights(out / UNET_FILE, whole / UNET_FILE)

    flags = FLAGS | LENGTH | folders | {"teacher_model_name_or_path": teachers / "maps", "train_batch_size": 4}
    arguments = tiny_run(flags.pop("train_data_dir"), None, cache_dir, tmp_path / "two", **flags)
    run_forked("distill.py", *arguments, processes=2)
    same_weights(tmp_path / "two" / UNET_FILE, whole / UNET_FILE, tolerance=2e-4)

    others, maps = write_pairs(tmp_path / "others", 16)
    shutil.rmtree(maps)
    shutil.copytree(folders["conditioning_data_dir"] / "a", maps / "b")  # the maps go into the loss
    for path in sorted((maps / "b").iterdir()):
        path.rename(maps / "b" / f"{int(path.stem) + 1:02d}.png")
    shutil.copytree(folders["conditioning_data_dir"] / "a", maps / "a")
    other = distill("maps", "other", train_data_dir=others, conditioning_data_dir=maps)
    assert not torch.equal(*(load_file(folder / UNET_FILE)["conv_in.weight"] for folder in (other, whole)))


@pytest.mark.slow
def test_a_student_of_label_maps_is_sampled_and_swept_beside_its_teacher(
    distill, folders, tmp_path, monkeypatch, on_the_cpu_alone
):
    held_out = folders["train_data_dir"].parent / "held-out"
    flags = {"validation_data_dir": held_out / "images", "validation_conditioning_data_dir": held_out / "maps"}
    out = distill(**flags, validation_steps=4, guidance_scale=2)
    assert "image=label_map" in (out / "README.md").read_text()
    pipeline = load_student(out)
    [one, other] = images_of(pipeline, 2, image=[label_map(0, 16, 16), np.zeros((16, 16), np.uint8)])
    assert len(pipeline.scheduler.timesteps) == 2 and np.abs(one - other).max() > 1e-4
    with pytest.raises(ValueError, match="the id 4, the model has 0 to 3"):
        pipeline(image=np.full((16, 16), 4))

    maps = str(held_out / "maps")
    sample_images(out, tmp_path / "samples", conditioning_dir=maps, num_images=4)
    samples = read(tmp_path / "samples", 4)
    assert samples.shape == (4, 20, 28, 3) and (samples[0] != samples[1]).any()
    monkeypatch.setattr("trainkit.evaluation.model.open_extractor", lambda *arguments: TinyExtractor())
    flags = {"model_name_or_path": out, "conditioning_dir": maps, "sweep": "student:2;teacher/dpmsolver:2"}
    flags |= {"num_images": 8, "sample_batch_size": 4, "cache_dir": tmp_path / "cache"}
    evaluate(monkeypatch, reference=held_out / "images", **flags)
    table = json.loads((out / "sampling_table.json").read_text())
    assert {cell["scheduler"] for cell in table["cells"]} == {"student", "teacher/dpmsolver"}


@pytest.mark.slow
def test_a_consistency_student_of_grey_pictures_and_classes(distill):
    out = distill("greys", method="consistency", first_steps=None)
    pictures = [np.zeros((16, 16, 1), np.uint8), np.full((16, 16, 1), 255, np.uint8)]
    pipeline = load_student(out)
    [dark, light] = images_of(pipeline, 2, class_labels=["a", "a"], image=pictures)
    [null] = images_of(pipeline, 1, class_labels=["a"])
    assert np.abs(dark - light).max() > 1e-4 and np.abs(dark - null).max() > 1e-4


@pytest.fixture(scope="module")
def prepared(folders, tmp_path_factory):
    """Prepared datasets with label maps of 4 and of 5 classes."""
    from trainkit.data.preparation.prepare import prepare
    from trainkit.data.settings import settings_from_options
    from trainkit.data.sources.opening import open_source
    from trainkit.options.script import ConditionalTrainingOptions

    output = tmp_path_factory.mktemp("prepared")
    given = {name: str(folder) for name, folder in folders.items()} | {"condition": ["image"], "resolution": "16"}
    for classes in (CLASSES, CLASSES + 1):
        options = ConditionalTrainingOptions(**given, conditioning_classes=classes)
        prepare(open_source(options), settings_from_options(options), output / str(classes), 1, False)
    return output


@pytest.mark.slow(7)
def test_prepared_pairs_need_no_flags_and_edges_ignore_them(distill, prepared, capsys):
    ready = {"train_data_dir": prepared / str(CLASSES), "conditioning_data_dir": None, "resolution": None}
    raw = distill("maps", "raw")
    same_weights(distill("maps", "ready", **ready) / UNET_FILE, raw / UNET_FILE)
    capsys.readouterr()
    distill("edges", "edges", **ready)
    assert "has label maps of 4 classes as conditioning images, which are not used" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("teacher", "flags", "message"),
    [
        (
            "maps",
            {"conditioning_data_dir": None},
            "maps was trained on pairs, and needs conditioning images, of which .*images has none: --conditioning_da",
        ),
        (
            "maps",
            {"validation_data_dir": "held-out/images"},
            "maps was trained on pairs, .* of which --validation_data_dir .* has none: --validation_conditioning_d",
        ),
        ("maps", {"conditioning_classes": 5}, "--conditioning_classes 5: --teacher.* takes label maps of 4 classes"),
        ("maps", {"conditioning_image_mode": "L"}, "--conditioning_image_mode L: .* takes label maps of 4 classes"),
        ("greys", {"conditioning_image_mode": "RGB"}, "--conditioning_image_mode RGB: .* takes L pictures"),
        ("edges", {}, "--conditioning_data_dir .*: --teacher_model_name_or_path .* was not trained on pairs"),
        (
            "maps",
            {"train_data_dir": 5, "resolution": None, "conditioning_data_dir": None},
            "has label maps of 5 classes as conditioning images, but --teacher_model_name_or_path .* takes label map",
        ),
        (
            "maps",
            {"train_data_dir": 4, "resolution": None},
            "--conditioning_data_dir .* is prepared already, with its conditioning images: leave the flag out",
        ),
    ],
)
def test_mistakes_are_one_line_before_anything_is_written(
    distill, folders, prepared, monkeypatch, tmp_path, teacher, flags, message
):
    monkeypatch.chdir(folders["train_data_dir"].parent)
    if "train_data_dir" in flags:
        flags = flags | {"train_data_dir": prepared / str(flags["train_data_dir"])}
    with pytest.raises(UserError, match=message) as refused:
        distill(teacher, **flags)
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


def test_a_model_says_which_pairs_it_takes(teachers):
    from trainkit.distillation.teacher import open_teacher
    from trainkit.options.distillation import DistillationOptions

    def of(name):
        return open_teacher(DistillationOptions(teacher_model_name_or_path=str(teachers / name))).pairs

    assert (of("maps"), of("greys"), of("edges")) == (PairSettings("L", CLASSES), PairSettings("L"), None)
