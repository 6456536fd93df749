"""The process that pushes for a run: it can be killed at any time, which a thread that waits for a server cannot.

It reads one `Push` as a line of JSON, writes its `Outcome` as another, and ends when its parent does.
"""

import json
import os
import signal
import sys
import threading
from dataclasses import asdict


def end_with_parent() -> None:
    sys.stdin.buffer.read()  # until the parent closes the pipe, or is gone
    os._exit(1)


def main() -> None:
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):  # of the whole job; the parent decides what they mean
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whatever else prints
    job = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read when huggingface_hub is imported
    from trainkit.hub.upload import Push, push

    answer.write(json.dumps(asdict(push(Push(**job)))) + "\n")
    answer.flush()
    os._exit(0)  # not after threads that still wait for a server


if __name__ == "__main__":
    main()
