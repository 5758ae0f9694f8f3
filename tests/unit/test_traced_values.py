"""Values that the members of a population have as arguments of one program: which, and how right.

For the learning rate and the weight decay, see `test_train_population.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distaff import OptimizerConfig, TrainerConfig, TrainerModule, data, tasks, tune, zoo
from distaff.errors import ConfigError
from distaff.models.linen_modes import drop_at_traced_rate
from distaff.tasks.classifier import ClassifierConfig
from distaff.tune.population import multi_seed
from distaff.tune.population.settings import grouped, make_settings, traced_paths

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(40, 4)).astype(np.float32)
Y = (X.sum(axis=1) > 0).astype(np.int32)
TOKENS = RANDOM.integers(0, 8, size=(40, 5)).astype(np.int32)
ADAM = OptimizerConfig("adamw", learning_rate=0.02)
QUIET = {"root": None, "enable_progress_bar": False}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MarkedConfig(ClassifierConfig):
    alpha: float = tune.traced(0.5)


class Marked(tasks.Classifier):
    """A task with a value of its own, which a jitted function reads too."""

    Config = MarkedConfig
    config: Any

    def loss_fn(self, params: Any, batch: Any, ctx: Any) -> Any:
        ctx.add_penalty(self.penalty(params["Dense_0"]["kernel"]))
        return super().loss_fn(params, batch, ctx)

    def extra_metrics(self, outputs: Any, batch: Any, ctx: Any) -> Any:
        return {"scaled": self.config.alpha * outputs[:, 0]}

    @functools.partial(jax.jit, static_argnums=0)
    def penalty(self, kernel: jax.Array) -> jax.Array:
        return self.config.alpha * jnp.square(kernel).sum()


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecidingConfig(TrainerConfig):
    alpha: float = tune.traced(0.5)


class Deciding(TrainerModule):
    """Decides in Python by a value that is marked."""

    Config = DecidingConfig
    config: Any

    def loss_fn(self, params: Any, batch: Any, ctx: Any) -> Any:
        logits = ctx.apply(params, batch["x"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return loss if self.config.alpha < 0.5 else 2 * loss


class Scaled(nn.Module):
    """A value of the forward pass, and one of the initial weights; both are marked."""

    temperature: float = tune.traced(1.0)
    scale: float = tune.traced(1.0)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Dense(4, kernel_init=nn.initializers.normal(self.scale))(x)
        return nn.Dense(2)(nn.tanh(x)) / self.temperature


def classifier(**options: Any) -> Any:
    model = options.pop("model", zoo.MLP((4, 2)))
    return tasks.Classifier(model, **{**QUIET, "optimizer": ADAM, **options})


def loaders(entries: Any = None) -> tuple[Any, Any]:
    entries = {"x": X, "label": Y} if entries is None else entries
    train, val = ({n: x[a:b] for n, x in entries.items()} for a, b in ((0, 32), (32, 40)))
    return data.ArrayLoader(train, 8, shuffle=True, seed=1), data.ArrayLoader(val, 8)


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the groups that are trained: one training program each."""
    sizes: list[int] = []

    class Noted(multi_seed.PopulationRun):
        def __init__(self, prepared: Any, settings: Any, *rest: Any) -> None:
            sizes.append(len(settings))
            super().__init__(prepared, settings, *rest)

    monkeypatch.setattr(multi_seed, "PopulationRun", Noted)
    return sizes


def check(
    trainer: Any,
    vary: Any,
    form: str,
    entries: Any = None,
    *,
    only: Any = None,
    apart: float = 1e-4,
) -> None:
    """Compares members of a population, all by default, with runs of their own."""
    train, val = loaders(entries)
    found = tune.train_population(trainer, train, val, val, vary=vary, num_epochs=2, form=form)
    for index in range(len(found.members)) if only is None else only:
        member, setting = found.members[index], found._settings[index]
        own = setting.trainer.variant(seed=member.seed)
        result = own.train_model(*loaders(entries), loaders(entries)[1], num_epochs=2)
        assert dict(member.metrics) == pytest.approx(
            dict(result.metrics), rel=apart, abs=apart / 10
        )
        pairs = zip(*map(jax.tree.leaves, (member.state.params, own.state.params)), strict=True)
        for x, y in pairs:
            np.testing.assert_allclose(x, y, rtol=apart, atol=apart / 10)
        mine, its = (each.predict(val) for each in (found.member(index), own))
        np.testing.assert_allclose(mine, its, rtol=apart, atol=apart / 10)
    first, last = (each.metrics for each in (found.members[0], found.members[-1]))
    assert first["train/loss"] != pytest.approx(last["train/loss"], rel=1e-4)


