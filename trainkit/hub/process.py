"""Start the process of child.py, and talk to it."""

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from trainkit.hub.upload import Push

BYTES_PER_S = 1e6  # the least that a connection must carry, or a push is taken for hung
ROOT = Path(__file__).resolve().parents[2]


def allowed_s(job: Push, num_bytes: int) -> float:
    """The seconds after which a push of so many bytes is given up."""
    return job.timeout_s + num_bytes / BYTES_PER_S


def start_child() -> subprocess.Popen:
    """A process that waits for a job. It hears no signal of the terminal: the run may still want to push then."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "trainkit.hub.child"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
        start_new_session=True,
    )  # fmt: skip


def ask(process: subprocess.Popen, job: Push) -> bytes:
    """The line that the process answers to `job`; empty if it was killed."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
        process.stdin.flush()
        return process.stdout.readline()
    except OSError:
        return b""


def close(process: subprocess.Popen) -> None:
    """Kill a process and close the pipes to it."""
    process.kill()
    process.wait()
    for pipe in filter(None, (process.stdin, process.stdout)):
        with contextlib.suppress(OSError):
            pipe.close()
