"""Constructors of one's own: how they were called is recorded, and they are called so again."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distaff
from distaff import OptimizerConfig
from distaff.core.config.encoding import to_json
from distaff.core.names import chosen, imported, module_name, name_of
from distaff.errors import CheckpointError, ConfigError
from distaff.models import rebuild
from distaff.trainer.constructor import constructed, rebuild_trainer, recorded_options
from distaff.trainer.plain import LostError, recorded, restored
from distaff.zoo import MLP
from scripted import Regression


class Color(enum.Enum):
    RED = 1


@dataclasses.dataclass(frozen=True)
class Settings:
    width: int
    rates: tuple[float, ...] = (0.1,)
    kind: Color = Color.RED


def double(x: Any) -> Any:
    return 2 * x


VALUES = (
    *(None, True, 3, 0.1, -math.inf, "text", "$float", [1, (2, "a")], ()),
    *({"a": {"b": [1.5]}}, {1: "one", (2,): 3}, {"$float": "nan"}, Path("a/b")),
    *(Color.RED, Settings(3, (0.5, 1.0)), OptimizerConfig("sgd", learning_rate=0.3)),
    *(double, nn.relu, jnp.tanh, optax.adam, Settings, jnp.dtype("bfloat16"), MLP((4, 1))),
)


@pytest.mark.parametrize("value", VALUES)
def test_plain_values_come_back_as_they_were(value):
    back = restored(json.loads(json.dumps(recorded(value), allow_nan=False)))
    assert (type(back), back) == (type(value), value)


@pytest.mark.parametrize(
    "value",
    [np.float32(0.1), np.array([[1, 2]], np.int8), jnp.array([0.1, jnp.nan]), np.array([True])],
    ids=repr,
)
def test_small_arrays_come_back_as_they_were(value):
    back = restored(json.loads(json.dumps(recorded(value), allow_nan=False)))
    assert isinstance(back, jax.Array) == isinstance(value, jax.Array)
    assert back.dtype == value.dtype
    np.testing.assert_array_equal(back, value)


@pytest.mark.parametrize(
    "value",
    [lambda x: x, object(), np.zeros(5000), {"a": [print]}, open, nn.Dense(1).init],
    ids=["lambda", "object", "large", "within", "builtin", "method"],
)
def test_what_cannot_come_back_is_described(value):
    text = json.dumps(recorded(value))
    assert "0x" not in text
    with pytest.raises(LostError, match="recorded as"):
        restored(json.loads(text))


@pytest.mark.parametrize(
    "name", ["os:system", "builtins:eval", "nowhere:f", "test_constructor:VALUES", "scripted:no.f"]
)
def test_names_lead_only_to_what_is_imported_and_not_to_pythons_own(name):
    assert imported(name) is None
    with pytest.raises(LostError):
        restored({"$function": name})


def test_a_script_is_named_as_its_file_and_found_as_either(monkeypatch):
    script = SimpleNamespace(__file__="/somewhere/train.py", __spec__=None, __name__="__main__")
    monkeypatch.setitem(sys.modules, "__main__", script)
    assert module_name("__main__") == "train"
    cls = type("Net", (), {"__module__": "__main__"})
    script.Net = cls
    assert name_of(cls) == "train:Net"
    assert imported("train:Net") is cls
    script.__file__ = None
    assert name_of(cls) == "__main__:Net"


def test_a_class_is_chosen_by_module_and_name():
    one, other, last = (type("Net", (), {"__module__": n}) for n in ("pkg.a", "pkg.b", "pkg.a"))
    assert chosen("pkg.a:Net", [one, other, last]) is last
    assert chosen("a:Net", [one, other]) is one
    assert chosen("__main__:Net", [other]) is other
    assert chosen("__main__:Net", [one, other]) is None
    assert chosen("c:Net", [one, other]) is None


class Weighted(Regression):
    def __init__(self, model, weight, *, scale=(1.0, 2.0), **options):
        self.weight, self.scale = weight, scale
        super().__init__(model, **options)


class Deeper(Weighted):
    def __init__(self, *args, settings=None, **options):
        self.settings = settings
        super().__init__(*args, **options)


class Building(Regression):
    """Makes its model, and chooses its optimizer and seed."""

    def __init__(self, hidden: list[int], activation: Any = nn.relu, seed: int = 3) -> None:
        self.hidden, self.activation = list(hidden), activation
        hidden.append(1)  # what is recorded is what was passed
        optimizer = OptimizerConfig("sgd", learning_rate=0.1)
        super().__init__(MLP(hidden), seed=seed, root=None, optimizer=optimizer)


class Popping(Regression):
    def __init__(self, model, **options):
        self.weight = options.pop("weight", 1.0)
        super().__init__(model, **options)


class Around(Regression):
    def __init__(self, model, teacher, callbacks=(), **options):
        self.teacher = teacher
        super().__init__(nn.Sequential([model]), callbacks=callbacks, **options)


def again(trainer: Any, cls: type | None = None, model: Any = None, **changes: Any) -> Any:
    """Makes a trainer from what a run of it would record."""
    parts = {
        "options": trainer.config,
        "optimizer": trainer.optimizer,
        **constructed(trainer._made_by, trainer.config),
        "model": trainer.model.record,
    }
    record = json.loads(json.dumps(to_json(parts), allow_nan=False))
    cls = cls or type(trainer)
    options = {**recorded_options(cls.Config, record), "enable_progress_bar": False}
    return rebuild_trainer(cls, record, model, options, changes)


OPTIONS = {"root": None, "enable_progress_bar": False, "optimizer": OptimizerConfig("sgd")}


class Explicit(Regression):
    def __init__(self, model, optimizer, example_batch, callbacks, rate=0.1):
        self.rate = rate
        options = {"optimizer": optimizer, "example_batch": example_batch, "callbacks": callbacks}
        super().__init__(model, root=None, enable_progress_bar=False, tune_process=False, **options)


def test_what_a_loaded_trainer_does_without_is_not_asked_for():
    batch = {"x": np.ones((2, 3), np.float32), "y": np.ones(2, np.float32)}
    trainer = Explicit(nn.Dense(1), optax.adam(0.1), batch, [distaff.Callback()], rate=0.2)
    record = trainer._made_by.record(trainer.config)
    assert set(record["named"]) == {"model", "optimizer", "rate"}
    made = again(trainer)
    assert (made.rate, made.state, made.optimizer) == (0.2, None, OptimizerConfig())


@pytest.mark.parametrize(
    ("make", "attributes"),
    [
        (lambda: Weighted(nn.Dense(1), 0.3, **OPTIONS), {"weight": 0.3, "scale": (1.0, 2.0)}),
        (
            lambda: Weighted(weight=nn.relu, model=nn.Dense(1), scale=[1], seed=7),
            {"weight": nn.relu, "scale": [1]},
        ),
        (
            lambda: Deeper(nn.Dense(1), 0.5, settings=Settings(2), scale=None, **OPTIONS),
            {"weight": 0.5, "settings": Settings(2), "scale": None},
        ),
        (lambda: Deeper(model=nn.Dense(1), weight=1, name="x"), {"weight": 1, "settings": None}),
        (lambda: Building([4], double), {"hidden": [4], "activation": double}),
        (lambda: Building([4], seed=9), {"hidden": [4], "activation": nn.relu}),
        (lambda: Popping(nn.Dense(1), weight=0.25, **OPTIONS), {"weight": 0.25}),
        (lambda: Around(nn.Dense(1), MLP((2,)), **OPTIONS), {"teacher": MLP((2,))}),
    ],
)
def test_trainer_is_rebuild_trainer_as_it_was_made(make, attributes):
    trainer = make()
    made = again(trainer)
    assert {name: getattr(made, name) for name in attributes} == attributes
    assert made.model.module == trainer.model.module
    assert made.optimizer == trainer.optimizer
    same = ("seed", "root", "name", "log_every_n_steps")
    assert [getattr(made.config, n) for n in same] == [getattr(trainer.config, n) for n in same]


def test_what_was_not_recorded_is_named_and_can_be_passed():
    trainer = Weighted(nn.Dense(1), lambda x: x, scale=object(), **OPTIONS)
    with pytest.raises(CheckpointError, match=r"'weight'.*'scale'.*weight=\.\.\., scale=\.\.\."):
        again(trainer)
    assert again(trainer, weight=1, scale=2).weight == 1
    assert again(trainer, weight=1, scale=2, seed=5).config.seed == 5


def test_a_run_of_another_class_names_what_is_missing():
    plain = Regression(nn.Dense(1), **OPTIONS)
    assert plain._made_by is None
    with pytest.raises(CheckpointError, match=r"'weight': it was not recorded"):
        again(plain, Weighted)
    assert again(plain, Weighted, weight=2).weight == 2
    assert type(again(Weighted(nn.Dense(1), 3, **OPTIONS), Regression)) is Regression


def test_a_model_is_passed_where_it_cannot_be_rebuild_trainer():
    trainer = Weighted((lambda key, x: {"w": x[0]}, lambda p, x: p["w"] * x), 0.3, **OPTIONS)
    with pytest.raises(CheckpointError, match="Pass the module itself"):
        again(trainer)
    assert isinstance(again(trainer, model=nn.Dense(1)).model.module, nn.Dense)


def test_a_change_that_a_constructor_does_not_take_is_an_error():
    with pytest.raises(ConfigError, match=r"Building takes 'hidden'.*not \['width'\]"):
        again(Building([4]), width=3)
    with pytest.raises(ConfigError, match="no option 'width'"):
        again(Weighted(nn.Dense(1), 1, **OPTIONS), width=3)


def test_options_do_not_make_a_run_another_one():
    first, second = (Weighted(nn.Dense(1), 1, root=root) for root in ("a", "b"))
    records = [each._made_by.record(each.config) for each in (first, second)]
    assert records[0] == records[1]
    assert records[0]["given"] == ["root"]


def test_a_function_among_a_models_hyperparameters_is_found_again():
    record = json.loads(json.dumps(to_json(Activated(double))))
    assert rebuild(record).activation is double


class Activated(nn.Module):
    activation: Any = nn.relu

    @nn.compact
    def __call__(self, x):
        return self.activation(nn.Dense(1)(x))


SCRIPT = """
import flax.linen as nn
import jax.numpy as jnp
import numpy as np

