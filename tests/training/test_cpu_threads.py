"""`--cpu_threads 0`: all cores are shared, unless the user has set OMP_NUM_THREADS and not the launcher."""

import os
from types import SimpleNamespace

import pytest

from trainkit.training import launch

CORES = 8


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
