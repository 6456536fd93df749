"""The text of --help: flags in groups, one line of purpose per group, wrapped to the terminal."""

import dataclasses
import inspect
import re
import shutil
import sys
import textwrap
import typing
from pathlib import Path
from typing import Any

from trainkit.errors import UserError
from trainkit.options.fields import PATH_FLAG, default_of, describe_range, groups_of, value_type_of

NAME_WIDTH, MAX_WIDTH = 34, 140  # of --help
CONFIG_HELP = (
    "YAML files of `flag: value`; a later file overrides an earlier one, and the command line overrides all of them"
)


def format_help(
    options_class: type, description: str, wanted: list[str] | None = None, width: int | None = None
) -> str:
    """The text of --help: usage, description, the groups, and the flags of all groups or of the `wanted` ones.

    `width` is in characters, by default that of the terminal. Raises `UserError` for an unknown group.
    """
    width = min(width or shutil.get_terminal_size((100, 24)).columns, MAX_WIDTH)
    script, groups = Path(sys.argv[0]).name, {_title(group): group for group in groups_of(options_class)}
    hints = typing.get_type_hints(options_class)
    for name in wanted or ():
        if name not in groups:
            raise UserError(f"--help {name}: the groups of flags are {', '.join(groups)}")
    first = next((name for name in ("train_data_dir", "model_name_or_path", "model_dir") if name in hints), None)
    usage = f" --{first} {_metavar_of(first)}" if first else ""
    lines = [f"usage: {script}{usage} [options]", ""]
    if not wanted:
        lines += [*description.strip().splitlines(), "", f"Groups of flags ({script} --help GROUP shows one):", ""]
        lines += [f"  {name:<16}{_purpose(group)}" for name, group in groups.items()]
        lines += ["", *_entry("--config FILE ...", CONFIG_HELP, width)]
    fields = {field.name: field for field in dataclasses.fields(options_class)}
    for name, group in groups.items():
        if wanted and name not in wanted:
            continue
        lines += ["", f"{name}: {_purpose(group)}"]
        for field_name in inspect.get_annotations(group):
            field = fields[field_name]
            lines += _entry(_usage(field, hints[field_name]), _help_text(field), width)
    if not wanted:
        lines += ["", *textwrap.wrap(_exit_statuses("checkpointing_steps" in fields), width)]
    return "\n".join(lines) + "\n"


def _exit_statuses(with_checkpoints: bool) -> str:
    """What the exit status of a script means (`run_script`)."""
    stopped = ", or stopped by a signal after its checkpoint was written" if with_checkpoints else ""
    early = "interrupted by Ctrl-C before the first step, or twice" if with_checkpoints else "interrupted by Ctrl-C"
    return (
        f"Exit status: 0: done{stopped}; 1: an error, with one line that says what to do (a traceback is a bug); "
        f"130: {early}; 128 + N or -N: ended by signal N"
    )


def _title(group: type) -> str:
    return (group.__doc__ or group.__name__).partition(":")[0].strip().lower()


def _purpose(group: type) -> str:
    return (group.__doc__ or "").partition(":")[2].strip()


def _metavar_of(name: str) -> str:
    return "DIR" if name.endswith("_dir") else "FOLDER_OR_ID" if name.endswith("_or_path") else "FILE"


def _usage(field: dataclasses.Field, hint: Any) -> str:
    value_type, choices = value_type_of(hint), field.metadata["choices"]
    if value_type is bool:
        return f"--{field.name} / --no_{field.name}"
    metavar = {int: "N", float: "X"}.get(value_type, "TEXT")
    if value_type is str and PATH_FLAG.fullmatch(field.name):
        metavar = _metavar_of(field.name)
    if choices:
        metavar = "|".join(map(str, choices))
    return f"--{field.name} {metavar}{' ...' if field.metadata['nargs'] else ''}"


def _help_text(field: dataclasses.Field) -> str:
    default, within, notes = default_of(field), field.metadata["within"], []
    if within is not None and within != "(-inf, inf)":
        notes.append(describe_range(within))
    if default is not None and default != []:
        shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        notes.append(f"default: {shown.lower() if isinstance(default, bool) else shown}")
    return field.metadata["help"] + (f" ({'; '.join(notes)})" if notes else "")


def _entry(usage: str, text: str, width: int) -> list[str]:
    """One flag: its usage, and its help beside it or, where that is too long, below it."""
    wrapped = textwrap.wrap(text, max(width - NAME_WIDTH, 30), break_on_hyphens=False)
    head = f"  {usage}"
    if len(head) + 2 > NAME_WIDTH:
        heads = [usage] if len(usage) < width - 4 else _wrap_choices(usage, width - 6)
        return [*(f"  {part}" for part in heads), *(" " * NAME_WIDTH + line for line in wrapped)]
    first, *rest = wrapped or [""]
    return [f"{head:<{NAME_WIDTH}}{first}", *(" " * NAME_WIDTH + line for line in rest)]


def _wrap_choices(usage: str, width: int) -> list[str]:
    lines, line = [], ""
    for part in re.split(r"(?<=\|)", usage):
        if line and len(line) + len(part) > width:
            lines.append(line)
            line = "    "
        line += part
    return [*lines, line]
