"""Third parties that a run may do without: found by string; a missing one names its remedy."""

from __future__ import annotations

import importlib
from types import ModuleType

from distaff.core.quiet import quiet
from distaff.errors import MissingExtraError


def load(integration: str, *, extra: str) -> ModuleType:
    """Imports `distaff.integrations.<integration>`.

    Args:
        integration: the file's name below `integrations/`, without `.py`.
        extra: the extra in `pyproject.toml` that installs what the file imports.

    Returns:
        The module.

    Raises:
        MissingExtraError: the package that the integration wraps is not installed.
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
