"""Holds the house against the code: who may import whom, how long things are, what an import costs.

Every rule is a function from the sources by module name to what breaks it, and is tried on small
houses that break it, so that a rule which has gone blind is noticed.
"""

from __future__ import annotations

import ast
import graphlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeAlias

import pytest

SOURCES = Path(__file__).parents[1] / "src"

# A package imports only from those before it. "distaff" is its own __init__.py.
PACKAGES = (
    *("errors", "core", "data", "augment", "metrics", "models", "zoo", "optim"),
    *(
        "step",
        "execution",
        "distributed",
        "mesh",
        "checkpoint",
        "loggers",
        "callbacks",
        "run",
        "report",
    ),
    *("trainer", "tasks", "export", "plan"),
    *("distaff", "tune", "serve", "cli", "integrations", "testing"),
)

CORE = {"jax", "flax", "optax", "orbax", "numpy", "rich", "tyro", "msgpack"}
PACKAGES_THAT_MAY_IMPORT = {
    "tyro": {"cli"},
    "orbax": {"checkpoint", "execution"},
    "rich": {"run", "cli"},
    "pytest": {"testing"},
}
NOWHERE = {"tensorflow", "pickle", "cloudpickle", "dill", "marshal", "shelve"}

# What a user may not have. None in sys.modules makes an import fail as a missing package does.
OPTIONAL = (
    *("matplotlib", "sklearn", "pandas", "torch", "tensorflow", "wandb", "mlflow", "optuna", "ray"),
    *("grain", "tensorboard", "tensorboardX", "equinox", "jaxtyping", "beartype", "hypothesis"),
    *(
        "pytest",
        "_pytest",
        "safetensors",
        "pyarrow",
        "array_record",
        "dm_pix",
        "trackio",
        "uvicorn",
    ),
)
WITHOUT_OPTIONAL = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL!r}))\n"

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 50
MAX_CLASS_LINES = 250
MAX_NESTING = 3
MAX_PARAMETERS = 8
MAX_MODULES = 14
MAX_SUBPACKAGES = 8

House: TypeAlias = Mapping[str, str]
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
BLOCK = (
    ast.If,
    ast.For,
    ast.AsyncFor,
    ast.While,
    ast.With,
    ast.AsyncWith,
    ast.Try,
    ast.TryStar,
    ast.Match,
)

parse = cache(ast.parse)


def module_name(path: Path) -> str:
    """Returns the dotted name of a file, such as `distaff.data.arrays`."""
    parts = path.relative_to(SOURCES).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


HOUSE = {module_name(path): path.read_text() for path in sorted(SOURCES.rglob("*.py"))}


class Import(NamedTuple):
    """One name that a module imports, at whatever depth: in a function, under TYPE_CHECKING."""

    source: str
    target: str
    line: int

    def __str__(self) -> str:
        return f"{self.source}:{self.line} imports {self.target}"


