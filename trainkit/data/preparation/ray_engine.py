"""Jobs on a Ray cluster: the same jobs as on the processes of one machine, with the same result.

Source and output must be URLs, or every node must see them under the same path.
"""

import contextlib
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from trainkit.data.preparation.pool import JOBS_IN_FLIGHT, num_cores, run_alone, run_job
from trainkit.data.preparation.shards import JoinJob, ShardWriter, SliceJob
from trainkit.errors import UserError
from trainkit.packages import load_package

PACKAGE = Path(__file__).resolve().parent.parent  # the code that workers on other machines need
CONNECT_S = 5
OBJECT_STORE_BYTES = 100 * 2**20  # of an embedded cluster: jobs and results are small


def ray_engine(address: str | None) -> Callable:
    """Return the engine for `prepare`. `address`: HOST:PORT, auto, or None for a cluster on this machine.

    Raises `UserError` if Ray is not installed.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    return partial(_run_jobs, load_package("ray", "--engine ray"), address)


def _run_jobs(
    ray, address: str | None, writer: ShardWriter, next_job: Callable, num_proc: int
) -> Iterator[SliceJob | JoinJob]:
    """`run_jobs` with `num_proc` tasks at a time (0: one per CPU).

    If a worker or node dies, its jobs run again, one at a time, and an item that kills its worker every time is
    rejected.
    """
    with _cluster(ray, address, num_proc):
        call = ray.remote(num_cpus=1, max_retries=0)(_call)
        shared = ray.put(writer)

        def died(task) -> bool:
            try:
                ray.get(task)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except (
                ray.exceptions.WorkerCrashedError,
                ray.exceptions.NodeDiedError,
                ray.exceptions.LocalRayletDiedError,
                ray.exceptions.OutOfMemoryError,
            ):
                return True
            return False

        def crashing(function: Callable, arguments: list) -> tuple[int, ...]:
            places = enumerate(arguments)
            return tuple(place for place, argument in places if died(call.remote(shared, function, argument)))

        in_flight: dict[Any, SliceJob | JoinJob] = {}  # by Ray's reference to the task
        while True:
            while len(in_flight) < _tasks_at_once(ray, address, num_proc) and (job := next_job()) is not None:
                in_flight[call.remote(shared, run_job, job)] = job
            if not in_flight:
                return
            for task in ray.wait(list(in_flight), num_returns=1)[0]:
                job = in_flight.pop(task)
                if died(task):
                    run_alone(crashing, job)
                yield job


def _tasks_at_once(ray, address: str | None, num_proc: int) -> int:
    if address is not None and num_proc:
        return num_proc
    return JOBS_IN_FLIGHT * max(1, int(ray.cluster_resources().get("CPU", 1)))  # nodes may join and leave


@contextlib.contextmanager
def _cluster(ray, address: str | None, num_proc: int) -> Iterator[None]:
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        with _importable_as_here():
            how = {"num_cpus": num_proc or num_cores(), "object_store_memory": OBJECT_STORE_BYTES}
            ray.init(address="local", include_dashboard=False, **how, **quiet)
    else:
        try:
            if address != "auto":
                _knock(address)
            ray.init(address=address, runtime_env={"py_modules": [str(PACKAGE)]}, **quiet)
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"--ray_address {address}: no Ray cluster answers there ({reason}); start one with "
                "`ray start --head` and give its HOST:PORT (if it requires a token, set RAY_AUTH_MODE=token as "
                "there), or leave the flag out"
            ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raise OSError or ValueError if nothing listens: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host, int(port)), CONNECT_S).close()


@contextlib.contextmanager
def _importable_as_here() -> Iterator[None]:
    """Let workers on this machine find the modules of this process, wherever it was started."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(os.path.abspath(folder) for folder in sys.path)
    try:
        yield
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


def _call(writer: ShardWriter, function: Callable, argument) -> None:
    """Run one task, on any node."""
    if isinstance(argument, SliceJob | JoinJob):
        source, work = getattr(writer.reader, "folder", None), argument.path.parent
        for folder in [source, work if isinstance(work, Path) else None]:
            if folder is not None and not Path(folder).is_dir():
                raise UserError(
                    f"--engine ray: {socket.gethostname()} does not see {folder}; it must be on a file system that "
                    "every node mounts under this path, or at a URL"
                )
    function(writer, argument)
