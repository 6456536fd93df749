"""Samples of conditional models: judged by what they were asked for, and never without what the judge is worth."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from evaluation_helpers import evaluate
from PIL import Image
from process_helpers import run_forked

from tools import measure_digits
from trainkit.errors import UserError
from trainkit.evaluation import classifier as classifiers
from trainkit.evaluation.conditioning import caption_retrieval, label_accuracy, proportion, scores_per_class
from trainkit.evaluation.conditions import read_annotations
from trainkit.evaluation.images import open_images

KINDS = ("across", "down", "plain")


def draw(kind, rng):
    """Stripes of 20 px across or down, or none, on a coloured ground."""
    rows, columns = np.mgrid[0:20, 0:20]
    wave = {"across": rows, "down": columns, "plain": 0 * rows}[kind]
    stripes = 0.5 + 0.4 * np.sin(wave * rng.uniform(0.9, 1.3) + rng.uniform(0, 6))
    pixels = stripes[..., None] * rng.uniform(120, 250, 3) + rng.normal(0, 6, (20, 20, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Twenty images in each class folder, with the class in the caption."""
    folder, rng = tmp_path_factory.mktemp("real"), np.random.default_rng(0)
    for kind in KINDS:
        (folder / kind).mkdir()
        for number in range(20):
            draw(kind, rng).save(folder / kind / f"{number:02d}.png")
            (folder / kind / f"{number:02d}.txt").write_text(f"stripes {kind}\n")
    return folder


@pytest.fixture
def cache(tmp_path_factory):
    """One for all tests of the run: the classifier is trained once."""
    return tmp_path_factory.getbasetemp() / "classifier-cache"


