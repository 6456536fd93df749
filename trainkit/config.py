"""Dataclass -> command line -> YAML.

A script's options are a dataclass whose bases are the groups it shares with other scripts; every field is one flag of
the same name. Values come, strongest first, from the command line, from the files of `--config` (a later one over an
earlier one) and from the field's default.
Nothing here imports torch, so that `--help` answers at once.
"""

import argparse
import dataclasses
import difflib
import inspect
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

from trainkit.errors import UserError

T = TypeVar("T")
TRUE_WORDS, FALSE_WORDS = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def option(default: Any, help: str, *, choices: tuple | None = None, nargs: str | None = None) -> Any:
    """Declare one flag: a dataclass field with its default, one line of help (with the unit) and its allowed values.

    `nargs="+"` makes a list of the field's element type (annotate `list[str]`); a default of None means "not given".
    """
    metadata = {"help": help, "choices": choices, "nargs": nargs}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse_options(options_class: type[T], description: str, argv: list[str] | None = None) -> T:
    """Read `options_class` from the command line (`argv`, or `sys.argv`), over the YAML files that `--config` names.

    Raises `UserError` naming the nearest known name for an unknown flag or YAML key, and the flag for a bad value.
    """
    parser = build_parser(options_class, description)
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", nargs="+", action="extend", default=[])
    for config_file in early.parse_known_args(argv)[0].config:
        parser.set_defaults(**_read_yaml(Path(config_file), parser))
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = next((word for word in unknown if word.startswith("-")), unknown[0])
        known = [name for action in parser._actions for name in action.option_strings]
        raise UserError(f"unknown argument {flag}{_nearest(flag.split('=')[0], known)}")
    del values.config
    return options_class(**vars(values))


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose mistakes are `UserError`s."""

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message} (see --help)")


def build_parser(options_class: type, description: str) -> argparse.ArgumentParser:
    """One argument a field, in one argument group a dataclass (its docstring is the heading)."""
    parser = Parser(
        description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, usage=None
    )
    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        nargs="+",
        action="extend",
        help="YAML files of flag: value; a later one overrides an earlier one, the command line all of them",
    )
    hints = typing.get_type_hints(options_class)
    for group_class in _groups(options_class):
        group = parser.add_argument_group(group_class.__doc__ or group_class.__name__)
        for name in inspect.get_annotations(group_class):
            field = options_class.__dataclass_fields__[name]
            _add_argument(group, field, hints[name])
    return parser


def _groups(options_class: type) -> list[type]:
    """The dataclasses that declare the fields, in the order in which the script lists its bases."""
    bases = [base for base in options_class.__mro__ if base is not object and dataclasses.is_dataclass(base)]
    return [base for base in bases if inspect.get_annotations(base)]


def _add_argument(group, field: dataclasses.Field, hint: Any) -> None:
    default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    help_text = field.metadata["help"].replace("%", "%%")
    if default is not None and default != []:
        help_text += f" (default: {default})"
    flag, value_type = f"--{field.name}", _value_type(hint)
    if value_type is bool:
        group.add_argument(flag, action=Switch, default=default, help=help_text)
        return
    choices, nargs = field.metadata["choices"], field.metadata["nargs"]
    metavar = "{" + ",".join(map(str, choices)) + "}" if choices else value_type.__name__.upper()
    group.add_argument(
        flag,
        type=_converter(value_type),
        choices=choices,
        nargs=nargs,
        default=default,
        help=help_text,
        metavar=metavar,
    )


class Switch(argparse.Action):
    """`--flag` and `--no_flag`, and `--flag true|false` as scripts write it."""

    def __init__(self, option_strings, dest, default=None, help=None):
        negated = "--no_" + option_strings[0].removeprefix("--")
        super().__init__([*option_strings, negated], dest, nargs="?", default=default, type=_to_bool, help=help)

    def __call__(self, parser, namespace, value, option_string=None):
        value = True if value is None else value
        setattr(namespace, self.dest, not value if option_string == self.option_strings[1] else value)

    def format_usage(self):
        return " | ".join(self.option_strings)


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


def _read_yaml(path: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The file's keys and values, each converted and checked as if it had been typed on the command line."""
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}; give the path of a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"--config {path} must hold lines of 'flag: value'")
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
        return None
    if isinstance(value, list) != (action.nargs == "+"):
        raise UserError(f"--config {path}: '{action.dest}' takes {'a list' if action.nargs == '+' else 'one value'}")
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
