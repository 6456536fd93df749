"""How the processes of a run wait for each other where one of them may take long: without a collective.

A collective that is not complete after `COLLECTIVE_TIMEOUT` ends the run, because a peer seems to be dead. So every
process first waits here, in the store of the process group, for work of unknown length: files, checksums, the Hub.
This has no time limit and does not use the device. The collective that follows is then short. A process that dies
ends the others through the launcher.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator

from trainkit.errors import UserError

# NCCL's own default is 10 minutes. Slower than that is only what this module waits for, or one very slow start.
COLLECTIVE_TIMEOUT = timedelta(hours=1)
FIRST_DELAY_S, LONGEST_DELAY_S = 0.001, 0.2  # between two looks at the store

_numbers = itertools.count()  # of barriers; the same on every process


def shared_store() -> dist.Store | None:
    """The store of the process group; None with a single process. A second thread needs a `clone()` of it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return dist.distributed_c10d._get_default_store()


def wait_for_everyone() -> None:
    """Return once every process has called this, however long the slowest takes.

    The main process, which may hold the store, returns last: it can end without taking the store from the others.
    """
    store = shared_store()
    if store is not None:
        leave = _meet(store)
        leave()


def _meet(store: dist.Store) -> Callable[[], object]:
    """Wait for every process. Returns what to call afterwards: on the main process, it waits for the others' calls."""
    key, others = f"trainkit/barrier/{next(_numbers)}", dist.get_world_size() - 1
    store.add(key, 1)
    _wait_for_count(store, key, others + 1)
    if dist.get_rank() == 0:
        return lambda: _wait_for_count(store, f"{key}/left", others)
    return lambda: store.add(f"{key}/left", 1)


def _wait_for_count(store: dist.Store, key: str, count: int) -> None:
    delay_s = FIRST_DELAY_S
    while store.add(key, 0) < count:
        time.sleep(delay_s)
        delay_s = min(2 * delay_s, LONGEST_DELAY_S)


def on_main_process(function: Callable[[], Any]) -> Any:
    """What `function` returns on the main process, on every process; its `UserError` is raised on every process.

    It may take any time. Call this on every process.
    """
    result, problem, store = None, None, shared_store()
    if store is None or dist.get_rank() == 0:
        try:
            result = function()
        except UserError as error:
            problem = str(error)
    if store is not None:
        leave, shared = _meet(store), [result, problem]
        dist.broadcast_object_list(shared)
        result, problem = shared
        leave()
    if problem:
        raise UserError(problem)
    return result


@contextmanager
def main_process_first() -> Iterator[None]:
    """Run the block on the main process, then on the others: for a download into a cache that they share."""
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    if not is_main:
        wait_for_everyone()
    try:
        yield
    finally:
        if is_main:
            wait_for_everyone()


def end_together(accelerator: Accelerator) -> None:
    """End the trackers and the process group, once every process has arrived here."""
    wait_for_everyone()
    accelerator.end_training()
