"""The thousand hostile files that Pillow tests itself with: each is used or rejected, and nothing is printed."""

import json
import os
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image, ImageOps
from process_helpers import run_forked

from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.sources.entries import IMAGE_EXTENSIONS


def fetch_pillow_source(folder: Path) -> Path:
    """Pillow's source distribution, of the installed version, through pip; downloaded once."""
    file = folder / f"pillow-{PIL.__version__}.tar.gz"
    if not file.is_file():
        tools = folder / "build_tools"  # pip asks the source for its dependencies, which it needs these to answer
        download = ["download", "--no-binary", "pillow", "--no-deps", "--no-build-isolation"]
        download += [f"pillow=={PIL.__version__}", "--dest", folder]
        for arguments in (["install", "--target", tools, "pybind11", "setuptools"], download):
            command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *map(str, arguments)]
            done = subprocess.run(
                command, env=os.environ | {"PYTHONPATH": str(tools)}, capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, f"this test needs a package registry: {done.stderr[-2000:]}"
    assert file.is_file(), f"pip left {[path.name for path in folder.iterdir()]} instead of {file.name}"
    return file


@pytest.fixture(scope="module")
def corpus(request, tmp_path_factory) -> Path:
    """All files of Tests/images in one folder, whatever they are, each under a name that is listed as an image."""
    folder = tmp_path_factory.mktemp("corpus")
    with tarfile.open(fetch_pillow_source(request.config.cache.mkdir("pillow-source"))) as archive:
        for member in archive:
            _, _, inner = member.name.partition("/Tests/images/")
            if inner and member.isfile():
                name = inner.replace("/", "__")
                name = name if Path(name).suffix in IMAGE_EXTENSIONS else f"{name}.png"
                (folder / name).write_bytes(archive.extractfile(member).read())
    assert len(list(folder.iterdir())) > 1000
    return folder


def prepared(corpus: Path, output: Path, *arguments: str) -> PreparedImages:
    done = run_forked("prepare_dataset.py", "--train_data_dir", corpus, "--output_dir", output, *arguments)
    lines = [line for line in done.stdout.splitlines() if not line.startswith(("  ", "preparing: "))]
    assert len(lines) == 3 - ("--no_contact_sheet" in arguments) and done.stderr == ""
    return PreparedImages(output)


@pytest.mark.slow(4)
@pytest.mark.parametrize(
    "arguments, image_mode",
    [
        (["--resize_mode", "crop"], "RGB"),
        (["--resize_mode", "random_crop", "--storage", "webp"], "RGBA"),
        (["--resize_mode", "pad", "--storage", "jpeg"], "L"),
        (["--resize_mode", "stretch", "--storage", "png", "--preserve_input_precision"], "RGB"),
    ],
)
def test_every_file_is_taken_or_told_of(corpus, tmp_path, arguments, image_mode):
    arguments = ["--resolution", "32", "--image_mode", image_mode, "--no_contact_sheet", *arguments]
    one = prepared(corpus, tmp_path / "one", *arguments, "--num_proc", "1")
    prepared(corpus, tmp_path / "two", *arguments, "--num_proc", "2")
    rejected = [json.loads(line) for line in (tmp_path / "one" / "rejected.jsonl").read_text().splitlines()]
    names = one.sources(np.arange(len(one))) + [line["source"] for line in rejected]
    assert sorted(names) == sorted(path.name for path in corpus.iterdir())
    assert len(one) > 700
    assert {line["fault"] for line in rejected} == {
        "corrupt", "heic", "icon", "not_an_image", "pdf", "photoshop", "too_large", "truncated",
        "unsupported",
    }  # fmt: skip
    assert all(line["message"] for line in rejected)
    assert one.gather(np.arange(len(one))).shape == (len(one), 32, 32, len(image_mode))
    for name in ["rejected.jsonl", *(shard["filename"] for shard in one.preparation["shards"])]:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.slow
def test_what_is_taken_looks_as_pillow_shows_it(corpus, tmp_path):
    """Pillow's own conversion, where it has one: it clips 16 bits and ignores profiles and the sign of 8 bits."""
    images = prepared(corpus, tmp_path / "out", "--resolution", "32", "--resize_mode", "stretch")
    indices = np.arange(len(images))
    compared, different = 0, []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, pixels in zip(images.sources(indices), images.gather(indices), strict=True):
            with Image.open(corpus / name) as image:
                is_signed = image.format == "TIFF" and image.tag_v2.get(339, (1,))[0] == 2
                if image.mode.startswith(("I", "F", "LAB")) or "icc_profile" in image.info or is_signed:
                    continue
                whole = ImageOps.exif_transpose(image).convert("RGBA").resize((32, 32), Image.Resampling.BILINEAR)
            shown = np.asarray(Image.alpha_composite(Image.new("RGBA", (32, 32), "white"), whole).convert("RGB"))
            compared += 1
            if np.abs(shown - pixels.astype(float)).mean() > 6:
                different.append(name)
    assert compared > 600 and not different
