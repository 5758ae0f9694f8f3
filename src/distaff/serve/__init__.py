"""Serves a trained model over HTTP: an ASGI application that computes requests in batches."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from distaff.serve.options import ServeOptions

if TYPE_CHECKING:
    from distaff.serve.app import Application
    from distaff.serve.model import Form, ServedModel

__all__ = ["Application", "Form", "ServeOptions", "ServedModel"]

_PLACES = {"Application": "app", "Form": "model", "ServedModel": "model"}


def __getattr__(name: str) -> Any:
    """Imports what needs JAX when it is used, so that the help of the command starts without it."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
