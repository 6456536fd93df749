"""Run scripts as processes of their own; on Linux in children of the fork server, without seconds of imports each.

python tests/process_helpers.py SCRIPT ...      as `python SCRIPT ...`, for a launcher that starts processes
python tests/process_helpers.py -c PROGRAM      as `python -c PROGRAM`, for the workers of pytest
"""

import atexit
import contextlib
import json
import os
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from filelock import FileLock

KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows has no other
ROOT = Path(__file__).resolve().parent.parent
SERVER_FOLDER = "TEST_FORK_SERVER"  # set by the process that starts the workers of pytest, and read by each
# Libraries read these when they are imported, so that a forked child would not see another value.
READ_AT_IMPORT = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "DIFFUSERS_", "TORCH_", "MKL_", "PYTORCH_", "XDG_")
READ_LATER = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "TORCH_NCCL_ASYNC_ERROR_HANDLING"}  # when processes meet
LAUNCHED = {
    "ACCELERATE_USE_CPU": "true",
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "OMP_NUM_THREADS": "1",
}


def script_environment(**extra: str) -> dict[str, str]:
    """The environment of this process, offline and on the CPU."""
    return os.environ | {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"} | extra


def share_fork_server() -> None:
    """Let all workers of this pytest run use one server; the first that needs it starts it."""
    folder = tempfile.mkdtemp(prefix="fork-server-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ[SERVER_FOLDER] = f"{os.getpid()}:{folder}"


def fork_workers(specifications: list[str]) -> list[str]:
    """The workers that pytest-xdist starts, as given to its --tx; on Linux they are children of the fork server."""
    command = shlex.join([sys.executable, __file__])
    if sys.platform != "linux":
        return specifications
    return [f"popen//python={command}" if each == "popen" else each for each in specifications]


def forked_cpu_seconds() -> list[tuple[str, float]]:
    """The test that started it and the CPU seconds, for each ended child of the fork server of this pytest run.

    The imports of the server itself come first, under the name of its file.
    """
    times = Path(os.environ.get(SERVER_FOLDER, ":").split(":", 1)[1], "cpu_times")
    lines = times.read_text(encoding="utf-8").splitlines() if times.is_file() else []
    return [(test, float(seconds)) for seconds, test in (line.split(" ", 1) for line in lines)]


def _connect() -> socket.socket:
    if SERVER_FOLDER not in os.environ:
        share_fork_server()
    watched_pid, folder = os.environ[SERVER_FOLDER].split(":", 1)
    address, started = f"{folder}/socket", Path(folder, "started")
    with FileLock(f"{folder}/lock"):
        if not started.exists():
            subprocess.Popen(
                [sys.executable, str(ROOT / "tests" / "fork_server.py"), address, watched_pid],
                env=script_environment(**LAUNCHED), cwd=folder, start_new_session=True, stdin=subprocess.DEVNULL,
            )  # fmt: skip
            started.touch()
    deadline = time.monotonic() + 300  # its imports are slow on a busy machine
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(address)
            return connection
        except OSError:
            connection.close()
            assert time.monotonic() < deadline, "the fork server does not answer"
            time.sleep(0.05)


class Pipe:
    """Collects what is written to one end, in a thread."""

    def __init__(self):
        self._source, self.target = os.pipe()
        self._pieces, self._thread = [], threading.Thread(target=self._collect, daemon=True)
        self._thread.start()

    def _collect(self):
        while piece := os.read(self._source, 1 << 16):
            self._pieces.append(piece)
        os.close(self._source)

    def close(self):
        """To call once each process has its copy of the end to write to."""
        os.close(self.target)

    def join(self):
        self._thread.join(timeout=5)  # a grandchild may live on, and hold the pipe open

    def text(self) -> str:
        return b"".join(self._pieces).decode("utf-8", "replace")


class ForkedProcess:
    """A child of the fork server; the part of `subprocess.Popen` that the tests use."""

    def __init__(self, arguments, environment, stdout, stderr, folder=ROOT, code=None, stdin=None):
        server = script_environment()
        changed = {name for name in {*environment, *server} if environment.get(name) != server.get(name)}
        late = [name for name in sorted(changed - READ_LATER) if name.startswith(READ_AT_IMPORT)]
        assert not late, f"{late} are read at import: use `launch`, which starts a fresh interpreter"
        self._connection = _connect()
        request = {"arguments": [*map(str, arguments)], "environment": environment, "folder": str(folder)}
        content = json.dumps(request | {"code": code}).encode()
        socket.send_fds(self._connection, [content], [stdout, stderr, *([] if stdin is None else [stdin])])
        self._lines = self._connection.makefile("r")
        self.pid, self.returncode = int(self._lines.readline()), None

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, negative for a signal. Raises `subprocess.TimeoutExpired`."""
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            self.returncode = int(self._lines.readline() or -KILL)
            self._connection.close()
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class SpawnedProcess:
    """As `ForkedProcess`, in a fresh interpreter: for systems other than Linux."""

    def __init__(self, arguments, environment, stdout, stderr, folder=ROOT, code=None):
        words = ["-c", code, *arguments[1:]] if code else arguments
        command = [sys.executable, *map(str, words)]
        self._process = subprocess.Popen(
            command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr
        )
        self.pid, self.wait, self.poll = self._process.pid, self._process.wait, self._process.poll
        self.send_signal = self._process.send_signal

    @property
    def returncode(self) -> int | None:
        return self._process.returncode


class ScriptRun:
    """The processes of one run of a script, which end together as under a launcher, and what they print."""

    def __init__(self, script, *arguments, processes=1, environment=None, folder=ROOT, code=None, launched=LAUNCHED):
        self._pipes = [Pipe(), Pipe()]
        shared = script_environment() | launched | (environment or {})
        shared = {name: value for name, value in shared.items() if value is not None}
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        self.ranks = []
        for rank in range(processes):
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            own = {name: str(value) for name, value in ranks.items()} if processes > 1 else {}
            words = [script if code else ROOT / script, *arguments]
            targets = (pipe.target for pipe in self._pipes)
            start = ForkedProcess if sys.platform == "linux" else SpawnedProcess
            self.ranks.append(start(words, shared | own, *targets, folder, code))
        for pipe in self._pipes:
            pipe.close()

    def running(self) -> bool:
        return any(rank.poll() is None for rank in self.ranks)

    def wait(self, timeout: float = 900) -> subprocess.CompletedProcess:
        """Wait for all ranks. One that fails ends the others, and its exit status is that of the run."""
        deadline, failed = time.monotonic() + timeout, None
        while self.running():
            statuses = [rank.returncode for rank in self.ranks]
            if failed is None and (failed := next(filter(None, statuses), None)) is not None:
                deadline = min(deadline, time.monotonic() + 10)
                for rank in self.ranks:
                    rank.send_signal(signal.SIGTERM)
            if time.monotonic() > deadline:
                for rank in self.ranks:
                    rank.send_signal(KILL)
                assert failed is not None, f"not done after {timeout} s: {self.output()}"
            time.sleep(0.01)
        for pipe in self._pipes:
            pipe.join()
        failed = failed or next(filter(None, (rank.returncode for rank in self.ranks)), 0)
        return subprocess.CompletedProcess([], failed, *self.output())

    def output(self) -> tuple[str, str]:
        """What was printed so far to stdout and to stderr."""
        return self._pipes[0].text(), self._pipes[1].text()


def run_forked(script, *arguments, processes=1, environment=None, check=True) -> subprocess.CompletedProcess:
    """Run a script of ours, on CPU processes that train together; returns its exit status and output as text."""
    done = ScriptRun(script, *arguments, processes=processes, environment=environment).wait()
    if check:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def run_code(code, *arguments, folder=ROOT, environment=None) -> subprocess.CompletedProcess:
    """Run the text of a program, as `python -c` would."""
    return ScriptRun("-c", *arguments, code=code, folder=folder, environment=environment).wait()


# The launcher, and what it starts by the name of the interpreter.
LAUNCHER = """
import os, runpy, sys
sys.executable = os.environ["PYTHON_EXEC"]
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__")
"""


def start_launcher(folder: Path, module: str, *arguments, environment=None) -> ScriptRun:
    """Start a launcher as `python -m module`. It and the processes that it starts are children of the fork server.

    Args:
        folder: where the program that takes the place of the interpreter is written.
        environment: added to `script_environment()`; None removes a variable.
    """
    interpreter = folder / "python"
    interpreter.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__)}" "$@"\n')
    interpreter.chmod(0o755)
    environment = (environment or {}) | {"PYTHON_EXEC": str(interpreter)}
    return ScriptRun("-c", module, *arguments, code=LAUNCHER, environment=environment, launched={})


def stand_in_for_python() -> None:
    """Run the script of the command line, pass on signals, and end as it ends. SIGKILL ends it too."""
    words = sys.argv[2:] if sys.argv[1] == "-u" else sys.argv[1:]
    code = words.pop(1) if words[0] == "-c" else None
    streams = [stream.fileno() for stream in (sys.stdout, sys.stderr)]
    process = ForkedProcess(words, dict(os.environ), *streams, os.getcwd(), code, stdin=sys.stdin.fileno())
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: os.kill(process.pid, number))
    if (status := process.wait()) < 0:
        with contextlib.suppress(OSError):  # SIGKILL has no handler
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


if __name__ == "__main__":
    stand_in_for_python()
