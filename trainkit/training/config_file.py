"""OUTPUT/config.yaml: every setting of a run, for `--config`, and in comments what else it depended on.

A run from this file, on as many processes, is the same run: only --output_dir is to be another.
"""

import dataclasses
import inspect
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from trainkit import __version__
from trainkit.atomic import write_text
from trainkit.options.fields import default_of, groups_of
from trainkit.options.training import SECRET_OPTIONS
from trainkit.versions import git_commit, versions

CONFIG_NAME = "config.yaml"
START = "# start: "  # of a line of the history
# What one start does, and not what is trained: a run from the file must not resume, delete or stay quiet.
OF_ONE_START = (
    "resume_from_checkpoint",
    "overwrite_output_dir",
    "dry_run",
    "quiet",
    "local_rank",
    "find_learning_rate",
)


def write_config(output_dir: Path, settings: Any, facts: Sequence[tuple[str, str]], step: int) -> None:
    """Write config.yaml of the options `settings` (a dataclass), without secrets.

    `facts` are further lines of the head, name and value. A start at `step` above 0 adds a line to the history of the
    file that is there; step 0 begins a new one.
    """
    history = _history(output_dir / CONFIG_NAME) if step else []
    history.append(f"{START}{time.strftime('%Y-%m-%d %H:%M:%S %z')}, step {step}, {dict(facts)['processes']}")
    write_text(output_dir / CONFIG_NAME, config_text(settings, facts, history))


def config_text(settings: Any, facts: Sequence[tuple[str, str]], history: Sequence[str]) -> str:
    """The text of config.yaml: first what differs from the defaults, then the defaults."""
    script = Path(sys.argv[0]).name
    fields = {field.name: field for field in dataclasses.fields(settings)}
    given: dict[str, Any] = {}
    left: dict[str, Any] = {}
    for name in (name for group in groups_of(type(settings)) for name in inspect.get_annotations(group)):
        if name not in (*SECRET_OPTIONS, *OF_ONE_START):
            value = getattr(settings, name)
            (left if value == default_of(fields[name]) else given)[name] = value
    secrets = [f"--{name}" for name in SECRET_OPTIONS if getattr(settings, name, None)]
    lines = [
        "# Every setting of this run. The same run again, elsewhere:",
        f"#   {script} --config {CONFIG_NAME} --output_dir OTHER",
        "#",
        *(f"# {name}: {value}" for name, value in [*_environment(), *facts]),
        *([f"# given, and not written here: {', '.join(secrets)}"] if secrets else []),
        *history,
        "",
        *_yaml_lines(given),
        "",
        f"# the defaults of trainkit {__version__}",
        *_yaml_lines(left),
    ]
    return "\n".join(lines) + "\n"


def _yaml_lines(values: dict[str, Any]) -> list[str]:
    return [
        yaml.safe_dump({name: value}, default_flow_style=False, allow_unicode=True, width=10**6).rstrip("\n")
        for name, value in values.items()
    ]


def _history(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    return [line for line in lines if line.startswith(START)]


def _environment() -> list[tuple[str, str]]:
    packages = versions()
    return [
        ("trainkit", f"{packages.pop('trainkit')}, git {git_commit() or 'unknown'}"),
        ("packages", ", ".join(f"{name} {number}" for name, number in packages.items() if name != "python")),
        ("python", f"{packages['python']}, {platform.platform()}"),
        ("working directory", os.getcwd()),
    ]
