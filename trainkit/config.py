"""Command line and YAML files -> an options dataclass.

The options of a script are a dataclass whose bases are the groups that it shares with other scripts. Every field is
one flag of the same name. A value on the command line overrides those of the `--config` files, a later file overrides
an earlier one, and both override the default of the field. Nothing here imports torch, so that `--help` is quick.
"""

import argparse
import dataclasses
import difflib
import inspect
import math
import os
import re
import shutil
import sys
import textwrap
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

from trainkit import __version__
from trainkit.errors import UserError, one_line

T = TypeVar("T")
TRUE_WORDS, FALSE_WORDS = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
PATH_FLAG = re.compile(r"(\w+_)?(dir|file|path|hdf5|inspect|generated|reference)")
NAME_WIDTH, MAX_WIDTH = 34, 140  # of --help
CONFIG_HELP = (
    "YAML files of `flag: value`; a later file overrides an earlier one, and the command line overrides all of them"
)


def option(
    default: Any,
    help: str,
    *,
    choices: tuple | None = None,
    nargs: str | None = None,
    within: str | None = None,
) -> Any:
    """Declare one flag: a dataclass field with its default, one line of help (with the unit) and its allowed values.

    `within` is the interval of a number, such as "[0, 1)" or "(0, inf)". `nargs="+"` makes a list of the element type
    of the field (annotate `list[str]`). A default of None means "not given".
    """
    metadata = {"help": help, "choices": choices, "nargs": nargs, "within": within}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse_options(options_class: type[T], description: str, argv: list[str] | None = None) -> T:
    """Read `options_class` from the command line (`argv`, or `sys.argv`), over the YAML files that `--config` names.

    `--help` and `--version` print and exit. Raises `UserError` naming the nearest known name for an unknown flag or
    YAML key, and the flag for a bad value.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if asked := _asked_for_help(arguments):
        print(format_help(options_class, description, asked[1:]), end="")
        sys.exit(0)
    if "--version" in arguments:
        print(f"trainkit {__version__}")
        sys.exit(0)
    parser = build_parser(options_class, description)
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", nargs="+", action="extend", default=[])
    for config_file in early.parse_known_args(arguments)[0].config:
        parser.set_defaults(**_read_yaml(Path(config_file).expanduser(), parser))
    values, unknown = parser.parse_known_args(arguments)
    if unknown:
        flag = next((word for word in unknown if word.startswith("-")), unknown[0])
        known = [name for action in parser._actions for name in action.option_strings]
        raise UserError(f"unknown argument {flag}{_nearest(flag.split('=')[0], known)}")
    del values.config
    options = options_class(**{name: _expanded(name, value) for name, value in vars(values).items()})
    check_ranges(options)
    return options


def check_ranges(options: Any) -> None:
    """Raise `UserError` for a number outside the interval that its field declares; NaN is outside of each."""
    for field in dataclasses.fields(options):
        within = field.metadata.get("within")
        value = getattr(options, field.name)
        if within is None or value is None:
            continue
        for number in value if isinstance(value, list) else [value]:
            if not _is_within(number, within):
                raise UserError(f"--{field.name} {number:g} must be {describe_range(within)}")


def describe_range(within: str) -> str:
    """'at least 1', 'more than 0', '0 to 1' and the like, for an interval such as "[0, 1)"."""
    low, high = _ends(within)
    from_low = f"at least {low:g}" if within[0] == "[" else f"more than {low:g}"
    to_high = f"at most {high:g}" if within[-1] == "]" else f"less than {high:g}"
    if math.isinf(low) and math.isinf(high):
        return "finite"
    if math.isinf(high):
        return from_low
    if within[0] == "[" and within[-1] == "]":
        return f"{low:g} to {high:g}"
    return f"{from_low} and {to_high}"


def _ends(within: str) -> tuple[float, float]:
    low, high = within[1:-1].split(",")
    return float(low), float(high)


def _is_within(number: float, within: str) -> bool:
    low, high = _ends(within)
    above = number >= low if within[0] == "[" else number > low
    return above and (number <= high if within[-1] == "]" else number < high)


def _expanded(name: str, value: Any) -> Any:
    """`value` with ~ and $VARIABLES replaced if the flag takes a path; other words as UTF-8, whatever the locale."""
    if isinstance(value, list):
        return [_expanded(name, item) for item in value]
    if not isinstance(value, str) or "://" in value:
        return value
    if PATH_FLAG.fullmatch(name):
        return os.path.expanduser(os.path.expandvars(value))
    return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are `UserError`s."""

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message} (see --help)")


