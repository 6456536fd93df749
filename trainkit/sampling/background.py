"""Work beside the device: items drawn ahead by a thread, and results taken over by a few threads.

Both have bounded queues, so memory does not grow with the number of images. Both count the seconds in which the main
thread waited for them, and raise their errors in it.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """Iterate over `items`, which a thread computes ahead: at most `slots` of them wait here.

    The thread starts an item only when there is a slot for it. As a context manager it ends the thread on exit; the
    items that nobody took are lost.
    """

    def __init__(self, items: Iterator[T], slots: int = 2):
        self._items, self._free = items, threading.Semaphore(slots)
        self._done: queue.SimpleQueue[tuple[list[T], BaseException | None]] = queue.SimpleQueue()
        self._is_stopped = False
        self.waited_s = 0.0
        self._thread = threading.Thread(target=self._run, name="ahead", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for _ in iter(self._wait_for_slot, True):
                self._done.put(([next(self._items)], None))
        except BaseException as error:  # StopIteration at the end, and whatever went wrong: for the main thread
            self._done.put(([], error))

    def _wait_for_slot(self) -> bool:
        """Return whether to stop."""
        self._free.acquire()
        return self._is_stopped

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        started = time.perf_counter()
        found, error = self._done.get()
        self.waited_s += time.perf_counter() - started
        if error is not None:
            self._done.put(([], error))  # for another call
            raise error
        self._free.release()
        return found[0]

    def __enter__(self) -> "Ahead[T]":
        return self

    def __exit__(self, *error: object) -> None:
        self._is_stopped = True
        self._free.release()
        self._thread.join()


class Writer:
    """Run calls in `threads` threads, with at most `slots` of them waiting or running.

    As a context manager it finishes all calls on exit, also after an error of the block, and raises their first error
    unless the block has one.
    """

    def __init__(self, threads: int, slots: int):
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="write")
        self._slots, self._pending = slots, deque[Future]()
        self.waited_s = 0.0

    def submit(self, function: Callable, *arguments: Any) -> None:
        """Call `function` in a thread, once there is a slot. Raises the error of an earlier call."""
        while len(self._pending) >= self._slots:
            self._finish_oldest()
        self._pending.append(self._pool.submit(function, *arguments))

    def finish(self) -> None:
        """Wait for all calls. Raises the first of their errors."""
        while self._pending:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        started = time.perf_counter()
        try:
            self._pending.popleft().result()
        finally:
            self.waited_s += time.perf_counter() - started

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self._pool.shutdown(wait=True)
