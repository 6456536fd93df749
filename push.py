#!/usr/bin/env python
"""Push a trained model, a prepared dataset or a set of samples to the Hub, in one commit.

    python push.py ddpm-model-64
    python push.py ddpm-model-64 --hub_model_id me/flowers --hub_private_repo
    python push.py photos-64 --hub_license cc-by-4.0
    python push.py samples --hub_dataset_id me/flower-samples

The folder is the --output_dir of a training script, of prepare_dataset.py or of sample.py; what it holds is found out
by its files. Run it again after an interruption: what the Hub has is not sent again. See docs/hub.md.
"""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainkit.errors import UserError, run_script
from trainkit.options.fields import option
from trainkit.options.hub import HubDatasetOptions
from trainkit.options.parsing import parse_options
from trainkit.terminal import tell


@dataclass
class FolderOptions:
    """folder: what is pushed"""

    output_dir: str | None = option(None, "folder to push; may be given without the name of the flag")
    hub_model_id: str | None = option(None, "repository to push a model to; default: the name of the folder")
    push_checkpoint: bool = option(
        False, "with a model: also push the newest complete checkpoint, for --resume_from_checkpoint hub"
    )


@dataclass
class Options(FolderOptions, HubDatasetOptions):
    """The options of push.py."""


def push_folder(options: Options) -> None:
    # Imported late, so that --help answers at once.
    from trainkit.hub.contents import MODEL, contents_of
    from trainkit.hub.options import clean_token, repository_name
    from trainkit.hub.share import Shared, share
    from trainkit.hub.upload import Push

    if options.output_dir is None:
        raise UserError("give the folder to push: python push.py FOLDER")
    folder = Path(options.output_dir)
    checkpoint = newest_checkpoint(folder) if options.push_checkpoint else None
    contents = MODEL if checkpoint is not None else contents_of(folder)
    refuse_other_flags(options, contents is MODEL, contents.name)
    flag, given = ("hub_model_id" if contents is MODEL else "hub_dataset_id"), options.hub_dataset_id
    name = repository_name(options.hub_model_id if contents is MODEL else given, folder, f"--{flag}")
    target = Push(name, is_private=options.hub_private_repo, token=clean_token(options.hub_token))
    with not_in_use(folder):
        outcome = share(Shared(folder, contents, options.hub_license, checkpoint), target)
    if outcome.failure is not None:
        raise UserError(f"{folder} was not pushed to {outcome.repo_id}: {outcome.failure}")
    tell(f"pushed the {contents.name} to {outcome.url} ({outcome.commit_url})")


def refuse_other_flags(options: Options, is_model: bool, name: str) -> None:
    """Raise `UserError` for a flag that has no meaning for what the folder holds."""
    unused = ("hub_dataset_id", "hub_license") if is_model else ("hub_model_id", "push_checkpoint")
    for flag in unused:
        if getattr(options, flag):
            raise UserError(f"--{flag}: {options.output_dir} holds a {name}, which has no use for it; leave it out")


def newest_checkpoint(folder: Path) -> Path:
    """The newest complete checkpoint of a run. Raises `UserError` if there is none."""
    from trainkit.training.checkpoints.folder import checkpoint_folders, damage

    for path in reversed(checkpoint_folders(folder)):
        if damage(path, checksums=True) is None:
            return path
    raise UserError(f"--push_checkpoint: {folder} holds no complete checkpoint; leave it out to push the model alone")


@contextlib.contextmanager
def not_in_use(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder. Raises `UserError` while a run writes there."""
    from filelock import FileLock, Timeout

    from trainkit.locking import holder_of

    marker = folder / ".trainkit"
    if not marker.is_dir():
        yield
        return
    lock = FileLock(marker / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{folder} is in use by {holder_of(marker / 'lock.json')}: push it when that has ended"
        ) from None
    try:
        yield
    finally:
        lock.release()


def main() -> None:
    words = sys.argv[1:]
    if words and not words[0].startswith("-"):
        words = ["--output_dir", *words]
    push_folder(parse_options(Options, __doc__, words))


if __name__ == "__main__":
    run_script(main)
