"""Bad steps: found where they are, and left out or gone back from as if they had never been."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distaff import Callback, TrainerModule, data
from distaff.checkpoint import CheckpointStore
from distaff.errors import ConfigError, MetricError, NonFiniteError

SIZE, BATCHES = 4, 60
# Fused by a given number: to measure which form is faster compiles two.
FIXED: Any = {"root": None, "enable_progress_bar": False, "steps_per_call": 4}


class Normed(nn.Module):
    """A model with running statistics."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(5, use_bias=False)(x))
        return nn.Dropout(0.3, deterministic=not train)(nn.Dense(1)(x))[:, 0]


class Fit(TrainerModule):
    """Squared errors."""

    def loss_fn(self, params, batch, ctx):
        return jnp.square(ctx.apply(params, batch["x"]) - batch["y"])


def bad_gradient_at(step: int) -> type[Fit]:
    """Returns a trainer whose gradient after so many steps is NaN, and whose loss is not."""

    class BadGradient(Fit):
        def loss_fn(self, params, batch, ctx):
            error = super().loss_fn(params, batch, ctx)
            away = jnp.where(ctx.state.step == step, 0.0, 1.0)
            return error + 0 * jnp.sqrt(jnp.square(params["Dense_1"]["kernel"]).sum() * away)

    return BadGradient


class Interrupt(Callback):
    """Ends a run after a validation or an epoch, as a user would with Ctrl-C."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_epoch_end(self, info):
        if info.epoch == self.epoch:
            raise KeyboardInterrupt


def arrays(**changes: dict[int, float]) -> dict[str, np.ndarray]:
    """Returns 60 batches of 4 examples; `x={5: nan}` puts NaN into the sixth batch of `x`."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(SIZE * BATCHES, 3)).astype(np.float32)
    found = {"x": x, "y": (x.sum(1) + 0.1 * rng.normal(size=len(x))).astype(np.float32)}
    for name, batches in changes.items():
        for batch, value in batches.items():
            found[name][SIZE * batch + 1] = value
    return found


def without(found: dict[str, np.ndarray], batches: range) -> dict[str, np.ndarray]:
    """Returns the arrays without some of the batches."""
    rows = np.arange(SIZE * BATCHES)
    kept = ~np.isin(rows // SIZE, batches)
    return {name: array[kept] for name, array in found.items()}


def trained(found: dict[str, np.ndarray], epochs: int = 1, callbacks: Any = (), **options: Any):
    options = {**FIXED, "log_every_n_steps": 7, **options}
    fit = Fit(Normed(), optimizer=optax.adam(1e-2), callbacks=callbacks, **options)
    result = fit.train_model(data.ArrayLoader(found, SIZE), num_epochs=epochs)
    return fit, result


def assert_same_state(first: TrainerModule, second: TrainerModule, *, but: tuple[str, ...] = ()):
    for name, tree in first.state.arrays().items():
        if name in ("rng", *but):
            continue
        other = second.state.arrays()[name]
        for one, two in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(one, two, err_msg=name)


def lines(path: Path) -> list[dict[str, Any]]:
    """Returns what a run has logged, without the times."""
    found = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{name: each for name, each in line.items() if name != "time"} for line in found]


@pytest.mark.parametrize("epoch", [1, 2])
@pytest.mark.parametrize("steps_per_call", [1, 8])
@pytest.mark.slow
def test_error_says_which_batch_and_why(steps_per_call: int, epoch: int, tmp_path: Path) -> None:
    # An example without weight is not seen; NaN is met in one epoch, in the middle of its order.
    class Logs(Fit):
        def loss_fn(self, params, batch, ctx):
            error = super().loss_fn(params, batch, ctx)
            at = jnp.where(ctx.state.step == 60 * (epoch - 1) + 20, -1.0, 1.0)
            return error + 0 * jnp.log(at)

    found = arrays()
    options = {**FIXED, "root": tmp_path, "steps_per_call": steps_per_call}
    fit = Logs(Normed(), optimizer=optax.adam(1e-2), **options)
    with pytest.raises(NonFiniteError) as error:
        fit.train_model(data.ArrayLoader(found, SIZE, shuffle=True), num_epochs=2)
    text = str(error.value)
    assert f"at step {60 * (epoch - 1) + 21}. It was batch 21 of epoch {epoch}." in text
    assert "The loss is not finite. It comes from log(-1), which is NaN" in text
    assert "test_recovery.py:" in text
    kept = "There is no checkpoint yet." if epoch == 1 else "The last good checkpoint is of step 60"
    assert kept in text
    assert json.loads((fit.last_run.path / "status.json").read_text())["reason"].endswith(text)


