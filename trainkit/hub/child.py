"""The process that pushes for a run: it can be killed at any time, which a thread that waits for a server cannot.

It reads a `Push` as a line of JSON and writes its `Outcome` as another, until the run closes the pipe or is gone.
"""

import json
import os
import queue
import signal
import sys
import threading
from dataclasses import asdict


def read_jobs(jobs: queue.SimpleQueue) -> None:
    """Put the lines of standard input into `jobs`. Their end ends the process, whatever it waits for."""
    for line in sys.stdin.buffer:
        jobs.put(line)
    os._exit(0)


def main() -> None:
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):  # of the whole job; the run decides what they mean
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whatever else prints
    jobs: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=read_jobs, args=(jobs,), daemon=True).start()
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read when huggingface_hub is imported
    from trainkit.hub.upload import Push, push

    while True:
        answers.write(json.dumps(asdict(push(Push(**json.loads(jobs.get()))))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