def build_parser(options_class: type, description: str) -> argparse.ArgumentParser:
    """A parser with one argument per field of `options_class`."""
    parser = Parser(description=description, allow_abbrev=False, add_help=False)
    parser.add_argument("--config", nargs="+", action="extend")
    hints = typing.get_type_hints(options_class)
    for group_class in _groups(options_class):
        for name in inspect.get_annotations(group_class):
            _add_argument(parser, options_class.__dataclass_fields__[name], hints[name])
    return parser


def _groups(options_class: type) -> list[type]:
    """The dataclasses that declare the fields, in the order in which the script lists its bases."""
    bases = [base for base in options_class.__mro__ if base is not object and dataclasses.is_dataclass(base)]
    return [base for base in bases if inspect.get_annotations(base)]


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()


def _add_argument(parser: argparse.ArgumentParser, field: dataclasses.Field, hint: Any) -> None:
    flag, value_type, default = f"--{field.name}", _value_type(hint), _default(field)
    if value_type is bool:
        parser.add_argument(flag, action=Switch, default=default)
        return
    parser.add_argument(
        flag,
        type=_converter(value_type),
        choices=field.metadata["choices"],
        nargs=field.metadata["nargs"],
        default=default,
    )


# Help


def _asked_for_help(arguments: list[str]) -> list[str]:
    """["--help"], or with the names of the groups to show; [] if nobody asks."""
    for position, word in enumerate(arguments):
        if word in ("-h", "--help"):
            return ["--help", *(name for name in arguments[position + 1 :] if not name.startswith("-"))]
    return []


def format_help(
    options_class: type, description: str, wanted: list[str] | None = None, width: int | None = None
) -> str:
    """The text of --help: usage, description, the groups, and the flags of all groups or of the `wanted` ones.

    `width` is in characters, by default that of the terminal. Raises `UserError` for an unknown group.
    """
    width = min(width or shutil.get_terminal_size((100, 24)).columns, MAX_WIDTH)
    script, groups = Path(sys.argv[0]).name, {_title(group): group for group in _groups(options_class)}
    hints = typing.get_type_hints(options_class)
    for name in wanted or ():
        if name not in groups:
            raise UserError(f"--help {name}: the groups of flags are {', '.join(groups)}")
    first = next((name for name in ("train_data_dir", "model_name_or_path", "model_dir") if name in hints), None)
    first = f" --{first} {_metavar_of(first)}" if first else ""
    lines = [f"usage: {script}{first} [options]", ""]
    if not wanted:
        lines += [*description.strip().splitlines(), "", f"Groups of flags ({script} --help GROUP shows one):", ""]
        lines += [f"  {name:<16}{_purpose(group)}" for name, group in groups.items()]
        lines += ["", *_entry("--config FILE ...", CONFIG_HELP, width)]
    for name, group in groups.items():
        if wanted and name not in wanted:
            continue
        lines += ["", f"{name}: {_purpose(group)}"]
        for field_name in inspect.get_annotations(group):
            field = options_class.__dataclass_fields__[field_name]
            lines += _entry(_usage(field, hints[field_name]), _help_text(field), width)
    return "\n".join(lines) + "\n"


def _title(group: type) -> str:
    return (group.__doc__ or group.__name__).partition(":")[0].strip().lower()


def _purpose(group: type) -> str:
    return (group.__doc__ or "").partition(":")[2].strip()


def _metavar_of(name: str) -> str:
    return "DIR" if name.endswith("_dir") else "FOLDER_OR_ID" if name.endswith("_or_path") else "FILE"


