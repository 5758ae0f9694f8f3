"""Averages of the weights: their arithmetic, and what a run does with them."""

from __future__ import annotations

import signal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import distaff
from distaff import EMA, Monitor, OptimizerConfig, TrainState, data
from distaff.errors import CheckpointError, ConfigError, StateError
from distaff.loggers import MemoryLogger
from distaff.optim import evaluation_params, with_loss_scale
from distaff.run.display.lines import rows_by_split
from distaff.step.averages import (
    AveragingOptions,
    averaged,
    averaging,
    averaging_rest,
    empty,
    find,
    with_epoch,
)
from distaff.step.step import train_step
from model_kinds import KINDS

_random = np.random.default_rng(0)
X = _random.normal(size=(24, 3)).astype(np.float32)
Y = (X @ np.array([1.0, -2.0, 0.5], np.float32))[:, None] + 1
STEPS_PER_EPOCH, NUM_EPOCHS = 3, 4


def same_bits(one: Any, other: Any) -> bool:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


# The arithmetic


def errors(params, batch, ctx):
    return jnp.square(batch["x"] @ params["w"] - batch["y"][:, 0])


def walked(options: AveragingOptions, tx: Any = None, num_steps: int = 7, w: Any = None) -> Any:
    """Returns the weights after each step, and the last state."""
    params = {"w": jnp.ones(3) if w is None else w}
    state = TrainState.create(params=params, tx=optax.sgd(0.1) if tx is None else tx)
    state = state.replace(averages={name: empty(state) for name in options.averages} or None)
    step, seen = jax.jit(averaging(train_step(errors), options)), []
    for number in range(num_steps):
        rows = slice(3 * number, 3 * number + 3)
        state, _ = step(state, {"x": X[rows], "y": Y[rows]})
        seen.append(np.asarray(state.params["w"]))
    return seen, state


def ema_of(state: TrainState) -> np.ndarray:
    return np.asarray(find(state, "ema").values["params"]["w"])


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99, 0.99999])
def test_ema_without_warmup_is_that_of_optax_with_debias(decay):
    seen, state = walked(AveragingOptions(ema=EMA(decay, warmup=False)))
    reference = optax.ema(decay, debias=True, accumulator_dtype=jnp.float32)
    memory = reference.init(jnp.zeros(3))
    for weights in seen:
        expected, memory = reference.update(jnp.asarray(weights), memory)
    # `optax` divides by 1 - decay ** count, which loses digits near 1.
    np.testing.assert_allclose(ema_of(state), expected, rtol=1e-5 if decay < 0.9 else 5e-3)


@pytest.mark.parametrize("options", [EMA(0.3), EMA(0.9), EMA(0.9, warmup=False)])
def test_ema_weighs_later_weights_by_products_of_its_decays(options):
    seen, state = walked(AveragingOptions(ema=options))
    products = np.ones(len(seen))
    for count in range(1, len(seen)):
        warm = (1 + count) / (10 + count) if options.warmup else 1.0
        products[:count] *= min(options.decay, warm)
    expected = np.average(np.array(seen, np.float64), axis=0, weights=products)
    np.testing.assert_allclose(ema_of(state), expected, rtol=1e-6)
    assert int(find(state, "ema").count) == len(seen)


def test_average_of_a_constant_is_that_constant_bit_for_bit():
    w = jnp.asarray(_random.normal(size=3), jnp.float32) * 1e3
    for ema in (EMA(0.999), EMA(0.9999, warmup=False)):
        _, state = walked(AveragingOptions(ema=ema), optax.sgd(0.0), w=w)
        np.testing.assert_array_equal(ema_of(state), w)


def test_average_of_bfloat16_weights_has_the_digits_of_float32():
    w = jnp.ones(3, jnp.bfloat16)
    seen, state = walked(AveragingOptions(ema=EMA(0.9, warmup=False)), w=w)
    assert ema_of(state).dtype == np.float32
    expected = np.average(np.array(seen, np.float64), axis=0, weights=0.9 ** np.arange(6, -1, -1.0))
    np.testing.assert_allclose(ema_of(state), expected, rtol=1e-6)
    assert averaged(find(state, "ema"), state).params["w"].dtype == jnp.bfloat16


