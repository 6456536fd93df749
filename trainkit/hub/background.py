"""Pushes of a run that never make it wait: a thread hands them one by one to a process that can be killed."""

import json
import shlex
import shutil
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

from trainkit.errors import one_line
from trainkit.hub.contents import MODEL, REPLACED
from trainkit.hub.failures import without_tokens
from trainkit.hub.process import allowed_s, ask, close, start_child
from trainkit.hub.snapshot import STAGING, stage
from trainkit.hub.upload import Outcome, Push
from trainkit.terminal import say, warn

STOP_S = 5.0  # for a process to be stopped and another one to start


class Pushes:
    """The pushes of one run. Create it on the main process only. No method waits for the network but `finish`.

    The repository is created first. A push takes the files as they are when it is asked for; a newer push replaces one
    that has not started. Failures are printed as a warning, and change nothing else.
    """

    def __init__(self, folder: Path, target: Push, is_with_checkpoint: bool = False):
        """`target` names the repository. With `is_with_checkpoint` each push has the newest complete checkpoint."""
        self.folder, self._target, self.is_with_checkpoint = folder.resolve(), target, is_with_checkpoint
        self.repo_id = target.repo_id  # with its owner once the Hub has answered
        self._staging, self._number, self._checkpoint_step = self.folder / STAGING, 0, -1
        shutil.rmtree(self._staging, ignore_errors=True)  # of a run that was killed
        self._waiting: tuple[Push, float] | None = target, target.timeout_s
        self._is_closing = self._is_cancelled = self._is_busy = False
        self._process: subprocess.Popen | None = None
        self._last = Outcome(target.repo_id, failure="nothing was pushed yet")
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="push", daemon=True)
        self._thread.start()

    def push(self, step: int, checkpoint_step: int | None = None) -> None:
        """Push the model as it is on disk now, and the complete checkpoint of `checkpoint_step` if it belongs to it.

        The message of the commit names `step`.
        """
        checkpoint = None
        if self.is_with_checkpoint and checkpoint_step is not None:
            checkpoint = self.folder / f"checkpoint-{checkpoint_step}"
            self._checkpoint_step = checkpoint_step
        self._number += 1
        target = self._staging / str(self._number)
        try:
            num_bytes = stage(self.folder, MODEL.files, target, checkpoint)
        except OSError as error:  # a full disk
            self._last = Outcome(self.repo_id, failure=f"its files cannot be collected ({one_line(error)})")
            self._warn(f"step {step}", self._last)
            return
        replaces = [pattern for pattern in REPLACED["model"] if (target / pattern[:-2]).exists()]
        job = replace(self._target, folder=str(target), message=f"Step {step}", replaces=replaces)
        with self._changed:
            replaced, self._waiting = self._waiting, (job, allowed_s(job, num_bytes))
            self._last = Outcome(self.repo_id, failure=f"timed out: step {step} was not done")
            self._changed.notify()
        if replaced is not None and replaced[0].folder is not None:
            shutil.rmtree(replaced[0].folder, ignore_errors=True)

    def push_checkpoint(self, step: int, checkpoint_step: int | None) -> None:
        """Push once a checkpoint newer than the last one pushed is complete; cheap, to call after every step."""
        if self.is_with_checkpoint and checkpoint_step is not None and checkpoint_step > self._checkpoint_step:
            self.push(step, checkpoint_step)

    def cancel(self) -> None:
        """Drop what was not pushed yet."""
        with self._changed:
            waiting, self._waiting = self._waiting, None
            if waiting is not None or self._is_busy:
                self._last = Outcome(self.repo_id, failure="the run was stopped before the push was done")
            self._is_cancelled = True
            if self._is_busy:
                self._stop_process()

    def finish(self) -> str:
        """Wait for the newest push, and return the last line about it: where it went, or what to do.

        A push of an older state is stopped. The wait takes as long as is allowed for one push, at most.
        """
        with self._changed:
            self._is_closing = True
            wait_s = self._target.timeout_s
            if self._waiting is not None:
                wait_s = self._waiting[1]
                if self._is_busy:
                    self._stop_process()
            self._changed.notify()
        self._thread.join(wait_s + STOP_S)
        with self._changed:
            self._is_cancelled = True  # what still runs is stopped without a word
            if self._process is not None:
                close(self._process)
        shutil.rmtree(self._staging, ignore_errors=True)
        if self._last.failure is None and self._last.commit_url:
            return f"pushed to {self._last.url}"
        return f"not pushed: {self._last.failure}; run {push_command(self.folder, self._target)}"

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._is_closing)
                if self._waiting is None:
                    return
                (job, allowed), self._waiting = self._waiting, None
            outcome = self._push(job, allowed)
            if job.folder is not None:
                shutil.rmtree(job.folder, ignore_errors=True)
            with self._changed:
                is_newest = self._waiting is None and not self._is_cancelled
                if is_newest and (job.folder is not None or outcome.failure is not None):
                    self._last = outcome
                is_told = self._is_closing  # by the last line
            if outcome.failure is None or (is_newest and not is_told):
                self._report(job, outcome)

    def _report(self, job: Push, outcome: Outcome) -> None:
        if outcome.failure is not None:
            self._warn(job.message.lower() or "the repository", outcome)
            return
        self.repo_id = outcome.repo_id
        if job.folder is None:
            say(f"models go to {outcome.url}")
        else:
            say(f"pushed {job.message.lower()}: {outcome.commit_url}")

    def _warn(self, what: str, outcome: Outcome) -> None:
        done = "pushed" if what.startswith("step") else "created"
        warn(
            f"--push_to_hub: {what} was not {done}: {outcome.failure}; training goes on, and the next push tries again"
        )

    def _push(self, job: Push, allowed: float) -> Outcome:
        """Push `job` in the process of this run, which is killed after `allowed` seconds."""
        try:
            with self._changed:
                if self._process is None:
                    self._process = start_child()
                process, self._is_busy = self._process, True
                if self._is_cancelled or (self._is_closing and self._waiting is not None):
                    process.kill()
        except OSError as error:
            return Outcome(job.repo_id, failure=f"no process can be started ({one_line(error)})")
        is_late = threading.Event()

        def give_up() -> None:
            is_late.set()
            process.kill()

        timer = threading.Timer(allowed, give_up)
        timer.daemon = True
        timer.start()
        answer = ask(process, job)
        timer.cancel()
        with self._changed:
            self._is_busy = False
            if not answer:
                close(process)
                self._process = None  # the next push starts another one
        if answer:
            return Outcome(**json.loads(answer))
        if is_late.is_set():
            return Outcome(job.repo_id, failure=f"timed out: not done after {allowed:.0f} s")
        return Outcome(job.repo_id, failure=f"the process that pushes ended with status {process.returncode}")

    def _stop_process(self) -> None:
        """End the process in the middle of a push. The next push starts another one."""
        if self._process is not None:
            self._process.kill()


def push_command(folder: Path, target: Push) -> str:
    """The command that pushes `folder` later."""
    words = ["python", "push.py", str(folder)]
    if target.repo_id != folder.name:
        words += ["--hub_model_id", target.repo_id]
    return without_tokens(shlex.join(words), target.token)
