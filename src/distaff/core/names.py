"""Names of classes and functions, and the way back to those that are imported already.

A script that runs is the module `__main__` to itself, and another one to whoever imports it. Its
classes are named here by the module that it is as a file, so that both mean the same.
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

    Args:
        name: as its classes have it; that of a script is `__main__`.

    Returns:
        The name itself; of a script, its module or the name of its file without `.py`. In a
        notebook, `__main__`.
    """
    module = sys.modules.get(name)
    if name not in _SCRIPTS or module is None:
        return name
    spec = getattr(module, "__spec__", None)
    if spec is not None and spec.name not in _SCRIPTS:
        return spec.name
    file = getattr(module, "__file__", None)
    return Path(file).stem if file else "__main__"


def name_of(named: Any) -> str:
    """Returns `module:qualified name` of a class or a function."""
    return f"{module_name(named.__module__)}:{named.__qualname__}"


def chosen(name: str, candidates: Iterable[T]) -> T | None:
    """Returns the candidate of a name: the last one, where it was defined again.

    A module may be named with its packages in one process and without them in another: where no
    candidate has the very name, the only one of the same module and class counts. A name that a
    notebook gave has no module to compare.

    Args:
        name: as `name_of` returned it.
        candidates: classes or functions.

    Returns:
        None where there is none, or where there are several.
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
    """Returns the class or function of a name, if its module is imported already.

    Nothing is imported, and nothing of Python's own library is returned: what a file names is not
    to be trusted with `os.system`.

    Args:
        name: as `name_of` returned it.

    Returns:
        None where it is not there.
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
    """Returns what a qualified name means in a module; None where it means something else."""
    found = module
    for part in path.split("."):
        found = getattr(found, part, None)
    is_it = getattr(found, "__qualname__", None) == path and hasattr(found, "__module__")
    return found if is_it and isinstance(found.__module__, str) else None
