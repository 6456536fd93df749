"""Sources of images, stored features, copies of training images, and the same scores on any number of processes."""

import json
import os
import shutil

import numpy as np
import pytest
from conditional_helpers import class_unet
from diffusers import DDPMPipeline, DDPMScheduler
from evaluation_helpers import evaluate, write_images
from PIL import Image
from process_helpers import run_forked

from trainkit.errors import UserError
from trainkit.evaluation import reference as features_of_sides
from trainkit.evaluation.images import open_images
from trainkit.sampling.pipeline import save_pipeline

ALL = "kid;fid;fid_infinity;precision;recall;density;coverage"


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "real", 44)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "made", 42, noise=30, seed=1)


def as_npz(folder, file):
    images = open_images(str(folder), "--generated")
    np.savez(file, arr_0=next(images.batches(np.arange(len(images)), len(images), 24)))
    return file


@pytest.mark.slow
def test_every_metric_of_a_folder_and_of_its_npz_file(real, made, tmp_path, monkeypatch, capsys):
    found = []
    for source in (made, as_npz(made, tmp_path / "made.npz")):
        file = tmp_path / "scores.json"
        evaluate(
            monkeypatch, generated=source, reference=real, metrics=ALL, output_file=file, cache_dir=tmp_path / "cache"
        )
        found.append(json.loads(file.read_text()))
    names = ALL.split(";")
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines() if " | noise floor " in line]
    assert lines == 2 * [name.upper() for name in names]
    assert found[0]["scores"] == pytest.approx(found[1]["scores"], rel=1e-4, abs=1e-4)
    assert {f"{name}_se" for name in names} <= set(found[0]["scores"])
    assert found[0]["scores"]["precision"] < 0.5 < found[0]["noise_floor"]["precision"]
    assert len(found[0]["weights_sha256"]) == 64 and found[0]["resize"].startswith("bicubic with antialiasing")


@pytest.mark.slow(8)
def test_features_of_the_reference_are_computed_once_until_an_image_changes(real, made, tmp_path, monkeypatch, capsys):
    counted, extract = [], features_of_sides.extract_features

    def counting(extractor, batches, device):
        features = extract(extractor, batches, device)
        counted.append(len(features))
        return features

    monkeypatch.setattr(features_of_sides, "extract_features", counting)
    folder, file = shutil.copytree(real, tmp_path / "real"), tmp_path / "scores.json"
    flags = {"generated": made, "reference": folder, "cache_dir": tmp_path / "cache", "output_file": file}
    flags["metrics"] = "kid"
    evaluate(monkeypatch, **flags)
    first = json.loads(file.read_text())["scores"]
    evaluate(monkeypatch, **flags)
    assert counted == [42, 44, 42] and json.loads(file.read_text())["scores"] == first
    (stored,) = (tmp_path / "cache" / "features").iterdir()
    stored.write_bytes(stored.read_bytes()[:100])  # damaged: computed again
    evaluate(monkeypatch, **flags)
    assert counted[3:] == [42, 44] and json.loads(file.read_text())["scores"] == first
    evaluate(monkeypatch, **flags, num_images=30)
    assert counted[5:] == [30, 30]
    image = folder / "000003.png"
    Image.open(image).rotate(90).save(image)
    os.utime(image, ns=(1, 1))
    evaluate(monkeypatch, **flags)
    assert counted[7:] == [42, 44] and json.loads(file.read_text())["scores"] != first


@pytest.mark.slow
def test_features_that_cannot_be_stored_do_not_stop_a_run(real, made, tmp_path, monkeypatch, capsys):
    (tmp_path / "cache").write_text("a file where the cache should be")
    evaluate(monkeypatch, generated=made, reference=real, metrics="kid", cache_dir=tmp_path / "cache")
    assert "KID" in capsys.readouterr().out


@pytest.mark.slow
def test_copies_of_reference_images_are_reported_and_shown(real, tmp_path, monkeypatch, capsys):
    copied = write_images(tmp_path / "copied", 20, seed=5)
    for number in range(4):
        shutil.copy(real / f"{number:06d}.png", copied / f"{number + 10:06d}.png")
    held_out = write_images(tmp_path / "held_out", 40, seed=6)
    file, picture = tmp_path / "scores.json", tmp_path / "new" / "pairs.png"
    flags = {"generated": copied, "reference": real, "metrics": "kid", "cache_dir": tmp_path / "cache"}
    evaluate(monkeypatch, **flags, held_out=held_out, closest_pairs_file=picture, output_file=file)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("MEMORIZATION")]
    assert len(lines) == 2 and all("4 of 20 samples equal a reference image" in line for line in lines)
    assert all("nearer to one than 99 % of 40 held-out images" in line for line in lines)
    found = json.loads(file.read_text())["memorization"]
    for space in ("features", "pixels"):
        assert 0.2 <= found[space]["share_too_near"] < 0.4 and found[space]["num_held_out"] == 40
    pairs = {(pair["generated"], pair["reference"]) for pair in found["closest_pairs"][:4]}
    assert pairs == {(10, 0), (11, 1), (12, 2), (13, 3)} and len(found["closest_pairs"]) == 16
    pixels = np.asarray(Image.open(picture))
    assert pixels.shape == (2 * 96, 16 * 96, 3)
    assert np.array_equal(pixels[:96, : 4 * 96], pixels[96:, : 4 * 96])  # the copies come first
    evaluate(monkeypatch, **flags)
    assert "MEMORIZATION" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_same_images_on_both_sides_are_named(real, tmp_path, monkeypatch, capsys):
    evaluate(monkeypatch, generated=real, reference=real, metrics="kid", cache_dir=tmp_path)
    assert "WARNING: --generated and --reference hold the same images" in capsys.readouterr().out


