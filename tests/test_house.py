"""The house: what is installed, what `make` does about it, and what a file may look like."""

import ast
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from source_tree import ROOT

MAX_LINES, MAX_FUNCTION_LINES = 350, 60
# In pieces, so that this file does not hold them.
FORBIDDEN = ["TO" + "DO", "FIX" + "ME", "work" + "place", "/wo" + "rk/", "/ro" + "ot/", "/tmp" + "/v/"]


def _files() -> list[Path]:
    """What git tracks; in a copy without git, everything that is not hidden or made by a run."""
    if shutil.which("git"):
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
        if listed.returncode == 0:
            return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    found = [file for file in ROOT.rglob("*") if file.is_file()]
    hidden = re.compile(r"(^|/)(\.|__pycache__|demo/)")
    return [file for file in found if not hidden.search(file.relative_to(ROOT).as_posix())]


def _text_files() -> list[Path]:
    return [file for file in _files() if file.suffix in {".py", ".md", ".txt", ".yaml", ".toml"} or not file.suffix]


def _python_files() -> list[Path]:
    return [file for file in _files() if file.suffix == ".py"]


def test_a_file_can_be_read_in_one_sitting():
    lengths = {
        str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines()) for file in _python_files()
    }
    assert not {name: length for name, length in lengths.items() if length >= MAX_LINES}


def long_functions(source: str) -> list[str]:
    """Functions of more than `MAX_FUNCTION_LINES` lines, decorators and docstring included."""
    functions = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    starts = {node: min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) for node in functions}
    return [node.name for node in functions if node.end_lineno - starts[node] + 1 > MAX_FUNCTION_LINES]


def test_a_function_fits_on_a_screen():
    assert long_functions("def short():\n    pass\ndef long():\n" + "    pass\n" * MAX_FUNCTION_LINES) == ["long"]
    found = {str(file.relative_to(ROOT)): long_functions(file.read_text(encoding="utf-8")) for file in _python_files()}
    assert not {file: names for file, names in found.items() if names}


def test_no_file_names_a_machine_or_leaves_work_undone():
    forbidden = re.compile("|".join(rf"(?<!\w){re.escape(word)}" for word in FORBIDDEN))  # not the tail of a path
    found = [
        f"{file.relative_to(ROOT)}: {match[0]}"
        for file in _text_files()
        for match in forbidden.finditer(file.read_text(encoding="utf-8"))
    ]
    assert not found


def test_the_licence_is_there():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0" in text and "END OF TERMS AND CONDITIONS" in text


def _names(file: str) -> dict[str, list[str]]:
    """Normalized distribution name -> its lines in a requirements file."""
    lines = {}
    for line in (ROOT / file).read_text().splitlines():
        name = re.match(r"[A-Za-z0-9._-]+", line)
        if name:
            lines.setdefault(re.sub(r"[-_.]+", "-", name[0]).lower(), []).append(line)
    return lines


def test_every_requirement_is_pinned_to_one_version_for_each_python():
    pins = _names("constraints.txt")
    for name in [*_names("requirements.txt"), *_names("requirements-dev.txt"), "mlxtend"]:
        assert name in pins, f"constraints.txt does not pin {name}"
    for name, lines in pins.items():
        assert all(re.match(r"[^=<>~!]+==[\w.]+(; python_version (<|>=) \"3\.\d+\")?$", line) for line in lines), lines
        assert len(lines) == 1 or {line.partition("; ")[2] for line in lines} == {
            'python_version >= "3.11"',
            'python_version < "3.11"',
        }, name


def test_torch_is_pinned_and_torchvision_is_nowhere():
    assert _names("constraints.txt")["torch"] == ["torch==2.13.0"]
    for file in ("requirements.txt", "requirements-dev.txt", "constraints.txt", "pyproject.toml"):
        assert "torchvision" not in _names(file)


