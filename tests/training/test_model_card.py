"""The card of a saved model: metadata that the Hub accepts, code that runs as printed, and scores that stay true."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conditional_helpers import text_parts
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from report_helpers import TABLE
from training_helpers import run_in_process, tiny_run

from trainkit.report.card_results import update_card
from trainkit.sampling.weights import weights_digest
from trainkit.training.run_report import RunReport

FLAGS = {"max_train_steps": 2, "checkpointing_steps": 0, "eval_batch_size": 2, "lr_warmup_steps": 1}
SCORES = {
    "scores": {"kid": 0.03, "kid_se": 0.002}, "num_generated": 100, "num_reference": 500, "note": "not comparable",
    "feature_extractor": "efficientnet-lite0", "reference": "held/out",
    "memorization": {"features": {"share_too_near": 0.014, "num_copies": 0, "num_held_out": 40}},
}  # fmt: skip


@pytest.fixture(scope="module")
def photos(image_folder, tmp_path_factory):
    """Two classes; a vector and a caption beside each image."""
    folder = shutil.copytree(image_folder, tmp_path_factory.mktemp("photos") / "shapes")
    for number, path in enumerate(sorted(folder.rglob("*.*"))):
        np.save(path.with_suffix(".npy"), np.float32([number, 100 + number % 3, -3]))
        path.with_suffix(".txt").write_text(f"a {('red', 'blue')[number % 2]} square\n")
    return folder


@pytest.fixture(scope="module")
def train(photos, tiny_unet, cache_dir, tmp_path_factory):
    """Runs a training script once for each set of flags; returns the folder of the model."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def call(name, script="train_unconditional", **flags):
        if name not in made:
            with pytest.MonkeyPatch.context() as patch:
                unet = None if script == "distill" or flags.get("condition") == "text" else tiny_unet
                arguments = tiny_run(photos, unet, cache_dir, root / name, **FLAGS | flags)
                run_in_process(patch, script, arguments)
            made[name] = root / name
        return made[name]

    return call


