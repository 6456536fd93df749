"""The page without gradio: what it knows of a model, what it accepts, and the images that it shows."""

import base64
import html.parser
import io

import numpy as np
import pytest
from app_helpers import open_models, save_models
from PIL import Image
from sampling_helpers import read, sample_images

from trainkit.app.gallery import gallery
from trainkit.app.generation import BATCH_SIZE, frames, warm_up
from trainkit.app.models import describe, first_setting, hint, table_rows
from trainkit.app.requests import Request, Setting, class_choices, example_vector, make_job
from trainkit.errors import UserError
from trainkit.sampling.catalogue import SCHEDULER_NAMES

pytestmark = pytest.mark.usefixtures("on_the_cpu_alone")
KINDS = ("plain", "student", "class", "vector", "both", "text", "stock", "enlarge", "fill", "edges")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def models(folder):
    return open_models(folder, KINDS)


def images_of(setting, request):
    *_, last = frames(make_job(setting, request))
    assert last.is_final and last.fraction == 1
    return last.images


@pytest.mark.parametrize(
    "kind, scheduler, steps, given, flags",
    [
        ("plain", "sde_dpmsolver", 5, {}, {}),
        ("plain", "heun", 4, {}, {}),
        ("student", "default", 4, {}, {}),
        ("stock", "ddim", 10, {}, {}),
        ("class", "unipc", 5, {"classes": ("dog", "7")}, {"class_labels": ["dog", "7"], "guidance_scale": 2.5}),
        ("class", "euler", 5, {}, {"class_labels": ["all"], "guidance_scale": 2.5}),
        ("vector", "dpmsolver", 5, {"vectors": "1, 2, 3\n4 5 6"}, {"vectors_file": "1,2,3\n4,5,6\n"}),
        ("text", "sasolver", 5, {"prompts": "a red square\na circle"}, {"prompts_file": "a red square\na circle\n"}),
    ],
)
def test_the_images_are_those_of_sample_py(models, folder, tmp_path, kind, scheduler, steps, given, flags):
    for name in ("vectors_file", "prompts_file"):
        if name in flags:
            (tmp_path / f"{name}.csv").write_text(flags[name])
            flags = flags | {name: str(tmp_path / f"{name}.csv"), "guidance_scale": 2.5}
    settings = {"num_images": 5, "num_inference_steps": steps, "seed": 7, "sample_batch_size": BATCH_SIZE}
    sample_images(folder / kind, tmp_path / "out", scheduler=None if scheduler == "default" else scheduler,
                  **settings, **flags)  # fmt: skip
    shown = images_of(Setting(models[kind], scheduler, steps, 2.5), Request(7, 5, **given))
    expected = read(tmp_path / "out", 5)
    assert np.array_equal(shown.reshape(expected.shape), expected)


def test_two_jobs_at_once_do_not_disturb_each_other(models):
    """Their frames are made in turns, as for two visitors with a thread each."""
    wanted = [(Setting(models["class"], name, steps, scale), Request(seed, 3, ("cat",)))
              for name, steps, scale, seed in (("dpmsolver", 6, 1.0, 0), ("dpmsolver", 9, 4.0, 5))]  # fmt: skip
    alone = [images_of(*one) for one in wanted]
    running, last = [frames(make_job(*one)) for one in wanted], [None, None]
    while any(running):
        for number, one in enumerate(running):
            frame = next(one, None) if one else None
            running[number] = one if frame else None
            last[number] = frame.images if frame else last[number]
    assert np.array_equal(last[0], alone[0]) and np.array_equal(last[1], alone[1])


