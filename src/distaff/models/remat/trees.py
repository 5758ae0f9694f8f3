"""Rematerialization of modules that are pytrees of their submodules, as Equinox's."""

from __future__ import annotations

import copy
import functools
from typing import Any

import jax

from distaff.models.remat.checkpointed import checkpointed
from distaff.models.remat.options import RematConfig


def rematerialized_tree(
    node: Any, remat: RematConfig, kind: type, path: tuple[str, ...] = ()
) -> Any:
    """Returns a module whose matching modules are computed again in the backward pass.

    Args:
        node: a module, or a pytree of modules.
        remat: the modules that match; those inside a matching one do not change.
        kind: base class of all modules.
        path: path of the module.
    """

    def is_inner(each: Any) -> bool:
        return isinstance(each, kind) and each is not node

    leaves, structure = jax.tree.flatten_with_path(node, is_leaf=is_inner)
    changed = []
    for keys, leaf in leaves:
        inner = (*path, *(jax.tree_util.keystr((key,), simple=True) for key in keys))
        if not is_inner(leaf):
            changed.append(leaf)
        elif callable(leaf) and remat.matches("/".join(inner)):
            again = copy.copy(leaf)
            object.__setattr__(again, "__class__", _again(type(leaf), remat))
            changed.append(again)
        else:
            changed.append(rematerialized_tree(leaf, remat, kind, inner))
    return jax.tree.unflatten(structure, changed)


@functools.cache
def _again(cls: Any, remat: RematConfig) -> Any:
    """Returns a subclass whose call is computed again; it is also used inside loops over layers."""
    method = cls.__call__

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return checkpointed(method, remat.saveable, cls.__name__)(self, *args, **kwargs)

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls)(cls.__name__, (cls,), {"__call__": call, **names})