def imports(house: House) -> Iterator[Import]:
    """Yields every import; the target of `from a import b` is `a.b` where that is a module."""
    for name, source in house.items():
        for node in ast.walk(parse(source)):
            if isinstance(node, ast.Import):
                yield from (Import(name, alias.name, node.lineno) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                module = "." * node.level + (node.module or "")
                members = [f"{module}.{alias.name}" for alias in node.names]
                for target in {member if member in house else module for member in members}:
                    yield Import(name, target, node.lineno)


def package(module: str) -> str:
    """Returns the package below `distaff` that a module belongs to."""
    return ".".join(module.split(".")[:2]).removeprefix("distaff.")


def layer_violations(house: House) -> list[str]:
    """Imports between packages that do not point up the list, and packages that are not in it."""
    found = [
        f"{name}: {package(name)!r} is not in PACKAGES"
        for name in house
        if package(name) not in PACKAGES
    ]
    for edge in imports(house):
        target = package(edge.target)
        if edge.target.startswith("."):
            found.append(f"{edge}, which is relative")
        elif target == "integrations" and edge.target.startswith("distaff"):
            found.append(f"{edge}, which is found by string only")
        elif edge.target.split(".")[0] == "distaff" and package(edge.source) != target:
            allowed = (
                PACKAGES[: PACKAGES.index(package(edge.source))]
                if package(edge.source) in PACKAGES
                else ()
            )
            found += [] if target in allowed else [f"{edge}, which stands below it"]
    return found


def cycle_violations(house: House) -> list[str]:
    """Modules that import each other, directly or around a corner."""
    graph: dict[str, set[str]] = {name: set() for name in house}
    for edge in imports(house):
        if edge.target in house:
            graph[edge.source].add(edge.target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [" imports ".join(reversed(error.args[1]))]
    return []


def third_party_violations(house: House) -> list[str]:
    """Third parties outside the core's list, or outside the package that may import them."""
    found = []
    guests: dict[str, set[str]] = {}
    for edge in imports(house):
        guest = edge.target.split(".")[0]
        hosts = PACKAGES_THAT_MAY_IMPORT.get(guest, {package(edge.source)})
        if guest in NOWHERE:
            found.append(f"{edge}, which nothing may")
        elif guest in {"distaff", *sys.stdlib_module_names} or edge.target.startswith("."):
            continue
        elif package(edge.source) == "integrations":
            guests.setdefault(edge.source, set()).update({guest} - CORE)
        elif guest not in CORE | PACKAGES_THAT_MAY_IMPORT.keys():
            found.append(f"{edge}, which is not in the core")
        elif package(edge.source) not in hosts:
            found.append(f"{edge}, which only {sorted(hosts)} may")
    several = {name: sorted(packages) for name, packages in guests.items() if len(packages) > 1}
    return found + [f"{name} wraps more than one: {packages}" for name, packages in several.items()]


def crowding_violations(house: House) -> list[str]:
    """Packages with more modules or sub-packages than a reader takes in at a glance."""
    packages = {name.rpartition(".")[0] for name in house} - {""}
    found = []
    for name in sorted(packages):
        inside = [each for each in house if each.rpartition(".")[0] == name]
        inner = [each for each in inside if each in packages]
        if len(inside) - len(inner) > MAX_MODULES and name != "distaff":
            found.append(f"{name} has {len(inside) - len(inner)} modules")
        if len(inner) > MAX_SUBPACKAGES and name != "distaff":
            found.append(f"{name} has {len(inner)} sub-packages")
    return found


def nesting(node: ast.AST) -> int:
    """Returns how deep the blocks of a function stand in each other; an `elif` adds nothing."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (*FUNCTION, ast.ClassDef)):
            continue
        is_elif = isinstance(node, ast.If) and node.orelse == [child] and isinstance(child, ast.If)
        deepest = max(deepest, nesting(child) + (isinstance(child, BLOCK) and not is_elif))
    return deepest


def sizes(node: ast.AST) -> Iterator[tuple[str, int, int]]:
    """Yields what is measured of a class or function, its size, and the most it may be."""
    if isinstance(node, ast.ClassDef):
        documented = [
            each for each in ast.walk(node) if isinstance(each, (*FUNCTION, ast.ClassDef))
        ]
        docs = [each.body[0] for each in documented if ast.get_docstring(each)]
        lines = node.end_lineno - node.lineno + 1
        yield "lines", lines - sum(d.end_lineno - d.lineno + 1 for d in docs), MAX_CLASS_LINES
    elif isinstance(node, FUNCTION):
        body = node.body[1:] if ast.get_docstring(node) else node.body
        named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        parameters = [argument for argument in named if argument.arg not in ("self", "cls")]
        yield "lines", node.end_lineno - body[0].lineno + 1 if body else 0, MAX_FUNCTION_LINES
        yield "parameters", len(parameters), MAX_PARAMETERS
        yield "levels of nesting", nesting(node), MAX_NESTING


def size_violations(house: House) -> list[str]:
    """Files, classes and functions that are larger than a reader can hold."""
    found = []
    for name, source in house.items():
        lines = len(source.splitlines())
        found += [f"{name}: {lines} lines"] if lines > MAX_FILE_LINES else []
        for node in ast.walk(parse(source)):
            over = [(what, size) for what, size, most in sizes(node) if size > most]
            found += [f"{name}:{node.lineno} {node.name}: {size} {what}" for what, size in over]
    return found


def documented(node: ast.ClassDef, classes: Mapping[str, ast.ClassDef]) -> set[str]:
    """Returns the methods that a class, or a base of it in the house, documents."""
    names = {method.name for method in public(node.body) if ast.get_docstring(method)}
    bases = [ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases]
    return names.union(*(documented(classes[base], classes) for base in bases if base in classes))


def public(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Yields the public classes and functions of a body, without overloads and setters."""
    for node in body:
        if isinstance(node, (*FUNCTION, ast.ClassDef)) and not node.name.startswith("_"):
            decorators = {ast.unparse(item).split(".")[-1] for item in node.decorator_list}
            if not decorators & {"overload", "setter"}:
                yield node


def docstring_violations(house: House) -> list[str]:
    """Public classes, functions and methods that do not say what they are.

    An override has the docstring of its base class.
    """
    trees = {name: parse(source) for name, source in house.items()}
    classes = {
        node.name: node
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    found = []
    for name, tree in trees.items():
        for node in public(tree.body):
            missing = [] if ast.get_docstring(node) else [node]
            if isinstance(node, ast.ClassDef):
                known = documented(node, classes)
                missing += [method for method in public(node.body) if method.name not in known]
            found += [f"{name}:{each.lineno} {each.name} has no docstring" for each in missing]
    return found


TRACERS = {
    *("program", "part", "once", "jaxpr", "shapes"),  # of an `Execution`
    *("jit", "make_jaxpr", "eval_shape", "grad", "value_and_grad", "vmap", "checkpoint"),
    *("scan", "fori_loop", "while_loop", "cond", "switch"),
}
TRACED = {"loss_fn", "predict_fn", "augment", "train_step", "eval_step"}
MUTATORS = {"append", "add", "update", "setdefault", "pop", "extend", "insert", "remove", "clear"}


def named(node: ast.AST) -> str:
    """Returns the name of a function, or of a method of `self`; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    is_own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    return node.attr if is_own and node.value.id == "self" else ""


def rooted(node: ast.AST) -> str:
    """Returns the object that an attribute or an entry is of, as far down as it goes."""
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def stores(function: ast.AST) -> Iterator[int]:
    """Yields the lines in which a function stores something that outlives its call."""
    for node in ast.walk(function):
        targets: list[ast.AST] = []
        if isinstance(node, ast.Assign):
            parts = [part for target in node.targets for part in ast.walk(target)]
            targets = [each for each in parts if isinstance(getattr(each, "ctx", None), ast.Store)]
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            targets = [node.target]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            is_mutator = node.func.attr in MUTATORS and len(node.args) < 3
            targets = [node.func.value] if is_mutator else []
        places = [each for each in targets if isinstance(each, (ast.Attribute, ast.Subscript))]
        if isinstance(node, (ast.Global, ast.Nonlocal)) or any(
            rooted(each) == "self" for each in places
        ):
            yield node.lineno


def trace_violations(house: House) -> list[str]:
    """Functions that are traced, and store something: it would be there for one signature only."""
    found = []
    for name, source in house.items():
        tree = parse(source)
        functions = [node for node in ast.walk(tree) if isinstance(node, FUNCTION)]
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        traced = set(TRACED)
        for call in calls:
            if isinstance(call.func, ast.Attribute) and call.func.attr in TRACERS:
                traced |= {named(each) for each in call.args} - {""}
        while True:
            bodies = [each for each in functions if each.name in traced]
            inner = [node for each in bodies for node in ast.walk(each)]
            called = {named(node.func) for node in inner if isinstance(node, ast.Call)} - {""}
            if called <= traced:
                break
            traced |= called
        lines = {(line, each.name) for each in bodies for line in stores(each)}
        found += [f"{name}:{line} {each} stores while it is traced" for line, each in sorted(lines)]
    return found


RULES = (
    trace_violations,
    layer_violations,
    cycle_violations,
    third_party_violations,
    crowding_violations,
    size_violations,
    docstring_violations,
)


@pytest.mark.parametrize("rule", RULES)
def test_house_keeps_rule(rule: Callable[[House], list[str]]) -> None:
    assert len(HOUSE) > 10
    assert rule(HOUSE) == []


GOOD = {
    "distaff.errors": "import jax",
    "distaff.core.typing": "from distaff.errors import Key",
    "distaff.data": "from distaff.data import arrays",
    "distaff.data.arrays": "from distaff import errors\nimport numpy.typing",
    "distaff.run.display": "from rich.table import Table",
    "distaff.integrations.wandb": "import wandb.sdk, numpy\nfrom distaff.data import arrays",
    "distaff.run.loop": "def f(a, b, c, d, e, g, h, i):\n    '''F.'''\n"
    "    if a:\n        for b in c:\n            with d:\n                e()\n"
    "            def g():\n                while h:\n                    i()\n"
    "    elif b:\n        pass\n    elif c:\n        while d:\n            pass\n",
    "distaff.metrics": "class Metric:\n    'M.'\n    def merge(self):\n        'Merges.'",
    "distaff.testing": "import pytest\nclass _Hidden:\n    def f(self): pass\n"
    "class Sum(metrics.Metric[int]):\n    'S.'\n"
    "class Mean(Sum):\n    'M.'\n    def merge(self): pass",
}


@pytest.mark.parametrize("rule", RULES)
def test_rules_accept_good_house(rule: Callable[[House], list[str]]) -> None:
    assert rule(GOOD) == []


@pytest.mark.parametrize(
    ("rule", "name", "source", "complaint"),
    [
        (layer_violations, "distaff.utils", "", "'utils' is not in PACKAGES"),
        (layer_violations, "distaff.metrics", "import distaff.run.loop", "below it"),
        (layer_violations, "distaff.metrics", "from distaff.run import loop", "below it"),
        (layer_violations, "distaff.metrics", "from distaff.step.state import f", "below it"),
        (layer_violations, "distaff.metrics", "from distaff import TrainState", "below it"),
        (
            layer_violations,
            "distaff.metrics",
            "if TYPE_CHECKING:\n    import distaff.cli",
            "below it",
        ),
        (layer_violations, "distaff.metrics", "def f():\n    import distaff.trainer", "below it"),
        (layer_violations, "distaff.data.stream", "from .arrays import f", "relative"),
        (layer_violations, "distaff.cli", "import distaff.integrations.wandb", "by string"),
        (
            layer_violations,
            "distaff.integrations.a",
            "from distaff.integrations import wandb",
            "by string",
        ),
        (
            cycle_violations,
            "distaff.data.arrays",
            "from distaff.data import f",
            "imports distaff.data",
        ),
        (
            cycle_violations,
            "distaff.errors",
            "def f():\n    import distaff.core.typing",
            "distaff.errors",
        ),
        (third_party_violations, "distaff.cli", "import pandas", "not in the core"),
        (third_party_violations, "distaff.cli", "from torch import nn", "not in the core"),
        (third_party_violations, "distaff.step", "def f():\n    from rich import text", "only"),
        (third_party_violations, "distaff.tasks", "from orbax.checkpoint import v1", "only"),
        (third_party_violations, "distaff.core.config", "import tyro", "only ['cli'] may"),
        (third_party_violations, "distaff.data", "import pytest", "only ['testing'] may"),
        (third_party_violations, "distaff.checkpoint", "import pickle", "nothing may"),
        (third_party_violations, "distaff.integrations.tf", "import tensorflow", "nothing may"),
        (third_party_violations, "distaff.integrations.ab", "import a, b", "['a', 'b']"),
        (size_violations, "distaff.data", "x = 1\n" * 401, "distaff.data: 401 lines"),
        (size_violations, "distaff.data", "class C:" + "\n    x = 1" * 250, "C: 251 lines"),
        (
            size_violations,
            "distaff.data",
            "def f():\n    '''F.'''" + "\n    x = 1" * 51,
            "f: 51 lines",
        ),
        (
            size_violations,
            "distaff.data",
            "def f(a, b, c, d, *, e, g, h, i, j): pass",
            "f: 9 parameters",
        ),
        (
            size_violations,
            "distaff.data",
            "def f():\n if a:\n  for b in c:\n   try:\n    x()\n   except E:\n    if d: pass",
            "f: 4 levels",
        ),
        (
            trace_violations,
            "distaff.data",
            "class _C:\n def loss_fn(self, p):\n  self.seen = p",
            "stores while",
        ),
        (
            trace_violations,
            "distaff.data",
            "class _C:\n def _f(self, x):\n  self.known[x] = 1\n def _g(self):\n  jax.jit(self._f)",
            "_f stores while",
        ),
        (
            trace_violations,
            "distaff.data",
            "class _C:\n def _f(self):\n  self._h()\n def _h(self):\n  self.all.append(1)\n"
            " def _g(self, execution):\n  execution.part(self._f)",
            "_h stores while",
        ),
        (docstring_violations, "distaff.data", "def f(): pass", "f has no docstring"),
        (docstring_violations, "distaff.data", "class C:\n  'C.'\n  def f(self): pass", "f has no"),
        (
            docstring_violations,
            "distaff.data",
            "class C(Metric):\n  'C.'\n  def f(self): pass",
            "f has no",
        ),
    ],
)
def test_rule_catches(
    rule: Callable[[House], list[str]], name: str, source: str, complaint: str
) -> None:
    (found,) = rule({**GOOD, name: source})
    assert complaint in found


def test_crowded_packages_are_named() -> None:
    modules = {f"distaff.data.module_{n}": "" for n in range(MAX_MODULES)}
    packages = {f"distaff.data.package_{n}.a": "" for n in range(MAX_SUBPACKAGES + 1)}
    inits = {name.rpartition(".")[0]: "" for name in packages}
    assert crowding_violations({"distaff.data": "", **modules}) == []
    (found,) = crowding_violations({"distaff.data": "", **modules, "distaff.data.one_more": ""})
    assert "15 modules" in found
    (found,) = crowding_violations({"distaff.data": "", **packages, **inits})
    assert "9 sub-packages" in found


def test_top_of_the_package_is_the_list_of_packages() -> None:
    found = [path for path in (SOURCES / "distaff").iterdir() if not path.is_dir()]
    packages = [path.parent for path in (SOURCES / "distaff").glob("*/__init__.py")]
    names = {path.stem for path in (*found, *packages)}
    assert names == {*PACKAGES, "__init__", "py"} - {"distaff"}


def run_python(code: str) -> str:
    """Runs code in a new interpreter that may keep its bytecode, and returns what it printed."""
    finished = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": ""},
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_core_imports_without_optional_packages() -> None:
    core = [name for name in HOUSE if package(name) not in ("integrations", "testing")]
    code = "\n".join(f"import {name}" for name in core)
    assert run_python(WITHOUT_OPTIONAL + code) == ""


@pytest.mark.slow
def test_training_needs_no_optional_package() -> None:
    code = """
import jax, numpy as np, optax
from distaff import data, tasks, zoo
arrays = {"x": np.ones((8, 3), np.float32), "label": np.arange(8) % 2}
trainer = tasks.Classifier(zoo.MLP((4, 2)), root="here", enable_progress_bar=False)
loader = data.ArrayLoader(arrays, 4)
result = trainer.train_model(loader, loader, loader, num_epochs=1)
assert result.step == 2 and np.isfinite(result.metrics["test/loss"]), result
print(result.path)
"""
    path = run_python(WITHOUT_OPTIONAL + code).strip()
    assert path == str(Path("here/classifier/0001").absolute())


def test_optional_package_is_missing_when_blocked() -> None:
    with pytest.raises(AssertionError, match=r"ModuleNotFoundError: .*sklearn"):
        run_python(WITHOUT_OPTIONAL + "from sklearn.datasets import load_digits")


def test_orbax_is_imported_by_the_first_store_beside_what_else_starts() -> None:
    code = """
import sys, threading, distaff
before = "orbax.checkpoint" in sys.modules
store = distaff.checkpoint.CheckpointStore("here")
for thread in threading.enumerate()[1:]:
    thread.join()
print(before, "orbax.checkpoint" in sys.modules)
"""
    assert run_python(code).strip() == "False True"


def test_import_of_distaff_adds_no_package_to_those_that_it_is_built_on() -> None:
    code = """
import sys, jax, flax.nnx, optax, rich
before = set(sys.modules)
from distaff import *
packages = {name.partition(".")[0] for name in set(sys.modules) - before}
known = {name.partition(".")[0] for name in before} | sys.stdlib_module_names
print(*sorted(packages - known))
"""
    assert run_python(code).split() == ["distaff"]
