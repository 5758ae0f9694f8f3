"""Joins the processes of a training: `initialize`."""

from distaff.distributed.joining import initialize

__all__ = ["initialize"]
