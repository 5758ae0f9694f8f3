"""Names classes and functions, and finds the imported ones by name.

A running script is the module `__main__`, but has another name when imported. Its classes are named
by the module's file name, so that both names agree.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

_SCRIPTS = ("__main__", "__mp_main__")


def module_name(name: str) -> str:
    """Returns the name under which a module can be imported.

    For a script, `__main__`, this is its module name, or its file name without `.py`; in a
    notebook, `__main__`.
    """
    module = sys.modules.get(name)
    if module is None or name not in _SCRIPTS:
        return name
    spec = getattr(module, "__spec__", None)
    if spec is not None and spec.name not in _SCRIPTS:
        return spec.name
    file = getattr(module, "__file__", None)
    return Path(file).stem if file else "__main__"


def name_of(named: Any) -> str:
    """Returns `module:qualified name` of a class or function."""
    return f"{module_name(named.__module__)}:{named.__qualname__}"


def chosen(name: str, candidates: Iterable[T]) -> T | None:
    """Returns the candidate with a name from `name_of`, or None if none or several match.

    If it was redefined, the last one is returned. A module may be named with its packages in one
    process and without them in another. So if no candidate has the full name, the only one with
    the same module and qualified name is returned. Names from a notebook have no module to
    compare.
    """
    known = {name_of(each): each for each in candidates}
    if name in known:
        return known[name]
    module, _, wanted = name.rpartition(":")
    alike = [
        each
        for other, each in known.items()
        if other.rpartition(":")[2] == wanted
        and ("__main__" in (module, other.rpartition(":")[0]) or _last(other) == _last(name))
    ]
    return alike[0] if len(alike) == 1 else None


def imported(name: str) -> Any:
    """Returns the class or function with a name from `name_of`, or None if it is not imported yet.

    This never imports a module, and returns nothing from Python's standard library: a name in a
    file must not lead to `os.system`.
    """
    module, _, path = name.rpartition(":")
    if module.split(".")[0] in sys.stdlib_module_names and module_name("__main__") != module:
        return None
    scripts = [each for each in _SCRIPTS if each in sys.modules and module_name(each) == module]
    modules = [module] if module in sys.modules else scripts
    modules = modules or [each for each in list(sys.modules) if _last(each) == _last(module)]
    found = [_member(sys.modules[each], path) for each in modules]
    return chosen(name, [each for each in found if each is not None])


def _last(name: str) -> str:
    return name.partition(":")[0].rpartition(".")[2]


def _member(module: Any, path: str) -> Any:
    """Returns the class or function with a qualified name in a module, or None."""
    member = module
    for part in path.split("."):
        member = getattr(member, part, None)
    is_it = getattr(member, "__qualname__", None) == path and hasattr(member, "__module__")
    return member if is_it and isinstance(member.__module__, str) else None
