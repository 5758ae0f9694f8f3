"""Serves a trained model over HTTP: an ASGI application that computes requests in batches."""

from distaff.serve.app import Application
from distaff.serve.model import Form, ServedModel
from distaff.serve.options import ServeOptions

__all__ = ["Application", "Form", "ServeOptions", "ServedModel"]
