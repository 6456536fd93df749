"""evaluate_samples.py --model_name_or_path and --sweep: the table, what is made after a kill, and who reads it."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conditional_helpers import NAMES, class_unet, vector_unet
from diffusers import DDPMPipeline, DDPMScheduler, EulerAncestralDiscreteScheduler
from evaluation_helpers import TinyExtractor, evaluate, write_images
from latent_helpers import LATENT_CHANNELS, make_vae
from matplotlib.figure import Figure
from PIL import Image
from sampling_helpers import tiny_model

from trainkit.diffusion.few_step import progressive_scheduler, step_timesteps, with_time_table
from trainkit.errors import UserError
from trainkit.evaluation import sweep
from trainkit.evaluation.candidates import Candidates, Cell, facts_of
from trainkit.evaluation.frechet import RunningMoments
from trainkit.evaluation.metrics import JACKKNIFE_GROUPS, frechet_distance, frechet_distance_of_groups
from trainkit.evaluation.sweep_report import _set_ticks
from trainkit.report.card_results import BEGIN, END, with_section
from trainkit.sampling.choice import choose_scheduler
from trainkit.sampling.load import is_stock_pipeline
from trainkit.sampling.pipeline import conditional_pipeline, save_pipeline, unconditional_pipeline
from trainkit.sampling.table import TABLE_NAME
from trainkit.sampling.weights import weights_digest


@pytest.fixture(autouse=True)
def on_the_cpu_with_a_tiny_extractor(monkeypatch, tmp_path):
    for name, value in {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("trainkit.evaluation.model.open_extractor", lambda *arguments: TinyExtractor())
    monkeypatch.setattr("trainkit.evaluation.features.open_extractor", lambda *arguments: TinyExtractor())


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_pipeline(folder / "plain", DDPMPipeline(class_unet(num_class_embeds=None), DDPMScheduler()), "# A card\n")
    latents = unconditional_pipeline(tiny_model(LATENT_CHANNELS, 8), DDPMScheduler(clip_sample=False), make_vae())
    save_pipeline(folder / "latents", latents, "# A card\n")
    save_pipeline(folder / "class", conditional_pipeline(class_unet(), DDPMScheduler(), id2label=NAMES), "# A card\n")
    return folder


@pytest.fixture
def model(models, tmp_path):
    return shutil.copytree(models / "plain", tmp_path / "model")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("reference") / "real", 24)


def run(monkeypatch, model, reference, **flags):
    flags = {"num_images": 6, "sample_batch_size": 4, "cache_dir": model.parent / "cache"} | flags
    evaluate(monkeypatch, model_name_or_path=model, reference=reference, **flags)


def table_of(folder):
    return json.loads((folder / TABLE_NAME).read_text())


@pytest.mark.slow
def test_a_sweep_ranks_its_rows_and_a_second_start_makes_none(model, reference, monkeypatch, capsys, drawn_figures):
    run(monkeypatch, model, reference, sweep="dpmsolver:2,3;heun:2")
    rows = table_of(model)["cells"]
    assert [(row["scheduler"], row["steps"], row["calls"]) for row in rows] == [
        ("dpmsolver", 2, 2),
        ("dpmsolver", 3, 3),
        ("heun", 2, 3),
    ]
    for row in rows:
        assert np.isfinite(row["scores"]["kid"]) and row["seconds_per_1000_images"] > 0
    assert [row["in_stock_pipeline"] for row in rows] == [True, True, False]
    output = capsys.readouterr().out
    assert "| dpmsolver | 3 | 3 | 2 | no | yes |" in output and "3 rows made now, 0 made before" in output
    picture = Image.open(model / "sampling_table.png")
    assert picture.width > 400 and (model / "sampling_plot.png").stat().st_size > 1000
    card = (model / "README.md").read_text()
    assert card.startswith("# A card\n") and card.count("## Schedulers and steps") == 1

    monkeypatch.setattr(sweep, "generate", None)  # a call would raise
    run(monkeypatch, model, reference, sweep="dpmsolver:2,3;heun:2")
    assert "0 rows made now, 3 made before" in capsys.readouterr().out
    assert (model / "README.md").read_text() == card


@pytest.mark.slow
def test_latents_without_a_condition_are_decoded_and_scored(models, reference, tmp_path, monkeypatch):
    model = shutil.copytree(models / "latents", tmp_path / "model")
    run(monkeypatch, model, reference, sweep="dpmsolver:2;heun:2")
    rows = table_of(model)["cells"]
    assert len(rows) == 2 and all(np.isfinite(row["scores"]["kid"]) for row in rows)
    run(monkeypatch, model, reference, num_inference_steps=2, output_file=tmp_path / "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["num_generated"] == 6 and np.isfinite(scores["scores"]["kid"])


def test_a_killed_sweep_keeps_its_rows_and_their_seeds(model, reference, tmp_path, monkeypatch):
    seen, real = [], sweep.generate

    def killed_in_the_second(pipeline, seeds, steps, *rest, **guidance):
        seen.append((steps, list(seeds)))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(pipeline, seeds, steps, *rest, **guidance)

    monkeypatch.setattr(sweep, "generate", killed_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, model, reference, sweep="dpmsolver:2,3", seed=5)
    assert [row["steps"] for row in table_of(model)["cells"]] == [2]
    run(monkeypatch, model, reference, sweep="dpmsolver:2,3", seed=5)
    assert [steps for steps, _ in seen] == [2, 3, 3]
    assert all(seeds == [5, 6, 7, 8, 9, 10] for _, seeds in seen)


def test_classes_are_balanced_and_only_sums_are_kept_for_fid(models, reference, tmp_path, monkeypatch):
    shown, real = [], sweep.generate

    def watched(pipeline, seeds, steps, batch_size, conditions, **guidance):
        shown.extend(conditions)
        assert guidance["guidance_scale"] == 2.0
        return real(pipeline, seeds, steps, batch_size, conditions, **guidance)

    monkeypatch.setattr(sweep, "generate", watched)
    flags = {"num_images": 6 * len(NAMES), "metrics": "fid", "guidance_scale": 2, "table_dir": tmp_path / "table"}
    model = shutil.copytree(models / "class", tmp_path / "class")
    run(monkeypatch, model, reference, sweep="dpmsolver:1", **flags)
    assert all(shown.count(label) == 6 for label in range(len(NAMES))) and len(shown) == 6 * len(NAMES)
    assert table_of(tmp_path / "table")["cells"][0]["scores"]["fid"] > 0
    assert not (model / TABLE_NAME).exists()


@pytest.mark.slow
def test_classes_and_vectors_are_swept_and_scored_together(reference, tmp_path, monkeypatch):
    model, vectors = tmp_path / "both", tmp_path / "vectors.npy"
    save_pipeline(model, conditional_pipeline(vector_unet(4), DDPMScheduler(), id2label=NAMES), "# A card\n")
    np.save(vectors, np.float32([[1, 2, 3], [0, 0, 0]]))
    given = {"vectors_file": vectors, "guidance_scale": 2}
    run(monkeypatch, model, reference, sweep="dpmsolver:1", **given)
    assert table_of(model)["settings"]["condition"] == "class_labels+vectors"
    run(monkeypatch, model, reference, num_inference_steps=1, output_file=model / "scores.json", **given)
    assert json.loads((model / "scores.json").read_text())["sampling"]["guidance_scale"] == 2


def test_a_model_is_scored_without_a_sweep(model, reference, monkeypatch, capsys):
    run(monkeypatch, model, reference, num_inference_steps=2, output_file=model / "scores.json")
    card = (model / "README.md").read_text()
    assert "## Scores" in card and "6 samples, 2 steps of dpmsolver" in card and "saved earlier" not in card
    output = capsys.readouterr().out
    assert "--scheduler dpmsolver: recommended for 2 steps" in output
    assert "dpmsolver (DPMSolverMultistepScheduler), 2 steps" in output and "6 generated, 24 reference" in output
    assert json.loads((model / "scores.json").read_text())["sampling"]["num_inference_steps"] == 2


@pytest.fixture
def students(models, tmp_path):
    """A folder of distill.py with students of 2 and 1 steps, of the teacher `models`/plain."""
    folder, alphas_cumprod = tmp_path / "students", DDPMScheduler().alphas_cumprod.double()
    for steps, place in ((2, folder / "stages" / "steps-2"), (1, folder)):
        unet = with_time_table(class_unet(num_class_embeds=None), step_timesteps(1000, steps))
        save_pipeline(place, DDPMPipeline(unet, progressive_scheduler(alphas_cumprod, steps, "sample")), "# A card\n")
    teacher = models / "plain"
    record = {"teacher": str(teacher), "teacher_sha256": weights_digest(teacher), "guidance_scale": 1.0}
    (folder / "distillation.json").write_text(json.dumps(record))
    return folder


@pytest.mark.slow
def test_students_are_compared_with_their_teacher(students, models, reference, monkeypatch, capsys):
    sampled, real = [], sweep.generate

    def watched(pipeline, seeds, steps, *rest, **guidance):
        sampled.append((type(pipeline.scheduler).__name__, len(pipeline.scheduler.betas), steps))
        return real(pipeline, seeds, steps, *rest, **guidance)

    monkeypatch.setattr(sweep, "generate", watched)
    run(monkeypatch, students, reference, sweep="student:1,2;teacher/dpmsolver:2;teacher/ddim:5")
    students_of, solvers = "DDIMScheduler", "DPMSolverMultistepScheduler"
    assert sampled == [(students_of, 1, 1), (students_of, 2, 2), (solvers, 1000, 2), ("DDIMScheduler", 1000, 5)]
    rows = [(row["scheduler"], row["steps"]) for row in table_of(students)["cells"]]
    assert rows == [("teacher/ddim", 5), ("teacher/dpmsolver", 2), ("student", 2), ("student", 1)]
    assert "| teacher/dpmsolver | 2 | 2 | 2 | no | yes |" in capsys.readouterr().out
    assert "| student | 1 |" in (students / "README.md").read_text()
    assert choose_scheduler(students, 1)[0] == "default"  # no row of the table is a scheduler of the student


@pytest.mark.slow
def test_a_sweep_without_words_takes_few_steps_first(students, model):
    few = [("student", 1), ("student", 2), ("teacher/dpmsolver", 1), ("teacher/unipc", 1), ("teacher/dpmsolver", 2)]
    cells = Candidates(students).parse([])
    assert cells[:5] == few and cells[-1] == ("teacher/ddpm", 1000)
    assert ("teacher/sde_dpmsolver", 20) in cells and ("teacher/ddim", 50) in cells
    assert [cell.steps for cell in Candidates(model).parse([])] == [5, 5, 10, 10, 10, 20, 20, 50, 50, 1000]


def test_guidance_that_a_student_has_learned_is_given_to_its_teacher_alone(students):
    record = json.loads((students / "distillation.json").read_text())
    (students / "distillation.json").write_text(json.dumps(record | {"guidance_scale": 2.0}))
    candidates = Candidates(students)
    assert [candidates.guidance_scale(Cell(name, 1)) for name in ("student", "teacher/ddim")] == [1.0, 2.0]


@pytest.mark.parametrize(
    "words, teacher, message",
    [
        (["student:4"], None, "--sweep student:4: .* has students of 1, 2 steps"),
        (["ddim:50"], None, "ddim must be one of student, or a scheduler of the teacher, such as teacher/ddim"),
        (["teacher/plms:5"], None, "teacher/plms must be one of teacher/sde_dpmsolver"),
        (["teacher/ddim:5"], "nowhere", "--teacher_model_name_or_path nowhere: there is no such folder, and the Hub"),
        (["teacher/ddim:5"], "students", "its weights are not those of distillation.json"),
    ],
)
def test_mistakes_in_the_rows_of_students(students, monkeypatch, words, teacher, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=message):
        Candidates(students, str(students) if teacher == "students" else teacher).parse(words)


def test_a_teacher_needs_a_student(model):
    with pytest.raises(UserError, match="is not a few-step student; remove the flag"):
        Candidates(model, str(model))


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"sweep": "plms:10"}, "--sweep plms:10: plms must be one of sde_dpmsolver, dpmsolver"),
        ({"sweep": "ddim:61"}, "--sweep ddim 61: DDIM samples garbage .* use 50"),
        ({"sweep": "ddim"}, "--sweep ddim: write a scheduler and its steps, such as ddim:10,20,50"),
        ({"sweep": "ddim:ten"}, "--sweep ddim:ten: write a scheduler and its steps"),
        ({"sweep": "ddim:10", "scheduler": "ddim"}, "--scheduler does nothing with --sweep"),
        ({"teacher_model_name_or_path": "there"}, "--teacher_model_name_or_path is compared .* by --sweep"),
        ({"table_dir": "here"}, "--table_dir is the folder of the table that --sweep writes"),
        ({"generated": "there"}, "--generated and --model_name_or_path both say what to score"),
        ({"class_labels": "all"}, "--class_labels: this pipeline is unconditional"),
        ({"num_images": 1}, "--num_images: 1 images are too few"),
    ],
)
def test_mistakes_get_one_line(model, reference, monkeypatch, flags, message):
    with pytest.raises(UserError, match=message):
        run(monkeypatch, model, reference, **flags)


def test_flags_of_a_model_need_one(reference, monkeypatch):
    with pytest.raises(UserError, match="--sweep needs --model_name_or_path"):
        evaluate(monkeypatch, generated=reference, reference=reference, sweep="ddim:10")


@pytest.mark.slow
def test_rows_of_other_settings_or_weights_are_not_mixed(model, reference, monkeypatch):
    run(monkeypatch, model, reference, sweep="dpmsolver:1")
    with pytest.raises(UserError, match=r"made with another num_images \(6 there, 8 now\)"):
        run(monkeypatch, model, reference, sweep="dpmsolver:1", num_images=8)
    table = table_of(model) | {"weights_sha256": "of another model"}
    (model / TABLE_NAME).write_text(json.dumps(table))
    run(monkeypatch, model, reference, sweep="dpmsolver:2", num_images=8)
    assert [row["steps"] for row in table_of(model)["cells"]] == [2]


def test_features_that_are_not_finite_are_named(model, reference, monkeypatch):
    monkeypatch.setattr(TinyExtractor, "forward", lambda self, images: torch.full((len(images), 12), torch.nan))
    with pytest.raises(UserError, match="features that are not finite"):
        run(monkeypatch, model, reference, sweep="dpmsolver:1")


def test_sample_takes_the_best_of_the_table_for_its_steps(model, monkeypatch):
    def cell(scheduler, steps, kid, calls=None):
        return {"scheduler": scheduler, "steps": steps, "calls": calls or steps, "scores": {"kid": kid}}

    cells = [cell("unipc", 10, 0.2), cell("ddim", 10, 0.1), cell("heun", 10, 0.01, 19), cell("ddim", 20, 0.05)]
    table = {"weights_sha256": weights_digest(model), "settings": {"metrics": ["kid"]}, "cells": cells}
    (model / TABLE_NAME).write_text(json.dumps(table))
    name, why = choose_scheduler(model, 10)
    assert name == "ddim" and "the lowest KID of 2 schedulers at 10 steps" in why
    assert choose_scheduler(model, 7)[0] == "dpmsolver" and choose_scheduler(model, 8)[0] == "sde_dpmsolver"
    (model / TABLE_NAME).write_text(json.dumps(table | {"weights_sha256": "of another model"}))
    assert choose_scheduler(model, 10)[0] == "sde_dpmsolver"
    (model / TABLE_NAME).write_text("{")
    with pytest.raises(UserError, match="is not a readable table: delete it"):
        choose_scheduler(model, 10)


def test_a_scheduler_that_the_user_put_into_the_pipeline_stays(model):
    EulerAncestralDiscreteScheduler().save_pretrained(model / "scheduler")
    assert choose_scheduler(model, 10) == ("default", "scheduler: the pipeline's own EulerAncestralDiscreteScheduler")


def test_sums_of_features_give_the_same_fid_in_any_batches():
    generator = torch.Generator().manual_seed(0)
    real, made = torch.randn(60, 5, generator=generator) + 30, 1.2 * torch.randn(70, 5, generator=generator) + 30
    groups = [RunningMoments(5) for _ in range(JACKKNIFE_GROUPS)]
    for start in range(0, 70, 16):
        for row in range(start, min(start + 16, 70)):
            groups[row % JACKKNIFE_GROUPS].add(made[row : row + 1])
    assert frechet_distance_of_groups(real, groups) == pytest.approx(frechet_distance(real, made), rel=1e-6)


def test_the_section_of_a_card_is_replaced():
    card = with_section("# Card\n", f"{BEGIN}\nold\n{END}")
    assert with_section(card + "more\n", f"{BEGIN}\nnew\n{END}") == f"# Card\n\n{BEGIN}\nnew\n{END}\n\nmore\n"


def test_the_list_of_schedulers_says_what_runs_where(models, capsys):
    import sample

    sample.list_schedulers(SimpleNamespace(model_name_or_path=str(models / "plain")))
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("unipc ") and "not in DDPMPipeline" in line and "order 3" in line for line in lines)
    assert any(line.startswith("sde_dpmsolver ") and "stochastic, runs in DDPMPipeline" in line for line in lines)


def test_ddpmpipeline_is_not_mentioned_for_a_model_that_it_cannot_hold(models, tmp_path, capsys):
    import sample

    folder = tmp_path / "latents"
    shutil.copytree(models / "plain", folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = ["unconditional", "UnconditionalPipeline"]  # as it is saved with an autoencoder
    (folder / "model_index.json").write_text(json.dumps(index))
    sample.list_schedulers(SimpleNamespace(model_name_or_path=str(folder)))
    assert "unipc" in (lines := capsys.readouterr().out) and "DDPMPipeline" not in lines
    assert not is_stock_pipeline(folder) and is_stock_pipeline(models / "plain")
    assert facts_of(Cell("unipc", 5), stock=False)["in_stock_pipeline"] is None


def test_the_plot_has_ticks_where_it_was_measured():
    one, many = Figure().add_subplot(), Figure().add_subplot()
    _set_ticks(one, [5])
    assert one.get_xscale() == "linear" and one.get_xticks().tolist() == [5] and one.get_xlim() == (4, 6)
    _set_ticks(many, [1, 2, 20, 21, 1000])
    assert many.get_xscale() == "log" and many.get_xticks().tolist() == [1, 2, 20, 1000]
    assert [label.get_text() for label in many.get_xticklabels()] == ["1", "2", "20", "1,000"]
