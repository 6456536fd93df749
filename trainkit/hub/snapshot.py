"""The files of one save, kept as they are while a push reads them and the run goes on."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

STAGING = Path(".trainkit") / "push"  # in the folder of a run
LAST_CHECKPOINT = "last-checkpoint"  # in the repository
APPENDED = ".jsonl"  # files that grow; all others are replaced by a rename and never written in place


def stage(folder: Path, names: Iterable[str], target: Path, checkpoint: Path | None = None) -> int:
    """Put the files of `folder` under `names` (files, folders or patterns) into `target`, and `checkpoint`, if any.

    They become hard links, which cost no space, or copies where these are impossible. Returns the size in bytes.
    Raises OSError, after which nothing is left of `target`.
    """
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    try:
        num_bytes = sum(_stage_tree(path, target / path.relative_to(folder)) for path in _named(folder, names))
        if checkpoint is not None:
            num_bytes += _stage_tree(checkpoint, target / LAST_CHECKPOINT)
    except OSError:
        shutil.rmtree(target, ignore_errors=True)
        raise
    return num_bytes


def _named(folder: Path, names: Iterable[str]) -> list[Path]:
    return [path for name in names for path in sorted(folder.glob(name))]


def _stage_tree(source: Path, target: Path) -> int:
    if source.is_dir():
        return sum(_stage_tree(path, target / path.name) for path in sorted(source.iterdir()))
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix == APPENDED:
        shutil.copyfile(source, target)
        return target.stat().st_size
    try:
        os.link(source.resolve(), target)
    except OSError:  # another disk behind a link, or a file system without hard links
        shutil.copyfile(source, target)
    return target.stat().st_size