def test_more_images_than_a_batch_appear_batch_by_batch(models):
    seen = list(frames(make_job(Setting(models["plain"], "dpmsolver", 10), Request(0, BATCH_SIZE + 2))))
    assert [len(frame.images) for frame in seen][0] == BATCH_SIZE and len(seen[-1].images) == BATCH_SIZE + 2
    fractions = [frame.fraction for frame in seen]
    assert fractions == sorted(fractions) and len(seen) >= 10 and sum(frame.is_final for frame in seen) == 1
    first = images_of(Setting(models["plain"], "dpmsolver", 10), Request(0, BATCH_SIZE))
    assert np.array_equal(seen[-1].images[:BATCH_SIZE], first)


@pytest.mark.parametrize(
    "kind, setting, given, message",
    [
        ("plain", {"steps": 1001}, {}, "Steps 1001 must be 1 to 1000"),
        ("plain", {"steps": 2.5}, {}, "Steps 2.5: give a whole number, at least 1"),
        ("plain", {"scheduler": "magic"}, {}, "Scheduler: plain has no magic; choose one of sde_dpmsolver, "),
        ("plain", {"scheduler": "ddim", "steps": 300}, {}, "Steps 300: DDIM samples garbage"),
        ("plain", {}, {"num_images": 65}, "Images 65: give a whole number, 1 to 64"),
        ("plain", {}, {"seed": None}, "Seed is empty: give a whole number, 0 to"),
        ("plain", {}, {"seed": -1}, "Seed -1: give a whole number"),
        ("student", {"scheduler": "default", "steps": 9}, {}, "Steps 9: this is a student of 4 steps; use 4 or fewer"),
        ("class", {}, {"classes": ("dgo",)}, "Classes: no class is called 'dgo': did you mean 'dog'?"),
        ("class", {}, {"classes": ("3",)}, "Classes: 3 must be 0 to 2"),
        ("class", {"guidance_scale": 0.5}, {}, "Guidance 0.5 must be 1 (none) to 20"),
        ("vector", {}, {"vectors": "1, 2"}, "Vector: 2 numbers in a vector, the model accepts 3"),
        ("vector", {}, {"vectors": "1, two, 3"}, "Vector: 'two' is not a number"),
        ("vector", {}, {"vectors": "1, inf, 3"}, "Vector: every number must be finite"),
        ("vector", {}, {"vectors": ""}, "Vector: empty; give 3 numbers, such as 1, 1, 1"),
        ("text", {}, {"prompts": "a red square " * 9}, "Prompt: 'a red square"),
    ],
)
def test_a_bad_value_is_one_line_that_names_the_field(models, kind, setting, given, message):
    setting = {"scheduler": "dpmsolver", "steps": 5} | setting
    request = {"seed": 0, "num_images": 2} | given
    with pytest.raises(UserError) as error:
        make_job(Setting(models[kind], **setting), Request(**request))
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_what_a_field_may_be_left_to(models):
    job = make_job(Setting(models["class"], "dpmsolver", 5), Request(0, 4))
    assert job.captions == ["cat", "dog", "7", "cat"], "no class: all of them"
    job = make_job(Setting(models["class"], "dpmsolver", 5), Request(0, 3, ("null", "cat")))
    assert job.captions == ["no class", "cat", "no class"]
    assert job.conditions == [{"class_labels": label} for label in (None, 0, None)]
    assert make_job(Setting(models["text"], "dpmsolver", 5), Request(0, 1)).captions == ["no prompt"]
    job = make_job(Setting(models["vector"], "dpmsolver", 5), Request(0, 2, vectors="null\n[1 2; 3]"))
    rows = [row["vectors"] for row in job.conditions]
    assert np.isnan(rows[0]).all() and rows[1].tolist() == [1, 2, 3]
    job = make_job(Setting(models["both"], "dpmsolver", 5), Request(0, 3, ("dog", "null"), "1 2 3"))
    assert job.captions == ["dog, 1 2 3", "no class, 1 2 3", "dog, 1 2 3"]
    assert [(row["class_labels"], row["vectors"].tolist()) for row in job.conditions[:2]] == [
        (1, [1, 2, 3]),
        (None, [1, 2, 3]),
    ]
    make_job(Setting(models["vector"], "dpmsolver", 5), Request(0, 1, vectors=example_vector(models["vector"])))
    for model in models.values():
        warm_up(model)


