"""Threads beside the device: bounded queues, errors in the main thread, and the seconds it waited."""

import itertools
import threading
import time

import pytest

from trainkit.sampling.background import Ahead, Writer


def test_items_come_in_order_and_only_a_few_are_drawn_ahead():
    drawn = []

    def items():
        for number in range(100):
            drawn.append(number)
            yield number

    with Ahead(items(), slots=2) as ahead:
        taken = [next(ahead) for _ in range(10)]
        time.sleep(0.2)
        assert taken == list(range(10)) and len(drawn) == 12
        assert [*ahead] == list(range(10, 100))
        assert next(ahead, "end") == "end"


def test_an_error_of_the_thread_is_raised_after_the_items_before_it():
    def items():
        yield 1
        raise OSError("no")

    with Ahead(items()) as ahead:
        assert next(ahead) == 1
        for _ in range(2):
            with pytest.raises(OSError, match="no"):
                next(ahead)


def test_leaving_early_ends_the_thread():
    before = threading.active_count()
    with Ahead(itertools.count()) as ahead:
        next(ahead)
    assert threading.active_count() == before


def test_the_main_thread_counts_its_waiting():
    def slow():
        time.sleep(0.2)
        yield 1

    with Ahead(slow()) as ahead:
        next(ahead)
    assert 0.15 < ahead.waited_s < 5
    with Writer(threads=1, slots=1) as writer:
        writer.submit(time.sleep, 0.2)
        assert writer.waited_s < 0.1
        writer.submit(time.sleep, 0)
        assert writer.waited_s > 0.15


def test_at_most_so_many_writes_wait():
    running = threading.Semaphore(0)
    counts = []
    with Writer(threads=2, slots=3) as writer:
        threading.Timer(0.3, running.release, [6]).start()
        for _ in range(6):
            writer.submit(running.acquire)
            counts.append(len(writer._pending))
    assert max(counts) == 3


def test_a_failed_write_is_raised_and_the_others_are_done():
    done = []

    def fail():
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"), Writer(threads=1, slots=9) as writer:
        writer.submit(fail)
        for number in range(5):
            writer.submit(done.append, number)
    assert done == [0, 1, 2, 3, 4]
    with pytest.raises(KeyboardInterrupt), Writer(threads=1, slots=9) as writer:
        writer.submit(fail)
        writer.submit(done.append, 5)
        raise KeyboardInterrupt
    assert done[-1] == 5
