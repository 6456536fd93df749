"""Datasets and samples on the Hub: what their cards say, and that others can load them as the cards show."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import yaml
from hub_helpers import SECRET
from hub_server import environment
from huggingface_hub import DatasetCard
from PIL import Image

import prepare_dataset
import push
from trainkit.atomic import write_json
from trainkit.errors import UserError
from trainkit.hub.dataset_card import size_category


def run(monkeypatch, script, *words):
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, words)])
    script.main()


def code_of(card, number=0):
    """A block of code in a card."""
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)[number]


def run_elsewhere(hub, home, code):
    """Run code in a fresh interpreter, without this repository; returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=home, env=os.environ | environment(hub, home / "elsewhere"),
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_a_prepared_dataset_goes_to_the_hub_with_its_card(as_client, image_folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "shapes"
    run(
        monkeypatch, prepare_dataset, "--train_data_dir", image_folder, "--resolution", 16, "--center_crop",
        "--validation_fraction", 0.3, "--output_dir", out, "--num_proc", 1, "--cache_dir", tmp_path / "cache",
        "--push_to_hub", "--hub_token", SECRET, "--hub_license", "cc0-1.0", "--hub_private_repo",
    )  # fmt: skip
    assert f"pushed to {as_client.url}/datasets/me/shapes" in capsys.readouterr().out
    pushed = as_client.repositories["datasets/me/shapes"]
    assert as_client.created[0]["type"] == "dataset" and as_client.created[0]["visibility"] == "private"
    assert {"README.md", "contact_sheet.png", "state.json", "preparation.json", "dataset_info.json"} <= pushed.keys()
    assert "validation/state.json" in pushed and not [name for name in pushed if "lock" in name or "units" in name]
    assert not (out / "README.md").exists() and not (out / ".trainkit").exists()

    card = DatasetCard(pushed["README.md"].decode())
    assert (card.data.license, card.data.size_categories) == ("cc0-1.0", ["n<1K"])
    assert card.data.task_categories == ["unconditional-image-generation"] and "trainkit" in card.data.tags
    assert "| round | " in card.text and "16x16 RGB" in card.text and "resize_mode: crop" in card.text
    used = code_of(card.text) + "print(len(images))\n" + code_of(card.text, 1) + "print(image.shape, image.dtype)\n"
    used += 'from datasets import load_dataset\nprint(sorted(load_dataset("me/shapes")))\n'
    count = yaml.safe_load(pushed["preparation.json"])["num_images"]
    assert run_elsewhere(as_client, tmp_path, used) == f"{count}\n(16, 16, 3) uint8\n['train', 'validation']\n"


@pytest.mark.slow
def test_a_failed_push_leaves_a_whole_dataset_and_push_py_sends_it(
    as_client, image_folder, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "shapes"
    as_client.fail("/create", 401)
    words = ["--train_data_dir", image_folder, "--resolution", 8, "--storage", "png", "--center_crop"]
    words += ["--output_dir", out, "--num_proc", 1, "--cache_dir", tmp_path / "cache", "--hub_token", SECRET]
    run(monkeypatch, prepare_dataset, *words, "--push_to_hub", "--hub_dataset_id", "team/shapes")
    said = capsys.readouterr().err
    assert "WARNING: not pushed: the token was refused (401)" in said and SECRET not in said
    assert f"run python push.py {out} --hub_dataset_id team/shapes" in said

    as_client.faults.clear()
    (out / "README.md").write_text("# Mine\n")
    run(monkeypatch, push, out, "--hub_dataset_id", "team/shapes", "--hub_token", SECRET)
    assert as_client.repositories["datasets/team/shapes"]["README.md"] == b"# Mine\n"
    with pytest.raises(UserError, match="--push_checkpoint: .* holds no complete checkpoint"):
        run(monkeypatch, push, out, "--push_checkpoint")
    with pytest.raises(UserError, match="--hub_model_id: .* holds a prepared dataset"):
        run(monkeypatch, push, out, "--hub_model_id", "me/x")
    with pytest.raises(UserError, match="--push_to_hub: --output_dir s3://x must be a folder of this machine"):
        run(monkeypatch, prepare_dataset, "--train_data_dir", image_folder, "--output_dir", "s3://x", "--push_to_hub")


@pytest.mark.slow
def test_samples_are_a_dataset_too(as_client, tmp_path, monkeypatch):
    folder = tmp_path / "samples"
    folder.mkdir()
    for number in range(3):
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(folder / f"{number:06d}.png")
    Image.new("RGB", (30, 10)).save(folder / "grid.png")
    lines = [f'{{"file_name": "{number:06d}.png", "seed": {number}}}\n' for number in range(3)]
    (folder / "metadata.jsonl").write_text("".join(lines))
    record = {"num_images": 3, "output_format": "png", "height_width": [8, 8], "model": "me/digits", "seed": 0}
    write_json(folder / "sampling.json", record | {"complete": True})
    run(monkeypatch, push, folder, "--hub_dataset_id", "me/samples", "--hub_token", SECRET)
    card = DatasetCard(as_client.repositories["datasets/me/samples"]["README.md"].decode())
    assert "3 images of 8x8" in card.text and "model: me/digits" in card.text and "synthetic" in card.data.tags
    code = code_of(card.text) + 'print(len(images), images[2]["seed"], images[2]["image"].getpixel((0, 0)))'
    assert run_elsewhere(as_client, tmp_path, code) == "3 2 (2, 2, 2)\n"


def test_sizes_have_the_words_of_the_hub():
    counts = [1, 999, 1000, 9999, 10_000, 70_000, 10**6, 10**9, 10**12]
    words = ["n<1K", "n<1K", "1K<n<10K", "1K<n<10K", "10K<n<100K", "10K<n<100K", "1M<n<10M", "1B<n<10B", "n>1T"]
    assert [size_category(count) for count in counts] == words
