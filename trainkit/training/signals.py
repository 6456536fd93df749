"""Stop signals: SIGTERM, SIGUSR1, SIGHUP and Ctrl-C ask for a checkpoint at the next step boundary, on all ranks."""

import contextlib
import itertools
import signal
import threading
from collections.abc import Callable

import torch.distributed as dist

from trainkit.processes import shared_store

STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT") if hasattr(signal, name)]
POLL_S = 0.5  # between two looks at the store

_numbers = itertools.count()  # of agreements; the same on every rank


class StopSignals:
    """Remembers a stop signal. `agreed()` is true on every rank at the same step.

    A second Ctrl-C interrupts at once. SIGHUP (a closed terminal) is ignored where `nohup` ignores it.
    """

    def __init__(self, step: int):
        """`step` is the number of finished steps."""
        self._received = False
        store = shared_store()
        self._agreement: StopAgreement | None = None
        if store is not None:
            ranks = dist.get_rank(), dist.get_world_size()
            self._agreement = StopAgreement(store, *ranks, step, lambda: self._received)
        wanted = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._former = {number: signal.signal(number, self._receive) for number in wanted}

    def _receive(self, number: int, frame) -> None:
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = True

    def agreed(self, step: int) -> bool:
        """Whether all ranks stop after `step` finished steps; call it after every step, on all ranks."""
        return self._received if self._agreement is None else self._agreement.reached(step)

    def close(self) -> None:
        """Restore the former signal handlers."""
        if self._agreement is not None:
            self._agreement.close()
        for number, handler in self._former.items():
            signal.signal(number, handler)


class StopAgreement:
    """The ranks agree in the store on the step after which they stop. Until one wants to, a step costs nothing.

    A thread of each rank looks at the store. Once any rank wants to stop, each thread announces the first step after
    which its rank can still stop, and the rank does not go beyond it before all have announced theirs. They stop at
    the last of these. Threads announce because a rank may be in a collective, which waits for another rank.
    """

    def __init__(self, store: dist.Store, rank: int, num_ranks: int, step: int, wanted: Callable[[], bool]):
        """`step` is the number of finished steps. `wanted()` tells whether this rank wants to stop."""
        self._store = store.clone() if hasattr(store, "clone") else store  # for the thread; older torch shares one
        self._rank, self._num_ranks, self._wanted = rank, num_ranks, wanted
        self._finished, self._announced, self._lock = step, False, threading.Lock()
        self._stop_step: int | None = None
        self._decided, self._closed = threading.Event(), threading.Event()
        self._prefix = f"trainkit/stop/{next(_numbers)}"
        self._thread = threading.Thread(target=self._watch, name="stop", daemon=True)
        self._thread.start()

    def reached(self, step: int) -> bool:
        """Whether the ranks stop now, after `step` finished steps. Waits while they are agreeing on it."""
        with self._lock:
            self._finished = step
            if not self._announced:
                return False
        while not self._decided.wait(1):
            if not self._thread.is_alive():
                raise RuntimeError("the other processes cannot be reached to agree on the step to stop at")
        assert self._stop_step is not None  # once it is decided
        return step >= self._stop_step

    def close(self) -> None:
        """End the thread after the last step. Others that are agreeing do not wait for this rank."""
        self._closed.set()
        self._thread.join()
        with contextlib.suppress(RuntimeError):  # the store is gone with its process
            self._announce()

    def _watch(self) -> None:
        asked = False
        while not self._closed.wait(POLL_S):
            if not asked and self._wanted():
                self._store.add(f"{self._prefix}/wanted", 1)
                asked = True
            if self._store.add(f"{self._prefix}/wanted", 0):
                self._announce()
                while self._store.add(f"{self._prefix}/announced", 0) < self._num_ranks:
                    if self._closed.wait(POLL_S):
                        return
                steps = [int(self._store.get(f"{self._prefix}/{rank}")) for rank in range(self._num_ranks)]
                self._stop_step = max(steps)
                self._decided.set()
                return

    def _announce(self) -> None:
        with self._lock:
            if self._announced:
                return
            self._announced, step = True, self._finished + 1
        self._store.set(f"{self._prefix}/{self._rank}", str(step))
        self._store.add(f"{self._prefix}/announced", 1)
