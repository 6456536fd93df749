"""What a person sees of a prepared dataset: its card and its contact sheet."""

import base64
import dataclasses
import errno
import html.parser
import io
import os
import re
import shlex
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from process_helpers import run_forked
from test_prepare import SETTINGS, Stopped, count_decoded, run, write_images

from train_unconditional import Options
from trainkit.data.cache import open_or_prepare
from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.preparation import contact_sheet
from trainkit.data.preparation.contact_sheet import picture_of, write_contact_sheet
from trainkit.data.preparation.filtering import NO_FILTERS, FilterSettings
from trainkit.data.preparation.prepare import prepare
from trainkit.data.settings import PreparationSettings
from trainkit.data.sources.folder import ImageFolder
from trainkit.errors import UserError
from trainkit.options.parsing import parse_options

WICKED = "<script>alert('1')</script><img src=x onerror=alert(2)>.jpg".replace("/", "|")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """60 images of two classes, one saved again, one cut short, and one with a name that is HTML."""
    folder = tmp_path_factory.mktemp("set") / "photos"
    write_images(folder / "<b>few", 20)
    write_images(folder / "many", 40, start=20)
    (folder / "many/zz.png").write_bytes((folder / "many/00022.png").read_bytes())
    cut = (folder / "many/00021.jpg").read_bytes()
    (folder / "many/cut.jpg").write_bytes(cut[: len(cut) * 2 // 3])
    (folder / "many" / WICKED).write_text("no image")
    return folder


def inspect(folder: Path) -> subprocess.CompletedProcess:
    return run_forked("prepare_dataset.py", "--inspect", folder, check=False)


def deadly_picture(writer, path: Path) -> bytes | None:
    if path.name == "cut.jpg":
        os.kill(os.getpid(), signal.SIGKILL)
    return picture_of(writer, path)


def prepared(photos: Path, output: Path, settings=SETTINGS, filters=NO_FILTERS) -> dict:
    return prepare(ImageFolder(photos), settings, output, 1, show_progress=False, filters=filters)


def test_flags_that_do_nothing_here_are_refused(tmp_path, monkeypatch):
    import prepare_dataset

    def main(*words):
        monkeypatch.setattr("sys.argv", ["prepare_dataset.py", *map(str, words)])
        prepare_dataset.main()

    with pytest.raises(UserError, match="--inspect prints what is in .*: remove --output_dir --resolution$"):
        main("--inspect", tmp_path, "--resolution", 64, "--output_dir", "x")
    (tmp_path / "images" / "inside").mkdir(parents=True)
    with pytest.raises(UserError, match="--output_dir .*inside/set is inside --train_data_dir .*images: the next"):
        main("--train_data_dir", tmp_path / "images", "--output_dir", tmp_path / "images" / "inside" / "set")


def test_the_card_says_what_is_in_it_and_how_to_train(photos, tmp_path):
    grey = dataclasses.replace(SETTINGS, image_mode="L")
    done = prepared(photos, tmp_path / "out", grey, FilterSettings("exact", validation_fraction=0.2))
    shown = inspect(tmp_path / "out")
    assert shown.returncode == 0 and shown.stderr == ""
    lines = shown.stdout.splitlines()
    assert lines[0] == str(tmp_path / "out") and len(lines) < 20
    card = {name: value for name, _, value in (re.split(r"( {2,})", line.strip(), maxsplit=1) for line in lines[1:])}
    held_out = 60 - done["num_images"]
    few = done["classes"]["<b>few"]
    assert card["images"] == f"{done['num_images']} of 16x16 L, 8 bits per channel, stored as pixels"
    assert card["held out"] == f"{held_out} more in {tmp_path / 'out/validation'}" and held_out > 0
    assert card["classes"].startswith(f"2: many {done['classes']['many']}, <b>few {few}; the largest is ")
    assert card["rejected"] == "3: 1 duplicate, 1 not_an_image, 1 truncated; see rejected.jsonl"
    assert re.match(r"L 0\.4\d{3} 0\.0\d{3} \(", card["mean, std"])
    assert done["fingerprint"] in card["fingerprint"] and "pillow" in card["made with"]
    assert "resize_mode crop" in card["settings"] and "validation_fraction 0.2" in card["settings"]
    assert "background #ffffff" in card["settings"]
    assert f"{sum(shard['num_bytes'] for shard in done['shards']) / 1e6:,.1f} MB" in card["files"]

    options = parse_options(Options, "", shlex.split(card["train"])[3:])
    assert len(open_or_prepare(options)) == done["num_images"], "the command that is shown opens it"
    assert len(open_or_prepare(dataclasses.replace(options, train_data_dir=options.validation_data_dir))) == held_out


@pytest.mark.slow
def test_a_card_of_no_whole_dataset_says_what_to_do(photos, tmp_path, monkeypatch):
    prepared(photos, tmp_path / "out")
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    with monkeypatch.context() as until_stopped, pytest.raises(Stopped):
        count_decoded(until_stopped, stop_after=30)
        prepared(photos, tmp_path / "unfinished")
    shard = next((tmp_path / "out").glob("data-*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-100])
    for folder, message, shows_card in (
        ("out", r"data-\w+.arrow is damaged \(.*delete it and run the preparation again", True),
        ("unfinished", r"is unfinished \(.*run its prepare_dataset.py command again", False),
        ("empty", r"empty is not a prepared dataset \(it has no preparation.json", False),
        ("file", r"file is a file; give a folder", False),
        ("nowhere", r"nowhere does not exist", False),
        (photos, r"photos is not a prepared dataset", False),
    ):
        shown = inspect(tmp_path / folder)
        assert shown.returncode == 1 and shown.stderr.startswith("error: ") and shown.stderr.count("\n") == 1
        assert re.search(message, shown.stderr), shown.stderr
        assert bool(shown.stdout) is shows_card
    (tmp_path / "out/state.json").write_text("{}")
    assert "is damaged (preparation.json and state.json do not agree)" in inspect(tmp_path / "out").stderr


class Page(html.parser.HTMLParser):
    """The tags of a page, its pictures and its text."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.pictures, self.text = set(), [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag == "img":
            kind, _, content = dict(attributes)["src"].partition(";base64,")
            assert kind in ("data:image/png", "data:image/jpeg"), "nothing is fetched from anywhere"
            self.pictures.append(Image.open(io.BytesIO(base64.b64decode(content))))
            self.pictures[-1].load()

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize(
    "settings",
    [
        SETTINGS,
        PreparationSettings(16, 24, image_mode="L"),
        PreparationSettings(200, 100, resize_mode="crop", image_mode="RGBA"),
        PreparationSettings(100, 100, image_mode="RGB", bit_depth=16),
    ],
    ids=lambda settings: f"{settings.image_mode}{settings.bit_depth}{'' if settings.fixed_size else 'free'}",
)
def test_the_sheet_shows_samples_duplicates_and_rejects(photos, tmp_path, settings):
    prepared(photos, tmp_path / "out", settings, FilterSettings("exact"))
    page = Page(write_contact_sheet(tmp_path / "out", ImageFolder(photos)))
    assert len(page.pictures) == 12 + 12 + 2 + 1, "of each class, the duplicate and what it repeats, the cut one"
    assert all(max(picture.size) <= 128 for picture in page.pictures)
    if settings.image_mode != "RGBA":
        assert {picture.mode for picture in page.pictures[:24]} == {settings.image_mode}
    first, second = (np.asarray(picture.convert("RGB")) for picture in page.pictures[24:26])
    assert np.array_equal(first, second) and first.std() > 10
    for text in ("<b>few: 20", "many: 40", "the same pixels as many/00022.png", "truncated: 1", "not_an_image: 1"):
        assert text in page.text
    assert f"many/{WICKED}" in page.text and not page.tags & {"script", "b"}


def test_a_picture_that_kills_its_process_is_left_out_of_the_sheet(photos, tmp_path, monkeypatch):
    prepared(photos, tmp_path / "out", filters=FilterSettings("exact"))
    monkeypatch.setattr(contact_sheet, "picture_of", deadly_picture)
    page = Page(write_contact_sheet(tmp_path / "out", ImageFolder(photos)))
    assert len(page.pictures) == 12 + 12 + 2 and "truncated: 1" in page.text, "all but the cut one"


def test_a_source_without_files_has_a_sheet_too(photos, tmp_path):
    prepared(photos, tmp_path / "out", filters=FilterSettings("exact"))
    page = Page(write_contact_sheet(tmp_path / "out"))
    assert len(page.pictures) == 24 and "the same pixels as" in page.text


def test_many_classes_and_none(tmp_path):
    for number in range(30):
        write_images(tmp_path / f"classes/{number:02d}", 2, start=2 * number)
    prepared(tmp_path / "classes", tmp_path / "out")
    page = Page(write_contact_sheet(tmp_path / "out"))
    assert len(page.pictures) == 48 and "23: 2 (and 6 more classes)" in page.text
    write_images(tmp_path / "flat", 5)
    prepared(tmp_path / "flat", tmp_path / "flat-out")
    assert len(Page(write_contact_sheet(tmp_path / "flat-out")).pictures) == 5


def test_the_sheet_begins_with_a_summary_and_the_counts_of_classes(photos, tmp_path):
    done = prepared(photos, tmp_path / "out", filters=FilterSettings("exact", validation_fraction=0.2))
    sheet = write_contact_sheet(tmp_path / "out", ImageFolder(photos))
    html_text, text = sheet.read_text(encoding="utf-8"), Page(sheet).text
    summary, _, rest = text.partition("Images to train on\n")
    for known in (f"images{done['num_images']} of 16x16 ", "held out", "validation_fraction 0.2", done["fingerprint"]):
        assert known in summary
    assert str(tmp_path) not in text, "a copy elsewhere has the same page"
    few, many = done["classes"]["<b>few"], done["classes"]["many"]
    assert f"2 classes of {few} to {many} images" in summary and f"--share: {few / many:.3f}" in html_text
    links = re.findall(r'href="#(part-\d)"', html_text)
    assert len(links) == 3 and all(f'id="{link}"' in html_text for link in links)
    assert rest.index("Held out for validation: ") < rest.index("Rejected files")


def test_captions_stand_apart_from_paths(tmp_path):
    write_images(tmp_path / "photos", 3)
    for file in list((tmp_path / "photos").iterdir()):
        file.with_suffix(".txt").write_text(f"the caption of {file.stem}")
    prepared(tmp_path / "photos", tmp_path / "out")
    text = write_contact_sheet(tmp_path / "out").read_text(encoding="utf-8")
    found = re.findall(r'<span class="text">the caption of (\w+)</span><span class="path" title="(\w+)\.', text)
    assert len(found) == 3 and all(stem == name for stem, name in found)


def test_held_out_images_are_shown_with_their_names(photos, tmp_path):
    done = prepared(photos, tmp_path / "out", filters=FilterSettings(validation_fraction=0.2))
    page = Page(write_contact_sheet(tmp_path / "out", ImageFolder(photos)))
    held_out = PreparedImages(tmp_path / "out/validation")
    assert f"Held out for validation: {len(held_out)} images" in page.text and len(held_out) + done["num_images"] == 61
    assert all(name in page.text for name in held_out.sources(np.arange(len(held_out))))


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_file_that_only_has_the_name_of_the_sheet_is_kept(photos, tmp_path, capsys, is_folder):
    prepared(photos, tmp_path / "out")
    sheet = tmp_path / "out/contact_sheet.html"
    sheet.mkdir() if is_folder else sheet.write_bytes(b"my notes \xff")
    assert write_contact_sheet(tmp_path / "out") is None
    assert f"{sheet} is not a contact sheet and is kept" in capsys.readouterr().out
    assert sheet.is_dir() or sheet.read_bytes() == b"my notes \xff"


def test_a_folder_without_room_for_the_sheet_is_reported_in_one_line(photos, tmp_path, capsys, monkeypatch):
    prepared(photos, tmp_path / "out")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(contact_sheet, "write_text", full)
    assert write_contact_sheet(tmp_path / "out") is None
    assert capsys.readouterr().out.endswith("contact_sheet.html cannot be written (No space left on device)\n")


@pytest.mark.slow
def test_the_command_writes_it_once_and_again_when_the_data_changes(photos, tmp_path):
    write_images(tmp_path / "photos", 5)
    output = tmp_path / "out"
    assert f"look at {output / 'contact_sheet.html'}" in run(tmp_path / "photos", output).stdout
    before = (output / "contact_sheet.html").stat().st_mtime_ns
    run(tmp_path / "photos", output)
    assert (output / "contact_sheet.html").stat().st_mtime_ns == before
    write_images(tmp_path / "photos", 1, start=77)
    run(tmp_path / "photos", output)
    assert len(Page(output / "contact_sheet.html").pictures) == 6
    run(tmp_path / "photos", tmp_path / "plain", "--no_contact_sheet")
    assert not (tmp_path / "plain/contact_sheet.html").exists()
    run(tmp_path / "photos", tmp_path / "again")
    assert (tmp_path / "again/contact_sheet.html").read_bytes() == (output / "contact_sheet.html").read_bytes()