def test_ema_counts_updates_where_gradients_are_accumulated():
    options = AveragingOptions(ema=EMA(0.9, warmup=False))
    seen, state = walked(options, distaff.optim.accumulate(optax.sgd(0.1), 2))
    state = jax.jit(averaging_rest(options))(state)
    updates = [*seen[1::2], np.asarray(state.params["w"])]  # seven batches make four updates
    assert int(find(state, "ema").count) == 4
    expected = np.average(updates, axis=0, weights=0.9 ** np.arange(3, -1, -1.0))
    np.testing.assert_allclose(ema_of(state), expected, rtol=1e-6)
    again = jax.jit(averaging_rest(options))(state)
    assert same_bits(again.averages, state.averages)


def test_ema_counts_no_step_that_a_loss_scale_skips():
    options = AveragingOptions(ema=EMA(0.9, warmup=False))
    state = TrainState.create(params={"w": jnp.ones(3)}, tx=with_loss_scale(optax.sgd(0.1)))
    step = jax.jit(averaging(train_step(errors), options))
    state, _ = step(state.replace(averages={"ema": empty(state)}), {"x": X[:3], "y": Y[:3]})
    after, _ = step(state, {"x": X[:3] * np.float32(np.inf), "y": Y[:3]})
    assert same_bits(after.averages, state.averages)
    assert int(find(after, "ema").count) == 1


@pytest.mark.parametrize(
    "tx",
    [
        optax.contrib.schedule_free_sgd(0.1),
        optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.05), sync_period=2),
    ],
    ids=["schedule-free", "sam"],
)
def test_ema_averages_the_weights_that_an_optimizer_evaluates(tx):
    options, seen = AveragingOptions(ema=EMA(0.8, warmup=False)), []
    for num_steps in range(1, 6):
        state = walked(options, tx, num_steps)[1]
        seen.append(np.asarray(evaluation_params(state.opt_state, state.params)["w"]))
    expected = np.average(seen, axis=0, weights=0.8 ** np.arange(4, -1, -1.0))
    np.testing.assert_allclose(ema_of(state), expected, rtol=1e-5)


def test_swa_is_the_mean_of_weights_and_counts_each_step_once():
    options, seen = AveragingOptions(swa_from_epoch=1), []
    state = walked(options)[1]
    for number in range(5):
        params = {"w": jnp.full(3, float(number**2))}
        state = with_epoch(state.replace(params=params, step=jnp.int32(10 + number)))
        state = with_epoch(state)
        seen.append(float(number**2))
    np.testing.assert_allclose(find(state, "swa").values["params"]["w"], np.mean(seen), rtol=1e-6)
    assert int(find(state, "swa").count) == 5


def test_an_average_that_has_not_begun_is_the_weights():
    _, state = walked(AveragingOptions(swa_from_epoch=3, ema=0.9))
    assert same_bits(averaged(find(state, "swa"), state).params, state.params)
    assert not same_bits(averaged(find(state, "ema"), state).params, state.params)


# Runs


class Regression(distaff.TrainerModule):
    def loss_fn(self, params, batch, ctx):
        loss = jnp.square(ctx.apply(params, batch["x"])[:, 0] - batch["y"][:, 0])
        return loss, {"mae": jnp.sqrt(loss)}


def loader(**options: Any) -> data.ArrayLoader:
    defaults = {"batch_size": 8, "shuffle": True, "seed": 1}
    return data.ArrayLoader({"x": X, "y": Y}, **{**defaults, **options})


def make(cls: type[Any] = Regression, kind: str = "linen", **options: Any) -> Any:
    defaults = {"optimizer": optax.adam(0.05), "root": None, "name": "run", "ema": 0.9}
    defaults |= {"enable_progress_bar": False, "log_every_n_steps": 2, "steps_per_call": 1}
    return cls(KINDS[kind].mlp(0.1, True), **{**defaults, **options})


def train(trainer: Any, **options: Any) -> Any:
    train_loader = options.pop("loader", None) or loader()
    arguments = {"num_epochs": NUM_EPOCHS, **options}
    val = loader(shuffle=False)
    return trainer.train_model(train_loader, val, val, **arguments)


