"""The hook `augment`: which key it gets, when it is called, and that a run with it is exact."""

from __future__ import annotations

import os
import signal
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distaff
from distaff import TrainState, TrainStep, augment, data, optim, tasks, train_step
from distaff.errors import BatchError, StateError
from distaff.metrics import Last

RNG = np.random.default_rng(0)
IMAGES = RNG.random((40, 8, 8, 1), np.float32)
LABELS = (IMAGES.mean(axis=(1, 2, 3)) > 0.5).astype(np.int32)
BATCH = {"image": IMAGES[:4], "label": LABELS[:4]}


class Model(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.relu(nn.Dense(4)(x.reshape(len(x), -1)))
        return nn.Dense(2)(nn.Dropout(0.3, deterministic=not train)(x))


def augmented(batch: Any, key: jax.Array) -> Any:
    keys = jax.random.split(key, 4)
    images = augment.random_crop(keys[0], batch["image"], 1)
    images = augment.cutout(keys[1], augment.random_flip(keys[2], images), 3)
    labels = jax.nn.one_hot(batch["label"], 2)
    images, labels = augment.mixup(keys[3], images, labels, 0.4)
    return {**batch, "image": images, "label": labels}


class Plain(tasks.Classifier):
    def print_tabulate(self, example_batch):
        pass  # it takes most of the time of a start


class Augmenting(Plain):
    calls = 0

    def augment(self, batch, key):
        self.calls += 1
        return augmented(batch, key)


def trainer(kind: type[Plain] = Augmenting, **options: Any) -> Plain:
    return kind(
        Model(), enable_progress_bar=False, **{"root": None, "steps_per_call": 1, **options}
    )


def loader() -> data.ArrayLoader:
    return data.ArrayLoader({"image": IMAGES, "label": LABELS}, 4, shuffle=True)


def loss_fn(params: Any, batch: Any, ctx: distaff.Context) -> Any:
    logits = ctx.apply(params, batch["image"])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return loss, {"drawn": Last(jax.random.uniform(ctx.rng))}


def new_state(tx: Any = None, **members: Any) -> TrainState:
    params = Model().init(jax.random.key(0), IMAGES[:1], train=False)["params"]
    members = {"rng": jax.random.key(1), **members}
    return TrainState.create(
        apply_fn=Model().apply, params=params, tx=tx or optax.sgd(0.1), **members
    )


STATE = new_state()


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_key_is_new_in_each_step_and_leaves_all_other_draws_as_they_are():
    seen = []

    def watching(batch: Any, key: jax.Array) -> Any:
        jax.debug.callback(lambda data: seen.append(tuple(data.tolist())), jax.random.key_data(key))
        return batch

    states, metrics = [STATE, STATE], [None, None]
    steps = [jax.jit(train_step(loss_fn)), jax.jit(train_step(loss_fn, augment=watching))]
    for _ in range(3):
        for each, step in enumerate(steps):
            states[each], metrics[each] = step(states[each], BATCH)
        assert bits(metrics[0]) == bits(metrics[1])
    assert bits(states[0].params) == bits(states[1].params)
    jax.effects_barrier()
    others = [jax.random.fold_in(jax.random.key(1), step) for step in range(3)]
    others += [jax.random.fold_in(key, 1) for key in others]  # the one of dropout
    assert len({*seen, *(tuple(jax.random.key_data(key).tolist()) for key in others)}) == 9


def test_class_form_is_the_same_step():
    steps = train_step(loss_fn, augment=brighter), TrainStep(loss_fn, augment=brighter)
    function, same = (str(jax.make_jaxpr(step)(STATE, BATCH)) for step in steps)
    assert function == same
    assert function != str(jax.make_jaxpr(TrainStep(loss_fn))(STATE, BATCH))


def brighter(batch: Any, key: jax.Array) -> Any:
    shift = jax.random.normal(key, (len(batch["image"]), 1, 1, 1))
    return {**batch, "image": batch["image"] + shift}


def test_step_without_the_hook_is_the_same_program():
    plain = trainer(Plain)
    plain._set_up(BATCH)
    step, _ = plain.create_functions()
    programs = [
        str(jax.make_jaxpr(each)(STATE, BATCH))
        for each in (step, train_step(plain.loss_fn), trainer().create_functions()[0])
    ]
    assert programs[0] == programs[1] != programs[2]


def test_hook_may_be_an_attribute():
    plain = trainer(Plain)
    plain.augment = lambda batch, key: 1 / 0
    with pytest.raises(ZeroDivisionError):
        plain.train_model(loader(), num_epochs=1)


def test_hook_is_called_once_where_an_optimizer_evaluates_the_loss_again():
    calls = []

    def counting(batch: Any, key: jax.Array) -> Any:
        calls.append(key)
        return brighter(batch, key)

    def update(updates, state, params, *, value, value_fn, **extra):
        again = value_fn(params), value_fn(params)
        return updates, jnp.stack([value, *again])

    asking = optax.GradientTransformationExtraArgs(lambda params: jnp.zeros(3), update)
    state, _ = jax.jit(train_step(loss_fn, augment=counting))(
        new_state(optax.chain(asking, optax.sgd(0.1))), BATCH
    )
    values = np.asarray(state.opt_state[0])
    assert len(calls) == 1
    np.testing.assert_allclose(values, values[0], rtol=1e-6)
    assert values[0] != pytest.approx(float(loss_fn_value(BATCH)), rel=1e-3)


def loss_fn_value(batch: Any) -> jax.Array:
    _, metrics = jax.jit(train_step(loss_fn))(STATE, batch)
    return metrics["loss"].compute()


def test_accumulated_steps_have_keys_of_their_own():
    def drawn(params, batch, ctx):
        loss = ctx.apply(params, batch["image"])[:, 0]
        return loss, {"mean": Last(batch["image"].mean())}

    step = jax.jit(train_step(drawn, augment=brighter))
    state, means = new_state(optim.accumulate(optax.sgd(0.1), 2)), []
    for _ in range(4):
        state, metrics = step(state, BATCH)
        means.append(float(metrics["mean"].compute()))
    assert len(set(means)) == 4


@pytest.mark.slow
def test_evaluation_and_prediction_see_batches_as_they_are():
    run = trainer()
    run.train_model(loader(), loader(), num_epochs=1)
    traced = run.calls
    assert traced >= 1
    plain = trainer(Plain)
    plain._set_up(BATCH)
    plain.state = plain.state.replace(params=run.state.params)
    assert run.eval_model([BATCH]) == plain.eval_model([BATCH])
    np.testing.assert_array_equal(run.predict([BATCH]), plain.predict([BATCH]))
    assert run.calls == traced


@pytest.fixture(scope="module")
def straight() -> dict[str, Any]:
    """Members of a run of two epochs of ten steps that was not stopped, one step at a time."""
    run = trainer(log_every_n_steps=3)
    run.train_model(loader(), num_epochs=2)
    return run.state.arrays()


def is_same(state: TrainState, members: dict[str, Any]) -> bool:
    return all(bits(state.arrays()[name]) == bits(members[name]) for name in ("params", "step"))


@pytest.mark.slow
def test_fused_steps_are_single_steps_bit_for_bit(straight):
    run = trainer(steps_per_call=4, log_every_n_steps=3)
    run.train_model(loader(), num_epochs=2)
    assert is_same(run.state, straight)
    other = trainer(steps_per_call=4, log_every_n_steps=3, seed=1)
    other.train_model(loader(), num_epochs=2)
    assert not is_same(other.state, straight)


class Interrupt(distaff.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, info):
        if info.step == self.step:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.slow
def test_run_that_was_stopped_within_an_epoch_goes_on_bit_for_bit(straight):
    options = {"root": "runs", "name": "run", "log_every_n_steps": 3}
    stopped = trainer(callbacks=[Interrupt(4)], **options)
    result = stopped.train_model(loader(), num_epochs=2)
    assert (result.status, result.step) == ("interrupted", 4)
    again = trainer(callbacks=[Interrupt(0)], **options)
    result = again.train_model(loader(), num_epochs=2)
    assert (result.status, result.path.name, os.listdir("runs/run")) == (
        "finished",
        "0001",
        ["0001"],
    )
    assert is_same(again.state, straight)


@pytest.mark.parametrize(
    ("hook", "words"),
    [
        (lambda batch, key: None, r"'image' is missing .* NoneType with the leaves \[\]"),
        (
            lambda batch, key: batch["image"],
            r"'image' is missing .* the leaves \['\(the whole tree\)'\]",
        ),
        (lambda batch, key: {"image": batch["image"]}, "'label' is missing in the returned"),
        (
            lambda batch, key: {**batch, "image": batch["image"][:3]},
            r"4 examples; 'image' has shape \(3, 8, 8, 1\)",
        ),
        (lambda batch, key: {**batch, "new": jnp.zeros(3)}, r"'new' has shape \(3,\)"),
        (
            lambda batch, key: {**batch, "label": batch["label"].sum()},
            r"'label' has shape \(\)\. Give it one value per example: jnp\.full\(4, value\)",
        ),
        (lambda batch, key: {**batch, "new": 3}, r"'new' has shape \(\)\. Give it one value"),
        (lambda batch, key: {**batch, "new": "x"}, "as arrays; 'new' is of type str"),
    ],
)
def test_batch_of_another_form_is_refused(hook, words):
    with pytest.raises(BatchError, match=f"returns all leaves of its batch.*{words}"):
        jax.eval_shape(train_step(loss_fn, augment=hook), STATE, BATCH)


def test_batch_may_get_new_leaves():
    def two_views(batch: Any, key: jax.Array) -> Any:
        return {**batch, "view": augment.random_flip(key, batch["image"])}

    def compared(params: Any, batch: Any, ctx: distaff.Context) -> Any:
        return jnp.square(ctx.apply(params, batch["image"]) - ctx.apply(params, batch["view"])).sum(
            axis=1
        )

    step = train_step(compared, augment=two_views)
    assert jax.eval_shape(step, STATE, BATCH)[1]["loss"].total.shape == ()


def test_state_without_a_key_is_refused():
    with pytest.raises(StateError, match=r"needs a root key.*rng=jax\.random\.key\(0\)"):
        train_step(loss_fn, augment=brighter)(new_state(rng=None), BATCH)