def test_what_the_page_knows_of_a_model(models):
    about = {kind: describe(model) for kind, model in models.items()}
    assert about["plain"].startswith("16×16 colour, unconditional, ") and "student of 4 steps" in about["student"]
    assert "3 classes" in about["class"] and "vectors of 3 numbers" in about["vector"] and "prompts" in about["text"]
    assert "3 classes and vectors of 3 numbers, " in about["both"]
    assert about["stock"].startswith("16×16 grey")
    assert models["plain"].schedulers == [*SCHEDULER_NAMES, "default"] and models["student"].schedulers == ["default"]
    assert models["student"].slider_end("default") == 4 and models["plain"].slider_end("ddpm") == 1000
    assert first_setting(models["student"], 1) == ("default", 4)
    assert first_setting(models["plain"], 0) == ("sde_dpmsolver", 20)
    assert class_choices([models["class"], models["plain"]])[:3] == [("cat", "cat"), ("dog", "dog"), ("7", "7")]


def test_the_hint_is_the_measured_table(models):
    plain = models["plain"]
    measured = "Measured at 20 steps: KID 0.03 ± 0.003, 80 s per 1,000 images."
    assert hint(plain, "dpmsolver", 20) == f"{measured} Better: sde_dpmsolver, 20 steps, KID 0.02 ± 0.002."
    assert hint(plain, "sde_dpmsolver", 20).endswith("No measured setting is better with as few UNet calls.")
    assert hint(plain, "dpmsolver", 9).startswith("Nearest measured: 8 steps, KID 0.05")
    assert hint(plain, "ddpm", 9) == "Made for 250 to the training steps."
    assert hint(models["class"], "dpmsolver", 9) == "Made for 4 to 50 steps."
    head, rows = table_rows(plain)
    assert len(head) == len(rows[0]) and [row[0] for row in rows] == ["sde_dpmsolver", "dpmsolver", "dpmsolver"]
    assert table_rows(models["class"]) == ([], [])


class Parsed(html.parser.HTMLParser):
    """Pictures, links and text of a gallery."""

    def __init__(self, page):
        super().__init__()
        self.pictures, self.files, self.text, self.tags = [], [], "", set()
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        given = dict(attributes)
        if tag == "img":
            self.pictures.append(given)
        if "download" in given:
            self.files.append(given["download"])

    def handle_data(self, data):
        self.text += data


def decoded(source):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2]))))


def test_the_gallery_has_every_image_unchanged_and_what_it_shows():
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 12, 3), dtype=np.uint8)
    page = gallery(images, [5, 6, 7], ["<script>x</script>", "b", ""], "m", "3 images")
    parsed = Parsed(page)
    assert all(np.array_equal(decoded(one["src"]), image) for one, image in zip(parsed.pictures, images, strict=True))
    assert parsed.files == ["m-seed-5.png", "m-seed-6.png", "m-seed-7.png", "m-grid.png"]
    assert "seed 5 · <script>x</script>" in parsed.text and "script" not in parsed.tags and "3 images" in parsed.text
    assert "--tk-width: 108px" in page and all(one["class"] == "tk-small" for one in parsed.pictures)
    early = Parsed(gallery(images[:2], [5, 6, 7], ["", "", ""], "m", "", 0.4))
    assert len(early.pictures) == 2 and early.files == [], "a preview is no file to keep"
    large = np.zeros((1, 512, 512, 1), np.uint8)
    assert decoded(Parsed(gallery(large, [0], [""], "m", "", 0.4)).pictures[0]["src"]).shape == (256, 256)
    assert decoded(Parsed(gallery(large, [0], [""], "m", "")).pictures[0]["src"]).shape == (512, 512)
