"""What scripts print: complete lines without a terminal, one line in place on a terminal, little with --quiet."""

import io
import sys
from types import SimpleNamespace

import pytest

from trainkit import terminal
from trainkit.terminal import Progress, format_seconds, say, set_output, tell, warn


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """Settings that end with the test."""
    monkeypatch.setattr(terminal, "_settings", {"quiet": False, "interval_s": 30.0})
    return terminal._settings


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    time = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(terminal.time, "monotonic", lambda: time.now)
    return time


def test_a_log_file_gets_the_first_line_and_then_one_per_interval(capsys, clock):
    with Progress("sampling", 100, "images") as progress:
        progress.update(0)
        for done in range(1, 101):
            clock.now += 1
            progress.update(done)
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "sampling: 1 of 100 images (1.0%), 1 images/s, 0:01:39 left",
        "sampling: 31 of 100 images (31.0%), 1 images/s, 0:01:09 left",
        "sampling: 61 of 100 images (61.0%), 1 images/s, 0:00:39 left",
        "sampling: 91 of 100 images (91.0%), 1 images/s, 9.0 s left",
    ]
    assert "\r" not in out and err == ""


def test_details_replace_the_speed_and_the_last_line_with_them_is_printed(capsys, clock):
    progress = Progress("training", 40, "steps", done=10)
    progress.update(11, "")  # no loss is known yet
    clock.now += 1
    progress.update(12, "loss 0.5", left_s=5)
    progress.update(13, "loss 0.4", left_s=5)
    progress.update(40, "loss 0.3", left_s=0)
    assert capsys.readouterr().out.splitlines() == [
        "training: 12 of 40 steps (30.0%), loss 0.5, 5.0 s left",
        "training: 40 of 40 steps (100.0%), loss 0.3, 0.0 s left",
    ]


def test_a_slow_first_step_is_a_sign_of_life_without_a_loss(capsys, clock):
    progress = Progress("training", 40, "steps")
    clock.now += 31
    progress.update(1, "")
    assert capsys.readouterr().out == "training: 1 of 40 steps (2.5%)\n"


def test_a_terminal_gets_a_bar_on_one_line_and_messages_above_it(monkeypatch, capsys):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    with Progress("training", 2, "steps") as progress:
        progress.update(1, "loss 0.5")
        say("step 1: validation loss 0.4")
        progress.update(2, "loss 0.3")
    shown = screen.getvalue()
    assert "\r" in shown and "| training: 2 of 2 steps, loss 0.3" in shown and shown.count("\n") == 1
    assert capsys.readouterr().out == "step 1: validation loss 0.4\n"


def test_quiet_leaves_warnings_and_results(capsys):
    set_output(SimpleNamespace(quiet=True, log_interval_s=0.0))
    with Progress("sampling", 2, "images") as progress:
        progress.update(1)
    say("information")
    warn("a warning")
    tell("a result")
    assert capsys.readouterr().out == "WARNING: a warning\na result\n"


def test_only_the_first_process_of_a_machine_prints_information(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with Progress("sampling", 2, "images") as progress:
        progress.update(1)
    say("information")
    tell("a result")
    warn("a warning")
    assert capsys.readouterr().out == "WARNING: a warning\n"


def test_batches_are_counted_when_they_are_done(capsys, settings):
    settings["interval_s"] = 0
    assert list(Progress("features", 5, "images").count([[1, 2], [3, 4], [5]])) == [[1, 2], [3, 4], [5]]
    assert [line.partition(" images")[0] for line in capsys.readouterr().out.splitlines()] == [
        "features: 2 of 5", "features: 4 of 5", "features: 5 of 5",
    ]  # fmt: skip


@pytest.mark.parametrize("seconds, text", [(2.34, "2.3 s"), (192, "0:03:12"), (90000, "1 day, 1:00:00")])
def test_seconds(seconds, text):
    assert format_seconds(seconds) == text
