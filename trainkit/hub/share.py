"""Push a folder while somebody waits for it: push.py, and prepare_dataset.py with --push_to_hub."""

import contextlib
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from trainkit.atomic import write_text
from trainkit.errors import UserError, one_line
from trainkit.hub.contents import DATASET, MODEL, REPLACED, Contents
from trainkit.hub.snapshot import LAST_CHECKPOINT, STAGING, stage
from trainkit.hub.upload import CARD, REQUEST_TIMEOUT_S, Outcome, Push, push
from trainkit.terminal import say

MAX_FILES = 10_000  # of a folder on the Hub


@dataclass(frozen=True)
class Shared:
    """A folder to push: what it holds, the licence for a dataset's card, and a checkpoint that goes with a model."""

    folder: Path
    contents: Contents
    license_name: str | None = None
    checkpoint: Path | None = None


def share(shared: Shared, target: Push) -> Outcome:
    """Push `shared` to the repository of `target`, with progress bars. Raises `UserError` for an unusable folder."""
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # retries; the failure that remains is told in one line
    target = replace(target, repo_type=shared.contents.repo_type, timeout_s=2 * REQUEST_TIMEOUT_S)
    staging = shared.folder.resolve() / STAGING
    try:
        num_bytes = _stage(shared, staging)
        created = push(target)
        if created.failure is not None:
            return created
        if shared.contents is not MODEL:
            _write_dataset_card(shared, staging, created.repo_id)
        files = sum(path.is_file() for path in staging.rglob("*"))
        say(f"pushing {files:,} files, {num_bytes / 1e6:,.1f} MB, to {created.url}")
        replaces = REPLACED[target.repo_type]
        if shared.checkpoint is None:
            replaces = [pattern for pattern in replaces if not pattern.startswith(LAST_CHECKPOINT)]
        message = f"Push {shared.contents.name}"
        return push(replace(target, repo_id=created.repo_id, folder=str(staging), message=message, replaces=replaces))
    except OSError as error:
        raise UserError(f"{staging} cannot be written ({one_line(error)}): free some space") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        with contextlib.suppress(OSError):  # a run's folder keeps other files there
            staging.parent.rmdir()


def _stage(shared: Shared, staging: Path) -> int:
    num_bytes = stage(shared.folder, shared.contents.files, staging, shared.checkpoint)
    num_files = sum(path.is_file() for path in staging.iterdir())
    if num_files > MAX_FILES:
        raise UserError(
            f"{shared.folder} has {num_files:,} files and the Hub takes {MAX_FILES:,} in a folder: sample with "
            "--output_format arrow or npz, which need a few"
        )
    return num_bytes


def _write_dataset_card(shared: Shared, staging: Path, repo_id: str) -> None:
    """Write README.md, unless the folder has its own, and the picture that it shows."""
    from trainkit.hub.dataset_card import PICTURE_NAME, prepared_dataset_card, samples_card, write_picture

    build_card = samples_card
    if shared.contents is DATASET:
        build_card = prepared_dataset_card
        write_picture(shared.folder, staging / PICTURE_NAME)
    if not (staging / CARD).exists():
        write_text(staging / CARD, build_card(shared.folder, repo_id, shared.license_name))
