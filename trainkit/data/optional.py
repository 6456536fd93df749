"""Packages that only some flags need."""

import importlib
from types import ModuleType

from trainkit.errors import UserError


def load_package(name: str, flag: str) -> ModuleType:
    """Import it late. Raises `UserError` naming the flag that needs it and the command that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"{flag} needs the package {name}: pip install {name}") from None
