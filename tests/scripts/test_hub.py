"""Runs that push, against a small HTTP server that answers as the Hub does, or does not answer."""

import json
import os
import signal
import sys
import threading
import time

import pytest
from hub_helpers import SECRET, run_forked_with_hub
from training_helpers import run_in_process, same_training_state, same_weights, tiny_run

import push
from trainkit.errors import UserError
from trainkit.training.log import read_metrics

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def flags(image_folder, tiny_unet, cache_dir):
    """Arguments of a tiny run into `output_dir` that pushes."""

    def build(output_dir, **changes):
        settings = {"push_to_hub": True, "hub_model_id": "me/digits", "hub_token": SECRET, "max_train_steps": 2}
        settings |= {"save_images_epochs": 1000, "lr_scheduler": "constant", "lr_warmup_steps": 0}
        return tiny_run(image_folder, tiny_unet, cache_dir, output_dir, **settings | changes)

    return build


def run_push(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["push.py", *map(str, words)])
    push.main()


@pytest.mark.slow
def test_one_commit_at_the_end_has_all_but_the_training_state(as_client, flags, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    arguments = flags(out, hub_strategy="end", save_model_epochs=1, hub_private_repo=True, logger="tensorboard")
    run_in_process(monkeypatch, "train_unconditional", arguments)
    pushed = as_client.repositories["me/digits"]
    assert as_client.messages == ["Step 2"] and as_client.created[0]["visibility"] == "private"
    assert {"model_index.json", "README.md", "samples.png", "scheduler/scheduler_config.json"} <= pushed.keys()
    assert {
        "schedulers/ddim/scheduler_config.json",
        "metrics.jsonl",
        "loss.png",
        "samples/0000002.png",
    } <= pushed.keys()
    assert pushed[WEIGHTS] == (out / WEIGHTS).read_bytes()
    assert not [name for name in pushed if "checkpoint" in name or "optimizer" in name or "logs" in name]
    printed = capsys.readouterr()
    assert printed.out.rstrip().splitlines()[-1] == f"pushed to {as_client.url}/me/digits"
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert SECRET.encode() not in b"".join([*written, *pushed.values()]) and SECRET not in printed.out + printed.err


@pytest.mark.slow
def test_a_dead_hub_stops_nothing_and_push_py_makes_up_for_it(as_client, flags, tmp_path, monkeypatch, capsys):
    out = tmp_path / "digits"
    as_client.fail("/", "hang")
    started = time.monotonic()
    arguments = flags(out, max_train_steps=10, save_model_epochs=1, hub_timeout_s=3, checkpointing_steps=5)
    run_in_process(monkeypatch, "train_unconditional", arguments)
    assert time.monotonic() - started < 60
    assert (out / "checkpoint-10").is_dir() and len(read_metrics(out)) == 10
    last = capsys.readouterr().out.rstrip().splitlines()[-1]
    assert last.startswith("not pushed: timed out") and last.endswith(
        f"run python push.py {out} --hub_model_id me/digits"
    )

    as_client.faults.clear()
    run_push(monkeypatch, out, "--hub_model_id", "me/digits", "--hub_token", SECRET)
    pushed = as_client.repositories["me/digits"]
    assert as_client.messages == ["Push model"] and pushed[WEIGHTS] == (out / WEIGHTS).read_bytes()
    assert {"metrics.jsonl", "loss.png", "README.md"} <= pushed.keys()
    assert f"pushed the model to {as_client.url}/me/digits (" in capsys.readouterr().out
    assert not (out / ".trainkit" / "push").exists()


@pytest.mark.slow
def test_a_stop_signal_during_a_hanging_push_writes_a_checkpoint_at_once(
    as_client, flags, tmp_path, monkeypatch, capsys
):
    as_client.fail("/create", "hang")
    stopped_at = []

    def stop():
        while not (as_client.requests and len(read_metrics(tmp_path)) >= 3):
            time.sleep(0.02)
        stopped_at.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    arguments = flags(tmp_path, max_train_steps=100_000, checkpointing_steps=0, hub_timeout_s=300)
    run_in_process(monkeypatch, "train_unconditional", arguments)
    assert time.monotonic() - stopped_at[0] < 20
    assert len(list(tmp_path.glob("checkpoint-*"))) == 1
    said = capsys.readouterr().out
    assert "stopped by a signal at step" in said and "not pushed: the run was stopped" in said


@pytest.mark.slow
def test_a_run_goes_on_from_the_hub_bit_for_bit(as_client, flags, tmp_path, monkeypatch, capsys):
    train = "train_unconditional"
    whole, first, second = (tmp_path / name for name in ("whole", "first", "second"))
    run_in_process(monkeypatch, train, flags(whole, max_train_steps=6, push_to_hub=None))
    shared = {"hub_strategy": "checkpoint", "resume_from_checkpoint": "hub"}
    run_in_process(monkeypatch, train, flags(first, max_train_steps=4, checkpointing_steps=2, **shared))
    said = capsys.readouterr().out
    assert "no checkpoint in me/digits on the Hub" in said and "starting a new run" in said
    assert "last-checkpoint/optimizer.safetensors" in as_client.repositories["me/digits"]

    run_in_process(monkeypatch, train, flags(second, max_train_steps=6, **shared))
    assert "fetching checkpoint-4 from me/digits on the Hub" in capsys.readouterr().out
    same_training_state(whole / "checkpoint-6", second / "checkpoint-6")
    same_weights(whole / WEIGHTS, second / WEIGHTS)
    assert [row["loss"] for row in read_metrics(second)] == [row["loss"] for row in read_metrics(whole)]
    state = json.loads(as_client.repositories["me/digits"]["last-checkpoint/training_state.json"])
    assert state["step"] == 6 and not list(second.glob("tmp-*"))

    third = tmp_path / "third"
    from_other = {"resume_from_checkpoint": "hf://me/digits", "push_to_hub": None, "hub_model_id": None}
    as_client.repositories["me/digits"]["last-checkpoint/optimizer.safetensors"] += b"x"
    with pytest.raises(
        UserError, match="hf://me/digits: the checkpoint in me/digits is damaged: optimizer.safetensors"
    ):
        run_in_process(monkeypatch, train, flags(third, **from_other))
    with pytest.raises(UserError, match=r"hf://me/none: me/none cannot be read: .*404"):
        run_in_process(monkeypatch, train, flags(third, **from_other | {"resume_from_checkpoint": "hf://me/none"}))
    assert not list(third.glob("*checkpoint-*"))


@pytest.mark.slow
def test_push_py_sends_the_checkpoint_if_asked_and_names_what_is_wrong(
    as_client, flags, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "digits"
    run_in_process(monkeypatch, "train_unconditional", flags(out, push_to_hub=None))
    run_push(monkeypatch, out, "--push_checkpoint", "--hub_token", SECRET)
    pushed = as_client.repositories["me/digits"]
    assert json.loads(pushed["last-checkpoint/training_state.json"])["step"] == 2 and WEIGHTS in pushed
    assert b'from_pretrained("me/digits"' in pushed["README.md"]
    as_client.refused_tokens.add(SECRET)
    for words, said in (
        ([out, "--hub_token", SECRET], r"was not pushed to digits: the token was refused \(401\)"),
        ([out, "--hub_license", "mit"], "--hub_license: .* holds a model, which has no use for it"),
        ([out, "--hub_model_id", "a b"], "--hub_model_id a b: not a name for a repository"),
        ([tmp_path], "holds no saved model"),
        ([tmp_path / "none"], "does not exist; give a folder"),
        ([], "give the folder to push: python push.py FOLDER"),
        ([tmp_path, "--push_checkpoint"], "holds no complete checkpoint"),
    ):
        with pytest.raises(UserError, match=said):
            run_push(monkeypatch, *words)


@pytest.mark.slow
def test_two_processes_push_once_and_wait_without_a_collective(hub, flags, tmp_path):
    hub.fail("/commit/", "hang")
    arguments = flags(tmp_path / "out", hub_timeout_s=4, hub_strategy="end")
    done = run_forked_with_hub(hub, tmp_path / "home", "train_unconditional", *arguments, processes=2)
    assert "not pushed: timed out" in done.stdout and done.stdout.count("not pushed") == 1
    assert done.stdout.count("models go to") == 1