def _usage(field: dataclasses.Field, hint: Any) -> str:
    value_type, choices = _value_type(hint), field.metadata["choices"]
    if value_type is bool:
        return f"--{field.name} / --no_{field.name}"
    metavar = {int: "N", float: "X"}.get(value_type, "TEXT")
    if value_type is str and PATH_FLAG.fullmatch(field.name):
        metavar = _metavar_of(field.name)
    if choices:
        metavar = "|".join(map(str, choices))
    return f"--{field.name} {metavar}{' ...' if field.metadata['nargs'] else ''}"


def _help_text(field: dataclasses.Field) -> str:
    default, within, notes = _default(field), field.metadata["within"], []
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


class Switch(argparse.Action):
    """`--flag` and `--no_flag`, and also `--flag true` or `--flag false`."""

    def __init__(self, option_strings, dest, default=None, help=None):
        negated = "--no_" + option_strings[0].removeprefix("--")
        super().__init__([*option_strings, negated], dest, nargs="?", default=default, type=_to_bool, help=help)

    def __call__(self, parser, namespace, value, option_string=None):
        value = True if value is None else value
        setattr(namespace, self.dest, not value if option_string == self.option_strings[1] else value)


def _value_type(hint: Any) -> type:
    """`int` for int, int | None and list[int]."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    return typing.get_args(hint)[0] if typing.get_origin(hint) is list else hint


def _converter(value_type: type):
    return {bool: _to_bool, int: _to_int}.get(value_type, value_type)


def _to_bool(text: str) -> bool:
    if text.lower() not in TRUE_WORDS + FALSE_WORDS:
        raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")
    return text.lower() in TRUE_WORDS


def _to_int(text: str) -> int:
    """Whole numbers, `1e6` among them."""
    try:
        number = int(text) if text.strip("+-").isdigit() else float(text)
        if number == int(number):
            return int(number)
    except (ValueError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(f"'{text}' is not a whole number")


class _Loader(yaml.SafeLoader):
    """Refuses a key that occurs twice: YAML readers keep the last one silently."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key) for key, _ in node.value]
        twice = next((key for number, key in enumerate(keys) if key in keys[:number]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"'{twice}' occurs twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The file's keys and values, each converted and checked as if it were typed on the command line."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}; give the path of a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError, TypeError) as error:
        raise UserError(f"--config {path} is not YAML in UTF-8: {one_line(error)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"--config {path} must consist of lines of the form 'flag: value'")
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    values = {}
    for key, value in content.items():
        if key not in actions:
            raise UserError(f"--config {path}: unknown key '{key}'{_nearest(str(key), list(actions))}")
        values[key] = _yaml_value(path, parser, actions[key], value)
    return values


def _yaml_value(path: Path, parser: argparse.ArgumentParser, action: argparse.Action, value: Any) -> Any:
    """PyYAML reads `1e-4` as a string and `1` for a float flag as an int: the flag's own type decides."""
    if value is None:
        if action.default is None:
            return None
        raise UserError(f"--config {path}: '{action.dest}' has no value; write one, or delete the line")
    if isinstance(value, dict) or isinstance(value, list) != (action.nargs == "+"):
        raise UserError(f"--config {path}: '{action.dest}' takes {'a list' if action.nargs == '+' else 'one value'}")
    if isinstance(value, list) and (not value or any(item is None or isinstance(item, list | dict) for item in value)):
        raise UserError(f"--config {path}: '{action.dest}' takes a list of one or more values")
    words = [_word(item, action.choices) for item in (value if isinstance(value, list) else [value])]
    try:
        converted = [parser._get_value(action, word) for word in words]
        for item in converted:
            parser._check_value(action, item)
    except argparse.ArgumentError as error:
        raise UserError(f"--config {path}: '{action.dest}': {error.message}") from None
    return converted if isinstance(value, list) else converted[0]


def _word(item: Any, choices: tuple | None) -> str:
    """What one would have typed: YAML reads a bare `no` or `yes` as a boolean, also where a flag has it as a word."""
    if not isinstance(item, bool):
        return str(item)
    words = TRUE_WORDS if item else FALSE_WORDS
    return next((word for word in words if word in (choices or ())), words[0])


def _nearest(name: str, known: list[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=1)
    return f": did you mean {matches[0]}?" if matches else " (see --help)"
