"""Encodings that are computed once: what they hold, that a killed run goes on, and that processes share the work."""

import errno
import json
import multiprocessing
import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock
from source_files import SETTINGS, open_given, png

from trainkit.data.loading.captions import CaptionIndex, split_captions
from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.loading.encodings import Rows, make_units, unit_name, unit_summary, write_rows
from trainkit.data.loading.statistics import vector_statistics
from trainkit.data.preparation.prepare import prepare
from trainkit.diffusion import text
from trainkit.errors import UserError


class Encoder:
    """Stands in for a text encoder: a caption's hidden states are its words' lengths, in two columns."""

    width, max_tokens = 2, 4

    def __init__(self):
        self.model, self.encoded = torch.nn.Linear(1, 1), []

    def digest(self):
        return "stand-in"

    def lengths(self, captions):
        return [len(caption.split()) + 1 for caption in captions]

    def encode(self, captions):
        self.encoded += captions
        words = [[1, *map(len, caption.split())][: self.max_tokens] for caption in captions]
        return [np.array([[number, number / 3] for number in row], dtype=np.float32) for row in words]


@pytest.fixture
def images(tmp_path):
    """Twelve images: eleven with two captions of which many are the same, one with none."""
    for number in range(12):
        (tmp_path / "raw").mkdir(exist_ok=True)
        (tmp_path / "raw" / f"{number:02d}.png").write_bytes(png(number))
        if number:
            (tmp_path / "raw" / f"{number:02d}.txt").write_text(f"a  thing\nno {'x' * (number % 4)}{number} \n\n")
    prepare(open_given(tmp_path / "raw"), SETTINGS, tmp_path / "prepared", 1, show_progress=False)
    return PreparedImages(tmp_path / "prepared")


def test_each_caption_is_encoded_once_and_read_back(images, tmp_path, capsys):
    encoder = Encoder()
    encodings = text.encode_captions(images, encoder, tmp_path, "--train_data_dir raw")
    index = encodings.index
    assert sorted(encoder.encoded) == sorted(["", "a thing", *(f"no {'x' * (n % 4)}{n}" for n in range(1, 12))])
    assert index.texts([0])[0] == "" and "12 distinct ones" in capsys.readouterr().out

    rows = np.arange(12)
    firsts = index.first_of(rows)
    assert index.texts(firsts) == [""] + ["a thing"] * 11 and firsts[0] == 0
    states, mask = encodings.gather(np.array([0, firsts[1]]))
    assert states.dtype == np.float32 and states.shape == (2, 3, 2), "the longest has a start and two words"
    assert mask.tolist() == [[True, False, False], [True, True, True]]
    assert states[1, :, 0].tolist() == [1, 1, 5] and not states[0, 1:].any()
    assert np.allclose(states[1, :, 1], [1 / 3, 1 / 3, 5 / 3], rtol=2**-11), "float16"

    again = Encoder()
    assert text.encode_captions(images, again, tmp_path, "").gather(firsts)[0].shape == (12, 3, 2)
    assert again.encoded == []


def test_captions_are_drawn_evenly_and_dropped_as_often_as_asked(images, tmp_path):
    index = CaptionIndex(images, tmp_path)
    uniforms = (np.arange(1000) + 0.5) / 1000
    drawn = index.drawn(np.full(1000, 3), uniforms, dropout=0.2)
    own = index.numbers[index.starts[3] : index.starts[4]].tolist()
    assert len(own) == 2 and [int((drawn == number).sum()) for number in (0, *own)] == [200, 400, 400]
    assert set(index.drawn(np.array([0, 0]), np.array([0.0, 0.999]), 0.0)) == {0}
    assert set(index.drawn(np.full(5, 3), uniforms[-5:], 0.0)) <= set(own)


def test_a_condition_depends_on_its_image_and_draw_alone(images, tmp_path):
    condition = text.TextCondition(images, Encoder(), tmp_path, "", dropout=0.3)
    rows, uniforms = np.arange(12), np.random.default_rng(0).random(12)
    whole = condition.inputs(rows, lambda purpose: uniforms)
    parts = [(rows[part], uniforms[part]) for part in (slice(5), slice(5, 12))]
    halves = [condition.inputs(some, lambda purpose, drawn=drawn: drawn) for some, drawn in parts]
    for name, value in whole.items():
        assert torch.equal(value, torch.cat([half[name] for half in halves]))
    assert (whole["encoder_attention_mask"].sum(1) == 1).any() and whole["encoder_attention_mask"].dtype == torch.bool
    undropped = condition.inputs(rows)["encoder_attention_mask"].sum(1)
    assert undropped.tolist() == [1] + [3] * 11


def test_lines_are_captions():
    assert split_captions(" a  cat\n\n the same cat ") == ["a cat", "the same cat"]
    assert split_captions("") == split_captions("\n ") == [""]


