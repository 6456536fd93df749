"""Files that are not wanted are listed in rejected.jsonl, each with its class; none takes the process down."""

import dataclasses
import io
import json
import os
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainkit.data.account import Account
from trainkit.data.faults import RejectedImage
from trainkit.data.images.decode import decode_image
from trainkit.data.preparation.pool import run_jobs_in_processes
from trainkit.data.preparation.prepare import prepare
from trainkit.data.settings import PreparationSettings
from trainkit.data.sources.records import Record, Unit

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = PreparationSettings(8, 8, resize_mode="crop")


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def fault(image: bytes | Path, **changes) -> str | None:
    """The class of fault; None where the image is taken."""
    try:
        decode_image(image, dataclasses.replace(SETTINGS, **changes))
    except RejectedImage as rejection:
        return rejection.fault
    return None


def header_only_png(width: int, height: int, color_type: int = 0) -> bytes:
    """It claims to be of that size and holds next to nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, color_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")
    )


def test_too_small_and_bad_aspect():
    assert fault(encoded(Image.new("L", (9, 20))), min_size=9) is None
    assert fault(encoded(Image.new("L", (8, 20))), min_size=9) == "too_small"
    for size in ((30, 10), (10, 30)):
        assert fault(encoded(Image.new("L", size)), max_aspect_ratio=3.0) is None
        assert fault(encoded(Image.new("L", size)), max_aspect_ratio=2.9) == "bad_aspect"
        assert fault(encoded(Image.new("L", size))) is None


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animated_images_are_taken_or_rejected_as_told(format):
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    file = encoded(frames[0], format, save_all=True, append_images=frames[1:])
    assert np.abs(decode_image(file, SETTINGS) - np.array([255, 0, 0])).max() <= 4
    assert fault(file, animated="reject") == "animated"
    assert fault(encoded(frames[0], format), animated="reject") is None


def test_a_photograph_with_a_preview_is_no_animation():
    file = encoded(Image.new("RGB", (16, 16)), "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    assert Image.open(io.BytesIO(file)).format == "MPO"
    assert fault(file, animated="reject") is None


def test_a_wrong_extension_is_no_fault(tmp_path):
    for name, format in {"a.jpg": "PNG", "b.png": "WEBP", "c.gif": "JPEG"}.items():
        (tmp_path / name).write_bytes(encoded(Image.new("RGB", (8, 8), "red"), format))
        assert (decode_image(tmp_path / name, SETTINGS)[..., 0] > 250).all()


def test_only_what_says_so_is_taken_for_tga(tmp_path):
    picture = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    file = encoded(picture, "TGA")
    old = file[: -len(b"TRUEVISION-XFILE.\0")]  # version 1 has no mark, and anything may look like it
    for content, name, expected in ((file, "a.png", None), (old, "b.TGA", None), (old, "c.png", "not_an_image")):
        (tmp_path / name).write_bytes(content)
        assert fault(tmp_path / name) == expected
    assert fault(file) is None and fault(old) == "not_an_image"
    assert (decode_image(file, SETTINGS)[..., 0] == np.asarray(picture)).all()


def test_the_limit_comes_before_the_memory():
    """A bomb of 40 GB as 8-bit RGBA: refused from its header."""
    assert fault(header_only_png(100_000, 100_000, 6)) == "too_large"
    with pytest.raises(RejectedImage, match="^10,000,000,000 pixels; --max_image_pixels is 89,478,485$"):
        decode_image(header_only_png(100_000, 100_000, 6), PreparationSettings(8, 8))
    assert fault(header_only_png(9400, 9520)) == "too_large" and fault(header_only_png(9400, 9500)) == "truncated"


@pytest.mark.slow(9)
@pytest.mark.skipif(sys.platform != "linux", reason="the bound is the kernel's")
def test_a_worker_cannot_take_the_memory_of_the_machine(tmp_path):
    """The limit on pixels is off here, so that only the bound on memory is left to stop 12 GB."""
    (tmp_path / "bomb.png").write_bytes(header_only_png(55_000, 55_000, 6))
    script = (
        "from trainkit.data.images.limits import limit_memory, RejectedImage\n"
        "from trainkit.data.images.decode import PreparationSettings, decode_image\n"
        "limit_memory(89_478_485)\n"
        f"try: decode_image({str(tmp_path / 'bomb.png')!r}, PreparationSettings(8, 8, max_image_pixels=0))\n"
        "except RejectedImage as rejection: print(rejection.fault)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "too_large", done.stderr


class DeadlyReader:
    """Item 3 kills the process that reads it; item 5 is a bomb."""

    def name(self, item: int) -> str:
        return f"item {item}"

    def read(self, item: int) -> Record:
        if item == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        content = header_only_png(99_999, 99_999) if item == 5 else encoded(Image.new("L", (8, 8), item))
        return Record(content, -1, None)


class DeadlySource:
    name, fingerprint, label_names, has_text, vector_length = "crashing", "0", None, False, None
    reader, account, pairs = DeadlyReader(), Account(), None

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def units(self) -> list[Unit]:
        return [Unit("all", range(self.count))]


@pytest.mark.slow
@pytest.mark.parametrize(("num_proc", "count"), [(2, 200), (1, 200), (2, 20)])
def test_the_file_that_kills_its_process_is_named_and_the_rest_is_taken(tmp_path, num_proc, count):
    preparation = prepare(
        DeadlySource(count), SETTINGS, tmp_path / "out", num_proc, show_progress=False, engine=run_jobs_in_processes
    )
    assert preparation["num_images"] == count - 2 and preparation["rejected"] == {"crashed": 1, "too_large": 1}
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [line["source"] for line in lines] == ["item 3", "item 5"]
    assert lines[0]["fault"] == "crashed" and all(line["message"] for line in lines)
