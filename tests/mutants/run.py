"""Show that the suite notices deliberate faults, one per contract: each is put into a copy, and its tests must fail.

    python tests/mutants/run.py                     all of them (make mutants)
    python tests/mutants/run.py ema_off_by_one ...  some of them
    python tests/mutants/run.py --check             only whether each still applies, in a second

Fails if a fault survives its tests, or no longer applies to the code: then point it at the code as it is now. A file
of tests that fails without any fault is reported too, since it would catch everything.
"""

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parent.parent.parent
TESTS_FAILED, TIMEOUT_S = 1, 400  # pytest's exit status; seconds per fault


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults to try (default: all)")
    parser.add_argument("--check", action="store_true", help="only check that each fault applies")
    parser.add_argument("--jobs", type=int, default=2, help="faults to try at a time (default: 2)")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - {fault.name for fault in FAULTS}
    if unknown:
        parser.error(f"no fault is called {', '.join(sorted(unknown))}")
    chosen = [fault for fault in FAULTS if not arguments.names or fault.name in arguments.names]
    stale = [problem for fault in chosen if (problem := why_stale(fault, ROOT))]
    print("\n".join(stale), end="\n" * bool(stale))
    if arguments.check:
        print(f"{len(chosen) - len(stale)} of {len(chosen)} faults apply")
        return bool(stale)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(arguments.jobs) as executor:
        applicable = [fault for fault in chosen if not why_stale(fault, ROOT)]
        selections = list(dict.fromkeys(fault.tests for fault in applicable))
        sound = dict(zip(selections, executor.map(lambda tests: passes(tests, Path(folder)), selections), strict=True))
        results = list(executor.map(lambda fault: sound[fault.tests] and try_fault(fault, Path(folder)), applicable))
    broken = [" ".join(tests) for tests, is_sound in sound.items() if not is_sound]
    print("\n".join(f"fails without a fault: {tests}" for tests in broken), end="\n" * bool(broken))
    print(f"{sum(results)} of {len(chosen)} faults caught, {len(stale)} do not apply")
    return sum(results) < len(chosen)


def why_stale(fault: Fault, root: Path) -> str | None:
    """Why `fault` cannot be put into the code below `root`, on one line; None if it can."""
    file = root / fault.file
    count = file.read_text(encoding="utf-8").count(fault.old) if file.is_file() else 0
    if count == 1:
        return None
    return f"does not apply: {fault.name}: {fault.file} holds {fault.old!r} {count} times, not once"


def passes(tests: tuple[str, ...], folder: Path) -> bool:
    """Whether `tests` pass as the code is."""
    with copied(folder) as copy:
        return run_tests(tests, copy) == 0


def try_fault(fault: Fault, folder: Path) -> bool:
    """Whether the tests of `fault` fail with it."""
    started = time.monotonic()
    with copied(folder) as copy:
        file = copy / fault.file
        file.write_text(file.read_text(encoding="utf-8").replace(fault.old, fault.new), encoding="utf-8")
        status = run_tests(fault.tests, copy)
    result = "caught" if status == TESTS_FAILED else "SURVIVED" if status == 0 else f"pytest ended with {status}"
    print(f"{result:10} {time.monotonic() - started:5.0f} s  {fault.name}: {fault.contract}", flush=True)
    return status == TESTS_FAILED


@contextlib.contextmanager
def copied(folder: Path) -> Iterator[Path]:
    """A copy of the tracked files below `folder`, deleted at the end."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as copy:
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).is_file():
                (Path(copy) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, Path(copy) / name)
        yield Path(copy)


def run_tests(tests: tuple[str, ...], copy: Path) -> int:
    """Exit status of pytest; a run that hangs counts as failed, as the suite's own limit would have it."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return TESTS_FAILED
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
