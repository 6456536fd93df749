"""Images inside archives: the same as in a folder, whatever is wrong with the archive."""

import io
import json
import random
import signal
import tarfile
import time
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from process_helpers import ScriptRun, run_forked
from source_files import assert_same, files_of, open_given, png, prepared, write_photos, write_tar, write_zip

from trainkit.data.preparation import prepare as prepare_module
from trainkit.data.sources import archives, containers, records
from trainkit.errors import UserError


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder)
    return folder


def rejected_lines(output: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (output / "rejected.jsonl").read_text().splitlines()]
    return {line["source"]: line["fault"] for line in lines}


@pytest.mark.parametrize("name", ["photos.zip", "photos.tar", "photos.tar.gz", "photos.tgz"])
def test_an_archive_is_as_good_as_the_folder_that_was_packed(photos, tmp_path, name):
    write = write_zip if name.endswith("zip") else write_tar
    archive = write(tmp_path / name, files_of(photos))
    before = set(tmp_path.iterdir())
    assert_same(prepared(archive, tmp_path / "out"), prepared(photos, tmp_path / "folder"))
    assert set(tmp_path.iterdir()) - before == {tmp_path / "out", tmp_path / "folder"}, "nothing is extracted"
    images = datasets.load_from_disk(tmp_path / "out")
    assert images.features["vector"] == datasets.List(datasets.Value("float32"), length=4)
    assert images[0]["source"] == "a/0000.png" and images[0]["text"] == "number 0"


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_BZIP2])
def test_other_ways_of_packing_a_zip(photos, tmp_path, method):
    archive = write_zip(tmp_path / "photos.zip", files_of(photos), method)
    assert_same(prepared(archive, tmp_path / "out"), prepared(photos, tmp_path / "folder"))


@pytest.mark.slow
def test_workers_read_an_archive_as_one_process_does(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "SLICE_ITEMS", 4)
    for name, write in (("p.zip", write_zip), ("p.tar.gz", write_tar)):
        archive = write(tmp_path / name, files_of(photos))
        for num_proc in (1, 2):
            prepared(archive, tmp_path / f"{name}-{num_proc}", num_proc=num_proc)
        one, two = (files_of(tmp_path / f"{name}-{num_proc}") for num_proc in (1, 2))
        assert one == two


def test_shards_by_brace_glob_and_folder(photos, tmp_path):
    files = files_of(photos)
    (tmp_path / "shards").mkdir()
    for number in range(3):
        write_tar(tmp_path / f"shards/s-{number:03d}.tar", files[number * 30 : number * 30 + 30])
    (tmp_path / "shards/README.md").write_text("about")
    wanted = prepared(tmp_path / "shards", tmp_path / "out")
    assert len(wanted.labels) == 30 and wanted.names[0] == "s-000.tar/a/0000.png" and wanted.label_names == ["a", "b"]
    for number, given in enumerate(["s-{000..002}.tar", "s-*.tar", "s-{000,001,002}.tar"]):
        assert_same(prepared(tmp_path / "shards" / given, tmp_path / f"out{number}"), wanted)
    assert len(open_given(tmp_path / "shards/s-{000..001}.tar")) == 20
    with pytest.raises(UserError, match=r"--train_data_dir .*s-003.tar does not exist"):
        open_given(tmp_path / "shards/s-{000..003}.tar")


def test_webdataset_samples(tmp_path):
    np.save(buffer := io.BytesIO(), np.arange(3.0))
    files = [
        ("0.jpg", png(0)), ("0.cls", b"7"), ("0.txt", b"zero"), ("0.npy", buffer.getvalue()),
        ("1.png", png(1)), ("1.json", b'{"label": 10, "caption": "one", "vector": [1, 2, 3]}'), ("1.mask.png", png(9)),
        ("2.webp", png(2)), ("2.json", b'{"cls": 7, "text": "not this", "vector": [4, 5, 6]}'), ("2.txt", b"two"),
        ("3.png", png(3)), ("3.json", b"[broken"),
    ]  # fmt: skip
    for name in ("samples.tar", "samples.tar.gz", "samples.zip"):
        write = write_zip if name.endswith("zip") else write_tar
        found = prepared(write(tmp_path / name, files), tmp_path / f"{name}-out")
        assert found.names == ["0.jpg", "1.png", "2.webp"] and found.rejected == {"bad_vector": 1}
        assert found.label_names == ["7", "10"] and found.labels == [0, 1, 0]
        assert found.texts == ["zero", "one", "two"]
        assert found.vectors.tolist() == [[0, 1, 2], [1, 2, 3], [4, 5, 6]]


