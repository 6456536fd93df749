"""Packages that only some flags need."""

import importlib
from types import ModuleType

from trainkit.errors import UserError


def load_package(name: str, flag: str, distribution: str | None = None) -> ModuleType:
    """Import the module `name` when a flag first needs it.

    `distribution` is the name that pip installs it by, where that differs from the module's.

    Raises:
        UserError: it is not installed; the message names `flag` and the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        distribution = distribution or name.partition(".")[0]
        raise UserError(f"{flag} needs the package {distribution}: pip install {distribution}") from None
