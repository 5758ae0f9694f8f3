"""Loads optional dependencies; a missing one raises an error that says what to install."""

from __future__ import annotations

import importlib
from types import ModuleType

from distaff.core.quiet import quiet
from distaff.errors import MissingExtraError


def load(integration: str, *, extra: str) -> ModuleType:
    """Imports `distaff.integrations.<integration>`; `extra` installs its dependency.

    Raises:
        MissingExtraError: the dependency is not installed.
    """
    try:
        with quiet():
            return importlib.import_module(f"distaff.integrations.{integration}")
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("distaff"):
            raise
        raise MissingExtraError(
            f"This feature needs the package {error.name!r}, which is not installed. "
            f'Install it with: pip install "distaff[{extra}]"'
        ) from error
