"""Listing folders of any size: in memory that does not grow, in the one right order, cut into the same units."""

import itertools
import os
import random
import re
import sys
import tracemalloc

import pyarrow as pa
import pytest
from process_helpers import run_code
from source_files import SETTINGS, open_given, png, write_zip

from trainkit.data.preparation.card import card
from trainkit.data.preparation.prepare import prepare
from trainkit.data.sources import rowfile
from trainkit.data.sources.folder import ImageFolder
from trainkit.data.sources.rowfile import RowFile, sorted_rows
from trainkit.errors import UserError

SCHEMA = pa.schema([("key", pa.binary()), ("number", pa.int64())])


@pytest.fixture(params=[2, 5, 10**6])
def run_rows(request, monkeypatch):
    """Sorted in many small runs on disk, and all in memory."""
    monkeypatch.setattr(rowfile, "RUN_ROWS", request.param)
    monkeypatch.setattr(rowfile, "BATCH_ROWS", 3)
    monkeypatch.setattr(rowfile, "MERGED_ROWS", 3)
    return request.param


def test_sorting_outside_of_memory_is_stable(run_rows):
    generator = random.Random(0)
    rows = [(b"%d" % generator.randrange(20), number) for number in range(100)]
    assert list(sorted_rows(iter(rows), SCHEMA)) == sorted(rows, key=lambda row: row[0])
    assert list(sorted_rows(iter([]), SCHEMA)) == []


def test_any_run_of_rows_is_read_back(run_rows):
    file, rows = RowFile(SCHEMA), [(b"%d" % number, None if number % 3 else number) for number in range(17)]
    for part in (rows[:4], rows[4:5], [], rows[5:]):
        file.extend(part)
    for start, stop in itertools.combinations_with_replacement(range(18), 2):
        assert list(file.rows(start, stop)) == rows[start:stop]


