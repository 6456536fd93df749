"""Pushes beside a run: what arrives, what is said when something goes wrong, and how long it may take."""

import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from conftest import ROOT
from hub_helpers import SECRET, use_hub

from trainkit.errors import UserError
from trainkit.hub.background import Pushes, push_command
from trainkit.hub.failures import describe_failure, without_tokens
from trainkit.hub.options import check_hub_access, repository_name
from trainkit.hub.snapshot import stage
from trainkit.hub.upload import Push, name_in_card, push
from trainkit.options.training import HubOptions

CARD = '---\nlibrary_name: diffusers\n---\nDiffusionPipeline.from_pretrained("digits", trust_remote_code=True)\n'


@pytest.fixture
def folder(tmp_path):
    """A run's folder, with what is pushed and what is not."""
    folder = tmp_path / "digits"
    files = {
        "model_index.json": "{}", "README.md": CARD, "unet/weights.safetensors": "one" * 1000, "samples/1.png": "png",
        "metrics.jsonl": "{}\n", "report.html": "<html>", "checkpoint-3/optimizer.safetensors": "state",
        "logs/events": "x", ".trainkit/run.json": "{}",
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def target(**settings):
    return Push("me/digits", **{"token": SECRET, "timeout_s": 20, "retry_delays_s": (0.05,)} | settings)


def push_once(folder, **settings):
    pushes = Pushes(folder, target(**settings))
    pushes.push(7)
    return pushes.finish()


def wait_for_request(server, part):
    deadline = time.monotonic() + 60
    while not any(part in request for request in server.requests):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_one_commit_has_the_model_and_nothing_else(as_client, folder, capsys):
    assert push_once(folder) == f"pushed to {as_client.url}/me/digits"
    assert as_client.messages == ["Step 7"]
    assert as_client.repositories["me/digits"].keys() == {
        "model_index.json", "README.md", "unet/weights.safetensors", "samples/1.png", "metrics.jsonl", "report.html",
    }  # fmt: skip
    assert f"pushed step 7: {as_client.url}/me/digits/commit/" in capsys.readouterr().out
    assert as_client.tokens == {f"Bearer {SECRET}"}
    assert as_client.repositories["me/digits"]["README.md"].decode() == CARD.replace('"digits"', '"me/digits"')
    assert (folder / "README.md").read_text() == CARD and not (folder / ".trainkit" / "push").exists()


@pytest.mark.slow
def test_a_push_has_the_files_of_the_moment_it_was_asked_for(as_client, folder):
    pushes = Pushes(folder, target())
    pushes.push(1)
    (folder / "new").write_text("two")
    (folder / "new").replace(folder / "unet" / "weights.safetensors")
    with (folder / "metrics.jsonl").open("a") as log:
        log.write("{}\n")
    assert "pushed to" in pushes.finish()
    held = as_client.repositories["me/digits"]
    assert held["unet/weights.safetensors"] == b"one" * 1000 and held["metrics.jsonl"] == b"{}\n"


@pytest.mark.slow
def test_the_newest_push_replaces_one_that_waits_and_stops_an_older_one_at_the_end(as_client, folder):
    as_client.fail("/create", "hang", times=1)
    pushes = Pushes(folder, target(timeout_s=60))
    pushes.push(1)
    pushes.push(2)
    wait_for_request(as_client, "/create")
    started = time.monotonic()
    assert "pushed to" in pushes.finish() and time.monotonic() - started < 30
    assert as_client.messages == ["Step 2"]


@pytest.mark.slow
def test_the_checkpoint_goes_along_and_replaces_the_former_one(as_client, folder):
    as_client.repositories["me/digits"] = {
        "last-checkpoint/old": b"x",
        "unet/old-00001.safetensors": b"x",
        "note": b"",
    }
    pushes = Pushes(folder, target(), is_with_checkpoint=True)
    pushes.push_checkpoint(4, None)
    pushes.push_checkpoint(4, 3)
    pushes.push_checkpoint(5, 3)
    assert "pushed to" in pushes.finish()
    held = as_client.repositories["me/digits"]
    assert held["last-checkpoint/optimizer.safetensors"] == b"state" and as_client.messages == ["Step 4"]
    assert "last-checkpoint/old" not in held and "unet/old-00001.safetensors" not in held and "note" in held


FAULTS = [
    ("/create", 500, "server error (500)"),
    ("/create", 401, "the token was refused (401): set HF_TOKEN"),
    ("/create", 403, "the token may not write to me/digits (403)"),
    ("/commit/", 409, "the name me/digits is taken, or somebody else pushes to it right now (409)"),
    ("/commit/", 403, "the token may not write to me/digits (403)"),
    ("/commit/", 429, "the Hub asks to send fewer requests (429)"),
    ("/commit/", "drop", "the connection to http"),
    ("/create", "hang", "timed out: http"),
]


@pytest.mark.parametrize(("part", "what", "said"), FAULTS)
def test_every_failure_is_told_by_its_cause(as_client, folder, part, what, said):
    as_client.fail(part, what)
    started = time.monotonic()
    outcome = push(target(folder=str(folder), message="Step 1", timeout_s=1 if what == "hang" else 20))
    assert outcome.failure.startswith(said) and SECRET not in outcome.failure
    assert time.monotonic() - started < 20 and as_client.commits == []


@pytest.mark.parametrize(("part", "what"), [("/create", 503), ("/commit/", "drop"), ("/lfs/", 500), ("/lfs/", "drop")])
def test_what_fails_once_is_tried_again(as_client, folder, part, what):
    as_client.fail(part, what, times=1)
    outcome = push(target(folder=str(folder), message="Step 1"))
    assert outcome.failure is None and as_client.messages == ["Step 1"]


def test_no_connection_is_not_blamed_on_the_token(monkeypatch, tmp_path, folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    use_hub(monkeypatch, f"http://127.0.0.1:{port}", tmp_path, {})
    failure = push(target(folder=str(folder))).failure
    assert failure.startswith(f"no connection to http://127.0.0.1:{port} (") and "refused" in failure
    assert "oken" not in failure and "log in" not in failure


def test_a_name_of_somebody_else_is_told_from_a_weak_token(as_client, folder):
    failure = push(replace(target(folder=str(folder)), repo_id="you/digits")).failure
    assert failure == "you/digits is not yours (403): the token belongs to me; choose me/digits"


@pytest.mark.slow
def test_a_hanging_upload_is_given_up_and_said_at_the_end(as_client, folder):
    as_client.fail("/lfs/", "hang")
    started = time.monotonic()
    line = push_once(folder, timeout_s=5)
    assert time.monotonic() - started < 15
    assert line == f"not pushed: timed out: not done after 5 s; run {push_command(folder, target())}"


@pytest.mark.slow
def test_a_failure_before_the_end_is_one_warning(as_client, folder, capsys):
    as_client.fail("/create", 401, times=1)
    pushes = Pushes(folder, target())
    deadline = time.monotonic() + 30
    while not (said := capsys.readouterr().out) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert said.strip().count("\n") == 0
    assert said.strip().startswith("WARNING: --push_to_hub: the repository was not created: the token was refused")
    pushes.push(1)
    assert pushes.finish().startswith("pushed to")


@pytest.mark.slow
def test_cancel_ends_a_hanging_push_at_once(as_client, folder):
    as_client.fail("/create", "hang")
    pushes = Pushes(folder, target(timeout_s=300))
    pushes.push(1)
    wait_for_request(as_client, "/create")
    pushes.cancel()
    started = time.monotonic()
    assert pushes.finish().startswith("not pushed: the run was stopped before")
    assert time.monotonic() - started < 10


def test_the_process_that_pushes_ends_with_its_parent_and_shows_no_token(as_client, folder):
    as_client.fail("/create", "hang")
    code = f"""
import os, sys
from trainkit.hub.process import ask, start_child
from trainkit.hub.upload import Push
process = start_child()
print(process.pid, flush=True)
ask(process, Push("me/digits", token={SECRET!r}))
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
        pid = int(run.stdout.readline())
        wait_for_request(as_client, "/create")
        assert "trainkit.hub.child" in shown(pid, "args") and SECRET not in shown(pid, "args")
        run.kill()
    deadline = time.monotonic() + 20
    while shown(pid, "stat")[:1] not in ("", "Z"):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def shown(pid, what):
    """What `ps` shows to everybody about a process."""
    return subprocess.run(["ps", "-ww", "-o", f"{what}=", str(pid)], capture_output=True, text=True).stdout.strip()


def test_messages_never_show_a_token(monkeypatch):
    error = ValueError(f"Illegal header value b'Bearer {SECRET}\\n', or Bearer other")
    for token in (SECRET, None):
        reason = describe_failure(error, "me/digits", token).reason
        assert SECRET not in reason and "other" not in reason and "***" in reason
    assert without_tokens("hf_hub_download of secret", "secret") == "hf_hub_download of ***"
    monkeypatch.setenv("HF_TOKEN", "short")
    assert "short" not in describe_failure(ValueError("Bearer: short"), "me/digits", None).reason
    assert SECRET not in repr(target())


def test_names_are_checked_before_anything_is_sent(tmp_path):
    assert repository_name(None, tmp_path / "digits") == "digits"
    assert repository_name("me/x", tmp_path) == "me/x"
    for name in ("me/a b", "a/b/c", "-x"):
        with pytest.raises(UserError, match=f"--hub_model_id {name}: not a name for a repository .*; give USER/NAME"):
            repository_name(name, tmp_path)


def hub_options(tmp_path, **settings):
    options = HubOptions(**{"push_to_hub": True, "hub_token": f" {SECRET}\n", "hub_model_id": "me/digits"} | settings)
    options.output_dir = str(tmp_path)
    return options


def test_access_is_told_in_a_line(as_client, tmp_path):
    assert check_hub_access(hub_options(tmp_path)) == "logged in as me; me/digits will be created"
    as_client.repositories["team/digits"] = {}
    assert check_hub_access(hub_options(tmp_path, hub_model_id="team/digits")).endswith("team/digits exists")
    with pytest.raises(UserError, match="you/x is not yours: the token belongs to me; choose me/x"):
        check_hub_access(hub_options(tmp_path, hub_model_id="you/x"))
    as_client.refused_tokens.add(SECRET)
    with pytest.raises(UserError, match=r"--push_to_hub: the token was refused \(401\)"):
        check_hub_access(hub_options(tmp_path))
    with pytest.raises(UserError, match="there is no token"):
        as_client.fail("whoami", 401)
        check_hub_access(hub_options(tmp_path, hub_token=None))


def test_staged_files_share_their_space_and_a_failure_leaves_nothing(folder, tmp_path):
    num_bytes = stage(folder, ("unet", "*.jsonl", "nothing"), tmp_path / "staged", folder / "checkpoint-3")
    assert num_bytes == 3000 + 3 + 5
    assert (tmp_path / "staged" / "unet" / "weights.safetensors").samefile(folder / "unet" / "weights.safetensors")
    assert not (tmp_path / "staged" / "metrics.jsonl").samefile(folder / "metrics.jsonl")
    with pytest.raises(OSError):
        stage(folder, ("unet",), tmp_path / "staged", folder / "checkpoint-4")
    assert not (tmp_path / "staged").exists()


def test_only_the_name_of_the_model_changes_in_its_card(tmp_path):
    card = tmp_path / "README.md"
    card.write_text(f'{CARD}\nDDIMScheduler.from_pretrained("digits", subfolder="x"); from_pretrained("google/vae")')
    name_in_card(card, "me/digits")
    text = card.read_text()
    assert text.count('from_pretrained("me/digits"') == 2 and 'from_pretrained("google/vae")' in text
    name_in_card(tmp_path / "none.md", "me/digits")