def test_lists_of_captions_come_from_metadata(tmp_path):
    (tmp_path / "raw").mkdir()
    lines = [{"file_name": "0.png", "text": ["one", "two\nlines"]}, {"file_name": "1.png", "captions": ["three"]}]
    (tmp_path / "raw" / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for number in range(2):
        (tmp_path / "raw" / f"{number}.png").write_bytes(png(number))
    prepare(open_given(tmp_path / "raw"), SETTINGS, tmp_path / "prepared", 1, show_progress=False)
    texts = PreparedImages(tmp_path / "prepared").texts(np.arange(2))
    assert [split_captions(text) for text in texts] == [["one", "two lines"], ["three"]]


def test_a_killed_run_goes_on_where_it_stopped(images, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "CAPTIONS_PER_UNIT", 4)
    first = Encoder()

    def killed(captions):
        if len(first.encoded) >= 8:
            raise KeyboardInterrupt
        return Encoder.encode(first, captions)

    first.encode = killed
    with pytest.raises(KeyboardInterrupt):
        text.encode_captions(images, first, tmp_path, "")
    second = Encoder()
    encodings = text.encode_captions(images, second, tmp_path, "")
    assert len(first.encoded) == 8 and len(second.encoded) == 5 and not set(first.encoded) & set(second.encoded)
    assert not any(path.is_dir() for path in encodings.rows.folder.iterdir())
    fresh = text.encode_captions(images, Encoder(), tmp_path / "other", "")
    for name in fresh.rows.unit_names:
        assert (fresh.rows.folder / name).read_bytes() == (encodings.rows.folder / name).read_bytes()


def _work(folder, rank, barrier):
    def make(number):
        with (folder / "made").open("a") as log:
            log.write(f"{number} {rank}\n")
        time.sleep(0.05)
        write_rows(folder / unit_name(number), [[np.full(3, number)]], {"number": number})

    barrier.wait()
    make_units(folder, [unit_name(number) for number in range(12)], make, first=rank * 6)


def test_two_processes_share_the_units_and_make_each_once(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    workers = [context.Process(target=_work, args=(tmp_path, rank, barrier)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    made = [line.split() for line in (tmp_path / "made").read_text().splitlines()]
    assert sorted(int(number) for number, _ in made) == list(range(12)) and len({rank for _, rank in made}) == 2
    rows = Rows(tmp_path, 12, 1)
    assert [rows[number].tolist() for number in range(12)] == [[number] * 3 for number in range(12)]
    assert unit_summary(tmp_path / unit_name(7)) == {"number": 7} and rows.longest() == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*rows.unit_names, "made"])


def test_what_a_killed_process_left_is_swept_and_what_another_is_writing_is_not(tmp_path):
    for name in (f".tmp-0123456789ab-{unit_name(0)}", ".tmp-0123456789ab-encodings.json"):
        (tmp_path / name).touch()
    make_units(tmp_path, [unit_name(0)], lambda number: write_rows(tmp_path / unit_name(number), [[np.ones(1)]]))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-0123456789ab-encodings.json", unit_name(0)]


def test_progress_counts_captions(images, tmp_path, capsys):
    found = text.encode_captions(images, Encoder(), tmp_path, "")
    assert f"encoding captions: {len(found.index)} of {len(found.index)} captions (100.0%)" in capsys.readouterr().out


def test_a_finished_cache_that_only_its_owner_can_write_is_read(images, tmp_path, monkeypatch):
    vectors = SimpleNamespace(fingerprint="f", column=lambda name: iter([np.ones((2, 3), dtype=np.float32)]))
    options = SimpleNamespace(cache_dir=tmp_path)
    finished = text.encode_captions(images, Encoder(), tmp_path, "")
    mean, _ = vector_statistics(vectors, options)

    def refused(*_args, **_kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    for owner, name in ((Path, "mkdir"), (FileLock, "acquire"), (os, "replace")):
        monkeypatch.setattr(owner, name, refused)
    make_units(finished.rows.folder, finished.rows.unit_names, refused)
    again = Encoder()
    read = text.encode_captions(images, again, tmp_path, "")
    assert again.encoded == [] and np.array_equal(read.gather(np.arange(12))[0], finished.gather(np.arange(12))[0])
    assert np.array_equal(vector_statistics(vectors, options)[0], mean)
    with pytest.raises(UserError, match="--cache_dir: .*other.* cannot be written"):
        text.encode_captions(images, again, tmp_path / "other", "")


def test_rows_of_any_length_in_several_batches(tmp_path):
    written = [[np.arange(5) / 8, np.zeros(0)], [np.ones((2, 3)) / 3]]
    write_rows(tmp_path / unit_name(0), written)
    rows = Rows(tmp_path, 3, 10)
    assert [len(rows[number]) for number in range(3)] == [5, 0, 6] and rows[0].tolist() == [0, 0.125, 0.25, 0.375, 0.5]
    assert np.allclose(rows[2], 1 / 3, rtol=2**-11) and rows.longest() == 6
    with pytest.raises(ValueError, match="beyond 65,504"):
        write_rows(tmp_path / "other", [[np.array([1e6])]])
    assert [path.name for path in tmp_path.iterdir()] == [unit_name(0)]


def test_a_damaged_unit_is_named_and_only_it_is_made_anew(tmp_path):
    write_rows(tmp_path / unit_name(0), [[np.ones(3000)]])
    os.truncate(tmp_path / unit_name(0), 2000)
    with pytest.raises(UserError, match=rf"{unit_name(0)} is damaged .*delete it") as error:
        Rows(tmp_path, 1, 4)[0]
    assert "\n" not in str(error.value)


def test_images_without_captions_are_refused(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "0.png").write_bytes(png())
    prepare(open_given(tmp_path / "raw"), SETTINGS, tmp_path / "prepared", 1, show_progress=False)
    with pytest.raises(UserError, match="--train_data_dir raw has no captions: put NAME.txt"):
        text.encode_captions(PreparedImages(tmp_path / "prepared"), Encoder(), tmp_path, "--train_data_dir raw")
