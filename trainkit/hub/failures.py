"""Why a push failed, in a few words that name the cause and the fix. The token is in none of them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from trainkit.errors import one_line

TOKEN = re.compile(r"\bhf_\w{20,}|(?<=Bearer )[^\s'\"]+")
WITH_TOKEN = "set HF_TOKEN to a token with write access, or log in with `hf auth login`"
# Names of classes, since the HTTP library differs between versions of huggingface_hub.
TIMEOUTS = ("TimeoutException", "Timeout", "TimeoutError")
NOT_CONNECTED = ("ConnectError", "gaierror", "ConnectionRefusedError")
BROKEN_OFF = ("NetworkError", "ProtocolError", "ConnectionError")


@dataclass(frozen=True)
class Failure:
    """What went wrong with a push, and whether it may go well a moment later."""

    reason: str
    is_transient: bool = False


def without_tokens(text: str, *tokens: str | None) -> str:
    """`text` with `tokens`, and everything that looks like one, replaced by ***."""
    for token in filter(None, tokens):
        text = text.replace(token, "***")
    return TOKEN.sub("***", text)


def describe_failure(error: BaseException, repo_id: str, token: str | None) -> Failure:
    """The cause of `error`, which huggingface_hub raised when it read or wrote `repo_id`."""
    from huggingface_hub import constants, get_token

    token = token or get_token()
    errors = list(_chain(error))
    status = next(filter(None, map(_status, errors)), None)
    if status is not None:
        return _refusal(status, error, repo_id, token)
    names = {base.__name__ for each in errors for base in type(each).__mro__}
    detail = without_tokens(one_line(errors[-1], 120), token)
    if names & {*TIMEOUTS}:
        return Failure(f"timed out: {constants.ENDPOINT} did not answer", True)
    if names & {*NOT_CONNECTED}:
        return Failure(f"no connection to {constants.ENDPOINT} ({detail})", True)
    if names & {*BROKEN_OFF}:
        return Failure(f"the connection to {constants.ENDPOINT} broke off ({detail})", True)
    if "OfflineModeIsEnabled" in names:
        return Failure("HF_HUB_OFFLINE is set: unset it to use the Hub")
    if "LocalTokenNotFoundError" in names:
        return Failure(f"there is no token: {WITH_TOKEN}")
    return Failure(without_tokens(one_line(error), token))


def _refusal(status: int, error: BaseException, repo_id: str, token: str | None) -> Failure:
    """What an HTTP status means for a push."""
    if status == 401:
        reason = "the token was refused (401)" if token else "there is no token, which the Hub asks for (401)"
        return Failure(f"{reason}: {WITH_TOKEN}")
    if status == 403:
        return Failure(_forbidden(repo_id, token))
    if status == 404:
        return Failure(f"{repo_id} does not exist, or the token may not see it (404)")
    if status == 409:
        return Failure(f"the name {repo_id} is taken, or somebody else pushes to it right now (409)")
    if status in (408, 429):
        return Failure(f"the Hub asks to send fewer requests ({status})", True)
    if status >= 500:
        return Failure(f"server error ({status})", True)
    return Failure(f"{without_tokens(one_line(error, 200), token)} ({status})")


def _forbidden(repo_id: str, token: str | None) -> str:
    """Whether the name or the token is the problem: the Hub knows to whom the token belongs."""
    from huggingface_hub import HfApi

    owner, slash, name = repo_id.rpartition("/")
    try:
        account = HfApi(token=token).whoami()
        names = [account["name"], *(each["name"] for each in account.get("orgs", []))]
    except Exception:  # then the answer stays less exact
        names = []
    if slash and names and owner not in names:
        return f"{repo_id} is not yours (403): the token belongs to {names[0]}; choose {names[0]}/{name}"
    return f"the token may not write to {repo_id} (403): {WITH_TOKEN}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """`error` and what caused it."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)