EVERYTHING = [
    {
        "alpha": alpha,
        "label_smoothing": smoothing,
        "class_weights": weights,
        "model.dropout": dropout,
        "optimizer.options.b1": b1,
        "optimizer.clip_norm": norm,
        "optimizer.clip_value": 0.2 * norm,
    }
    for alpha, smoothing, weights, dropout, b1, norm in (
        (0.1, 0.0, [1, 2], 0.3, 0.8, 0.5),
        (0.9, 0.2, (3.0, 1.0), 0.0, 0.9, 0.01),
    )
]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["stacked", "in turn"])
def test_members_that_differ_in_everything_share_a_program(form: str, groups: list[int]) -> None:
    trainer = Marked(zoo.MLP((4, 2), dropout=0.1), **QUIET, optimizer=ADAM)
    check(trainer, EVERYTHING, form)
    assert groups == [2]
    assert (trainer.config.alpha, trainer.model.module.dropout) == (0.5, 0.1)


def sized(task: Any, model: Any, **options: Any) -> Any:
    return task(model, **{**QUIET, "optimizer": ADAM, **options})


CASES: dict[str, Any] = {
    "focal": (classifier, {"focal": [1.0, 3.0]}, None),
    "multi-label": (
        lambda: sized(tasks.MultiLabelClassifier, zoo.MLP((4, 2))),
        {"positive_weights": [[1, 5], [2, 1]], "label_smoothing": [0.0, 0.2]},
        {"x": X, "labels": (X[:, :2] > 0).astype(np.float32)},
    ),
    "huber": (
        lambda: sized(tasks.Regressor, zoo.MLP((4, 1)), loss="huber"),
        {"huber_delta": [0.5, 2]},
        {"x": X, "y": X.sum(axis=1, keepdims=True)},
    ),
    "noise": (
        lambda: sized(tasks.Autoencoder, zoo.MLP((4, 4))),
        {"noise": [0.0, 0.3], "data_range": [1.0, 2.0]},
        {"x": X},
    ),
    "language model": (
        lambda: sized(
            tasks.LanguageModel,
            zoo.GPT(vocab_size=8, max_length=4, features=4, num_heads=2, num_layers=1),
        ),
        {"model.dropout": [0.1, 0.4], "label_smoothing": [0.0, 0.2]},
        {"tokens": TOKENS},
    ),
    "muon": (
        lambda: classifier(optimizer=OptimizerConfig("muon", learning_rate=0.02)),
        {
            "optimizer.options.beta": [0.8, 0.95],
            "optimizer.options.adam_learning_rate": [0.01, 0.02],
        },
        None,
    ),
    "momentum": (
        lambda: classifier(optimizer=OptimizerConfig("sgd", learning_rate=0.1, accumulate=3)),
        {"optimizer.options.momentum": [0.5, 0.9]},
        None,
    ),
    "half precision": (
        lambda: classifier(precision="bf16"),
        {"optimizer.options.b2": [0.9, 0.99], "optimizer.options.eps": [1e-8, 1e-2]},
        None,
    ),
    "schedule-free": (
        lambda: classifier(optimizer=OptimizerConfig("schedule_free_adamw", learning_rate=0.02)),
        {"optimizer.options.b1": [0.8, 0.95]},
        None,
    ),
    "temperature": (lambda: classifier(model=Scaled()), {"model.temperature": [1.0, 2.0]}, None),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_stacked_member_is_a_run_with_its_values(case: str, groups: list[int]) -> None:
    make, values, entries = CASES[case]
    pair = [{name: x[index] for name, x in values.items()} for index in (0, 1)]
    apart = 5e-3 if case == "half precision" else 1e-4
    check(make(), pair, "stacked", entries, only=[1], apart=apart)
    assert groups == [2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "vary", "line"),
    [
        (
            Deciding(zoo.MLP((4, 2)), **QUIET, optimizer=ADAM),
            {"alpha": [0.1, 0.9], "optimizer.learning_rate": [0.01, 0.02]},
            r"alpha is static, .* it decides in Python \(test_traced_values.py:\d+\)",
        ),
        (
            classifier(model=Scaled()),
            {"model.scale": [0.1, 1.0], "model.temperature": [1.0, 2.0]},
            "model.scale is static, .* the initial weights depend on it",
        ),
    ],
)
def test_a_value_that_cannot_be_traced_forms_groups(
    trainer: Any, vary: Any, line: str, groups: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="distaff"):
        check(trainer, vary, "stacked", only=[-1])
    assert groups == [2, 2]
    assert any(re.match(line, each) for each in caplog.messages)
    first = next(iter(vary))
    expected = f"group 2 of 2: {{{first!r}: {vary[first][1]!r}}} (2 members)"
    assert expected in caplog.messages