import distaff


def half(x):
    return x / 2


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(x)


class Mine(distaff.TrainerModule):
    def __init__(self, model, weight, final=None, **options):
        self.weight, self.final = weight, final
        super().__init__(model, **options)

    def loss_fn(self, params, batch, ctx):
        return self.final(jnp.square(ctx.apply(params, batch))[:, 0] * self.weight)


if __name__ == "__main__":
    trainer = Mine(Net(), 0.25, half, root="runs", name="mine")
    trainer.train_model([np.ones((4, 2), np.float32)], num_epochs=1)
"""


@pytest.mark.slow
def test_a_run_of_a_script_is_loaded_by_whoever_imports_it(monkeypatch, capsys):
    Path("train_mine.py").write_text(SCRIPT)
    subprocess.run([sys.executable, "train_mine.py"], check=True, stdout=subprocess.DEVNULL)
    monkeypatch.syspath_prepend(".")
    import train_mine  # ty: ignore[unresolved-import]

    capsys.readouterr()
    loaded = train_mine.Mine.load_from_checkpoint("runs/mine/0001")
    assert (loaded.weight, loaded.final) == (0.25, train_mine.half)
    assert type(loaded.model.module) is train_mine.Net
    assert capsys.readouterr().out == ""
    assert loaded.predict([np.ones((4, 2), np.float32)]).shape == (4, 1)


def test_more_than_the_model_by_position_is_an_error():
    with pytest.raises(ConfigError, match=r"Regression\(model, example_batch=batch"):
        Regression(nn.Dense(1), {"x": np.ones(2)})  # ty: ignore[too-many-positional-arguments]
