"""Small images in folders, archives and tables, and what a source makes of them."""

import dataclasses
import io
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from trainkit.data.account import Account
from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.preparation import prepare as prepare_module
from trainkit.data.preparation.prepare import prepare
from trainkit.data.settings import PreparationSettings
from trainkit.data.sources import records
from trainkit.data.sources.opening import open_source
from trainkit.options.data import ImageOptions, LoadingOptions, SourceOptions

SETTINGS = PreparationSettings(16, 16, resize_mode="crop")


@dataclasses.dataclass
class DataOptions(SourceOptions, ImageOptions, LoadingOptions):
    """What a training script is told about its images."""


class Prepared(NamedTuple):
    pixels: np.ndarray
    labels: list[int]
    label_names: list[str] | None
    texts: list[str]
    vectors: np.ndarray
    names: list[str]
    rejected: dict[str, int]


def write_photos(folder: Path, count: int = 30, start: int = 0) -> None:
    """Noise of two classes, with a caption and a vector each."""
    for number in range(start, start + count):
        generator = np.random.default_rng(number)
        pixels = generator.integers(0, 256, (20, 24 + number % 3, 3), dtype=np.uint8)
        path = folder / "ab"[number % 2] / f"{number:04d}.{('png', 'jpg', 'webp')[number % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        path.with_suffix(".txt").write_text(f"number {number}\n")
        np.save(path.with_suffix(".npy"), generator.normal(size=4))


def small_units(monkeypatch, images: int, images_per_slice: int = 8) -> None:
    """Let a few images make several work units and slices, as a large source has them."""
    monkeypatch.setattr(records, "UNIT_ITEMS", images)
    monkeypatch.setattr(prepare_module, "SLICE_ITEMS", images_per_slice)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def files_of(folder: Path) -> list[tuple[str, bytes]]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(path.relative_to(folder).as_posix(), path.read_bytes()) for path in paths]


def write_zip(path: Path, files: list[tuple[str, bytes]], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files:
            archive.writestr(name, content)
    return path


def write_tar(path: Path, files: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def png(value: int = 0, side: int = 16) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def open_given(given: str | Path, num_proc: int = 1, **options):
    return open_source(SourceOptions(train_data_dir=str(given), num_proc=num_proc, **options))


def prepared(given: str | Path, output: Path, settings=SETTINGS, num_proc: int = 1, **options) -> Prepared:
    """Prepare and read back; every item must be accounted for."""
    source = open_given(given, num_proc, **options)
    preparation = prepare(source, settings, output, num_proc, show_progress=False, overwrite=True)
    assert preparation["num_images"] + sum(preparation["rejected"].values()) == len(source)
    assert Account.from_json(preparation["account"], preparation["ignored"]).difference == 0
    images = PreparedImages(output)
    rows = np.arange(len(images))
    labels, texts, vectors, names = images.labels(rows), images.texts(rows), images.vectors(rows), images.sources(rows)
    pixels = images.gather(rows)
    return Prepared(pixels, labels.tolist(), images.label_names, texts, vectors, names, preparation["rejected"])


def assert_same(found: Prepared, wanted: Prepared, with_names: bool = True) -> None:
    assert np.array_equal(found.pixels, wanted.pixels)
    assert (found.labels, found.label_names, found.texts) == (wanted.labels, wanted.label_names, wanted.texts)
    assert np.array_equal(found.vectors, wanted.vectors) and wanted.vectors.shape[1] == 4
    assert found.names == wanted.names or not with_names
    assert found.rejected == wanted.rejected
