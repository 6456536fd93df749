"""Checkpoints that a run with `--hub_strategy checkpoint` has pushed: fetched, verified, and then like any other."""

import shutil
from pathlib import Path

from trainkit.errors import UserError
from trainkit.hub.download import PushedCheckpoint, find_checkpoint
from trainkit.hub.options import clean_token, repository_name
from trainkit.hub.snapshot import LAST_CHECKPOINT
from trainkit.options.script import TrainingOptions
from trainkit.training.checkpoints import folder as checkpoints
from trainkit.training.log import METRICS_FILE

HUB, URL = "hub", "hf://"  # values of --resume_from_checkpoint


def is_remote(resume_from: str | None) -> bool:
    """Whether `--resume_from_checkpoint` names a checkpoint of the Hub."""
    return resume_from is not None and (resume_from == HUB or resume_from.startswith(URL))


def fetch_checkpoint(options: TrainingOptions) -> str:
    """Download the checkpoint that `--resume_from_checkpoint` names into `--output_dir`.

    Returns what to resume from there: `latest` for `hub`, which also accepts a newer checkpoint of the folder, or none
    at all; the checkpoint's name for hf://USER/MODEL. Call it on the main process, which holds the folder's lock.

    Raises:
        UserError: the Hub cannot be reached, or the checkpoint is missing, damaged or in conflict with one there.
    """
    resume_from, output_dir = str(options.resume_from_checkpoint), Path(options.output_dir)
    flag, is_own = f"--resume_from_checkpoint {resume_from}", resume_from == HUB
    name = options.hub_model_id if is_own else resume_from.removeprefix(URL).rstrip("/").removesuffix(LAST_CHECKPOINT)
    repo_id = repository_name(name and name.rstrip("/"), output_dir, "--hub_model_id" if is_own else flag)
    found = find_checkpoint(flag, repo_id, clean_token(options.hub_token), is_own)
    if found is None:
        print(f"no checkpoint in {repo_id} on the Hub", flush=True)
        return "latest"
    target = output_dir / f"{checkpoints.PREFIX}{found.step}"
    held = max(map(checkpoints.checkpoint_step, _intact(output_dir)), default=-1)
    if is_own and held >= found.step:
        print(f"{output_dir} holds {checkpoints.PREFIX}{held}: nothing to fetch from {found.repo_id}", flush=True)
    elif target in _intact(output_dir):
        if (target / checkpoints.MANIFEST).read_bytes() != found.manifest:
            raise UserError(
                f"{flag}: {output_dir} holds another {target.name}: use `latest` to continue from it, or another "
                "--output_dir"
            )
    else:
        _fetch(found, output_dir, target, flag)
    return "latest" if is_own else target.name


def _intact(output_dir: Path) -> list[Path]:
    return [path for path in checkpoints.checkpoint_folders(output_dir) if checkpoints.damage(path) is None]


def _fetch(found: PushedCheckpoint, output_dir: Path, target: Path, flag: str) -> None:
    """Download into a staging folder, verify every byte, and rename. Also the log up to there, if there is none."""
    print(f"fetching {target.name} from {found.repo_id} on the Hub", flush=True)
    staging = checkpoints.staging_folder(output_dir, found.step)
    shutil.rmtree(staging, ignore_errors=True)
    try:
        found.download(staging, METRICS_FILE)
        if problem := checkpoints.damage(staging / LAST_CHECKPOINT, checksums=True):
            raise UserError(f"{flag}: the checkpoint in {found.repo_id} is damaged: {problem}; start a new run")
        if target.exists():  # damaged
            shutil.rmtree(target)
        (staging / LAST_CHECKPOINT).rename(target)
        if (staging / METRICS_FILE).is_file() and not (output_dir / METRICS_FILE).exists():
            (staging / METRICS_FILE).rename(output_dir / METRICS_FILE)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
