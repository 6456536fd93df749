"""The option --cpu_times of the suite: CPU seconds per file and per test, which a busy machine does not change.

Children count too, those of the fork server included. A fixture counts for the test that runs it first.
"""

import resource
from collections import Counter

import process_helpers
import pytest


def cpu_seconds() -> float:
    """What this process and its ended children have used."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


class CpuTimes:
    """The pytest plugin, in the workers and in the process that reports."""

    def __init__(self):
        self._mark, self._collection = 0.0, []

    def pytest_collection_finish(self, session):
        self._mark = cpu_seconds()
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["collection_cpu_s"] = self._mark
        self._collection.append(self._mark)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        self._collection.append(getattr(node, "workeroutput", {}).get("collection_cpu_s", 0.0))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self):
        report = yield
        report.cpu_s, self._mark = (now := cpu_seconds()) - self._mark, now  # xdist passes it on
        return report

    def pytest_terminal_summary(self, terminalreporter):
        tests = Counter()
        for report in (report for reports in terminalreporter.stats.values() for report in reports):
            if hasattr(report, "cpu_s"):
                tests[report.nodeid] += report.cpu_s
        for test, seconds in process_helpers.forked_cpu_seconds():
            tests[test] += seconds
        files = Counter()
        for test, seconds in tests.items():
            files[test.partition("::")[0]] += seconds
        terminalreporter.section("CPU seconds")
        lines = [f"{sum(files.values()):8.1f}  tests", f"{sum(self._collection):8.1f}  imports and collection"]
        for table, least in ((files, 0.0), (tests, 0.2)):
            lines += ["", *(f"{seconds:8.2f}  {name}" for name, seconds in table.most_common() if seconds >= least)]
        terminalreporter.write_line("\n".join(lines))