class Snapshots(distaff.Callback):
    """Keeps the weights after each step, and what predictions are after each epoch."""

    def __init__(self) -> None:
        self.steps: list[Any] = []
        self.epochs: list[Any] = []

    def on_step_end(self, info):
        state = info.state
        members = {n: getattr(state, n) for n in ("params", "batch_stats", "collections")}
        self.steps.append(jax.tree.map(np.array, floats(members)))

    def on_epoch_end(self, info):
        self.epochs.append(self.steps[-1])


def floats(tree: Any) -> list[Any]:
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]


def weighted(trees: list[Any], weights: Any) -> Any:
    return jax.tree.map(lambda *each: np.average(each, axis=0, weights=weights), *trees)


@pytest.mark.parametrize("kind", ["linen", "nnx", "equinox", "functions"])
@pytest.mark.slow
def test_averages_cover_weights_and_statistics_of_every_kind_of_model(kind):
    seen = Snapshots()
    trainer = make(kind=kind, ema=EMA(0.7, warmup=False), swa_from_epoch=3, callbacks=[seen])
    trainer.train_model(loader(), num_epochs=NUM_EPOCHS)
    expected = {
        "ema": weighted(seen.steps, 0.7 ** np.arange(len(seen.steps))[::-1]),
        "swa": weighted(seen.epochs[2:], [1, 1]),
        "raw": seen.steps[-1],
    }
    for name, arrays in expected.items():
        state = trainer.evaluation_state(name)
        members = {n: getattr(state, n) for n in ("params", "batch_stats", "collections")}
        for found, wanted in zip(floats(members), arrays, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-6)
    assert len({trainer.eval_model(loader(), weights=name)["loss"] for name in expected}) == 3
    outputs = {n: trainer.predict(loader(shuffle=False), weights=n) for n in expected}
    np.testing.assert_array_equal(trainer.predict(loader(shuffle=False)), outputs["raw"])
    assert not np.allclose(outputs["ema"], outputs["raw"])
    bound = trainer.bind_model(weights="ema")
    if kind == "equinox":
        module, eqx_state = bound
        rows = jax.vmap(lambda x: module(x, eqx_state)[0])(X)
    else:
        rows = bound(X, train=False) if kind == "linen" else bound(X)
    np.testing.assert_allclose(rows, outputs["ema"], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_averages_change_nothing_else():
    logs = [MemoryLogger(), MemoryLogger()]
    plain = make(ema=None, loggers=[logs[0]])
    kept = make(ema=0.9, swa_from_epoch=2, loggers=[logs[1]])
    results = [train(trainer) for trainer in (plain, kept)]
    assert plain.state.averages is None
    for member in ("params", "opt_state", "batch_stats", "step"):
        assert same_bits(getattr(plain.state, member), getattr(kept.state, member))
    rows = [[r.metrics for r in log.records if "train/loss" in r.metrics] for log in logs]
    raw = [{n: x for n, x in r.items() if "_ema/" not in n and "_swa/" not in n} for r in rows[1]]
    assert rows[0] == raw
    names = {"val_ema/loss", "val_ema/mae", "test_ema/loss", "val_swa/loss", "test_swa/mae"}
    assert names <= results[1].metrics.keys()
    assert not any("ema" in name or "swa" in name for name in results[0].metrics)


def test_table_of_results_has_a_column_for_each_average():
    names = ("train", "val", "val_ema", "val_swa", "test", "test_ema", "test_swa")
    metrics = {f"{name}/loss": float(number) for number, name in enumerate(names)}
    assert rows_by_split(metrics, {"val": "best"}) == {
        "best" if name == "val" else name: {"loss": float(n)} for n, name in enumerate(names)
    }


@pytest.mark.parametrize("options", [{}, {"optimizer": OptimizerConfig("adam", accumulate=2)}])
@pytest.mark.slow
def test_fused_steps_make_the_same_averages(options):
    states = []
    for steps_per_call in (1, 3):
        trainer = make(steps_per_call=steps_per_call, swa_from_epoch=2, **options)
        trainer.train_model(loader(), num_epochs=NUM_EPOCHS)
        states.append(trainer.state.averages)
    assert same_bits(*states)
    num_updates = {True: 2, False: 3}[bool(options)] * NUM_EPOCHS
    assert int(states[0]["ema"].count) == num_updates


class Line(Regression):
    def __init__(self, **options: Any) -> None:
        defaults = {"root": None, "enable_progress_bar": False, "optimizer": optax.sgd(0.1)}
        super().__init__(
            (lambda key, x: {"w": jnp.ones((3, 1))}, lambda p, x: x @ p["w"]),
            **{**defaults, **options},
        )


@pytest.mark.slow
def test_skipped_steps_do_not_update_the_average():
    bad, averages = X.copy(), []
    bad[8:16] = np.nan
    for x, y in ((bad, Y), (np.delete(X, range(8, 16), 0), np.delete(Y, range(8, 16), 0))):
        trainer = Line(on_bad_numbers="skip", ema=0.9)
        trainer.train_model(data.ArrayLoader({"x": x, "y": y}, 8), num_epochs=2)
        averages.append(trainer.state.averages["ema"]._replace(step=0))
    assert int(trainer.state.step) == int(averages[0].count) == 4
    assert same_bits(*averages)


class EndAt(distaff.Callback):
    """Interrupts the run at a step, or in a validation."""

    def __init__(self, step: int = 0, epoch: int = 0) -> None:
        self.step, self.epoch = step, epoch

    def on_step_end(self, info):
        if info.step == self.step:
            signal.raise_signal(signal.SIGINT)

    def on_epoch_end(self, info):
        if info.epoch == self.epoch:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("at", [{"step": 7}, {"epoch": 3}], ids=["within-epoch", "validation"])
@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_averages_of_one_that_was_not(at, tmp_path):
    options = {"swa_from_epoch": 2, "optimizer": OptimizerConfig("adam", accumulate=2)}
    whole = make(root=str(tmp_path / "whole"), callbacks=[EndAt()], **options)
    expected = train(whole)
    options |= {"root": str(tmp_path / "cut")}
    assert train(make(callbacks=[EndAt(**at)], **options)).status == "interrupted"
    resumed = make(callbacks=[EndAt()], **options)
    result = train(resumed)
    assert (result.status, result.metrics) == ("finished", expected.metrics)
    assert result.first_step > 0
    assert same_bits(resumed.state.averages, whole.state.averages)
    assert same_bits(resumed.state.params, whole.state.params)


class BestAverage(Line):
    """Is judged by a loss that rises with the epochs for the average, and falls for the weights."""

    monitor = Monitor("val_ema/loss")

    def on_validation_epoch_end(self, epoch, metrics, val_loader):
        metrics["val_ema/loss"], metrics["val/loss"] = float(epoch), 1 / epoch


OPTIONS = {"ema": EMA(0.9, warmup=False), "log_every_n_steps": 2}


def weights_of(trainer: Any, name: str | None = None) -> np.ndarray:
    return np.asarray(trainer.evaluation_state(name).params["w"])


@pytest.mark.slow
def test_monitor_of_an_average_chooses_the_checkpoint_and_the_weights_to_use(tmp_path):
    trainer = BestAverage(root=str(tmp_path), **OPTIONS)
    result = train(trainer)
    assert (result.best.epoch, result.best.step) == (1, STEPS_PER_EPOCH)
    first = Line(**OPTIONS)
    first.train_model(loader(), num_epochs=1)
    np.testing.assert_array_equal(weights_of(trainer, "ema"), weights_of(first, "ema"))
    np.testing.assert_array_equal(weights_of(trainer), weights_of(first, "ema"))
    np.testing.assert_array_equal(weights_of(first), weights_of(first, "raw"))
    assert not np.array_equal(weights_of(first, "raw"), weights_of(first, "ema"))

    rows = loader(shuffle=False)
    loaded = BestAverage.load_from_checkpoint(result.path, trainer.model.module)
    for name in (None, "ema", "raw"):
        outputs = X @ weights_of(trainer, name)
        np.testing.assert_allclose(loaded.predict(rows, weights=name), outputs, rtol=1e-5)
        np.testing.assert_allclose(loaded.bind_model(weights=name)(X), outputs, rtol=1e-5)
    assert loaded.eval_model(rows)["loss"] == result.metrics["test_ema/loss"]
    assert loaded.eval_model(rows, weights="raw")["loss"] == result.metrics["test/loss"]
    for ema in (0.5, None):
        other = Line(ema=ema, example_batch=rows.peek())
        other.load_weights(result.path)
        np.testing.assert_array_equal(weights_of(other, "ema"), weights_of(trainer, "ema"))
    files = {name: tmp_path / f"{name}.safetensors" for name in ("ema", "raw")}
    for name, file in files.items():
        loaded.export_weights(file, weights=name)
        started = Line(init_from=file, example_batch=rows.peek())
        np.testing.assert_array_equal(weights_of(started), weights_of(trainer, name))


def test_a_second_training_continues_from_the_weights_and_the_average():
    at_once, twice = Line(**OPTIONS), Line(**OPTIONS)
    restarted = Line(**OPTIONS, keep_optimizer=False)
    at_once.train_model(loader(shuffle=False), num_epochs=4)
    for trainer in (twice, restarted, twice, restarted):
        trainer.train_model(loader(shuffle=False), num_epochs=2)
    assert same_bits(twice.state.params, at_once.state.params)
    assert same_bits(twice.state.averages, at_once.state.averages)
    assert same_bits(restarted.state.params, at_once.state.params)
    assert int(restarted.state.averages["ema"].count) == 2 * STEPS_PER_EPOCH


class Distilled(Line):
    """Measures the distance from the outputs of the average."""

    def loss_fn(self, params, batch, ctx):
        outputs = ctx.apply(params, batch["x"])
        teacher = ctx.apply(params, batch["x"], weights="ema")
        loss = jnp.square(outputs - batch["y"])[:, 0]
        return loss, {"distance": jnp.square(outputs - teacher)[:, 0]}


def test_a_loss_may_run_the_model_with_an_average():
    trainer = Distilled(**OPTIONS)
    trainer.train_model(loader(), num_epochs=1)
    raw, ema = (weights_of(trainer, name) for name in ("raw", "ema"))
    distance = np.square(X @ (raw - ema)).mean()
    assert trainer.eval_model(loader())["distance"] == pytest.approx(distance, rel=1e-4)
    assert trainer.eval_model(loader(), weights="ema")["distance"] == 0


class Statistics(Regression):
    """Runs the average in training mode, too, whose statistics must not become the model's."""

    with_teacher = True

    def loss_fn(self, params, batch, ctx):
        outputs = ctx.apply(params, batch["x"])
        if self.with_teacher:
            ctx.apply(params, 5 * batch["x"], weights="ema")
        return jnp.square(outputs - batch["y"])[:, 0]


@pytest.mark.slow
def test_a_pass_with_the_average_changes_no_statistics():
    states = []
    for with_teacher in (True, False):
        trainer = make(Statistics)
        trainer.with_teacher = with_teacher
        trainer.train_model(loader(), num_epochs=1)
        states.append(trainer.state.batch_stats)
    jax.tree.map(np.testing.assert_array_equal, *states)


class OwnStep(Line):
    """A step of its own, which its class may compile itself, too."""

    compiles = False

    def create_functions(self):
        def step(state, batch):
            grads = jax.grad(lambda p: jnp.square(batch["x"] @ p["w"] - batch["y"]).mean())(
                state.params
            )
            return state.apply_gradients(grads=grads), {}

        return step, super().create_functions()[1]

    def create_jitted_functions(self, train_step, eval_step):
        if not self.compiles:
            super().create_jitted_functions(train_step, eval_step)
        else:
            self.train_step = jax.jit(train_step, donate_argnums=0)
            self.eval_step = jax.jit(eval_step)


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.slow
def test_steps_of_your_own_are_averaged(compiles):
    trainer, plain = OwnStep(**OPTIONS), Line(**OPTIONS)
    trainer.compiles = compiles
    for each in (trainer, plain):
        each.train_model(loader(shuffle=False), num_epochs=2)
    assert int(trainer.state.averages["ema"].count) == 2 * STEPS_PER_EPOCH
    np.testing.assert_allclose(weights_of(trainer, "ema"), weights_of(plain, "ema"), rtol=1e-5)


class OldEvaluation(Line):
    def eval_model(self, loader, prefix=""):
        return super().eval_model(loader, prefix)


def test_wrong_uses_say_what_to_do():
    for decay in (1.0, -0.1, True, "0.9", float("nan")):
        with pytest.raises(ConfigError, match=r"decay of an EMA must be at least 0 and less than"):
            Line(ema=decay)
    with pytest.raises(ConfigError, match="swa_from_epoch must be an integer, at least 1; got 0"):
        Line(swa_from_epoch=0)
    with pytest.raises(ConfigError, match=r"has no option 'ema_decay'. Write ema=0.999"):
        Line(ema_decay=0.9)
    trainer = Line(ema=0.9, example_batch=loader().peek())
    with pytest.raises(ConfigError, match=r"weights has no value 'emma'. Did you mean 'ema'"):
        trainer.predict(loader(), weights="emma")
    with pytest.raises(StateError, match=r"'swa' needs an average.*it has 'raw'.*swa_from_epoch"):
        trainer.predict(loader(), weights="swa")
    with pytest.raises(
        ConfigError, match=r"swa_from_epoch=3 is after the last epoch of the run, 2"
    ):
        Line(swa_from_epoch=3).train_model(loader(), num_epochs=2)
    with pytest.raises(ConfigError, match=r"validation set 'a_ema'.*Rename the set"):
        Line(ema=0.9).train_model(loader(), {"a": loader(), "a_ema": loader()}, num_epochs=1)


def test_an_override_of_eval_model_must_take_weights_only_where_there_are_averages():
    assert train(OldEvaluation()).status == "finished"
    with pytest.raises(ConfigError, match=r"eval_model does not accept.*weights"):
        train(OldEvaluation(ema=0.9))


def test_validation_sets_with_names_are_evaluated_with_each_average():
    sets = {"a": loader(shuffle=False), "b": loader(shuffle=False)}
    trainer = Line(ema=0.9, swa_from_epoch=1)
    trainer.monitor = Monitor("val_b_swa/loss")
    result = trainer.train_model(loader(), sets, num_epochs=2)
    names = {name for name in result.metrics if name.endswith("/loss") and "val" in name}
    assert names == {f"val_{one}{two}/loss" for one in "ab" for two in ("", "_ema", "_swa")}
    np.testing.assert_array_equal(weights_of(trainer), weights_of(trainer, "swa"))


@pytest.mark.parametrize("kind", ["linen", "nnx", "equinox", "functions"])
@pytest.mark.slow
def test_another_training_starts_from_the_weights_of_a_run_that_are_asked_for(kind, tmp_path):
    class Judged(Regression):
        monitor = Monitor("val_swa/loss")

    source = make(Judged, kind, swa_from_epoch=1, root=str(tmp_path))
    path = train(source, num_epochs=2).path
    for name, used in (("raw", "raw"), ("ema", "ema"), (None, "swa")):
        init_from = distaff.InitFrom(path, weights=name)
        started = make(kind=kind, ema=None, init_from=init_from, example_batch=loader().peek())
        expected = source.evaluation_state(used)
        for member in ("params", "batch_stats"):
            assert same_bits(getattr(started.state, member), getattr(expected, member))
        assert same_bits(*(floats(s.collections) for s in (started.state, expected)))
    assert "weights" not in distaff.InitFrom(path).record()
    assert distaff.InitFrom(path, weights="ema").record()["weights"] == "ema"
    with pytest.raises(ConfigError, match=r"weights has no value 'best'"):
        distaff.InitFrom(path, weights="best")
    init_from = distaff.InitFrom(source.state.params, weights="ema")
    with pytest.raises(ConfigError, match=r"weights='ema' needs a run directory"):
        make(kind=kind, init_from=init_from, example_batch=loader().peek())


def test_a_source_without_averages_says_which_weights_it_has(tmp_path):
    path = train(Line(root=str(tmp_path)), num_epochs=1).path
    with pytest.raises(CheckpointError, match=r"does not have the weights 'ema'; it has 'raw'\."):
        Line(init_from=distaff.InitFrom(path, weights="ema"), example_batch=loader().peek())
