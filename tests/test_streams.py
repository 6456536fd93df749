"""Printing never ends a script: closed streams, closed terminals, encodings that lack a letter."""

import os
import subprocess
import sys

import pytest
from source_tree import ROOT

SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from trainkit.errors import UserError, run_script

def main():
    for number in range(2000):
        print("line", number, "\\u00e4\\u2603" * 20, flush=number % 7 == 0)
        print("error", number, file=sys.stderr)
    open({done!r}, "w").write("done")
    {end}

run_script(main)
"""


@pytest.fixture
def script(tmp_path):
    def write(end="pass"):
        (tmp_path / "script.py").write_text(SCRIPT.format(root=str(ROOT), done=str(tmp_path / "done"), end=end))
        return [sys.executable, str(tmp_path / "script.py")]

    return write


@pytest.mark.parametrize("closing", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", "| head -n 1", "2>&1 | true"])
def test_closed_streams_do_not_end_a_script(script, tmp_path, closing):
    command = " ".join(script())
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; ({command}; echo $? > {tmp_path}/status) {closing}"], capture_output=True
    )
    assert (tmp_path / "done").read_text() == "done" and (tmp_path / "status").read_text().strip() == "0", done.stderr


def test_exit_codes(script, tmp_path):
    for end, code, message in (
        ("raise UserError('--flag 1 must be 2')", 1, b"error: --flag 1 must be 2\n"),
        ("raise KeyboardInterrupt", 130, b"interrupted\n"),
        ("sys.exit(3)", 3, b""),
        ("return 4", 4, b""),
    ):
        done = subprocess.run(script(end), capture_output=True)
        assert done.returncode == code and done.stderr.endswith(message)


def test_letters_that_the_terminal_lacks_are_escaped(script):
    environment = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run(script(), capture_output=True, env=environment)
    assert done.returncode == 0 and b"\\xe4\\u2603" in done.stdout


def test_the_first_process_reports_an_error_for_all(script):
    """A launcher ends the others while they wait; what only another process met is reported after the wait."""
    command = script("raise UserError('--flag is wrong')")
    first = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"LOCAL_RANK": "0"})
    assert first.returncode == 1 and first.stderr.endswith("error: --flag is wrong\n")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"LOCAL_RANK": "1"}) as other:
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(1.5)
        other.terminate()
        assert "error: --flag" not in other.stderr.read()
    command = script(
        "import trainkit.errors; trainkit.errors.OTHER_PROCESSES_WAIT_S = 0; raise UserError('--flag is wrong')"
    )
    late = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"LOCAL_RANK": "1"})
    assert late.returncode == 1 and late.stderr.endswith("error: --flag is wrong\n")
