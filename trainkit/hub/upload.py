"""Push a folder in one commit. Nothing here imports torch: it also runs in a process of its own (child.py)."""

import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainkit.atomic import write_text
from trainkit.hub.failures import describe_failure

REQUEST_TIMEOUT_S = 30.0  # without a byte, for each request
RETRY_DELAYS_S = (1.0, 2.0, 4.0, 8.0)  # after a failure that may be over a moment later
CARD = "README.md"
LOADED = re.compile(r'from_pretrained\("([^"]+)"')  # in a card: the name under which others load the model


@dataclass
class Push:
    """What is pushed, and where: everything in `folder`, or nothing for a repository that is only created.

    Files of the repository that match `replaces` and are not in `folder` are deleted by the same commit. `token` None
    is that of HF_TOKEN or `hf auth login`. Retries end `timeout_s` after the start.
    """

    repo_id: str
    folder: str | None = None
    message: str = ""
    repo_type: str = "model"
    is_private: bool = False
    token: str | None = field(default=None, repr=False)
    replaces: list[str] = field(default_factory=list)
    timeout_s: float = 60.0
    retry_delays_s: tuple[float, ...] = RETRY_DELAYS_S


@dataclass
class Outcome:
    """The repository with its owner, its address and that of the commit; or the reason for a failure."""

    repo_id: str
    url: str = ""
    commit_url: str = ""
    failure: str | None = None


def push(job: Push) -> Outcome:
    """Create the repository if it is missing and push `job`. Failures are an outcome, never an exception."""
    limit_requests(min(REQUEST_TIMEOUT_S, job.timeout_s / 2))
    started = time.monotonic()
    for delay_s in (*job.retry_delays_s, None):
        try:
            return _push_once(job)
        except Exception as error:  # from the Hub, from its HTTP library, or because of a file
            failure = describe_failure(error, job.repo_id, job.token)
        if not failure.is_transient or delay_s is None or time.monotonic() + delay_s > started + job.timeout_s:
            break
        time.sleep(delay_s)
    return Outcome(job.repo_id, failure=failure.reason)


def limit_requests(timeout_s: float) -> None:
    """Have every request of huggingface_hub in this process fail after `timeout_s` without a byte.

    By default it waits for ever.
    """
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    def limit(request: Any) -> None:  # a hook, since some calls ask for no limit
        request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), timeout_s)

    def build_client():
        client = default_client_factory()
        hooks = client.event_hooks
        client.event_hooks = {**hooks, "request": [*hooks["request"], limit]}
        return client

    set_client_factory(build_client)


def _push_once(job: Push) -> Outcome:
    from huggingface_hub import HfApi

    api = HfApi(token=job.token)
    url = api.create_repo(job.repo_id, exist_ok=True, private=job.is_private or None, repo_type=job.repo_type)
    outcome = Outcome(url.repo_id, str(url))
    if job.folder is None:
        return outcome
    name_in_card(Path(job.folder) / CARD, url.repo_id)
    commit = api.upload_folder(
        repo_id=url.repo_id,
        repo_type=job.repo_type,
        folder_path=job.folder,
        commit_message=job.message,
        delete_patterns=job.replaces or None,
    )
    outcome.commit_url = str(commit.commit_url)
    return outcome


def name_in_card(card: Path, repo_id: str) -> None:
    """Have the code of a model's card load `repo_id`: its owner is known only now, or the card has another name."""
    if not card.is_file():
        return
    text = card.read_text(encoding="utf-8")
    found = LOADED.search(text)
    if found and found[1] != repo_id:
        write_text(card, text.replace(f'from_pretrained("{found[1]}"', f'from_pretrained("{repo_id}"'))
