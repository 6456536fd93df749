"""Read what a run has pushed: its newest checkpoint."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainkit.errors import UserError
from trainkit.hub.failures import describe_failure
from trainkit.hub.snapshot import LAST_CHECKPOINT
from trainkit.hub.upload import REQUEST_TIMEOUT_S, limit_requests

MANIFEST, STATE = f"{LAST_CHECKPOINT}/manifest.json", f"{LAST_CHECKPOINT}/training_state.json"


@dataclass
class PushedCheckpoint:
    """The checkpoint in one commit of a repository."""

    api: Any
    repo_id: str
    revision: str
    step: int
    manifest: bytes
    flag: str

    def download(self, folder: Path, *more: str) -> None:
        """Download it as `folder`/last-checkpoint, and the files `more` of the repository. Raises `UserError`."""
        patterns = [f"{LAST_CHECKPOINT}/*", *more]
        try:
            self.api.snapshot_download(
                self.repo_id, revision=self.revision, allow_patterns=patterns, local_dir=folder, max_workers=4
            )
        except Exception as error:  # from the Hub, from its HTTP library, or because of a file
            raise _unreadable(self.flag, self.repo_id, self.api.token, error) from None


def find_checkpoint(flag: str, repo_id: str, token: str | None, is_own: bool) -> PushedCheckpoint | None:
    """The newest checkpoint that was pushed to `repo_id`.

    None if there is no such repository or no checkpoint in it and `is_own`, since a run that starts for the first time
    has none. The token is checked first then: without it, a private repository would seem to be missing.

    Raises:
        UserError: the message begins with `flag`.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    limit_requests(REQUEST_TIMEOUT_S)
    api = HfApi(token=token)
    try:
        if is_own:
            owner = api.whoami()["name"]
            repo_id = repo_id if "/" in repo_id else f"{owner}/{repo_id}"
        try:
            info = api.model_info(repo_id)
        except RepositoryNotFoundError:
            if is_own:
                return None
            raise
        if MANIFEST not in {file.rfilename for file in info.siblings or ()}:
            if is_own:
                return None
            raise UserError(
                f"{flag}: {repo_id} has no {LAST_CHECKPOINT}/; runs with --hub_strategy checkpoint push one"
            )
        manifest, state = (
            Path(api.hf_hub_download(repo_id, name, revision=info.sha)).read_bytes() for name in (MANIFEST, STATE)
        )
        return PushedCheckpoint(api, repo_id, str(info.sha), json.loads(state)["step"], manifest, flag)
    except UserError:
        raise
    except Exception as error:  # from the Hub, from its HTTP library, or because of a file
        raise _unreadable(flag, repo_id, token, error) from None


def _unreadable(flag: str, repo_id: str, token: str | None, error: Exception) -> UserError:
    reason = describe_failure(error, repo_id, token).reason
    return UserError(f"{flag}: {repo_id} cannot be read: {reason}; `latest` resumes from --output_dir alone")
