"""The command `distaff new`: makes a project from a template."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import shutil
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated

import tyro

from distaff.core.files import explained
from distaff.core.paths import as_path, shown
from distaff.errors import ConfigError

FILES = {
    "recipe.py": "recipe.py.txt",
    "test_recipe.py": "test_recipe.py.txt",
    "Makefile": "Makefile.txt",
    "README.md": "README.md.txt",
    "pyproject.toml": "pyproject.toml.txt",
    ".gitignore": "gitignore.txt",
}
"""Files of a project, and the templates in which NAME stands for its name."""

_PACKAGES = {"distaff", "flax", "jax", "numpy", "optax", "pytest", "ruff"}
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_-]{0,98}[A-Za-z0-9])?")


def new(name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")]) -> int:
    """Makes a project that trains at once: recipe, model, test, Makefile.

    Args:
        name: the folder to make, such as spirals; its last part is the name of the project.
    """
    target = as_path(os.path.normpath(name), "NAME") if name else Path()
    name = target.name
    if not _NAME.fullmatch(name):
        better = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:100].strip("-") or "my-project"
        raise ConfigError(
            "The name of a project must have only letters, digits, '-' and '_', begin and end with "
            f"a letter or digit, and have at most 100 characters; got {name!r}. Try {better!r}."
        )
    if name.lower() in _PACKAGES:
        raise ConfigError(
            f"A project must not have the name of a package that it needs; got {name!r}. Try "
            f"'my-{name.lower()}'."
        )
    if os.path.lexists(target):
        raise ConfigError(
            f"{shown(target)!r} exists, and nothing is overwritten. Choose another name, or move "
            "it away."
        )
    if not target.parent.is_dir():
        raise ConfigError(
            f"There is no folder {shown(target.parent)!r} to make {name!r} in. Make it first, or "
            "choose another folder."
        )
    with explained(target, rule="A project must be a folder that can be {}", other="folder"):
        _make(target, name)
    place = shown(target)
    print(f"{place}: {', '.join(FILES)}")
    print(f"To train its model: cd {shlex.quote(place)} && make train")
    return 0


def _make(target: Path, name: str) -> None:
    """Writes all files of a project, or none."""
    template = resources.files("distaff.cli") / "template"
    temporary = target.with_name(f".{name[:50]}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir()
        for file, source in FILES.items():
            text = (template / source).read_text(encoding="utf-8").replace("NAME", name)
            (temporary / file).write_text(text, encoding="utf-8")
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main(words: Sequence[str]) -> int:
    """Runs `distaff new` with these arguments; returns the exit status.

    Raises:
        DistaffError: the name is invalid or taken, or the files cannot be written.
    """
    return tyro.cli(new, prog="distaff new", args=list(words))
