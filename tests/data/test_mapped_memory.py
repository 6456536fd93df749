"""The copy of a batch from mapped files: its bytes, the other threads meanwhile, and advice to the kernel."""

import threading
import time

import numpy as np
import pytest

from trainkit.data.loading import mapped_memory
from trainkit.data.loading.mapped_memory import GIL_FREE_INDICES, copy_rows, pieces_per_row, will_need


@pytest.mark.parametrize("size", [1, 7, 48, 3 * 32 * 32, 3 * 37 * 41, 3 * 256 * 256])
@pytest.mark.parametrize("num_rows", [1, 5, 128, 600])
def test_rows_are_copied_in_order(size, num_rows):
    generator = np.random.default_rng(0)
    memory = generator.integers(0, 256, 40 * size, dtype=np.uint8).reshape(40, size)
    rows = generator.integers(0, 40, num_rows)
    copied = copy_rows(memory.ctypes.data + rows * size, size)
    assert np.array_equal(copied.reshape(num_rows, size), memory[rows])
    pieces = pieces_per_row(num_rows, size)
    assert size % pieces == 0 and (num_rows * pieces >= GIL_FREE_INDICES or pieces == size)


def test_no_rows():
    assert len(copy_rows(np.empty(0, dtype=np.int64), 12)) == 0


def test_other_threads_run_during_a_copy():
    """A large batch stands in for a slow disk: both keep numpy inside one call."""
    memory = np.ones(1 << 24, dtype=np.uint8)
    addresses = np.full(24, memory.ctypes.data)  # 400 MB
    ticks, done = [], threading.Event()

    def tick():
        while not done.wait(0.001):
            ticks.append(time.perf_counter())

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        started = time.perf_counter()
        copied = copy_rows(addresses, memory.size)
        ended = time.perf_counter()
    finally:
        done.set()
        thread.join()
    assert copied.all()
    margin = (ended - started) / 4  # outside numpy's call the threads take turns
    assert sum(started + margin < moment < ended - margin for moment in ticks) >= 2


def test_advice_covers_whole_pages(monkeypatch):
    calls = []
    monkeypatch.setattr(mapped_memory, "_madvise", lambda: lambda *arguments: calls.append(arguments))
    page = mapped_memory.mmap.PAGESIZE
    will_need([(10 * page + 5, 7), (3 * page, page), (page, 0)])
    assert [call[:2] for call in calls] == [(10 * page, 12), (3 * page, page)]


def test_without_madvise_nothing_happens(monkeypatch):
    mapped_memory._madvise.cache_clear()
    monkeypatch.delattr(mapped_memory.mmap, "MADV_WILLNEED")
    will_need([(4096, 10)])
    mapped_memory._madvise.cache_clear()
