"""`--cpu_threads 0`: all cores are shared, unless the user has set OMP_NUM_THREADS and not the launcher."""

import os
import threading
import time
import zlib
from types import SimpleNamespace

import pytest
import torch

from trainkit.training import launch, throughput
from trainkit.training.log import StepLog
from trainkit.training.throughput import CoreWait

CORES = 8
BYTES = bytes(10**7)


@pytest.fixture
def threads_of(monkeypatch):
    def call(own=None, parent=(), parents_variable=None, processes=1):
        """The threads of a process with OMP_NUM_THREADS `own`, started by the words `parent`."""
        environment = {} if parents_variable is None else {"OMP_NUM_THREADS": parents_variable}
        started_by = SimpleNamespace(environ=lambda: environment), list(parent)
        monkeypatch.setattr(launch, "_parent", lambda: started_by)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(CORES)), raising=False)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if own is not None:
            monkeypatch.setenv("OMP_NUM_THREADS", own)
        return launch._default_threads(processes)

    return call


LAUNCHERS = [
    ("python", "/venv/bin/accelerate", "launch", "train.py"),
    ("python", "-m", "accelerate.commands.launch", "train.py"),
    ("python", "/venv/bin/torchrun", "train.py"),
]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_1_of_a_launcher_leaves_all_cores(threads_of, launcher):
    assert threads_of("1", launcher) == CORES
    assert threads_of("1", launcher, processes=2) == CORES // 2


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_1_of_the_user_counts(threads_of, launcher):
    assert threads_of("1", launcher, parents_variable="1") == 1
    assert threads_of("1", ("bash",)) == 1
    assert threads_of("1", ("/home/me/accelerate/bin/python", "-m", "pytest")) == 1
    assert threads_of("1", ("python", "accelerate", "launch", "--num_cpu_threads_per_process", "1")) == 1
    assert threads_of("1", ("python", "accelerate", "launch", "--num_cpu_threads_per_process=1")) == 1


def test_other_values(threads_of):
    assert threads_of("3", LAUNCHERS[0]) == 3 and threads_of("4,2", ("bash",)) == 4
    assert threads_of(None, ("bash",)) == threads_of("many", ("bash",)) == CORES


def test_a_busy_machine_is_seen():
    """A process whose two threads share one core with two others waits half of its time or more."""
    seen = CoreWait()
    if seen.share() is None:
        pytest.skip("the kernel does not count the time that threads wait for a core")
    cores = os.sched_getaffinity(0)
    threads = [threading.Thread(target=_work_on, args=(min(cores),)) for _ in range(2)]
    seen.share()
    for thread in threads:
        thread.start()
    time.sleep(0.4)
    share = seen.share()
    for thread in threads:
        thread.join()
    assert share > 0.3


def _work_on(core):
    os.sched_setaffinity(threading.get_native_id(), {core})
    end = time.perf_counter() + 0.6
    while time.perf_counter() < end:
        zlib.crc32(BYTES)  # without the GIL, so that both threads want the core


def test_the_progress_says_that_cores_are_missing(monkeypatch):
    log = StepLog.__new__(StepLog)
    log.throughput = SimpleNamespace(values=lambda images_per_s: {"images_per_s": images_per_s})
    log.accelerator = SimpleNamespace(
        device=torch.device("cpu"), scaler=None, is_main_process=False, reduce=lambda tensor, kind: tensor
    )
    log.global_batch_size, log.show_progress, log._pending = 4, False, []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(throughput, "core_seconds", iter([(1.0, 0.0), (2.0, 0.05), (3.0, 1.05)]).__next__)
    log.start(0, 10)
    details = []
    for step in (1, 2):
        log.add(step, torch.tensor(0.5), 1e-3, 1.0)
        log.flush(0.0)
        details.append(log._details)
    assert "cores" not in details[0] and "50% of the time waiting for cores (--cpu_threads)" in details[1]