@pytest.mark.slow
def test_splits_are_named_and_a_folder_of_one_split_is_read(tmp_path, monkeypatch, capsys):
    """Files named test0.png are of the test split alone, which evaluation uses like any other."""
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            folder = write_images(tmp_path / "real" / split / label, 8, seed=len(label + split))
            for number, file in enumerate(sorted(folder.iterdir())):
                file.rename(folder / f"{split}{number}.png")
    flags = {"generated": tmp_path / "real/train", "metrics": "kid", "cache_dir": tmp_path / "cache"}
    evaluate(monkeypatch, **flags, reference=tmp_path / "real")
    assert "--reference: images of the splits test (16), train (16) are all used" in capsys.readouterr().out
    evaluate(monkeypatch, **flags, reference=tmp_path / "real/test")
    assert "all used" not in capsys.readouterr().out


@pytest.mark.slow
def test_mistakes_are_reported_in_one_line(real, made, tmp_path, monkeypatch):
    whole = as_npz(made, tmp_path / "whole.npz")
    (tmp_path / "cut.npz").write_bytes(whole.read_bytes()[:200])
    np.savez(tmp_path / "floats.npz", np.zeros((4, 8, 8, 3)))
    np.savez(tmp_path / "flat.npz", np.zeros((4, 8), np.uint8))
    np.savez(tmp_path / "objects.npz", np.array([None, {}], dtype=object))
    np.savez(tmp_path / "empty.npz")
    (tmp_path / "text.csv").write_text("a\n")
    for name, message in [
        ("cut.npz", "--generated .*cut.npz cannot be read .*write it again with numpy.savez"),
        ("floats.npz", r"holds float64 of shape \(4, 8, 8, 3\); its first array must be uint8"),
        ("flat.npz", r"holds uint8 of shape \(4, 8\)"),
        ("objects.npz", "objects.npz cannot be read"),
        ("empty.npz", "empty.npz cannot be read"),
        ("text.csv", "text.csv is not a folder; give a folder of images, a prepared dataset or an .npz file"),
    ]:
        with pytest.raises(UserError, match=message):
            evaluate(monkeypatch, generated=tmp_path / name, reference=real)
    sides = {"generated": made, "reference": real, "metrics": "kid", "cache_dir": tmp_path / "cache"}
    for flags, message in [
        ({"output_file": tmp_path}, "--output_file .* is a folder: give the name of a JSON file"),
        ({"output_file": whole / "scores.json"}, "--output_file .*scores.json cannot be written"),
        ({"closest_pairs_file": tmp_path / "a.jpg"}, "--closest_pairs_file .*a.jpg must end in .png"),
        ({"closest_pairs_file": whole / "a.png"}, "--closest_pairs_file .*a.png cannot be written"),
        ({"held_out": tmp_path / "none"}, "--held_out .*none is not a folder"),
        ({"feature_extractor": tmp_path / "none.pt"}, "--feature_extractor .*none.pt: the file does not exist"),
    ]:
        with pytest.raises(UserError, match=message):
            evaluate(monkeypatch, **sides, **flags)


@pytest.mark.slow(6)
def test_two_processes_compute_the_same_scores(real, made, tmp_path, monkeypatch, capsys):
    reference = shutil.copytree(real, tmp_path / "real")
    (reference / "000007.png").write_bytes(b"\x89PNG\r\n\x1a\n and no image")
    sides = {"generated": made, "reference": reference, "held_out": write_images(tmp_path / "held_out", 9, seed=6)}
    evaluate(monkeypatch, **sides, output_file=tmp_path / "one.json", cache_dir=tmp_path / "cache1")
    flags = sides | {"output_file": tmp_path / "two.json", "cache_dir": tmp_path / "cache2"}
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    done = run_forked("evaluate_samples.py", *words, processes=2)
    assert done.stdout.count("\nKID ") == 1  # only the main process reports
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert two["scores"] == pytest.approx(one["scores"], rel=1e-4, abs=1e-5)
    assert two["num_generated"] == 42 and two["num_reference"] == 43
    assert list(two["unreadable_reference"]) == list(one["unreadable_reference"]) == [str(reference / "000007.png")]
    assert two["memorization"]["features"]["num_held_out"] == 9


@pytest.mark.slow
def test_two_processes_score_the_samples_of_one(real, tmp_path, monkeypatch):
    pipeline = DDPMPipeline(class_unet(num_class_embeds=None), DDPMScheduler())
    save_pipeline(tmp_path / "model", pipeline, "# A card\n")
    flags = {"model_name_or_path": tmp_path / "model", "reference": real, "num_images": 7, "sample_batch_size": 2}
    flags |= {"num_inference_steps": 2, "cache_dir": tmp_path / "cache"}
    evaluate(monkeypatch, **flags, output_file=tmp_path / "one.json")
    flags["output_file"] = tmp_path / "two.json"
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    run_forked("evaluate_samples.py", *words, processes=2)
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert two["num_generated"] == 7
    assert two["scores"] == pytest.approx(one["scores"], rel=1e-3, abs=1e-3)
