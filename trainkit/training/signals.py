"""Stop signals: SIGTERM, SIGUSR1, SIGHUP and Ctrl-C ask for a checkpoint at the next step boundary, on all ranks."""

import signal

import torch
import torch.distributed as dist

STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT") if hasattr(signal, name)]


class StopSignals:
    """Remembers a stop signal. `agreed()` returns the same on every rank at the same step.

    The ranks combine their flags in an all-reduce on the CPU, started at one step and read at the next, so that no
    step waits. A second Ctrl-C interrupts at once. SIGHUP (a closed terminal) is ignored where `nohup` ignores it.
    """

    def __init__(self):
        self._received = False
        self._pending = None
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        wanted = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._former = {number: signal.signal(number, self._receive) for number in wanted}

    def _receive(self, number: int, frame) -> None:
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = True

    def agreed(self) -> bool:
        """Whether any rank had received a signal by the last step; call it once a step, on all ranks."""
        if self._group is None:
            return self._received
        stop = False
        if self._pending is not None:
            flag, work = self._pending
            work.wait()
            stop = bool(flag.item())
        flag = torch.tensor([int(self._received)])
        self._pending = flag, dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return stop

    def close(self) -> None:
        """Restore the former signal handlers."""
        if self._pending is not None:
            self._pending[1].wait()
            self._pending = None
        for number, handler in self._former.items():
            signal.signal(number, handler)