def write_samples(folder, asked, drawn, column="label"):
    """A folder as sample.py writes it: images that show `drawn`, with `asked` in metadata.jsonl."""
    folder.mkdir(parents=True)
    rng, lines = np.random.default_rng(1), []
    for number, (wanted, kind) in enumerate(zip(asked, drawn, strict=True)):
        draw(kind, rng).save(folder / f"{number:06d}.png")
        lines.append(json.dumps({"file_name": f"{number:06d}.png", column: wanted}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    Image.new("RGB", (99, 99)).save(folder / "grid.png")  # no sample
    record = {"complete": True, "scheduler_name": "default", "num_inference_steps": 20, "num_images": len(lines)}
    (folder / "sampling.json").write_text(json.dumps(record | {"scheduler": {"class": "DDIMScheduler"}}))
    return folder


@pytest.mark.slow(8)
def test_samples_are_judged_by_the_class_asked_for(real, cache, tmp_path, monkeypatch, capsys):
    asked = ["across"] * 8 + ["down"] * 8 + ["null"] * 2
    drawn = ["across"] * 8 + ["down"] * 6 + ["plain"] * 4
    samples, file = write_samples(tmp_path / "samples", asked, drawn), tmp_path / "scores.json"
    evaluate(
        monkeypatch, generated=samples, reference=real, classifier_data_dir=real, cache_dir=cache, metrics="kid",
        output_file=file,
    )  # fmt: skip
    found, output = json.loads(file.read_text()), capsys.readouterr().out
    accuracy = found["accuracy"]
    assert accuracy["labels"] == list(KINDS) and accuracy["confusion"] == [[8, 0, 0], [0, 6, 2], [0, 0, 0]]
    assert accuracy["share"] == 14 / 16 and accuracy["n"] == 16 and accuracy["num_without_label"] == 2
    assert accuracy["per_class"]["down"]["share"] == 0.75 and "plain" not in accuracy["per_class"]
    assert accuracy["classifier"] == proportion(6, 6), "three classes of twenty, every tenth held out"
    [line] = [line for line in output.splitlines() if line.startswith("ACCURACY")]
    assert "87.5%" in line and "of 16 samples" in line and "95 % interval 64.0% to 96.5%" in line
    assert "chance 33.3%" in line and "right on 100.0%" in line and "of 6 real images" in line and "2 samples" in line

    assert list(found["per_class"]) == ["across", "down"]
    by_class = [line for line in output.splitlines() if line.startswith("class ")]
    assert len(by_class) == 2 and all("8 generated, 20 reference" in line for line in by_class)
    assert all("noise floor" in line and "not comparable" in line for line in by_class)
    assert found["per_class"]["across"]["num_noise_floor"] == 8


@pytest.mark.slow
def test_the_classifier_is_a_function_of_images_and_seed_and_is_kept(real, cache, tmp_path, monkeypatch):
    images = open_images(str(real), "--classifier_data_dir", skip_unreadable=True)
    annotations = read_annotations(images, "--classifier_data_dir")

    def made(folder, seed=0):
        return classifiers.open_classifier(images, annotations, "--classifier_data_dir", folder, seed)

    kept, again = made(cache), made(tmp_path / "other")
    weights, others = kept.network.state_dict(), again.network.state_dict()
    assert all(torch.equal(weights[name], others[name]) for name in weights) and again.accuracy == kept.accuracy
    [file] = (tmp_path / "other").rglob("*.safetensors")

    monkeypatch.setattr(classifiers, "fit", lambda *arguments: pytest.fail("it was trained again"))
    loaded = made(tmp_path / "other")
    assert all(torch.equal(weights[name], value) for name, value in loaded.network.state_dict().items())
    assert (loaded.accuracy, loaded.num_held_out) == (again.accuracy, again.num_held_out)
    monkeypatch.setattr(classifiers, "fit", lambda network, *arguments: network.eval())
    made(tmp_path / "other", seed=1)
    assert len(list((tmp_path / "other").rglob("*.safetensors"))) == 2
    file.write_bytes(file.read_bytes()[:1000])  # as a full disk leaves it
    monkeypatch.setattr(classifiers, "fit", lambda network, *arguments: pytest.fail("trained, as it should be"))
    with pytest.raises(pytest.fail.Exception, match="as it should be"):
        made(tmp_path / "other")


@pytest.mark.slow
def test_a_prepared_dataset_says_what_it_shows_as_its_folder_does(real, tmp_path):
    flags = ["--train_data_dir", real, "--output_dir", tmp_path / "prepared", "--resolution", 20, "--num_proc", 1]
    run_forked("prepare_dataset.py", *flags)
    folder, prepared = open_images(str(real), "--reference"), open_images(str(tmp_path / "prepared"), "--reference")
    one, other = read_annotations(folder, "--reference"), read_annotations(prepared, "--reference")
    assert sorted(zip(one.labels, one.texts, strict=True)) == sorted(zip(other.labels, other.texts, strict=True))
    assert one.label_names == other.label_names == list(KINDS) and folder.side == prepared.side == 20


@pytest.mark.slow
def test_captions_are_found_again(real, tmp_path, monkeypatch, capsys):
    kinds = ["across", "down", "plain"] * 4
    found = {}
    for name, drawn in (("right", kinds), ("wrong", kinds[1:] + kinds[:1])):
        asked = [f"stripes {kind}" for kind in kinds[:-1]] + ["a caption of no real image"]
        samples, file = write_samples(tmp_path / name, asked, drawn, "text"), tmp_path / f"{name}.json"
        evaluate(monkeypatch, generated=samples, reference=real, metrics="kid", output_file=file)
        found[name] = json.loads(file.read_text())["retrieval"]
        assert found[name]["n"] == 11 and found[name]["num_not_judged"] == 1
        assert found[name]["num_captions"] == 3 and found[name]["chance"] == 1 / 3, "there are no ten captions"
        [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("RETRIEVAL")]
        assert "among 3 captions" in line and "chance 33.3%" in line
    assert found["right"]["share"] > 0.9 and found["wrong"]["share"] < 0.1


def test_retrieval_among_k_captions_is_at_chance_where_nothing_is_known():
    generator = torch.Generator().manual_seed(0)
    real, made = torch.randn(60, 40, generator=generator), torch.randn(900, 40, generator=generator)
    texts = [f"caption {number}" for number in range(60)]
    asked = [texts[number % 60] for number in range(900)]
    found = caption_retrieval(real, texts, made, asked, 4, seed=0)
    assert found["chance"] == 0.25 and found["interval"][0] < 0.25 < found["interval"][1]
    assert found == caption_retrieval(real, texts, made, asked, 4, seed=0)
    assert caption_retrieval(real, texts, real + 0.1 * made[:60], texts, 4, seed=0)["share"] == 1
    assert caption_retrieval(real, texts, made, ["unknown"] * 900, 4, seed=0) is None


def test_an_interval_covers_what_it_should():
    assert proportion(50, 100)["interval"] == pytest.approx([0.4038, 0.5962], abs=1e-4)
    assert proportion(20, 20)["interval"] == pytest.approx([0.8389, 1.0], abs=1e-4)
    assert proportion(0, 20)["interval"][0] == 0


def test_a_class_is_scored_against_its_own_real_images():
    generator = torch.Generator().manual_seed(0)
    labels = ["a", "b"] * 30
    centres = torch.tensor([[0.0], [3.0]]).repeat(30, 6)
    real, made = (centres + torch.randn(60, 6, generator=generator) for _ in range(2))
    right, wrong = (
        scores_per_class(real, labels, made, asked, ["kid", "fid"], seed=0) for asked in (labels, labels[::-1])
    )
    for name in ("kid", "fid"):
        for label in "ab":
            assert wrong[label]["scores"][name] > 5 * abs(right[label]["scores"][name])


def test_a_class_without_enough_images_has_no_score():
    features = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    real, made = ["a"] * 10 + ["b"] * 3 + ["c"] * 7, ["a"] * 10 + ["b"] * 9 + ["c"]
    found = scores_per_class(features, real, features, made, ["fid"], seed=0)
    assert list(found) == ["a"] and found["a"]["scores"]["fid"] == pytest.approx(0, abs=1e-4)
    assert found["a"]["num_noise_floor"] == 5


@pytest.mark.slow
def test_a_real_image_that_cannot_be_read_is_named_and_left_out(real, cache, tmp_path, monkeypatch, capsys):
    reference = tmp_path / "reference"
    for kind in KINDS:
        (reference / kind).mkdir(parents=True)
        for file in sorted((real / kind).glob("*.png"))[:6]:
            (reference / kind / file.name).write_bytes(file.read_bytes())
    (reference / "across" / "02.png").write_bytes((reference / "across" / "02.png").read_bytes()[:90])
    samples = write_samples(tmp_path / "samples", ["across", "down"] * 4, ["across", "down"] * 4)
    evaluate(monkeypatch, generated=samples, reference=reference, metrics="kid", output_file=tmp_path / "scores.json")
    output, found = capsys.readouterr().out, json.loads((tmp_path / "scores.json").read_text())
    assert "--reference: left out 1 images that cannot be read" in output
    assert "across/02.png cannot be read" in output and "8 generated, 17 reference" in output
    assert list(found["unreadable_reference"]) == [str(reference / "across" / "02.png")]
    assert {kind: found["per_class"][kind]["num_reference"] for kind in ("across", "down")} == {"across": 5, "down": 6}

    for file in reference.rglob("*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(UserError, match="--reference: 0 images are too few.*that can be read"):
        evaluate(monkeypatch, generated=samples, reference=reference)
    with pytest.raises(UserError, match="--classifier_data_dir .* holds no image that can be read"):
        evaluate(monkeypatch, generated=samples, reference=real, classifier_data_dir=reference, cache_dir=cache)


def test_mistakes_are_told_before_anything_is_trained(real, tmp_path, monkeypatch):
    monkeypatch.setattr(classifiers, "fit", lambda *arguments: pytest.fail("something was trained"))
    samples = write_samples(tmp_path / "samples", ["across", "zigzag"] * 3, ["across", "down"] * 3)
    (samples / "metadata.jsonl").rename(tmp_path / "metadata.jsonl")
    single = tmp_path / "single"
    for folder in (single / "across", single / "down"):
        folder.mkdir(parents=True)
    for number, file in enumerate(sorted((real / "across").glob("*.png"))):
        (single / ("across" if number else "down") / file.name).write_bytes(file.read_bytes())
    common = {"generated": samples, "reference": real, "cache_dir": tmp_path / "cache"}
    with pytest.raises(UserError, match="class of each image of --generated .*metadata.jsonl.*leave the flag"):
        evaluate(monkeypatch, **common, classifier_data_dir=real)
    (tmp_path / "metadata.jsonl").rename(samples / "metadata.jsonl")
    with pytest.raises(UserError, match="--classifier_data_dir .* has no class zigzag.*across, down, plain"):
        evaluate(monkeypatch, **common, classifier_data_dir=real)
    with pytest.raises(UserError, match="--classifier_data_dir .* is not a folder"):
        evaluate(monkeypatch, **common, classifier_data_dir=tmp_path / "none")
    (samples / "metadata.jsonl").write_text((samples / "metadata.jsonl").read_text().replace("zigzag", "down"))
    with pytest.raises(UserError, match="1 images of class down; give at least 2"):
        evaluate(monkeypatch, **common, classifier_data_dir=single)
    with pytest.raises(UserError, match="--retrieval_captions 1 must be at least 2"):
        evaluate(monkeypatch, **common, retrieval_captions=1)


def test_a_class_asked_for_and_never_found_is_no_hit():
    judge = classifiers.Classifier(torch.nn.Identity(), ["a", "b"], 8, accuracy=0.75, num_held_out=4)
    found = label_accuracy(["a", "a", None, "null"], ["b", "b", "a", "a"], judge)
    assert found["share"] == 0 and found["confusion"] == [[0, 2], [0, 0]] and found["num_without_label"] == 2
    assert found["classifier"]["share"] == 0.75 and found["chance"] == 0.5


def drawn_stroke(shape, size=40, fine=8):
    """`shape(x, y)` in pixels from the middle, y upwards, drawn with soft edges as (size, size) in [0, 1]."""
    place = (np.arange(size * fine) + 0.5) / fine - size / 2
    inside = shape(place[None], -place[:, None]).astype(float)
    return inside.reshape(size, fine, size, fine).mean(axis=(1, 3))


@pytest.mark.parametrize("width", [2.5, 4.0, 6.0])
def test_stroke_width_of_rings_and_bars_has_a_closed_form(width):
    ring = drawn_stroke(lambda x, y: abs(np.hypot(x, y) - 12) < width / 2)
    assert measure_digits.stroke_width(ring) == pytest.approx(width, rel=0.02)
    length = 30
    for degrees in (0, 30, 45):  # of a bar the ends count too: 2 w L / (2 L + 2 w)
        cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        bar = drawn_stroke(
            lambda x, y, cos=cos, sin=sin: (abs(x * cos - y * sin) < width / 2) & (abs(x * sin + y * cos) < length / 2)
        )
        assert measure_digits.stroke_width(bar) == pytest.approx(width * length / (width + length), rel=0.06)
        assert measure_digits.stroke_width(bar / 2) == pytest.approx(measure_digits.stroke_width(bar))


@pytest.mark.parametrize("degrees", [-30, 0, 12, 40])
def test_slant_is_the_angle_of_a_shear(degrees):
    shear = math.tan(math.radians(degrees))
    ellipse = drawn_stroke(lambda x, y: ((x - y * shear) / 5) ** 2 + (y / 11) ** 2 < 1)
    assert measure_digits.slant(ellipse) == pytest.approx(degrees, abs=0.5)
    assert measure_digits.slant(np.roll(ellipse, (3, -2), (0, 1))) == pytest.approx(degrees, abs=0.5)
    assert measure_digits.measure(np.zeros((28, 28))).tolist() == [0, 0]


def test_vectors_are_written_beside_digits_and_compared_with_samples(tmp_path, monkeypatch, capsys):
    shears, widths = np.linspace(-0.5, 0.5, 12), np.linspace(1.5, 5, 12)[[5, 2, 9, 0, 7, 11, 1, 4, 8, 3, 10, 6]]
    folder, lines = tmp_path / "digits" / "0", []
    folder.mkdir(parents=True)
    for number, (shear, width) in enumerate(zip(shears, widths, strict=True)):
        image = drawn_stroke(lambda x, y, s=shear, w=width: (abs(x - y * s) < w / 2) & (abs(y) < 12), 28)
        Image.fromarray((image * 255).round().astype(np.uint8)).save(folder / f"{number:06d}.png")

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["measure_digits.py", *map(str, words)])
        measure_digits.main()

    run(tmp_path / "digits")
    vectors = np.stack([np.load(folder / f"{number:06d}.npy") for number in range(12)])
    assert vectors.shape == (12, 2) and vectors.dtype == np.float32
    assert np.corrcoef(vectors[:, 0], widths)[0, 1] > 0.98 and np.corrcoef(vectors[:, 1], shears)[0, 1] > 0.98
    run(tmp_path / "digits", "--output_file", tmp_path / "asked.npy")
    assert np.array_equal(np.load(tmp_path / "asked.npy"), vectors)

    asked = vectors * [1, -1]  # every slant is wrong
    for number, vector in enumerate(asked):
        lines.append(json.dumps({"file_name": f"{number:06d}.png", "vector": vector.tolist()}))
    lines.append(json.dumps({"file_name": "000000.png", "vector": None}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    capsys.readouterr()
    run("--samples", folder, "--report", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["stroke width in pixels"]["correlation"] == pytest.approx(1)
    assert report["slant in degrees"]["correlation"] == pytest.approx(-1)
    assert report["slant in degrees"]["n"] == 12
    assert "goal 0.8; chance 0" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="has no metadata.jsonl"):
        run("--samples", tmp_path)