@pytest.mark.slow
def test_error_names_the_entry_of_the_batch() -> None:
    with pytest.raises(NonFiniteError, match=r"has 1 non-finite value in 'y', in exampl"):
        trained(arrays(y={33: np.nan}), steps_per_call=8)


@pytest.mark.slow
def test_gradient_that_shows_a_step_later_is_traced_back() -> None:
    fit = bad_gradient_at(40)(Normed(), optimizer=optax.adam(1e-2), **FIXED)
    with pytest.raises(
        NonFiniteError, match=r"at step 42\..*In step 41: The gradient is not finite"
    ):
        fit.train_model(data.ArrayLoader(arrays(), SIZE), num_epochs=1)


def test_loader_that_cannot_go_back_leaves_the_reason_open() -> None:
    found = arrays(x={33: np.nan})
    batches = [
        {name: array[SIZE * n : SIZE * n + SIZE] for name, array in found.items()}
        for n in range(BATCHES)
    ]
    fit = Fit(Normed(), **FIXED)
    with pytest.raises(
        NonFiniteError, match=r"batch 34 of epoch 1\. The cause is unknown: A Stream"
    ):
        fit.train_model(batches, num_epochs=1)


@pytest.mark.parametrize("steps_per_call", [1, 8])
@pytest.mark.parametrize("name", ["x", "y"])
@pytest.mark.slow
def test_skipped_step_changes_nothing_but_the_count(name: str, steps_per_call: int) -> None:
    found = arrays(**{name: {20: np.nan, 33: np.inf}})
    fit, result = trained(found, on_bad_numbers="skip", steps_per_call=steps_per_call)
    assert (result.step, result.metrics["train/skipped"]) == (BATCHES, 2)
    assert np.isfinite(result.metrics["train/loss"])
    assert fit.state.step == BATCHES

    # The same by hand: the step's own program, and the update thrown away.
    by_hand = Fit(Normed(), optimizer=optax.adam(1e-2), root=None, enable_progress_bar=False)
    by_hand._set_up({name: array[:SIZE] for name, array in found.items()})
    by_hand.init_optimizer(None)
    state, step = by_hand.state, jax.jit(by_hand.create_functions()[0])
    losses = []
    for batch in range(BATCHES):
        rows = slice(SIZE * batch, SIZE * batch + SIZE)
        after, metrics = step(state, {name: array[rows] for name, array in found.items()})
        if batch in (20, 33):
            state = state.replace(step=after.step)
        else:
            state = after
            losses.append(metrics["loss"].compute())
    for one, two in zip(
        jax.tree.leaves((state.params, state.opt_state, state.batch_stats)),
        jax.tree.leaves((fit.state.params, fit.state.opt_state, fit.state.batch_stats)),
        strict=True,
    ):
        np.testing.assert_allclose(one, two, rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(result.metrics["train/loss"], np.mean(losses), rtol=1e-5)


@pytest.mark.slow
def test_skipping_too_many_in_a_row_ends_the_run() -> None:
    bad = dict.fromkeys(range(30, 60), np.nan)
    with pytest.raises(NonFiniteError, match=r"at step 34.*max_skips=3 bad steps before it"):
        trained(arrays(x=bad), on_bad_numbers="skip", max_skips=3)
    _, result = trained(
        arrays(x=dict.fromkeys(range(30, 33), np.nan)), on_bad_numbers="skip", max_skips=3
    )
    assert result.metrics["train/skipped"] == 3


@pytest.mark.parametrize("steps_per_call", [1, 8])
@pytest.mark.parametrize("bad", [3, 30, 58])
@pytest.mark.slow
def test_rollback_is_as_if_the_batches_had_never_been(
    bad: int, steps_per_call: int, tmp_path: Path
) -> None:
    options = {"on_bad_numbers": "rollback", "steps_per_call": steps_per_call}
    found = arrays(x={bad: np.nan})
    fit, result = trained(found, root=tmp_path / "back", **options)
    gone = range(max(0, bad - 8), bad + 9)
    rest = without(found, gone)
    clean, expected = trained(rest, root=tmp_path / "clean", **options)
    assert result.step == expected.step == len(rest["x"]) // SIZE
    assert_same_state(fit, clean)
    assert lines(result.path) == lines(expected.path)
    assert f"batches {gone.start + 1} to {gone.stop}" in (result.path / "log.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("writes", [True, False])
def test_saves_by_the_clock_do_not_decide_what_is_left_out(tmp_path: Path, writes: bool) -> None:
    found = arrays(x={30: np.nan})
    options = {"on_bad_numbers": "rollback", "root": tmp_path / "back" if writes else None}
    fit, result = trained(found, save_every=1e-9, **options)
    clean, expected = trained(without(found, range(22, 39)), root=tmp_path / "clean")
    assert_same_state(fit, clean, but=("guard",))
    assert result.step == expected.step
    if writes:
        assert lines(result.path) == lines(expected.path)


@pytest.mark.slow
def test_rollback_over_epochs_leaves_out_batches_of_one(tmp_path: Path) -> None:
    found = arrays()
    order = data.ArrayLoader(found, SIZE, shuffle=True, seed=1)
    first, second = list(order.rows()), list(order.rows())
    # One example is bad, so that it is met in each epoch, elsewhere.
    found["x"][second[40][0]] = np.nan
    places = [
        next(i for i, rows in enumerate(epoch) if second[40][0] in rows)
        for epoch in (first, second)
    ]
    fit = Fit(
        Normed(),
        optimizer=optax.adam(1e-2),
        on_bad_numbers="rollback",
        check_val_every_n_epoch=2,
        **{**FIXED, "root": tmp_path},
    )
    loader = data.ArrayLoader(found, SIZE, shuffle=True, seed=1)
    result = fit.train_model(loader, [arrays()], num_epochs=2)  # a list that cannot go back
    gone = []
    for epoch, place, reach in zip((1, 2), places, (8, 15), strict=True):
        gone.append(min(60, place + reach + 1) - max(0, place - reach))
        assert f"batch {place + 1} of epoch {epoch}" in (result.path / "log.txt").read_text()
    assert result.step == 2 * BATCHES - sum(gone)
    assert np.isfinite(result.metrics["train/loss"])


@pytest.mark.slow
def test_run_that_goes_back_and_is_interrupted_goes_on_without_the_batches(tmp_path: Path) -> None:
    found = arrays(x={30: np.nan})
    options = {"on_bad_numbers": "rollback", "epochs": 3}
    with pytest.raises(KeyboardInterrupt):
        trained(found, root=tmp_path / "cut", callbacks=[Interrupt(2)], **options)
    fit, result = trained(found, root=tmp_path / "cut", callbacks=[Interrupt(9)], **options)
    clean, expected = trained(found, root=tmp_path / "whole", callbacks=[Interrupt(9)], **options)
    assert result.path.name == "0001"
    assert_same_state(fit, clean)
    assert lines(result.path) == lines(expected.path)


@pytest.mark.slow
def test_run_goes_back_only_so_often() -> None:
    bad = dict.fromkeys(range(10, 60, 20), np.nan)
    with pytest.raises(NonFiniteError, match=r"rolled back 2 times \(max_skips=2\)"):
        trained(arrays(x=bad), on_bad_numbers="rollback", max_skips=2, save_every=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("epochs", "message"),
    [(1, "All batches of epoch 1 were skipped"), (9, "rolled back 3 times to step 0")],
)
def test_run_that_is_bad_whatever_its_batches_ends(epochs: int, message: str) -> None:
    found = {name: array[: SIZE * 3] for name, array in arrays().items()}
    fit = Fit(
        Normed(),
        optimizer=optax.sgd(jnp.inf),
        on_bad_numbers="rollback",
        **FIXED,
    )
    if epochs == 9:
        found = arrays()
    with pytest.raises(NonFiniteError, match=message):
        fit.train_model(data.ArrayLoader(found, SIZE), num_epochs=epochs)


def test_loader_that_cannot_go_back_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    fit = Fit(
        Normed(), root=tmp_path / "runs", enable_progress_bar=False, on_bad_numbers="rollback"
    )
    with pytest.raises(ConfigError, match=r"rollback.*get_state"):
        fit.train_model([arrays()], num_epochs=1)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_spike_ends_the_run_where_that_is_asked_for() -> None:
    found = arrays(y={50: 1e4})
    with pytest.raises(NonFiniteError, match=r"loss is a spike at step 51.*batch 51 of epoch 1"):
        trained(found, on_loss_spike="raise", steps_per_call=8)
    _, result = trained(found)
    assert result.step == BATCHES


@pytest.mark.parametrize("steps_per_call", [1, 8])
@pytest.mark.slow
def test_spike_is_skipped(steps_per_call: int) -> None:
    fit, result = trained(arrays(y={50: 1e4}), on_loss_spike="skip", steps_per_call=steps_per_call)
    assert (result.metrics["train/skipped"], result.metrics["train/spikes"]) == (1, 1)
    # What the batch was is no matter.
    other, _ = trained(arrays(y={50: 1e5}), on_loss_spike="skip", steps_per_call=steps_per_call)
    assert_same_state(fit, other, but=("guard",))


@pytest.mark.slow
def test_new_level_of_the_loss_is_trained_on_after_some_steps() -> None:
    found = arrays(y=dict.fromkeys(range(40, 60), 1e3))
    _, result = trained(found, on_loss_spike="skip", max_skips=4)
    assert result.metrics["train/skipped"] == 4
    assert result.metrics["train/spikes"] > 4


@pytest.mark.slow
def test_spike_is_gone_back_from(tmp_path: Path) -> None:
    found = arrays(y={45: 1e4})
    fit, result = trained(found, on_loss_spike="rollback", root=tmp_path / "back")
    rest = without(found, range(37, 54))
    clean, _ = trained(rest, on_loss_spike="rollback", root=tmp_path / "clean")
    assert result.step == 43
    assert_same_state(fit, clean)


@pytest.mark.slow
def test_resumed_run_looks_back_on_the_same_losses(tmp_path: Path) -> None:
    found = arrays(y={2: 1e4, 40: 1e4})
    options = {"on_loss_spike": "skip", "epochs": 3}
    with pytest.raises(KeyboardInterrupt):
        trained(found, root=tmp_path / "cut", callbacks=[Interrupt(2)], **options)
    fit, result = trained(found, root=tmp_path / "cut", callbacks=[Interrupt(9)], **options)
    clean, expected = trained(found, root=tmp_path / "whole", callbacks=[Interrupt(9)], **options)
    assert_same_state(fit, clean)
    assert lines(result.path) == lines(expected.path)
    assert expected.metrics["train/skipped"] == 2


@pytest.mark.slow
def test_policy_may_be_changed_from_one_start_to_the_next(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        trained(arrays(), 2, root=tmp_path, callbacks=[Interrupt(2)])
    changed = {"on_loss_spike": "skip", "resume": "must"}
    _, result = trained(arrays(), 2, root=tmp_path, callbacks=[Interrupt(9)], **changed)
    assert (result.path.name, result.step) == ("0001", 2 * BATCHES)


def test_spike_needs_a_loss() -> None:
    class Own(Fit):
        def create_functions(self):
            train, evaluate = super().create_functions()

            def renamed(state, batch):
                state, metrics = train(state, batch)
                return state, {"error": metrics["loss"]}

            return renamed, evaluate

    own = Own(Normed(), **FIXED, on_loss_spike="skip")
    with pytest.raises(MetricError, match="metric called 'loss'"):
        own.train_model(data.ArrayLoader(arrays(), SIZE), num_epochs=1)


@pytest.mark.slow
def test_checkpoints_within_an_epoch_change_nothing_and_do_not_stay(tmp_path: Path) -> None:
    saved = []

    class Look(Callback):
        def on_step_end(self, info):
            saved.extend(
                CheckpointStore(tmp_path / "often" / "fit" / "0001" / "checkpoints").steps()
            )

    often, result = trained(
        arrays(), 2, root=tmp_path / "often", save_every=0.2, callbacks=[Look()]
    )
    never, expected = trained(
        arrays(), 2, root=tmp_path / "never", save_every=None, callbacks=[Interrupt(9)]
    )
    assert_same_state(often, never)
    assert lines(result.path) == lines(expected.path)
    names = [sorted(p.name for p in (r.path / "checkpoints").iterdir()) for r in (result, expected)]
    assert names[0] == names[1]


def test_run_that_waits_for_its_data_says_where(tmp_path: Path, capfd) -> None:
    def batches():
        for batch in range(6):
            time.sleep(2.0 * (batch == 4))
            yield {name: array[:SIZE] for name, array in arrays().items()}

    fit = Fit(
        Normed(),
        root=tmp_path,
        enable_progress_bar=False,
        steps_per_call=1,
        optimizer=optax.sgd(1e-2),
        stuck_after=0.4,
        recompile="ignore",
    )
    fit.train_model(batches, num_epochs=1)
    text = (fit.last_run.path / "log.txt").read_text()
    assert "seems stuck: at step 4, a step has taken" in text
    assert "in batches" in text  # the function that it waits in
    assert "continues, after" in text
    assert "seems stuck" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["spikes", "not_finite", "skipped", "guard"])
def test_names_of_metrics_are_free_where_nothing_is_guarded(name: str) -> None:
    class Named(Fit):
        def loss_fn(self, params, batch, ctx):
            return super().loss_fn(params, batch, ctx), {name: jnp.float32(3.0)}

    class Looks(Callback):
        def on_step_end(self, info):
            assert float(info.metrics[name].compute()) == 3.0

    fit = Named(Normed(), optimizer=optax.adam(1e-2), callbacks=[Looks()], **FIXED)
    result = fit.train_model(data.ArrayLoader(arrays(), SIZE), num_epochs=1)
    assert result.metrics[f"train/{name}"] == 3.0
    fit = Named(Normed(), **FIXED, on_loss_spike="skip")
    if name != "not_finite":
        with pytest.raises(MetricError, match=f"'{name}'.*Rename"):
            fit.train_model(data.ArrayLoader(arrays(), SIZE), num_epochs=1)


@pytest.fixture(scope="module")
def loss_of_two_epochs() -> float:
    """Returns the training loss of the second epoch of a run without a policy."""
    return trained(arrays(), 2)[1].metrics["train/loss"]


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"on_bad_numbers": "skip"}),
        ({}, {"on_loss_spike": "rollback", "save_every": 1e-9}),
        ({"on_bad_numbers": "skip"}, {}),
        ({"on_bad_numbers": "skip"}, {"on_loss_spike": "skip"}),
        ({"on_loss_spike": "skip"}, {"on_bad_numbers": "rollback"}),
    ],
)
@pytest.mark.slow
def test_every_policy_goes_on_from_a_run_of_every_other(
    before: dict[str, Any],
    after: dict[str, Any],
    within: bool,
    loss_of_two_epochs: float,
    tmp_path: Path,
) -> None:
    # The state is the same under each: nothing is bad.
    class Stop(Callback):
        def on_step_end(self, info):
            if info.step == 75:
                signal.raise_signal(signal.SIGINT)

    first = [Stop()] if within else [Interrupt(2)]
    if within:
        assert trained(arrays(), 2, first, root=tmp_path, **before)[1].status == "interrupted"
    else:
        with pytest.raises(KeyboardInterrupt):
            trained(arrays(), 2, first, root=tmp_path, **before)
    _, result = trained(arrays(), 2, [Callback()], root=tmp_path, **after)
    assert (result.path.name, result.step) == ("0001", 2 * BATCHES)
    np.testing.assert_allclose(result.metrics["train/loss"], loss_of_two_epochs, rtol=1e-4)


