"""Python's garbage collector, kept from looking again and again at what imports have made.

JAX and the libraries on it are 140,000 objects that live as long as the process. A full collection
walks all of them, which takes a tenth of a second and finds nothing; Python makes two while they
are imported, more while a run starts, and more when the process ends. See
`docs/decisions/0012-a-quick-start.md` for what was measured.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def spared() -> Generator[None]:
    """Pauses the collector for imports, and spares it what they have made: `gc.freeze`.

    Objects of the user's own must stay collectable, so it does nothing where JAX was imported
    before, or where `DISTAFF_GC=off` is set.
    """
    if "jax" in sys.modules or not gc.isenabled() or _is_off():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def _is_off() -> bool:
    return os.environ.get("DISTAFF_GC", "").lower() in ("off", "0", "false", "no")