def test_metadata_inside_an_archive(tmp_path):
    files = [
        ("sub/1.png", png(1)),
        ("sub/2.png", png(2)),
        ("sub/picture.data", png(3)),
        ("sub/metadata.csv", "file_name,text,label\n1.png,häuser,x\npicture.data,odd,y\ngone.png,,x\n".encode()),
    ]
    found = prepared(write_zip(tmp_path / "p.zip", files), tmp_path / "out")
    assert found.texts == ["häuser", "odd"] and found.label_names == ["x", "y"] and found.labels == [0, 1]
    assert found.rejected == {"missing": 1}
    outside = [("1.png", png()), ("metadata.csv", b"file_name\n../../secret.png\n")]
    with pytest.raises(UserError, match="is outside of"):
        open_given(write_zip(tmp_path / "q.zip", outside))


def test_paths_that_lead_out_are_only_names(tmp_path):
    files = [("../../evil.png", png(1)), ("/etc/passwd.png", png(2)), ("a\\b.png", png(3)), ("./c.png", png(4))]
    files += [("__MACOSX/._c.png", b"junk"), (".hidden/d.png", png(5))]
    found = prepared(write_zip(tmp_path / "p.zip", files), tmp_path / "out")
    assert found.names == ["evil.png", "etc/passwd.png", "a/b.png", "c.png"]
    assert {path.name for path in tmp_path.iterdir()} == {"p.zip", "out"}


