"""Share a saved pipeline on the Hub, never the training state."""

import sys
from pathlib import Path
from typing import Protocol

from trainkit.errors import UserError, one_line


class PushOptions(Protocol):
    """The options that a push reads: those of `HubOptions`, and the folder that gives the default name."""

    output_dir: str
    hub_model_id: str | None
    hub_token: str | None
    hub_private_repo: bool


def create_repository(options: PushOptions) -> str:
    """Create the repository for `--push_to_hub` and return its id. Raises `UserError`."""
    from huggingface_hub import create_repo

    name = options.hub_model_id or Path(options.output_dir).resolve().name
    try:
        return create_repo(name, exist_ok=True, token=options.hub_token, private=options.hub_private_repo).repo_id
    except Exception as error:  # from the Hub, from its HTTP library, or because of an invalid name
        raise UserError(
            f"--push_to_hub: repository {name} cannot be created ({one_line(error)}); check --hub_model_id and "
            "--hub_token, or log in with `hf auth login`"
        ) from None


def push_pipeline(folder: Path, repo_id: str, token: str | None, parts: tuple[str, ...], step: int) -> None:
    """Upload only the `parts` of the pipeline in `folder`. A failed upload warns; the files stay on disk."""
    from huggingface_hub import upload_folder

    patterns = [pattern for part in parts for pattern in (part, f"{part}/*")]
    try:
        upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=patterns, token=token, commit_message=f"Step {step}"
        )
    except Exception as error:
        print(
            f"\nWARNING: the push to {repo_id} failed ({one_line(error)}); {folder} is complete",
            file=sys.stderr,
            flush=True,
        )
