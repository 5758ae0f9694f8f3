"""Holds what the parts of the house may do to each other: rules over the source, by name.

A rule is a function from the sources by module name to what breaks it, as in `test_architecture`,
and does not depend on where a file stands. What breaks it today is listed, and lists only shrink.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest

from distaff import TrainerConfig, TrainerModule
from test_architecture import FUNCTION, HOUSE, House, parse, trace_violations

SCOPE = (*FUNCTION, ast.ClassDef)
TRAINERS = {"trainer", "_trainer"}
SETTERS = {"setattr", "delattr", "__setattr__", "__delattr__"}
TRAINER_CLASSES = {cls.__name__ for cls in TrainerModule.__mro__} - {"object"}

OPTIONS = {field.name: field for field in dataclasses.fields(TrainerConfig)}
OPTION_MODULES = {cls.__module__ for cls in TrainerConfig.__mro__}
KEYS_OF_FILES = {"steps_per_call", "batch_size"}
"""Options whose name is a key of a checkpoint, too: the position of a loader has its batch size."""

PLACEMENT = {"device_put", "committed", "sharding", "NamedSharding", "SingleDeviceSharding"}
PLACEMENT |= {"addressable_shards", "device_set", "is_fully_replicated"}
PLACERS = {
    "distaff.execution.placement",  # decides where arrays are
    "distaff.execution.shards",  # the parts of arrays that other processes have
    "distaff.execution.compile.signature",  # what a program is compiled for
    *("distaff.checkpoint.arrays", "distaff.checkpoint.snapshot"),
    "distaff.plan.traced",  # of arrays that do not exist
    "distaff.mesh.shapes",  # of arrays that do not exist
    *("distaff.mesh.config", "distaff.mesh.pins", "distaff.mesh.placement", "distaff.mesh.rules"),
    "distaff.mesh.host_memory",
}
"""Modules that may look at where arrays are, and put them there."""


def scoped(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Yields every node of a tree, with the functions and classes it stands in: `Feed.epoch`."""
    waiting = [("", tree)]
    while waiting:
        scope, node = waiting.pop()
        if isinstance(node, SCOPE):
            scope = f"{scope}.{node.name}".lstrip(".")
        yield scope, node
        waiting += [(scope, child) for child in ast.iter_child_nodes(node)]


def chain(node: ast.AST) -> list[str]:
    """Returns the names that an expression goes through: `self`, `_trainer`, `config`."""
    names: list[str] = []
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        if isinstance(node, ast.Call):  # such as vars(trainer)
            node = node.args[0] if node.args else node.func
            continue
        names += [node.attr] if isinstance(node, ast.Attribute) else []
        node = node.value
    return [*names, node.id] if isinstance(node, ast.Name) else names


def trainers_of(function: ast.AST) -> set[str]:
    """Returns the arguments of a function that are trainers by their annotation."""
    if not isinstance(function, FUNCTION):
        return set()
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return {
        each.arg
        for each in arguments
        if each.annotation is not None
        and TRAINER_CLASSES & {*re.findall(r"\w+", ast.unparse(each.annotation))}
    }


def setters(house: House) -> list[str]:
    """Places outside of the trainer's package that set an attribute of a trainer."""
    found = []
    for module, source in house.items():
        nodes = [] if module.startswith("distaff.trainer.") else list(scoped(parse(source)))
        arguments = {scope: trainers_of(node) for scope, node in nodes if isinstance(node, SCOPE)}
        for scope, node in nodes:
            target = target_of(node)
            if target is not None:
                around = [n for f, n in arguments.items() if f"{scope}.".startswith(f"{f}.")]
                is_trainer = TRAINERS.union(*around) & {*chain(target)}
                found += [f"{scope} sets {ast.unparse(node)}"] if is_trainer else []
    return sorted(found)


def target_of(node: ast.AST) -> ast.AST | None:
    """Returns the object whose attribute, or entry, a node sets or deletes."""
    if isinstance(getattr(node, "ctx", None), (ast.Store, ast.Del)):
        return getattr(node, "value", None)
    is_call = isinstance(node, ast.Call) and node.args and SETTERS & {*chain(node.func)}
    return node.args[0] if is_call else None


def repeated(house: House) -> list[str]:
    """Names that several classes of the house have."""
    nodes = [node for source in house.values() for node in ast.walk(parse(source))]
    counts = Counter(node.name for node in nodes if isinstance(node, ast.ClassDef))
    return sorted(name for name, count in counts.items() if count > 1)


def placers(house: House) -> list[str]:
    """Functions and classes that put arrays on devices, or look at where they are, and may not."""
    found = set()
    for module, source in house.items():
        for scope, node in [] if module in PLACERS else scoped(parse(source)):
            names = {getattr(node, "attr", ""), getattr(node, "id", "")}
            names |= (
                {each.name for each in node.names} if isinstance(node, ast.ImportFrom) else {""}
            )
            found |= {scope} if names & PLACEMENT else set()
    return sorted(found)


def named_options(house: House) -> list[str]:
    """Options whose name is a string outside of the modules that declare options.

    A name of one word, such as `root`, may be that of something else.
    """
    nodes = [
        node
        for module, source in house.items()
        if module not in OPTION_MODULES
        for node in ast.walk(parse(source))
    ]
    strings = {node.value for node in nodes if isinstance(node, ast.Constant)}
    return sorted(n for n in OPTIONS.keys() & strings - KEYS_OF_FILES if "_" in n)