@pytest.mark.slow
def test_number_that_is_bad_behind_tolerated_spikes_is_seen() -> None:
    found = arrays(y={**dict.fromkeys(range(40, 60), 1e3), 46: np.nan})
    with pytest.raises(NonFiniteError, match=r"at step 47"):
        trained(found, on_loss_spike="skip", max_skips=2, log_every_n_steps=50)


def test_rate_is_that_of_the_updates_and_not_of_skipped_steps(tmp_path: Path) -> None:
    schedule = optax.linear_schedule(1e-2, 0.0, 60)

    class Scheduled(Fit):
        def init_optimizer(self, total_steps):
            super().init_optimizer(total_steps)
            self._workspace.schedule = schedule

    fit = Scheduled(
        Normed(),
        optimizer=optax.sgd(schedule),
        on_bad_numbers="skip",
        log_every_n_steps=10,
        **{**FIXED, "root": tmp_path},
    )
    bad = dict.fromkeys(range(2, 8), np.nan)
    result = fit.train_model(data.ArrayLoader(arrays(x=bad), SIZE), num_epochs=1)
    rates = [line["step/learning_rate"] for line in lines(result.path) if "step/loss" in line]
    expected = [schedule(step - 6 - 1) for step in range(10, 61, 10)]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)


@pytest.mark.slow
def test_bad_number_that_only_the_last_save_sees_is_told_of_like_others() -> None:
    fit = bad_gradient_at(59)(
        Normed(), optimizer=optax.adam(1e-2), check_val_every_n_epoch=2, **FIXED
    )
    with pytest.raises(NonFiniteError, match=r"step 60.*batch 60 of epoch 1.*clip"):
        fit.train_model(data.ArrayLoader(arrays(), SIZE), num_epochs=1)


