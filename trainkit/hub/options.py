"""What the Hub flags mean: which repository, whether it can be reached, and the pushes of a run."""

from pathlib import Path
from typing import Protocol

from trainkit.errors import UserError, one_line
from trainkit.hub.background import Pushes
from trainkit.hub.failures import describe_failure
from trainkit.hub.upload import Push, limit_requests

ACCESS_TIMEOUT_S = 10.0


class PushOptions(Protocol):
    """The options that a push reads, and the folder that gives the default name."""

    output_dir: str
    push_to_hub: bool
    hub_strategy: str
    hub_model_id: str | None
    hub_token: str | None
    hub_private_repo: bool
    hub_timeout_s: float


def repository_name(repo_id: str | None, folder: str | Path, flag: str = "--hub_model_id") -> str:
    """`repo_id`, or the name of `folder`. Raises `UserError` if the Hub would refuse it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    name = repo_id or Path(folder).resolve().name
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        reason = one_line(str(error).partition(":")[0])
        raise UserError(f"{flag} {name}: not a name for a repository ({reason}); give USER/NAME") from None
    return name


def check_hub_options(options: PushOptions) -> None:
    """Raise `UserError` for a name that cannot be pushed to. Nothing is sent."""
    if options.push_to_hub:
        repository_name(options.hub_model_id, options.output_dir)


def start_pushes(options: PushOptions) -> Pushes:
    """The pushes of a run, whose repository is being created. On the main process only."""
    folder = Path(options.output_dir)
    target = Push(
        repository_name(options.hub_model_id, folder),
        is_private=options.hub_private_repo,
        token=clean_token(options.hub_token),
        timeout_s=options.hub_timeout_s,
    )
    return Pushes(folder, target, options.hub_strategy == "checkpoint")


def clean_token(token: str | None) -> str | None:
    """`token` without the white space that a file or a copy adds, which no HTTP header may have."""
    return (token or "").strip() or None


def check_hub_access(options: PushOptions) -> str:
    """One line that says whether this run could push: to whom the token belongs, and what is there.

    Asks the Hub twice, for 10 s each at most. Raises `UserError` with the reason if it could not.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    name = repository_name(options.hub_model_id, options.output_dir)
    token = clean_token(options.hub_token)
    limit_requests(ACCESS_TIMEOUT_S)
    api = HfApi(token=token)
    try:
        account = api.whoami()
        owners = [account["name"], *(each["name"] for each in account.get("orgs", []))]
        repo_id = name if "/" in name else f"{owners[0]}/{name}"
        if repo_id.partition("/")[0] not in owners:
            raise UserError(
                f"--hub_model_id {repo_id} is not yours: the token belongs to {owners[0]}; choose "
                f"{owners[0]}/{repo_id.partition('/')[2]}"
            )
        try:
            api.repo_info(repo_id)
            state = "exists"
        except RepositoryNotFoundError:
            state = "will be created"
    except UserError:
        raise
    except Exception as error:  # from the Hub, or from its HTTP library
        raise UserError(f"--push_to_hub: {describe_failure(error, name, token).reason}") from None
    return f"logged in as {owners[0]}; {repo_id} {state}"
