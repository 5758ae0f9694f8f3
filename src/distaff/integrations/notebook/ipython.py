"""IPython: an output of a notebook cell that is updated in place."""

from __future__ import annotations

from typing import Any

from IPython.core.getipython import get_ipython
from IPython.display import display


class CellOutput:
    """One output of a cell, as HTML, and as text for front ends without HTML."""

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, html: str, text: str) -> None:
        """Shows the output, or replaces it."""
        bundle = {"text/html": html, "text/plain": text}
        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)


def is_in_cell(stream: Any) -> bool:
    """Whether a stream is the output of a cell, rather than a file or a captured text."""
    kernel = getattr(get_ipython(), "kernel", None)
    return kernel is not None and type(stream).__module__.partition(".")[0] == "ipykernel"
