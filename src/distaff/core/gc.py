"""Excludes imported libraries from Python's garbage collection.

JAX and its libraries create 140,000 objects that live as long as the process. A full collection
walks all of them, takes 0.1 s and frees nothing. Python runs two during the imports, and more when
a run starts and when the process ends. `docs/decisions/0012-a-quick-start.md` has measurements.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def spared() -> Generator[None]:
    """Pauses the collector during imports, and excludes their objects with `gc.freeze`.

    The user's objects must stay collectable, so this does nothing if JAX is already imported, or
    if `DISTAFF_GC=off` is set.
    """
    is_off = os.environ.get("DISTAFF_GC", "").lower() in ("off", "0", "false", "no")
    if "jax" in sys.modules or not gc.isenabled() or is_off:
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()