FULL = """
import resource
import pyarrow as pa
from trainkit.data.sources.rowfile import RowFile
from trainkit.errors import run_script
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
file = RowFile(pa.schema([("name", pa.binary())]))
run_script(lambda: file.extend([(bytes(1000),) for _ in range(10)]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of files")
def test_a_disk_that_takes_only_a_part_of_the_list_is_one_line():
    done = run_code(FULL)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: the list of files cannot be written to " in done.stderr and "set TMPDIR" in done.stderr


def test_names_sort_as_whole_paths_and_captions_find_their_image(tmp_path, run_rows):
    names = [
        "a.d/1.png", "a/1.png", "a-b/1.png", "a.png", "a.x.png", "a/2.x.png", "a0.png", "é.png", "a.\udcff.png",
        "A.PNG", "\ue000.png", "\U0001f600.png",
    ]  # fmt: skip
    captions = {"a.txt": "a.png", "a.x.TXT": "a.x.png", "a/2.x.txt": "a/2.x.png", "A.txt": "A.PNG", "a.d/9.txt": None}
    for name in [*names, *captions]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name, errors="replace")
    entries = list(ImageFolder(tmp_path).entries)
    assert [entry.path for entry in entries] == sorted(names)
    captioned = {entry.path: entry.caption_file[0] for entry in entries if entry.caption_file}
    assert captioned == {image: len(caption) for caption, image in captions.items() if image}


def test_metadata_in_any_order_joins_and_captions_of_several_rows_are_kept(tmp_path, run_rows):
    generator = random.Random(0)
    numbers = list(range(40))
    (tmp_path / "sub").mkdir()
    for number in numbers:
        (tmp_path / f"sub/{number}.png").touch()
    generator.shuffle(numbers)
    lines = [f"sub/{number}.png,first {number},x" for number in numbers] + ["sub/7.png,second,x", "zz.png,gone,y"]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,text,label", *lines]))
    (tmp_path / "sub/metadata.csv").write_text("file_name,text\n8.png,deeper\n")
    source = ImageFolder(tmp_path)
    entries = {entry.path: (entry.text, entry.label, entry.size) for entry in source.entries}
    assert len(entries) == 41 and source.label_names == ["x", "y"]
    assert entries["sub/8.png"] == ("first 8\ndeeper", "x", 0)
    assert sorted(entries["sub/7.png"][0].split("\n")) == ["first 7", "second"]
    assert entries["sub/9.png"] == ("first 9", "x", 0) and entries["zz.png"] == ("gone", "y", -1)
    with (tmp_path / "metadata.csv").open("a") as file:
        file.write("\nsub/9.png,other,y\n")
    with pytest.raises(UserError, match="give sub/9.png different labels \\(x and y\\): keep one row per image"):
        ImageFolder(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without named pipes")
def test_pipes_and_links_in_a_circle_are_lines_and_never_waited_for(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "fine.png").write_bytes(png())
    for name in ("pipe.png", "fine.txt", "fine.npy"):
        os.mkfifo(folder / name)
    for name, target in (("self.png", "self.png"), ("up", "."), ("zero.png", "/dev/zero"), ("gone.png", "nowhere")):
        (folder / name).symlink_to(target)
    source = ImageFolder(folder)
    found = prepare(source, SETTINGS, tmp_path / "out", 1, show_progress=False)
    assert found["rejected"] == {"missing": 1, "not_a_file": 2, "unreadable": 1} and found["num_images"] == 1
    assert (source.has_text, source.vector_length) == (False, None)
    os.mkfifo(folder / "metadata.csv")
    with pytest.raises(UserError, match="metadata.csv: a pipe"):
        ImageFolder(folder)


@pytest.mark.parametrize("packed", [False, True])
def test_files_that_are_no_images_are_counted(tmp_path, capsys, packed):
    files = [("a.png", png()), ("a.txt", b"seen"), ("b.txt", b"alone"), ("b.PDF", b""), ("c.pdf", b"")]
    files += [("README", b""), ("told.dat", png(1)), ("told.txt", b"seen too"), (".hidden", b"")]
    files += [("metadata.csv", b"file_name,label\ntold.dat,x\na.png,\n")]
    for name, content in files:
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(content)
    given = write_zip(tmp_path / "photos.zip", files) if packed else tmp_path / "photos"
    preparation = prepare(open_given(given), SETTINGS, tmp_path / "out", 1)
    assert "ignored 4 files that are not images: .pdf 2, .txt 1, README 1" in capsys.readouterr().out
    assert preparation["ignored"] == {".pdf": 2, ".txt": 1, "README": 1} and preparation["num_images"] == 2
    assert re.search("ignored +4 files .*: .pdf 2", card(tmp_path / "out", preparation))


def test_units_hold_all_entries_once_and_give_slices(tmp_path, run_rows, monkeypatch):
    monkeypatch.setattr("trainkit.data.sources.records.UNIT_ITEMS", 8)
    for number in range(100):
        (tmp_path / f"{number:03d}.png").touch()
    source = ImageFolder(tmp_path)
    units = source.units()
    assert [entry for unit in units for entry in unit.items] == list(source.entries) and len(units) > 3
    items = units[1].items
    assert items[2:5] == list(items)[2:5] and items[-1] == list(items)[-1] and isinstance(items[2:5], list)
    with pytest.raises(IndexError):
        items[len(items)]


@pytest.mark.slow
@pytest.mark.parametrize("per_folder", [8_000, 100])
def test_memory_does_not_grow_with_the_number_of_files(tmp_path, monkeypatch, per_folder):
    monkeypatch.setattr(rowfile, "RUN_ROWS", 1000)
    monkeypatch.setattr(rowfile, "MERGED_ROWS", 50)
    for number in range(8_000):
        folder = tmp_path / str(number // per_folder)
        if number % per_folder == 0:
            folder.mkdir()
        os.close(os.open(folder / f"{number}.jpg", os.O_CREAT))
    tracemalloc.start()
    try:
        units = ImageFolder(tmp_path).units()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(len(unit.items) for unit in units) == 8_000
    assert peak < 1.2e6, "bytes of Python objects; the list of entries alone would take 2.5 MB"
