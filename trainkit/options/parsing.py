"""Command line and YAML files -> an options dataclass.

The options of a script are a dataclass whose bases are the groups that it shares with other scripts. Every field is
one flag of the same name. A value on the command line overrides those of the `--config` files, a later file overrides
an earlier one, and both override the default of the field. Nothing here imports torch, so that `--help` is quick.
"""

import argparse
import dataclasses
import inspect
import os
import re
import sys
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from trainkit import __version__
from trainkit.errors import UserError, one_line
from trainkit.options.fields import PATH_FLAG, check_range, check_ranges, default_of, groups_of, value_type_of
from trainkit.options.help import format_help
from trainkit.options.suggestions import suggestion
from trainkit.options.terminal import TerminalOptions
from trainkit.terminal import set_output

T = TypeVar("T")
NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
TRUE_WORDS, FALSE_WORDS = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def parse_options(options_class: type[T], description: str, argv: list[str] | None = None) -> T:
    """Read `options_class` from the command line (`argv`, or `sys.argv`), over the YAML files that `--config` names.

    `--help` and `--version` print and exit. Raises `UserError` naming the flag that was probably meant for an unknown
    flag or YAML key, and the flag for a bad value. All mistakes in the YAML files are named at once.
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
    problems: list[str] = []
    for config_file in early.parse_known_args(arguments)[0].config:
        parser.set_defaults(**_read_yaml(Path(config_file).expanduser(), parser, problems))
    if problems:
        raise UserError("; ".join(problems))
    values, unknown = parser.parse_known_args(arguments)
    if unknown:
        flags = [word for word in unknown if word.startswith("-")] or unknown[:1]
        known = [name for action in parser._actions for name in action.option_strings]
        meant = [f"{flag}{suggestion(flag.split('=')[0], known)}" for flag in flags]
        raise UserError(f"unknown argument {'; '.join(meant)}")
    del values.config
    options = options_class(**{name: _expanded(name, value) for name, value in vars(values).items()})
    check_ranges(options)
    if isinstance(options, TerminalOptions):
        set_output(options)
    return options


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

    def __init__(self, **settings):
        super().__init__(**settings)
        self._negative_number_matcher = NEGATIVE_NUMBER  # argparse takes -1e-4 for a flag

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            meant = suggestion(str(value), map(str, action.choices)).removesuffix(" (see --help)")
            raise argparse.ArgumentError(action, f"'{value}' is none of {', '.join(map(str, action.choices))}{meant}")

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message} (see --help)")


def build_parser(options_class: type, description: str) -> argparse.ArgumentParser:
    """A parser with one argument per field of `options_class`."""
    parser = Parser(description=description, allow_abbrev=False, add_help=False)
    parser.add_argument("--config", nargs="+", action="extend")
    hints, fields = (
        typing.get_type_hints(options_class),
        {field.name: field for field in dataclasses.fields(options_class)},
    )
    for group_class in groups_of(options_class):
        for name in inspect.get_annotations(group_class):
            _add_argument(parser, fields[name], hints[name])
    return parser


def _add_argument(parser: argparse.ArgumentParser, field: dataclasses.Field, hint: Any) -> None:
    flag, value_type, default = f"--{field.name}", value_type_of(hint), default_of(field)
    if value_type is bool:
        parser.add_argument(flag, action=Switch, default=default)
        return
    argument = parser.add_argument(
        flag,
        type=_converter(value_type),
        choices=field.metadata["choices"],
        nargs=field.metadata["nargs"],
        default=default,
    )
    vars(argument)["within"] = field.metadata["within"]


def _asked_for_help(arguments: list[str]) -> list[str]:
    """["--help"], or with the names of the groups to show; [] if nobody asks."""
    for position, word in enumerate(arguments):
        if word in ("-h", "--help"):
            return ["--help", *(name for name in arguments[position + 1 :] if not name.startswith("-"))]
    return []


class Switch(argparse.Action):
    """`--flag` and `--no_flag`, and also `--flag true` or `--flag false`."""

    def __init__(self, option_strings, dest, default=None, help=None):
        negated = "--no_" + option_strings[0].removeprefix("--")
        super().__init__([*option_strings, negated], dest, nargs="?", default=default, type=_to_bool, help=help)

    def __call__(self, parser, namespace, value, option_string=None):
        value = True if value is None else value
        setattr(namespace, self.dest, not value if option_string == self.option_strings[1] else value)


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


def _read_yaml(path: Path, parser: argparse.ArgumentParser, problems: list[str]) -> dict[str, Any]:
    """The file's keys and values, each converted and checked as if it were typed on the command line.

    What is wrong with a key or value is added to `problems`. Raises `UserError` if the file cannot be read.
    """
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
    values, wrong = {}, []
    for key, value in content.items():
        try:
            if key not in actions:
                raise UserError(f"unknown key '{key}'{suggestion(str(key), actions)}")
            values[key] = _yaml_value(parser, actions[key], value)
        except UserError as error:
            wrong.append(str(error))
    if wrong:
        problems.append(f"--config {path}: {'; '.join(wrong)}")
    return values


def _yaml_value(parser: argparse.ArgumentParser, action: argparse.Action, value: Any) -> Any:
    """PyYAML reads `1e-4` as a string and `1` for a float flag as an int: the flag's own type decides."""
    if value is None:
        if action.default is None:
            return None
        raise UserError(f"'{action.dest}' has no value; write one, or delete the line")
    is_list = action.nargs in ("+", "*")
    if isinstance(value, dict) or (isinstance(value, list) and not is_list):
        raise UserError(f"'{action.dest}' takes {'a list' if is_list else 'one value'}")
    if is_list and not isinstance(value, list):
        value = [value]  # as on the command line
    if isinstance(value, list) and (not value or any(item is None or isinstance(item, list | dict) for item in value)):
        raise UserError(f"'{action.dest}' takes a list of one or more values")
    words = [_word(item, action.choices) for item in (value if isinstance(value, list) else [value])]
    try:
        converted = [parser._get_value(action, word) for word in words]
        for item in converted:
            parser._check_value(action, item)
    except argparse.ArgumentError as error:
        raise UserError(f"'{action.dest}': {error.message}") from None
    for item in converted:
        check_range(f"'{action.dest}'", item, vars(action).get("within"))
    return converted if isinstance(value, list) else converted[0]


def _word(item: Any, choices: Iterable | None) -> str:
    """What one would have typed: YAML reads a bare `no` or `yes` as a boolean, also where a flag has it as a word."""
    if not isinstance(item, bool):
        return str(item)
    words = TRUE_WORDS if item else FALSE_WORDS
    return next((word for word in words if word in (choices or ())), words[0])