@pytest.mark.parametrize("file", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda file: file.name)
def test_accelerate_takes_each_config_and_every_line_is_explained(file):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    text = file.read_text()
    config, loaded = yaml.safe_load(text), load_config_from_file(str(file))
    assert (loaded.num_processes, loaded.num_machines) == (config["num_processes"], config["num_machines"])
    assert loaded.use_cpu is (file.stem == "cpu")
    assert f"--config_file accelerate_configs/{file.name}" in text, "the head shows the command"
    unexplained = [line for line in text.splitlines() if re.match(r"\s*\w+:", line) and "# " not in line]
    assert all(re.match(r"num_(machines|processes): \d+$", line) for line in unexplained), unexplained
    engine = {"FSDP": "fsdp_config", "DEEPSPEED": "deepspeed_config"}.get(config["distributed_type"])
    assert [name for name in config if name.endswith("_config") and name != "dynamo_config"] == [engine] * bool(engine)
    if engine:  # a misspelt key would be ignored without a word
        known = {action.dest for action in launch_command_parser()._actions}
        assert config[engine].keys() <= known and getattr(loaded, engine) == config[engine]


@pytest.fixture
def fake_house(tmp_path):
    """The Makefile with empty requirements and a `python` that only writes down how it was called."""
    house = tmp_path / "a house"
    house.mkdir()
    shutil.copy(ROOT / "Makefile", house)
    for name in ("requirements.txt", "requirements-dev.txt", "constraints.txt", "pyproject.toml"):
        (house / name).write_text("")
    python = house / "python"
    python.write_text(
        "#!/bin/sh\n"
        'echo "$@" >> calls\n'
        'case "$*" in\n'
        '*venv*) mkdir -p .venv/bin; cp "$0" .venv/bin/python;;\n'
        "*install*) test ! -e broken;;\n"
        "esac\n"
    )
    python.chmod(0o755)
    return house


def _make(house: Path, target: str) -> tuple[int, list[str]]:
    """Exit status, and how python was called."""
    (house / "calls").write_text("")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "ARGS"))}
    done = subprocess.run(["make", target, "PYTHON=./python"], cwd=house, env=environment, capture_output=True)
    return done.returncode, (house / "calls").read_text().splitlines()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
class TestMake:
    def test_set_up_runs_once_and_again_when_a_pin_changes(self, fake_house):
        status, calls = _make(fake_house, "venv")
        assert status == 0 and any("venv --clear .venv" in call for call in calls)
        assert any("--requirement requirements.txt" in call and "constraints.txt" in call for call in calls)
        assert not any("requirements-dev.txt" in call for call in calls)
        assert _make(fake_house, "venv") == (0, [])

        newer = (fake_house / ".venv" / ".run-ready").stat().st_mtime + 2
        os.utime(fake_house / "constraints.txt", (newer, newer))
        status, calls = _make(fake_house, "venv")
        assert status == 0 and any("install" in call for call in calls)
        assert not any("venv --clear" in call for call in calls)

    def test_an_installation_that_failed_is_begun_again(self, fake_house):
        (fake_house / "broken").touch()
        status, calls = _make(fake_house, "venv")
        assert status != 0 and any("install" in call for call in calls)
        (fake_house / "broken").unlink()
        status, calls = _make(fake_house, "venv")
        assert status == 0 and any("install" in call for call in calls)

    def test_tests_need_no_installation_once_it_is_done(self, fake_house):
        _, calls = _make(fake_house, "test")
        assert any("--requirement requirements-dev.txt" in call for call in calls) and calls[-1].startswith(
            "-m pytest"
        )
        status, calls = _make(fake_house, "test")
        assert status == 0 and len(calls) == 1 and calls[0].startswith("-m pytest")

    def test_help_is_the_default_and_names_every_target(self):
        shown = subprocess.run(["make", "-C", ROOT], capture_output=True, text=True).stdout
        targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
        assert all(f"make {target}" in shown for target in targets if target != "help")