@pytest.mark.slow
def test_error_survives_a_loader_that_fails_in_its_own_words() -> None:
    class Stubborn:
        def __init__(self) -> None:
            self.loader = data.ArrayLoader(arrays(x={33: np.nan}), SIZE)

        def __iter__(self):
            return iter(self.loader)

        def __len__(self) -> int:
            return BATCHES

        def peek(self):
            return self.loader.peek()

        def get_state(self):
            return self.loader.get_state()

        def set_state(self, state):
            raise NotImplementedError("no way back")

    for policy, text in {
        "raise": "cause is unknown: no way",
        "rollback": "rollback failed",
    }.items():
        fit = Fit(Normed(), **FIXED, on_bad_numbers=policy)
        with pytest.raises(NonFiniteError, match=rf"step 34.*{text}"):
            fit.train_model(Stubborn(), num_epochs=1)


@pytest.mark.slow
def test_callbacks_go_back_with_a_run_in_memory(tmp_path: Path) -> None:
    class Remembers(Callback):
        def __init__(self) -> None:
            self.seen: list[int] = []

        def on_epoch_end(self, info):
            self.seen.append(info.epoch)

        def get_state(self):
            return {"seen": self.seen}

        def set_state(self, state):
            self.seen = list(state["seen"])

    class Once(Fit):
        def loss_fn(self, params, batch, ctx):
            error = super().loss_fn(params, batch, ctx)
            return error + jnp.where(ctx.state.step == 230, jnp.nan, 0.0)

    for root in (None, tmp_path):
        remembers = Remembers()
        fit = Once(
            Normed(),
            on_bad_numbers="rollback",
            callbacks=[remembers],
            check_val_every_n_epoch=2,
            **{**FIXED, "root": root},
        )
        result = fit.train_model(data.ArrayLoader(arrays(), SIZE), num_epochs=4)
        # It has gone back from the fourth epoch to the end of the second.
        assert (
            [each.back_to for each in fit.last_run.state.skipped]
            == [120] * len(fit.last_run.state.skipped)
            != []
        )
        assert result.step < 4 * BATCHES
        assert remembers.seen == [1, 2, 3, 4]
