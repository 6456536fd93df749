"""The processes of a run: work is handed out as it is finished, and nobody waits for a process that is gone.

They talk through the key-value store of the process group. There are no collectives, in which one slow or lost process
would hold up the others.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from accelerate import Accelerator

from trainkit.errors import UserError

LOST_AFTER_S = 60.0  # without a sign of life; each gives one per second
POLL_S = 0.1
NEXT, WRITTEN = "sample/next", "sample/written"


def cut_units(num_images: int, batch_size: int, missing: set[int], padded: bool = False) -> list[range]:
    """The batches that hold an image of `missing`, as ranges of image numbers.

    Where a batch starts and ends does not depend on what is missing, so that every image is computed in a batch of the
    same shape after a kill as without one. With `padded` the last batch is as large as the others: its images from
    `num_images` on are computed and not kept.
    """
    end = -(-num_images // batch_size) * batch_size if padded else num_images
    units = (range(start, min(start + batch_size, end)) for start in range(0, num_images, batch_size))
    return [unit for unit in units if not missing.isdisjoint(unit)]


class Team:
    """What this process shares with the others of its run: the next unit of work, counts, signs of life, reports."""

    def __init__(self, accelerator: Accelerator):
        self.rank, self.size = accelerator.process_index, accelerator.num_processes
        # torch has no public name for the store of the process group. With a launcher's store, it outlives rank 0.
        self._store = dist.HashStore() if self.size == 1 else dist.distributed_c10d._get_default_store()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def take(self, units: list[range]) -> Iterator[range]:
        """Yield units that no other process has taken, until none is left. `units` are the same on all processes."""
        while (number := self._add(NEXT, 1) - 1) < len(units):
            yield units[number]

    def add_written(self, num_images: int) -> None:
        self._add(WRITTEN, num_images)

    def num_written(self) -> int:
        """Images written in this run by all processes."""
        return self._add(WRITTEN, 0)

    def give_sign_of_life(self) -> None:
        self._add(f"sample/alive/{self.rank}", 1)

    def report(self, figures: dict) -> None:
        """This process has written all that it took."""
        with _contact():
            self._store.set(f"sample/report/{self.rank}", json.dumps(figures))

    def reports(self) -> list[dict]:
        """Wait for the reports of all processes and return them, in the order of the ranks.

        A process that gives no sign of life for `LOST_AFTER_S` is left out.
        """
        seen = {rank: (-1, time.monotonic()) for rank in range(self.size)}
        found: dict[int, dict] = {}
        while waiting := seen.keys() - found.keys():
            for rank in waiting:
                signs, since = self._add(f"sample/alive/{rank}", 0), seen[rank][1]
                if signs != seen[rank][0]:
                    since = time.monotonic()
                seen[rank] = signs, since
                with _contact():
                    if self._store.check([f"sample/report/{rank}"]):
                        found[rank] = json.loads(self._store.get(f"sample/report/{rank}"))
                if rank not in found and time.monotonic() - since > LOST_AFTER_S:
                    del seen[rank]
            if seen.keys() - found.keys():
                time.sleep(POLL_S)
        return [found[rank] for rank in sorted(found)]

    def _add(self, key: str, amount: int) -> int:
        with _contact():
            return self._store.add(key, amount)


@contextmanager
def _contact() -> Iterator[None]:
    try:
        yield
    except RuntimeError:  # the process with the store is gone
        raise UserError(
            "another process of this run has ended: run the same command again, which generates what is missing"
        ) from None