@pytest.fixture(scope="module")
def text_model(train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    unet, parts = text_parts(folder)
    unet.save_pretrained(folder / "unet")
    for part in parts.values():
        part.save_pretrained(folder / "encoder")
    flags = {"text_encoder_name_or_path": folder / "encoder", "model_config_name_or_path": folder / "unet"}
    return train("captions", "train_conditional", condition="text", **flags)


def card_of(folder):
    text = (folder / "README.md").read_text(encoding="utf-8")
    return text, ModelCard(text)


def blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def run_printed_code(folder, monkeypatch):
    """Run the code of a card as printed, from the folder beside the model; returns its names."""
    monkeypatch.chdir(folder.parent)
    names: dict = {}
    for block in blocks((folder / "README.md").read_text(encoding="utf-8")):
        exec(block, names)
    return names


KINDS = {
    "class": ("train_conditional", {"condition": "class"}, "other", "class_labels='round'"),
    "vector": ("train_conditional", {"condition": "vector"}, "other", "vectors=[0.0, 100.0, -3.0]"),
    "plain": ("train_unconditional", {"license": "mit"}, "unconditional-image-generation", "batch_size=16"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_printed_code_runs_and_the_metadata_is_valid(train, kind, monkeypatch):
    script, flags, task, argument = KINDS[kind]
    folder = train(kind, script, **flags)
    text, card = card_of(folder)
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == task and "diffusers" in card.data.tags
    assert yaml.safe_load(text.split("---")[1]) == card.data.to_dict()
    assert argument in text and "Trained on `shapes`: 37 images of 2 classes" in text
    assert "![samples](samples.png)" in text and "![training loss](loss.png)" in text
    assert (folder / "samples.png").is_file() and (folder / "loss.png").is_file()
    assert "|\n\n|" not in text and "\n\n\n" not in text, "blank lines would cut its tables"
    assert re.search(r"torch \d", text) and "| hardware | 1 × CPU" in text and "| images seen | 16" in text
    names = run_printed_code(folder, monkeypatch)
    assert names["images"][0].size == (16, 16) and len(blocks(text)) == 2
    assert type(names["pipeline"].scheduler).__name__ == "DDIMScheduler", "the second block replaces it"


@pytest.mark.slow
def test_the_licence_is_the_one_given_or_the_card_says_that_there_is_none(train):
    text, card = card_of(train("plain", license="mit"))
    assert card.data.license == "mit" and "No licence" not in text
    text, card = card_of(train("class", "train_conditional", condition="class"))
    assert card.data.license is None and "license" not in yaml.safe_load(text.split("---")[1])
    assert "No licence was given" in text and "Classes: round, square." in text


@pytest.mark.slow
def test_a_text_model_is_text_to_image(text_model, monkeypatch):
    text, card = card_of(text_model)
    assert card.data.pipeline_tag == "text-to-image" and "Text-to-image diffusion model, 16 × 16 pixels" in text
    names = run_printed_code(text_model, monkeypatch)
    assert names["images"][0].size == (16, 16)
    assert json.loads((text_model / "report.json").read_text())["preview"]["captions"][0].endswith("square")
    assert "Captions, row by row" in (text_model / "report.html").read_text()


@pytest.mark.slow
def test_the_card_of_a_student_says_its_steps_first(train, monkeypatch):
    teacher = train("plain", license="mit")
    flags = {"teacher_model_name_or_path": teacher, "num_steps": 1, "first_steps": 2, "random_flip": None}
    flags |= {"ddpm_num_inference_steps": None, "max_train_steps": 3}
    folder = train("student", "distill", **flags)
    text, card = card_of(folder)
    body = text.split("---", 2)[2].strip().splitlines()
    assert any("takes 1 steps" in line or "takes 1 step" in line for line in body[:6]), body[:6]
    assert "distillation" in card.data.tags and "num_inference_steps=1" in text and "schedulers/" not in text
    assert run_printed_code(folder, monkeypatch)["images"][0].size == (16, 16)
    page = (folder / "report.html").read_text()
    assert "Students" in page and 'href="stages/steps-2/report.html"' in page and "few-step student" in page
    assert (folder / "stages/steps-2/report.html").is_file()


@pytest.fixture
def scored(train, tmp_path):
    """A copy of a model with a table of its weights and scores.json."""
    folder = shutil.copytree(train("plain", license="mit"), tmp_path / "plain")
    table = TABLE | {"weights_sha256": weights_digest(folder)}
    (folder / "sampling_table.json").write_text(json.dumps(table))
    sampling = {"scheduler_name": "ddim", "num_inference_steps": 20, "weights_sha256": weights_digest(folder)}
    (folder / "scores.json").write_text(json.dumps(SCORES | {"sampling": sampling}))
    return folder


@pytest.mark.slow
def test_scores_are_a_model_index_with_what_they_depend_on(scored):
    update_card(scored)
    text, card = card_of(scored)
    index = yaml.safe_load(text.split("---")[1])["model-index"]
    name, results = model_index_to_eval_results(index)
    assert name == "plain" and card.data.metrics == ["kid"]
    named = {result.metric_name: result for result in results}
    assert set(named) == {
        "KID (200 samples, 5 steps of dpmsolver; efficientnet-lite0)",
        "KID (200 samples, 10 steps of dpmsolver; efficientnet-lite0)",
        "KID (100 samples, 20 steps of ddim; efficientnet-lite0)",
    }
    best = named["KID (200 samples, 10 steps of dpmsolver; efficientnet-lite0)"]
    assert best.metric_value == 0.125 and best.metric_args["num_reference"] == 400 and best.dataset_name == "photos"
    assert text.count("## Schedulers and steps") == text.count("## Scores") == 1
    assert "1.4% are nearer to one than 99 % of 40 held-out images" in text
    assert text.index("## Scores") < text.index("## Training")
    update_card(scored)
    assert card_of(scored)[0] == text, "twice is as once"


@pytest.mark.slow
def test_scores_of_earlier_weights_stay_and_say_so(scored):
    unet = scored / "unet" / "config.json"
    unet.write_text(unet.read_text() + "\n")  # as another save would
    update_card(scored)
    text, card = card_of(scored)
    assert text.count("Measured on weights that were saved earlier") == 2 and "| dpmsolver | 10 |" in text
    assert card.data.eval_results is None and card.data.metrics is None


@pytest.mark.slow
def test_what_a_person_added_to_the_metadata_stays(scored):
    update_card(scored)
    _, card = card_of(scored)
    card.data.language, card.data.license = "en", "cc-by-4.0"
    (scored / "README.md").write_text(str(card) + "\nmine\n")
    (scored / "scores.json").unlink()
    update_card(scored)
    text, card = card_of(scored)
    assert card.data.language == "en" and card.data.license == "cc-by-4.0" and text.endswith("mine\n")
    assert len(card.data.eval_results) == 2 and "## Scores" not in text


def test_a_killed_run_has_taken_at_least_as_long_as_it_trained(tmp_path):
    rows = [{"step": step, "images": 8 * step, "loss": 0.1, "images_per_s": 2.0} for step in (5, 10)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    run = SimpleNamespace(output_dir=tmp_path, step=10, accelerator=SimpleNamespace(device=torch.device("cpu")))
    for reported, expected in ((7.5, 40.0), (50.0, 50.0)):  # the last report may be older than the last rows
        (tmp_path / "report.json").write_text(json.dumps({"wall_time_s": reported}))
        assert RunReport(run, None)._earlier_s == expected