@pytest.mark.parametrize(
    ("trainer", "vary", "sizes", "traced"),
    [
        (classifier(), {"focal": [0, 1, 2]}, [1, 2], ["focal"]),
        (classifier(), {"class_weights": [None, [1, 2], (2, 3)]}, [1, 2], ["class_weights"]),
        (classifier(), {"optimizer.clip_norm": [None, 1, 2.0]}, [1, 2], ["optimizer.clip_norm"]),
        (classifier(), {"optimizer.options.nesterov": [False, True]}, [1, 1], []),
        (classifier(), {"model.features": [(4, 2), (8, 2)], "ema": [None, 0.9]}, [1] * 4, []),
        (classifier(), {"ignore_index": [-1, -2]}, [1, 1], []),
        (
            classifier(),
            [{"label_smoothing": 0.1}, {"model.dropout": 0.3}],
            [2],
            ["label_smoothing", "model.dropout"],
        ),
        (
            classifier(optimizer=OptimizerConfig("rprop", schedule="constant")),
            {"optimizer.learning_rate": [0.1, 0.2]},
            [1, 1],
            [],
        ),
    ],
)
def test_what_is_static_makes_groups(trainer: Any, vary: Any, sizes: Any, traced: Any) -> None:
    settings = make_settings(trainer, vary, [0])
    found = grouped(settings)
    assert [len(each.indices) for each in found] == sizes
    last = [settings[index] for index in found[-1].indices]
    assert traced_paths(last) == traced
    assert len(grouped(settings, static=traced)) == len(settings)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("model.drop_out", "no path 'model.drop_out'. .*dropout"),
        ("model.name", "no path 'model.name'"),
        ("optimizer.options.b9", "has no option 'b9'"),
        ("mesh.data", "optimizer.options.<name>, or model.<field>"),
    ],
)
def test_a_wrong_path_raises(path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_settings(classifier(), {path: [0.1]}, [0])


def test_dropout_at_a_traced_rate_is_dropout() -> None:
    key, x = jax.random.key(0), jnp.asarray(X)

    @jax.jit
    def dropped(rate: Any) -> Any:
        def total(x: jax.Array) -> Any:
            with nn.intercept_methods(drop_at_traced_rate):
                drop = nn.Dropout(rate, broadcast_dims=(-1,))
                out = drop.apply({}, x, deterministic=False, rngs={"dropout": key})
                assert drop.apply({}, x, deterministic=True) is x
            return out.sum(), out

        grads, out = jax.grad(total, has_aux=True)(x)
        return out, grads

    for rate in (0.0, 0.3, 1.0):
        layer = nn.Dropout(rate, broadcast_dims=(-1,))
        expected = layer.apply({}, x, deterministic=False, rngs={"dropout": key})
        out, grads = dropped(rate)
        np.testing.assert_allclose(out, expected, rtol=1e-6)
        assert np.isfinite(grads).all()
