"""Worker processes that run jobs and are replaced if they die.

Jobs are requested only when there is room, so memory use does not depend on their number.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

from trainkit.data.images.limits import limit_memory
from trainkit.data.preparation.shards import JoinJob, ShardWriter, SliceJob
from trainkit.errors import UserError

JOBS_IN_FLIGHT = 3  # per process: one running, two waiting
THREAD_LIMITS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
# Imported once, before workers are forked. pyarrow imports pandas with its first array, which takes 0.4 s of CPU.
PRELOADED = ["numpy", "PIL.Image", "PIL.JpegImagePlugin", "PIL.TiffImagePlugin", "pyarrow", "pandas"]
DIED = object()  # the result of a call that killed its process

_writer: ShardWriter | None = None  # of this worker process


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(writer: ShardWriter, next_job: Callable, num_proc: int) -> Iterator[SliceJob | JoinJob]:
    """Run the jobs of `next_job()` (None: nothing at present) on `num_proc` processes; yields each job when done.

    0 processes mean one per core. 1 means this process, which an image may kill.
    """
    if num_proc != 1:
        yield from run_jobs_in_processes(writer, next_job, num_proc)
        return
    while (job := next_job()) is not None:
        run_job(writer, job)
        yield job


def run_jobs_in_processes(writer: ShardWriter, next_job: Callable, num_proc: int) -> Iterator[SliceJob | JoinJob]:
    """`run_jobs` on `num_proc` (0: one per core) worker processes.

    If a worker dies, its jobs run again, one at a time, and an item that kills its process every time is rejected.
    """
    num_proc = num_proc or num_cores()
    with _single_threaded_children():
        pool = _start_pool(writer, num_proc)
        in_flight: dict[Future, SliceJob | JoinJob] = {}
        try:
            while True:
                suspects: list[SliceJob | JoinJob] = []
                while not suspects and len(in_flight) < JOBS_IN_FLIGHT * num_proc:
                    if (job := next_job()) is None:
                        break
                    try:
                        in_flight[_submit(pool, run_job, job)] = job
                    except BrokenProcessPool:
                        suspects.append(job)
                if not in_flight and not suspects:
                    return
                for future in wait(in_flight, return_when=FIRST_COMPLETED).done if in_flight else ():
                    job = in_flight.pop(future)
                    try:
                        future.result()
                    except BrokenProcessPool:
                        suspects.append(job)
                    else:
                        yield job
                if suspects:  # the pool is dead, and so is every job in it
                    suspects += in_flight.values()
                    in_flight.clear()
                    pool.shutdown()
                    for job in suspects:
                        run_alone(partial(_crashing, writer), job)
                        yield job
                    pool = _start_pool(writer, num_proc)
        finally:
            pool.shutdown(cancel_futures=True)


def run_alone(crashing: Callable[[Callable, list], tuple[int, ...]], job: SliceJob | JoinJob) -> None:
    """Run a job whose process died; if it kills another one, find and reject the items that do it.

    `crashing(function, arguments)` calls `function(writer, argument)` for each, in another process; it returns the
    positions of those that killed it.
    """
    if not crashing(run_job, [job]):
        return
    if crashing(do_nothing, [None]):
        raise UserError("worker processes die as soon as they start; try --num_proc 1")
    if isinstance(job, SliceJob):
        positions = crashing(probe, [job.items[position : position + 1] for position in range(len(job.items))])
        if not crashing(run_job, [job._replace(crashing=positions)]):
            return
    raise UserError(f"writing {job.path} killed the process; is there too little memory? try a smaller --num_proc")


def run_job(writer: ShardWriter, job: SliceJob | JoinJob) -> None:
    with quiet_decoders():
        writer.run(job)


def do_nothing(writer: ShardWriter, argument: None) -> None:
    pass


def probe(writer: ShardWriter, items: Sequence) -> None:
    with quiet_decoders():
        writer.probe(items)


def _crashing(writer: ShardWriter, function: Callable, arguments: list) -> tuple[int, ...]:
    """Return the positions of the arguments with which a call kills its process."""
    results = call_in_process(writer, function, arguments)
    return tuple(position for position, result in enumerate(results) if result is DIED)


def call_in_process(writer: ShardWriter, function: Callable, arguments: Iterable) -> Iterator[Any]:
    """Yield `function(writer, argument)` for each, one at a time in another process; `DIED` if the process died."""
    pool = None
    try:
        for argument in arguments:
            pool = pool or _start_pool(writer, 1)
            try:
                yield _submit(pool, function, argument).result()
            except BrokenProcessPool:
                pool.shutdown()
                pool = None
                yield DIED
    finally:
        if pool is not None:
            pool.shutdown()


def _start_pool(writer: ShardWriter, num_proc: int) -> ProcessPoolExecutor:
    # Not fork: the parent may have threads and locks of torch.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(PRELOADED)
    return ProcessPoolExecutor(num_proc, mp_context=context, initializer=_start_worker, initargs=(writer,))


def _submit(pool: ProcessPoolExecutor, function: Callable, argument) -> Future:
    """Call `pool.submit`, which starts missing processes, and keep them from importing the main script.

    Workers do not need it, and it may import torch, have no `if __name__ == "__main__":`, or not be a file.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        return pool.submit(_call, function, argument)
    finally:
        sys.modules["__main__"] = main


def _start_worker(writer: ShardWriter) -> None:
    global _writer
    _writer = writer
    limit_memory(writer.settings.max_image_pixels)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """End this worker if its parent is killed, which closes no queue: the worker would wait indefinitely."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    parent.join()
    os._exit(1)


def _call(function: Callable, argument) -> Any:
    return function(_writer, argument)


@contextlib.contextmanager
def quiet_decoders():
    """Silence what Pillow logs and C libraries print about broken files, which rejected.jsonl lists."""
    logger = logging.getLogger("PIL")
    level, standard_error = logger.level, os.dup(2)
    logger.setLevel(logging.CRITICAL)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(standard_error, 2)
        os.close(standard_error)
        logger.setLevel(level)


@contextlib.contextmanager
def _single_threaded_children():
    """Limit BLAS to one thread per worker: many processes with many threads would wait for each other."""
    before = {name: os.environ.get(name) for name in THREAD_LIMITS}
    os.environ.update(dict.fromkeys(THREAD_LIMITS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
