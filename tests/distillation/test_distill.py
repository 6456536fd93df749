"""distill.py from teacher to saved students: stages, resume, processes, conditions, and mistakes."""

import contextlib
import io
import json
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from conditional_helpers import UNET, class_unet, text_parts, vector_pipeline
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from distillation_helpers import FLAGS, run_distill
from process_helpers import run_forked
from safetensors.torch import load_file
from training_helpers import same_training_state, same_weights, tiny_run

import reconstruct_ema
from pipelines.conditional import ConditionalPipeline
from trainkit.distillation.teacher import engine_options, open_teacher
from trainkit.errors import UserError
from trainkit.options.distillation import DistillationOptions
from trainkit.sampling.load import load_pipeline
from trainkit.sampling.schedulers import load_scheduler
from trainkit.training.signals import StopSignals

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


def save_teacher(folder, scheduler=None, **changes):
    torch.manual_seed(0)
    unet = UNet2DModel(**UNET | changes)
    DDPMPipeline(unet, scheduler or DDPMScheduler(prediction_type="sample")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def distill(image_folder, cache_dir, tmp_path, monkeypatch):
    """Run distill.py in this process with flags over those of a tiny run; returns the output folder."""

    def call(teacher, name="out", images=None, **flags):
        return run_distill(monkeypatch, teacher, images or image_folder, cache_dir, tmp_path / name, **flags)

    return call


@pytest.fixture(scope="module")
def whole_run(teacher, image_folder, cache_dir, tmp_path_factory):
    """An uninterrupted distillation to 4, 2 and 1 steps."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        run_distill(patch, teacher, image_folder, cache_dir, folder)
    (folder / "printed.txt").write_text(printed.getvalue())
    return folder


@pytest.mark.slow
def test_it_says_which_student_is_trained_and_what_comes_next(whole_run):
    lines = (whole_run / "printed.txt").read_text().splitlines()
    assert [line for line in lines if line.startswith("stage ")] == [
        "stage 1 of 3: a student of 4 steps",
        "stage 2 of 3: a student of 2 steps",
        "stage 3 of 3: a student of 1 step",
    ]
    assert lines[-1].startswith(f"saved the student in {whole_run}; next: python sample.py --model_name_or_path ")


@pytest.mark.slow
def test_each_stage_saves_a_stock_pipeline_that_refuses_more_steps(whole_run):
    record = json.loads((whole_run / "distillation.json").read_text())
    assert record["complete"] == ["steps-4", "steps-2", "steps-1"]
    folders = {4: whole_run / "stages/steps-4", 2: whole_run / "stages/steps-2", 1: whole_run}
    weights = set()
    for num_steps, folder in folders.items():
        pipeline = DDPMPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(num_inference_steps=num_steps, generator=torch.manual_seed(0), output_type="np").images
        assert images.shape == (1, 16, 16, 3) and np.isfinite(images).all()
        with pytest.raises(ValueError, match=f"maximal {num_steps} timesteps"):
            pipeline()  # the default of DDPMPipeline: 1,000 steps
        assert f"takes {num_steps} steps" in (folder / "README.md").read_text()
        weights.add((folder / UNET_FILE).read_bytes())
    assert len(weights) == 3


def test_the_lengths_of_the_stages_are_shares_of_the_run(whole_run):
    folders = [whole_run / "stages/steps-4", whole_run / "stages/steps-2", whole_run]
    assert [len((folder / "metrics.jsonl").read_text().splitlines()) for folder in folders] == [3, 7, 7]


@pytest.mark.slow(7)
def test_a_student_is_scored_with_its_scheduler_and_an_average_of_it_keeps_its_time_table(
    distill, teacher, image_folder, monkeypatch, capsys
):
    flags = {"ema_power_lengths": [0.05, 0.1], "ema_snapshot_steps": 2, "num_steps": 2, "first_steps": 2}
    out = distill(teacher, score_steps=100, score_images=4, **flags)
    assert "training images | the student's DDIMScheduler, 2 steps |" in capsys.readouterr().out
    sampling = ["--reference", image_folder, "--num_images", 4, "--num_inference_steps", 2, "--lengths", 0.05, 0.1]
    words = ["--model_dir", out, "--output_dir", out / "averaged", "--cpu_threads", 1, *sampling]
    monkeypatch.setattr(sys, "argv", ["reconstruct_ema.py", *map(str, words)])
    reconstruct_ema.main()
    before, after = load_file(out / UNET_FILE), load_file(out / "averaged" / UNET_FILE)
    assert before.keys() == after.keys() and torch.equal(before["time_proj.weight"], after["time_proj.weight"])
    assert not torch.equal(before["conv_in.weight"], after["conv_in.weight"])
    DDPMPipeline.from_pretrained(out / "averaged")(num_inference_steps=2)


@pytest.mark.slow
def test_a_run_that_is_stopped_in_any_stage_is_the_same_run(distill, teacher, whole_run, monkeypatch, capsys):
    """Stopped within the first and the second stage, and killed between the second and its record."""
    agreed, calls = StopSignals.agreed, iter(range(1, 100))
    with monkeypatch.context() as patch:
        patch.setattr(StopSignals, "agreed", lambda self, step: next(calls) in (2, 5))
        out = distill(teacher)
        assert not (out / "stages/steps-2").exists()
        out = distill(teacher, resume_from_checkpoint="latest")
        assert (out / "stages/steps-2/checkpoint-3").is_dir() and not (out / "model_index.json").exists()
    assert StopSignals.agreed is agreed
    import trainkit.distillation.stages as stages

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stages.Distillation, "complete", lambda self, stage: (_ for _ in ()).throw(KeyboardInterrupt))
        distill(teacher, resume_from_checkpoint="latest")
    distill(teacher, resume_from_checkpoint="latest")
    assert "resumed from" in capsys.readouterr().out
    same_training_state(out / "checkpoint-7", whole_run / "checkpoint-7")
    same_weights(out / UNET_FILE, whole_run / UNET_FILE)
    distill(teacher, resume_from_checkpoint="latest")  # complete: nothing happens
    same_weights(out / UNET_FILE, whole_run / UNET_FILE)


@pytest.mark.slow(6)
def test_two_processes_make_the_students_of_one(teacher, whole_run, image_folder, cache_dir, tmp_path):
    flags = FLAGS | {"teacher_model_name_or_path": teacher, "train_batch_size": 4}
    run_forked("distill.py", *tiny_run(image_folder, None, cache_dir, tmp_path / "out", **flags), processes=2)
    same_weights(tmp_path / "out" / UNET_FILE, whole_run / UNET_FILE, tolerance=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", [DDPMScheduler(), FlowMatchEulerDiscreteScheduler()], ids=["epsilon", "flow"])
def test_a_teacher_of_noise_or_flow_is_adapted_first(distill, tmp_path, scheduler):
    out = distill(save_teacher(tmp_path / "teacher", scheduler), num_steps=4, max_train_steps=6)
    adapted = DDPMPipeline.from_pretrained(out / "stages/adapted").scheduler.config
    assert (adapted.num_train_timesteps, adapted.prediction_type) == (8, "v_prediction")
    assert DDPMPipeline.from_pretrained(out).scheduler.config.num_train_timesteps == 4


@pytest.mark.slow
def test_one_consistency_student_takes_one_to_four_steps(distill, teacher):
    out = distill(teacher, method="consistency", num_steps=4, first_steps=None, max_train_steps=8)
    pipeline = DDPMPipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    num_timesteps = pipeline.scheduler.config.num_train_timesteps
    assert 64 < pipeline.scheduler.alphas_cumprod[-1] ** -0.5 <= 80.1  # cosine betas go on to 20,000
    for num_steps in (1, 2, 4):
        images = pipeline(num_inference_steps=num_steps, output_type="np").images
        assert np.isfinite(images).all() and num_timesteps - pipeline.scheduler.timesteps[0] <= 4
    with pytest.raises(ValueError, match="num_inference_steps"):
        pipeline()
    assert "takes 1 to 4 steps" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, ("muon", 2e-3)),
        ({"method": "consistency"}, ("adamw", 5e-4)),
        ({"method": "consistency", "optimizer": "muon", "learning_rate": 0.0}, ("muon", 0.0)),
    ],
)
def test_the_optimizer_follows_the_method_unless_it_is_given(teacher, given, expected):
    options = DistillationOptions(teacher_model_name_or_path=str(teacher), train_data_dir="images", **given)
    engine = engine_options(options, open_teacher(options))
    assert (engine.optimizer, engine.learning_rate) == expected


@pytest.fixture(scope="module")
def described(image_folder, tmp_path_factory):
    """The images in two classes, with a vector and a caption next to each."""
    folder = tmp_path_factory.mktemp("described") / "train"
    shutil.copytree(image_folder, folder)
    for number, path in enumerate(sorted(path for path in folder.rglob("*.*"))):
        np.save(path.with_suffix(".npy"), np.float32([number, number % 3, -3]))
        path.with_suffix(".txt").write_text(["a red square", "a blue circle"][number % 2])
    return folder


def conditional_teacher(kind, folder):
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    if kind == "class_labels":
        pipeline = ConditionalPipeline(class_unet(num_class_embeds=3), scheduler, id2label={0: "square", 1: "round"})
    elif kind in ("vectors", "both"):
        pipeline = vector_pipeline(3 if kind == "both" else None)
        pipeline.scheduler = scheduler
        pipeline.register_to_config(id2label={0: "square", 1: "round"} if kind == "both" else None)
    else:
        folder.mkdir()
        unet, parts = text_parts(folder)
        pipeline = ConditionalPipeline(unet, scheduler, **parts)
    pipeline.save_pretrained(folder / "teacher")
    return folder / "teacher"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["progressive", "consistency"])
@pytest.mark.parametrize(
    ("kind", "asked"),
    [
        ("class_labels", {"class_labels": ["round", None]}),
        ("vectors", {"vectors": [[1, 2, 3], None]}),
        ("both", {"class_labels": ["round", "round"], "vectors": [[1, 2, 3], None]}),
        ("prompt", {"prompt": ["a red square", ""]}),
    ],
)
def test_conditional_students_load_with_diffusers_and_keep_their_condition(
    distill, described, tmp_path, kind, asked, method
):
    teacher = conditional_teacher(kind, tmp_path / kind)
    flags = {"guidance_scale": 2} if method == "progressive" else {"method": method, "first_steps": None}
    out = distill(teacher, images=described, num_steps=2, max_train_steps=8, **flags)
    pipeline = DiffusionPipeline.from_pretrained(out, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    images = pipeline(**asked, generator=generators, output_type="np").images  # by default all its steps
    assert len(pipeline.scheduler.timesteps) == 2
    assert np.isfinite(images).all() and np.abs(images[0] - images[1]).max() > 1e-4  # the condition is heard
    with pytest.raises(ValueError, match="num_inference_steps"):
        pipeline(**asked, num_inference_steps=20)
    if "class_labels" in asked:
        assert pipeline.config.id2label == {0: "square", 1: "round"}
    if kind == "prompt" and method == "progressive":
        ours = load_pipeline(out, load_scheduler(out))  # as sample.py opens it
        assert pipeline.config.unet_timesteps == ours.config.unet_timesteps == [499, 999]


def refused(distill, message, *arguments, **flags):
    with pytest.raises(UserError) as caught:
        distill(*arguments, **flags)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_steps": 3}, "--num_steps 3 must be a power of two"),
        ({"first_steps": 6}, "--first_steps 6 must be a power of two and at least --num_steps 1"),
        ({"first_steps": 2, "num_steps": 4}, "--first_steps 2 must be a power of two and at least --num_steps 4"),
        ({"first_steps": 512}, "--first_steps 512: its teacher takes 1024 steps, but was trained over 1000"),
        ({"method": "consistency"}, "--first_steps 4: --method consistency has no stages; remove the flag"),
        ({"guidance_scale": 2}, "is unconditional; remove the flag"),
        ({"resolution": 32}, "holds images of 32x32 pixels and 3 channels, but --teacher_model_name_or_path"),
        ({"image_mode": "L"}, "16x16 pixels and 1 channels, but --teacher_model_name_or_path"),
        ({"teacher_model_name_or_path": None}, "--teacher_model_name_or_path is missing"),
        (
            {"teacher_model_name_or_path": "/nowhere"},
            "--teacher_model_name_or_path /nowhere does not exist",
        ),
        ({"resume_from_checkpoint": "checkpoint-2"}, "--resume_from_checkpoint checkpoint-2: distill.py resumes"),
    ],
)
def test_mistakes_are_refused_in_one_line_before_anything_is_written(distill, teacher, tmp_path, flags, message):
    refused(distill, message, teacher, **flags)
    assert not (tmp_path / "out").exists()


def test_teachers_that_cannot_be_distilled_are_refused(distill, whole_run, tmp_path):
    refused(distill, f"{whole_run} is itself a student of 1 steps: give its teacher", whole_run)
    bare = save_teacher(tmp_path / "bare")
    shutil.rmtree(bare / "scheduler")
    refused(distill, f"{bare}", bare)
    unknown = save_teacher(tmp_path / "unknown", DDPMScheduler(prediction_type="score"))
    refused(distill, f"{unknown} predicts score; students can be made of epsilon", unknown)
    fourier = save_teacher(tmp_path / "fourier", time_embedding_type="fourier")
    refused(distill, "its UNet has fourier timesteps", fourier)


def test_other_settings_do_not_continue_an_earlier_distillation(distill, teacher, whole_run, tmp_path):
    shutil.copytree(whole_run, tmp_path / "out")
    refused(distill, "of an earlier", teacher)
    refused(
        distill, "holds stages with another --num_steps (was 1)", teacher, num_steps=2, resume_from_checkpoint="latest"
    )
    other = save_teacher(tmp_path / "other", DDIMScheduler(prediction_type="sample"), dropout=0.1)
    refused(distill, "holds stages with another --teacher_model", other, resume_from_checkpoint="latest")


def test_a_class_that_the_teacher_does_not_know_is_named(distill, described, tmp_path):
    teacher = conditional_teacher("class_labels", tmp_path / "teacher")
    (tmp_path / "images").mkdir()
    shutil.copytree(described / "round", tmp_path / "images/hexagon")
    shutil.copytree(described / "square", tmp_path / "images/square")
    refused(distill, "has the class hexagon", teacher, images=tmp_path / "images")


def test_the_script_starts_without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", types.ModuleType("torch"))
    monkeypatch.setattr(sys, "argv", ["distill.py", "--help"])
    import distill as script

    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 0
