"""Checkpoint folders: every rank writes into a staging folder, and a rename completes the checkpoint.

checkpoint-500/
  unet/  unet_ema/                weights, safetensors, each loadable by diffusers
  unet_ema_<sigma_rel>/           power-function averages, if any
  optimizer.safetensors           the optimizer's state per parameter
  random_states_<rank>.safetensors
  training_state.json             step, learning-rate schedule, options
  manifest.json                   size and checksum of every other file; written last
"""

import hashlib
import json
import re
import shutil
from pathlib import Path

from trainkit.atomic import flush_to_disk
from trainkit.errors import UserError

PREFIX, STAGING_PREFIX = "checkpoint-", "tmp-checkpoint-"
NAME = re.compile(rf"{PREFIX}[0-9]+")
MANIFEST = "manifest.json"


def checkpoint_folders(output_dir: Path) -> list[Path]:
    """The completed checkpoint folders of `output_dir`, lowest step first."""
    found = [path for path in output_dir.glob(f"{PREFIX}*") if path.is_dir() and NAME.fullmatch(path.name)]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(folder: Path) -> int:
    return int(folder.name.removeprefix(PREFIX))


def staging_folder(output_dir: Path, step: int) -> Path:
    return output_dir / f"{STAGING_PREFIX}{step}"


def commit(staging: Path, final: Path) -> None:
    """Turn a fully written `staging` folder into the checkpoint `final`: write the manifest, flush to disk, rename."""
    files = sorted(path for path in staging.rglob("*") if path.is_file())
    found = {
        path.relative_to(staging).as_posix(): {"bytes": path.stat().st_size, "blake2b": _checksum(path)}
        for path in files
    }
    (staging / MANIFEST).write_text(json.dumps({"files": found}, indent=1), encoding="utf-8")
    for path in [*files, staging / MANIFEST, *(path for path in staging.rglob("*") if path.is_dir()), staging]:
        flush_to_disk(path)  # before the rename that follows
    if final.exists():  # left by a run that was resumed from an older step
        replaced = final.with_name(f"{STAGING_PREFIX}replaced-{checkpoint_step(final)}")
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
        staging.rename(final)
        shutil.rmtree(replaced)
    else:
        staging.rename(final)
    flush_to_disk(final.parent)


def damage(folder: Path, checksums: bool = False) -> str | None:
    """Why the checkpoint in `folder` is incomplete or damaged, in a few words; None if every file is intact.

    File sizes are always compared. With `checksums` every byte is read and compared too.
    """
    try:
        files = {name: (entry["bytes"], entry["blake2b"]) for name, entry in _manifest(folder).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is missing or unreadable"
    for name, (size, checksum) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        try:
            if checksums and _checksum(path) != checksum:
                return f"{name} has changed since it was written"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def _manifest(folder: Path) -> dict:
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]


def _checksum(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def rotate(output_dir: Path, total_limit: int | None, newest: Path) -> None:
    """Delete the oldest checkpoints so that `total_limit` complete ones remain. Call it once `newest` is complete.

    A damaged checkpoint does not count. It is deleted when it is older than all that remain.
    """
    if total_limit is None:
        return
    kept = 1
    for path in reversed(checkpoint_folders(output_dir)):
        if path == newest:
            continue
        if kept >= max(1, total_limit):
            path.unlink() if path.is_symlink() else shutil.rmtree(path)  # a link's target is not the run's
        elif damage(path) is None:
            kept += 1


def remove_leftovers(output_dir: Path) -> None:
    """Delete what a killed run left incomplete, and restore a checkpoint that was being replaced."""
    for path in output_dir.glob(f"{STAGING_PREFIX}*"):
        original = output_dir / f"{PREFIX}{path.name.removeprefix(f'{STAGING_PREFIX}replaced-')}"
        if path.name.startswith(f"{STAGING_PREFIX}replaced-") and not original.exists():
            path.rename(original)
        else:
            shutil.rmtree(path, ignore_errors=True)


def resume_candidates(output_dir: Path, resume_from: str) -> list[Path]:
    """The checkpoints to try for `--resume_from_checkpoint`, best first; empty if `latest` finds none.

    Raises `UserError` if a named checkpoint does not exist or is damaged.
    """
    if resume_from == "latest":
        return [*reversed(checkpoint_folders(output_dir))]
    folder = named_checkpoint(output_dir, resume_from)
    problem = damage(folder)
    if problem:
        raise UserError(
            f"--resume_from_checkpoint {folder} is damaged: {problem}; use `latest` for the newest complete one"
        )
    return [folder]


def named_checkpoint(output_dir: Path, resume_from: str) -> Path:
    """The folder that `--resume_from_checkpoint` names: a path, or a name in `output_dir`. Raises `UserError`."""
    named = Path(resume_from)
    is_bare_name = named.parent == Path() and named.name  # as in the diffusers example: relative to --output_dir
    folder = output_dir / named.name if is_bare_name or not named.is_dir() else named
    if not folder.is_dir():
        found = ", ".join(path.name for path in checkpoint_folders(output_dir)) or "none"
        raise UserError(
            f"--resume_from_checkpoint {resume_from} does not exist (checkpoints in {output_dir}: {found}); use one "
            "of these, or `latest`"
        )
    return folder
