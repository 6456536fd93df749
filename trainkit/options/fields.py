"""Declare the fields of an options dataclass: one flag each, with help, choices and range."""

import dataclasses
import inspect
import math
import re
import types
import typing
from typing import Any

from trainkit.errors import UserError

PATH_FLAG = re.compile(r"(\w+_)?(dir|file|path|hdf5|inspect|generated|reference)")


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


def check_ranges(options: Any) -> None:
    """Raise `UserError` for a number outside the interval that its field declares; NaN is outside of each."""
    for field in dataclasses.fields(options):
        within = field.metadata.get("within")
        value = getattr(options, field.name)
        for number in value if isinstance(value, list) else [value]:
            check_range(f"--{field.name}", number, within)


def check_range(name: str, number: Any, within: str | None) -> None:
    """Raise `UserError` if `number` (not None) of the flag `name` is outside the interval `within` (not None)."""
    if within is not None and number is not None and not _is_within(number, within):
        raise UserError(f"{name} {number:g} must be {describe_range(within)}")


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


def groups_of(options_class: type) -> list[type]:
    """The dataclasses that declare the fields, in the order in which the script lists its bases."""
    bases = [base for base in options_class.__mro__ if base is not object and dataclasses.is_dataclass(base)]
    return [base for base in bases if inspect.get_annotations(base)]


def default_of(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def value_type_of(hint: Any) -> type:
    """`int` for int, int | None and list[int]."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    return typing.get_args(hint)[0] if typing.get_origin(hint) is list else hint