def test_a_tar_of_odd_things(tmp_path):
    with tarfile.open(tmp_path / "odd.tar", "w") as archive:
        for name, kind in (("l.png", tarfile.SYMTYPE), ("h.png", tarfile.LNKTYPE), ("d.png", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        for number, name in enumerate(["1.png", "2.png", "1.png", "empty.png", "text.png"]):
            content = [png(1), png(2), png(3), b"", b"no image"][number]
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    found = prepared(tmp_path / "odd.tar", tmp_path / "out")
    assert found.names == ["2.png", "1.png"] and found.pixels[1].max() == 3, "the later one of a name counts"
    assert rejected_lines(tmp_path / "out") == {
        "l.png": "link", "h.png": "link", "d.png": "not_a_file", "1.png": "duplicate_name", "empty.png": "empty",
        "text.png": "not_an_image",
    }  # fmt: skip


def test_a_zip_of_odd_things(tmp_path, monkeypatch):
    monkeypatch.setattr(containers, "MAX_MEMBER_BYTES", 100_000)
    path = tmp_path / "odd.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("bomb.png", b"\0" * 10_000_000)
        archive.writestr("secret.png", png(1))
        archive.writestr("lzma.png", png(2), zipfile.ZIP_LZMA)
        archive.writestr("crc.png", png(3), zipfile.ZIP_STORED)
        archive.writestr("liar.png", b"\0" * 10_000_000)
        archive.writestr("good.png", png(4))
        entries = {info.filename: info for info in archive.infolist()}
        entries["secret.png"].flag_bits |= 1
        entries["liar.png"].file_size = 90_000  # declares less than it unpacks to
        crc_at = entries["crc.png"].header_offset + 60
    content = bytearray(path.read_bytes())
    content[crc_at] ^= 255
    path.write_bytes(content)
    assert prepared(path, tmp_path / "out").names == ["good.png"]
    assert rejected_lines(tmp_path / "out") == {
        "link.png": "link", "bomb.png": "too_large", "secret.png": "encrypted", "lzma.png": "unsupported",
        "crc.png": "corrupt", "liar.png": "corrupt",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["cut.tar", "cut.tar.gz"])
def test_what_lies_before_the_cut_is_taken(photos, tmp_path, name):
    archive = write_tar(tmp_path / name, [file for file in files_of(photos) if file[0].endswith(("png", "jpg"))])
    content = archive.read_bytes()
    archive.write_bytes(content[: len(content) * 2 // 3])
    found = prepared(archive, tmp_path / "out")
    assert 5 < len(found.names) < 20
    faults = rejected_lines(tmp_path / "out")
    assert name in faults and set(faults.values()) <= {"truncated", "corrupt"} and len(faults) <= 2


def test_one_bad_shard_of_several_is_a_rejected_line(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.png", png(1))])
    (tmp_path / "1.tar").write_bytes(b"no archive" * 100)
    write_zip(tmp_path / "2.zip", [("b.png", png(2))])
    (tmp_path / "3.zip").write_bytes(b"PK")
    assert prepared(tmp_path, tmp_path / "out").names == ["0.tar/a.png", "2.zip/b.png"]
    assert rejected_lines(tmp_path / "out") == {"1.tar": "corrupt", "3.zip": "corrupt"}


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz"])
@pytest.mark.parametrize("kind", ["nothing", "garbage", "no files", "no images"])
def test_an_archive_without_an_image_is_one_line(tmp_path, name, kind):
    write = write_zip if name.endswith("zip") else write_tar
    if kind in ("nothing", "garbage"):
        (tmp_path / name).write_bytes(b"" if kind == "nothing" else b"garbage " * 500)
    else:
        write(tmp_path / name, [] if kind == "no files" else [("a.md", b"text"), ("b/.x.png", png())])
    with pytest.raises(UserError, match=rf"--train_data_dir \S+/{name} holds no image that can be read") as raised:
        open_given(tmp_path / name)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["p.zip", "p.tar", "p.tar.gz"])
def test_damage_anywhere_is_told_and_never_a_crash(photos, tmp_path, name):
    """Bytes changed at random, in the headers above all."""
    write = write_zip if name.endswith("zip") else write_tar
    files = [(path, content if path.endswith("txt") else png(7)) for path, content in files_of(photos)[:24]]
    archive = write(tmp_path / name, files)
    content, generator = archive.read_bytes(), random.Random(name)
    for number in range(40):
        damaged = bytearray(content)
        for _ in range(generator.choice([1, 3, 30])):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        path = tmp_path / f"{number}-{name}"
        path.write_bytes(damaged[: generator.choice([len(damaged), generator.randrange(len(damaged))])])
        try:
            source = open_given(path)
        except UserError as error:
            assert "\n" not in str(error)
            continue
        for member in source.members:
            try:
                source.reader.read(member)
            except archives.RejectedImage as rejection:
                assert rejection.fault in {
                    "truncated", "corrupt", "too_large", "link", "not_a_file", "unsupported", "encrypted", "missing",
                    "duplicate_name", "bad_vector",
                }, str(rejection)  # fmt: skip


def test_fingerprints_follow_the_content(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "UNIT_ITEMS", 4)
    files = files_of(photos)
    first = open_given(write_zip(tmp_path / "p.zip", files))
    (tmp_path / "else").mkdir()
    again = open_given(write_zip(tmp_path / "else/q.zip", files, zipfile.ZIP_STORED))
    assert again.fingerprint == first.fingerprint, "packed elsewhere, another day, in another way"
    added = open_given(write_zip(tmp_path / "p.zip", [*files, ("b/9999.png", png(1))]))
    units, more = ({unit.identity for unit in source.units()} for source in (first, added))
    assert added.fingerprint != first.fingerprint and len(units - more) <= 1 < len(units)
    changed = [(name, b"other" if name == "a/0000.txt" else content) for name, content in files]
    assert open_given(write_zip(tmp_path / "p.zip", changed)).fingerprint != first.fingerprint
    tar = open_given(write_tar(tmp_path / "p.tar", files)).fingerprint
    time.sleep(0.01)
    assert open_given(write_tar(tmp_path / "p.tar", changed[:-1] + files[-1:])).fingerprint != tar


@pytest.mark.slow
def test_a_killed_run_goes_on_over_an_archive(tmp_path):
    """SIGKILL, several times; the finished folder is that of a run that nothing stopped."""
    files = [(f"{number:05d}.png", png(number % 256, 200)) for number in range(1500)]
    archive = write_tar(tmp_path / "p.tar.gz", files)
    words = ["prepare_dataset.py", "--train_data_dir", archive, "--resolution", 16, "--center_crop"]
    words += ["--num_proc", 2, "--output_dir"]
    for _ in range(2):
        [process] = ScriptRun(*words, tmp_path / "killed").ranks
        before, deadline = len(list((tmp_path / "killed").glob("work/*.arrow"))), time.monotonic() + 60
        while len(list((tmp_path / "killed").glob("work/*.arrow"))) < before + 2 and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert list((tmp_path / "killed/work").glob("*.arrow"))
    for name in ("killed", "whole"):
        run_forked(*words, tmp_path / name)
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")
