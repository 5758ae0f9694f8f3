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
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any


@contextmanager
def spared() -> Generator[None]:
    """Pauses the collector during imports, and excludes their objects with `gc.freeze`.

    The user's objects must stay collectable, so this does nothing if JAX is already imported, or
    not imported in the block, or if `DISTAFF_GC=off` is set.
    """
    is_off = os.environ.get("DISTAFF_GC", "").lower() in ("off", "0", "false", "no")
    if "jax" in sys.modules or not gc.isenabled() or is_off:
        yield
        return
    gc.disable()
    try:
        yield
        if "jax" in sys.modules:
            gc.freeze()
    finally:
        gc.enable()


class SparingFinder(MetaPathFinder):
    """Finds the modules of Distaff until one of them has imported JAX, in a block of `spared`.

    So `from distaff.tasks import Classifier` is as quick as `from distaff import tasks`.
    """

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Returns where a module of Distaff is; None for other modules, or with JAX imported."""
        if not fullname.startswith("distaff.") or "jax" in sys.modules or not gc.isenabled():
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or type(spec.loader) is not SourceFileLoader:
            return None
        spec.loader = _SparingLoader(spec.loader.name, spec.loader.path)
        return spec


class _SparingLoader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        with spared():
            super().exec_module(module)


def spare_imports() -> None:
    """Spares imports of Distaff's modules, whichever the program imports first."""
    if not any(type(finder) is SparingFinder for finder in sys.meta_path):
        last = len(sys.meta_path)
        place = sys.meta_path.index(PathFinder) if PathFinder in sys.meta_path else last
        sys.meta_path.insert(place, SparingFinder())