def undescribed_options(house: House) -> list[str]:
    """Options that do not say, where they are declared, what they are and what a resume does."""
    return [name for name, field in OPTIONS.items() if not {"doc", "resume"} <= {*field.metadata}]


TODAY: dict[Callable[[House], list[str]], set[str]] = {
    setters: {
        "Digits.run sets trainer.monitor",
    },
    repeated: set(),
    placers: set(),
    named_options: {
        *("enable_progress_bar", "max_time", "on_bad_numbers", "on_failed_save"),
        *("on_loss_spike", "stuck_after", "tune_process"),
    },
    undescribed_options: set(),
}
"""What breaks each rule: nothing is added, and what is mended goes."""


@cache
def broken(rule: Callable[[House], list[str]]) -> list[str]:
    """Returns what breaks a rule in the package."""
    return rule(HOUSE)


@pytest.mark.parametrize("rule", TODAY)
def test_nothing_new_breaks_rule(rule: Callable[[House], list[str]]) -> None:
    assert [each for each in broken(rule) if each not in TODAY[rule]] == []


def cases() -> list[Any]:
    """Returns the rules; those that are broken are marked so."""
    mark = pytest.mark.xfail(reason="TODAY lists what breaks it")
    return [pytest.param(rule, marks=[mark] if TODAY[rule] else []) for rule in TODAY]


@pytest.mark.parametrize("rule", cases())
def test_house_keeps_rule(rule: Callable[[House], list[str]]) -> None:
    assert broken(rule) == []


GOOD = {
    "distaff.trials": "class Trial:\n"
    " def run(self, trainer: TrainerModule):\n"
    "  self.config = trainer.config\n  trainer = trainer.variant(seed=1)\n  self.seen[trainer] = 1",
    "distaff.execution.placement": "class OneDevice:\n"
    " def f(self, x):\n  return jax.device_put(x, x.sharding)",
    "distaff.checkpoint.snapshot": "def _taken(x):\n return x.sharding",
    TrainerModule.__module__: "def helper(trainer):\n trainer.state = None",
    TrainerConfig.__module__: "x = 'keep_last'",
    "distaff.words": "x = 'keep_last=3'\ny = 'root'\nz = 'steps_per_call'",
}


@pytest.mark.parametrize(
    ("rule", "source", "found"),
    [
        (setters, "def f(trainer):\n trainer.step = 1", "f sets trainer.step"),
        (setters, "def f(trainer):\n trainer.step += 1", "f sets trainer.step"),
        (setters, "def f(a, trainer):\n a, trainer.b = 1, 2", "f sets trainer.b"),
        (setters, "def f(trainer):\n del trainer.step", "f sets trainer.step"),
        (setters, "def f(trainer):\n for trainer.x in y: pass", "f sets trainer.x"),
        (setters, "def f(trainer):\n trainer.a.b = 1", "f sets trainer.a.b"),
        (setters, "def f(trainer):\n vars(trainer)['a'] = 1", "f sets vars(trainer)['a']"),
        (setters, "def f(trainer):\n trainer.__dict__['a'] = 1", "f sets trainer.__dict__['a']"),
        (setters, "def f(trainer):\n setattr(trainer, n, 1)", "f sets setattr(trainer, n, 1)"),
        (setters, "class C:\n def f(self):\n  self._trainer.x = 1", "C.f sets self._trainer.x"),
        (setters, "def f(owner: 'Predictor'):\n owner.x = 1", "f sets owner.x"),
        (setters, "def f(o: TrainerModule | None):\n def g():\n  o.x = 1", "f.g sets o.x"),
        (repeated, "class OneDevice: pass", "OneDevice"),
        (repeated, "def f():\n class Trial: pass", "Trial"),
        (placers, "def f(x):\n return jax.device_put(x)", "f"),
        (placers, "def f(x):\n return x.committed", "f"),
        (placers, "class C:\n def f(self, x):\n  return x.sharding", "C.f"),
        (placers, "from jax.sharding import NamedSharding", ""),
        (named_options, "x = {'keep_last'}", "keep_last"),
        (named_options, "def f(options):\n return options['on_bad_numbers']", "on_bad_numbers"),
    ],
)
def test_rule_catches(rule: Callable[[House], list[str]], source: str, found: str) -> None:
    assert rule(GOOD) == []
    assert rule({**GOOD, "distaff.bad": source}) == [found]


def test_loop_is_short_and_calls_only_what_a_user_may_override():
    source = HOUSE["distaff.run.loop"]
    assert len(source.splitlines()) <= 150
    called = {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and chain(node)[-1] == "hooks"
    }
    assert called == {
        *("on_training_start", "train_epoch", "on_training_epoch_end", "eval_model"),
        *("on_validation_epoch_end", "save_metrics", "is_new_model_better", "save_model"),
    }


@pytest.mark.parametrize(
    "body", ["self.n = 1", "self.n: int = 1", "self.n += 1", "self.n['a'] = 1", "self.n.append(1)"]
)
def test_nothing_is_stored_while_it_is_traced(body: str) -> None:
    for source in (
        f"class _C:\n def loss_fn(self, params, batch, ctx):\n  {body}",
        f"class _C:\n def _f(self, x):\n  {body}\n def _g(self, run):\n  run.program(self._f)",
        f"class _C:\n def _f(self, x):\n  {body}\n def _g(self, run):\n  run.part(self._f)",
    ):
        (found,) = trace_violations({"distaff.bad": source})
        assert "stores while it is traced" in found
