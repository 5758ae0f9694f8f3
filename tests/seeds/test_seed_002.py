"""The third source document, how to build an optimizer: its steps, and its slips of the pen.

What other files prove is not repeated here:

    {"params": params} and params   unit/test_step.py: apply_takes_params_bare_and_under_their_name
    batches of any kind in a step   unit/test_step.py: a_batch_is_any_pytree
    new_param                       unit/test_state.py, test_seed_001.py
    value_and_grad in one go        test_seed_000.py
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distaff
from distaff import TrainState, train_step
from distaff.errors import DistaffError, StateError


class SimpleClassifier(nn.Module):
    num_hidden: int
    num_classes: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.num_classes)(nn.tanh(nn.Dense(self.num_hidden)(x)))


MODEL = SimpleClassifier(num_hidden=10, num_classes=10)
OPTIMIZER = optax.adam(learning_rate=1e-3)
IMAGE = jnp.asarray(np.random.default_rng(0).normal(size=(4, 10)).astype(np.float32))
WRAPPED: Any = MODEL.init(jax.random.key(42), IMAGE)
BARE = WRAPPED["params"]


def assert_same_bits(tree: Any, other: Any) -> None:
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def document_loss(params: Any, state: Any, image: Any) -> jax.Array:
    return jnp.mean((state.apply_fn(params, image) - image) ** 2)


def loss_fn(params: Any, batch: Any, ctx: distaff.Context) -> jax.Array:
    return jnp.mean((ctx.apply(params, batch) - batch) ** 2)


def test_the_document_trains_as_it_stands_with_its_variables_wrapped():
    state = TrainState.create(apply_fn=MODEL.apply, params=WRAPPED, tx=OPTIMIZER)
    params, opt_state = WRAPPED, OPTIMIZER.init(WRAPPED)
    for _ in range(10):
        _, grad = jax.value_and_grad(document_loss)(state.params, state, IMAGE)
        state = state.apply_gradients(grads=grad)
        updates, opt_state = OPTIMIZER.update(grad, opt_state, params)
        params = optax.apply_updates(params, updates)
    assert_same_bits(state.params, params)
    assert int(state.step) == 10
    assert document_loss(params, state, IMAGE) < document_loss(WRAPPED, state, IMAGE)


def test_variables_wrapped_and_bare_train_to_the_same_bits():
    states = [
        TrainState.create(apply_fn=MODEL.apply, params=params, tx=OPTIMIZER)
        for params in (WRAPPED, BARE)
    ]
    step = jax.jit(train_step(loss_fn))
    for _ in range(10):
        states = [step(state, IMAGE)[0] for state in states]
    assert_same_bits(states[0].params, {"params": states[1].params})
    assert (states[0].params["params"]["Dense_0"]["kernel"] != BARE["Dense_0"]["kernel"]).any()


def test_apply_fn_is_the_forward_pass_of_the_model():
    state: Any = TrainState.create(apply_fn=MODEL.apply, params=WRAPPED, tx=OPTIMIZER)
    assert_same_bits(state.apply_fn(state.params, IMAGE), MODEL.apply(WRAPPED, IMAGE))


def slip_in_create() -> Any:
    return TrainState.create(appy_fn=MODEL.apply, params=BARE, tx=OPTIMIZER)


def slip_in_update(use: Callable[[Any], Any]) -> Callable[[], Any]:
    def slip():
        grads, opt_state = jax.tree.map(jnp.ones_like, BARE), OPTIMIZER.init(BARE)
        params = OPTIMIZER.update(grads, opt_state, BARE)
        return use(params)

    return slip


def slip_in_gradients() -> Any:
    state = TrainState.create(apply_fn=MODEL.apply, params=BARE, tx=OPTIMIZER)
    return state.apply_gradients(jax.tree.map(jnp.ones_like, BARE))


@pytest.mark.parametrize(
    ("slip", "right"),
    [
        (slip_in_create, "'appy_fn' to set here. Did you mean 'apply_fn'?"),
        (
            slip_in_update(lambda params: TrainState.create(params=params, tx=OPTIMIZER)),
            "params = optax.apply_updates(params, updates)",
        ),
        (
            slip_in_update(lambda params: TrainState.create(params=BARE).replace(params=params)),
            "params = optax.apply_updates(params, updates)",
        ),
        (slip_in_gradients, "Write state.apply_gradients(grads=grads)."),
    ],
    ids=["appy_fn", "params = optimizer.update, create", "the same, replace", "positional"],
)
def test_each_slip_of_the_document_is_answered_with_the_right_form(slip, right):
    with pytest.raises(StateError, match=re.escape(right)):
        slip()


@pytest.mark.parametrize(
    ("slip", "right"),
    [
        ("jax.random.PNGKey(42)", "Did you mean: 'PRNGKey'?"),
        ("optimizer = None\noptimimizer.update()", "Did you mean: 'optimizer'?"),
    ],
)
def test_each_slip_in_a_name_is_answered_by_python_itself(slip, right, capsys):
    with pytest.raises((AttributeError, NameError)) as caught:
        exec(slip, {"jax": jax})
    sys.__excepthook__(caught.type, caught.value, caught.tb)  # where the interpreter adds it
    assert right in capsys.readouterr().err


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Pair:
    x: Any
    y: Any


class Regression(distaff.TrainerModule):
    def loss_fn(self, params, batch, ctx):
        if isinstance(batch, Pair):
            x, y = batch.x, batch.y
        else:
            x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch
        return jnp.square(ctx.apply(params, x)[:, 0] - y)


FORMS: dict[str, Callable[[Any, Any], Any]] = {
    "dict": lambda x, y: {"x": x, "y": y},
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "dataclass": Pair,
}


def run(form: str) -> tuple[Any, ...]:
    make = FORMS[form]
    x = np.random.default_rng(1).normal(size=(10, 3)).astype(np.float32)
    batches = [
        make(x[i : i + 4], x[i : i + 4].sum(1)) for i in range(0, 10, 4)
    ]  # the last is short
    made = Regression(nn.Dense(1), name=form, enable_progress_bar=False)
    result: Any = made.train_model(batches, batches, batches, num_epochs=2)
    loaded = Regression.load_from_checkpoint(result.path)
    return made.state, result.metrics, made.predict(batches), loaded.predict(batches)


@pytest.fixture(scope="module")
def of_dicts(tmp_path_factory) -> tuple[Any, ...]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("dicts"))
        return run("dict")


@pytest.mark.slow_but("dataclass")
@pytest.mark.parametrize("form", ["tuple", "list", "dataclass"])
def test_a_batch_of_any_form_trains_validates_tests_predicts_and_loads(form, of_dicts):
    state, metrics, predictions, loaded = run(form)
    assert_same_bits(state.params, of_dicts[0].params)
    assert metrics == of_dicts[1]
    assert predictions.shape == (10, 1)
    np.testing.assert_array_equal(predictions, of_dicts[2])
    np.testing.assert_array_equal(loaded, predictions)


def test_a_batch_whose_input_cannot_be_known_says_where_to_return_it():
    batches = [{"pixels": np.ones((4, 3), np.float32), "y": np.ones(4, np.float32)}]
    with pytest.raises(DistaffError, match=r"holds \['pixels', 'y'\]\. Override model_inputs"):
        Regression(nn.Dense(1), enable_progress_bar=False).train_model(batches, num_epochs=1)
