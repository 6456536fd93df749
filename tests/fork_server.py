"""Start scripts in forked children of one process that has torch and the Hugging Face libraries imported.

A fresh interpreter spends 5 to 8 seconds on those imports, a forked one none. A child is a process like any other: own
arguments, environment, working folder and output, an exit status, signals. Nothing of `trainkit` is imported here, so
children run the code as it is on disk, but for `undrawn_figures.py`. `process_helpers.py` is the client.

    python tests/fork_server.py SOCKET WATCHED_PID      ends with the process WATCHED_PID
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
import time
import warnings
from pathlib import Path

PRELOADED = [
    "accelerate", "accelerate.commands.launch", "accelerate.tracking", "accelerate.utils", "datasets", "diffusers",
    "diffusers.optimization", "diffusers.pipelines.ddpm.pipeline_ddpm", "diffusers.schedulers.scheduling_ddpm",
    "diffusers.training_utils", "diffusers.models.unets.unet_2d", "diffusers.models.unets.unet_2d_condition",
    "filelock", "diffusers.models.autoencoders.autoencoder_kl", "diffusers.pipelines.pipeline_utils",
    "huggingface_hub", "matplotlib.pyplot", "numpy", "pandas", "PIL.Image", "PIL.JpegImagePlugin", "pyarrow",
    "pytorch_optimizer", "safetensors.torch", "torch", "torch.distributed.run", "torch.distributed.fsdp",
    "torch.distributed.tensor", "torch.utils.data", "torchmetrics", "transformers",
    "transformers.models.bert.modeling_bert", "undrawn_figures",
]  # fmt: skip
PR_SET_PDEATHSIG = 1


def main(address: str, watched_pid: int) -> dict | None:
    """Serve until `watched_pid` is gone; returns in each child, with what it has to run."""
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    warnings.filters.remove(("ignore", None, Warning, None, 0))  # PYTHONWARNINGS of this process; see `_become`
    sys.warnoptions.clear()
    Path("cpu_times").write_text(f"{time.process_time()} {Path(__file__).name}\n", encoding="utf-8")
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page
    wake, waker = socket.socketpair()
    waker.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
    server = socket.socket(socket.AF_UNIX)
    server.bind(address)
    server.listen(64)
    selector, clients, tests = selectors.DefaultSelector(), {}, {}
    for listened in (server, wake):
        selector.register(listened, selectors.EVENT_READ)
    while Path(f"/proc/{watched_pid}").exists():
        for key, _ in selector.select(timeout=1):
            if key.fileobj is wake:
                wake.recv(4096)
                _report_ended(clients, tests, selector)
            elif key.fileobj is server:
                client, _ = server.accept()
                content, descriptors, _, _ = socket.recv_fds(client, 1 << 20, 3)
                if not content:
                    client.close()
                    continue
                request = json.loads(content)
                if (pid := os.fork()) == 0:
                    signal.set_wakeup_fd(-1)
                    selector.close()
                    for connection in (server, wake, waker, client, *clients.values()):
                        connection.close()
                    _become(request, descriptors)
                    return request
                else:
                    for descriptor in descriptors:
                        os.close(descriptor)
                    client.sendall(f"{pid}\n".encode())
                    clients[pid], tests[pid] = client, request["environment"].get("PYTEST_CURRENT_TEST")
                    selector.register(client, selectors.EVENT_READ)
            else:  # the client is gone, so nobody waits for its child
                pid = next(pid for pid, client in clients.items() if client is key.fileobj)
                selector.unregister(key.fileobj)
                clients.pop(pid).close()
                os.kill(pid, signal.SIGKILL)
    for pid in clients:
        os.kill(pid, signal.SIGKILL)
    return None


def _report_ended(
    clients: dict[int, socket.socket], tests: dict[int, str | None], selector: selectors.BaseSelector
) -> None:
    while True:
        try:
            pid, status, used = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        if test := tests.pop(pid):  # a worker of pytest has none, and reports its own time
            with Path("cpu_times").open("a", encoding="utf-8") as times:  # in the folder of this server
                times.write(f"{used.ru_utime + used.ru_stime} {test.rpartition(' ')[0]}\n")
        if client := clients.pop(pid, None):
            selector.unregister(client)
            with contextlib.suppress(OSError):
                client.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
            client.close()


def _become(request: dict, descriptors: list[int]) -> None:
    """Give this forked child its own environment, folder, arguments and output."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for target, descriptor in zip((1, 2, 0), descriptors, strict=False):  # input only where it is given
        os.dup2(descriptor, target)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(request["environment"])
    for action in filter(None, os.environ.get("PYTHONWARNINGS", "").split(",")):
        warnings.simplefilter(action)
    os.chdir(request["folder"])
    sys.argv = request["arguments"]
    script = Path(sys.argv[0])
    first = str(script.parent) if script.suffix == ".py" else request["folder"]
    given = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [first, *given, *(path for path in sys.path[1:] if path not in given)]


def _run(code: str | None) -> int:
    """Run the script that `sys.argv` names, or the text of a program; returns the exit status of an interpreter."""
    try:
        if code is None:
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            del globals()["__file__"]  # a program without a file, as of `python -c`, also for its worker processes
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as leaving:
        if leaving.code is None or isinstance(leaving.code, int):
            return leaving.code or 0
        print(leaving.code, file=sys.stderr)
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def _leave(status: int) -> None:
    """End as an interpreter does, but let no module be taken down, which would copy every page: half a second."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status & 0xFF)


if __name__ == "__main__":
    if child := main(sys.argv[1], int(sys.argv[2])):
        _leave(_run(child["code"]))
