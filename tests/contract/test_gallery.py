"""A gallery of models: each trains and evaluates as the same model does by hand."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distaff import Context, TrainState, train_step
from distaff.models import as_model, rematerialized
from distaff.trainer.initial import normalized, on_host
from gallery import KINDS, WIDTH, Kind, without_keys

# One or two of each family are quick; the others are compiled apart, for the long proofs.
QUICK = (
    "linen is_train",
    "linen counter",
    "nnx flag, statistics, float64",
    "equinox inference, rng",
    "functions with a state",
    "lora",
)


# Of these, no module but the model itself is called where a pattern can match it.
WITHOUT_MODULES = ("linen jit", "linen dense", "linen shared scope", "linen bound", "linen pair")


def batch() -> dict[str, Any]:
    x = np.random.default_rng(0).normal(size=(8, WIDTH)).astype(np.float32)
    return {"x": jnp.asarray(x), "y": jnp.asarray(x.sum(1, keepdims=True))}


def loss(outputs: Any, y: Any) -> Any:
    return jnp.square(outputs - y)[:, 0]


def trained(kind: Kind, model: Any, variables: Any, data: Any) -> Any:
    def loss_fn(params, batch, ctx):
        given = kind.call(batch["x"], ctx.train)
        return loss(kind.outputs(ctx.apply(params, batch["x"], **given)), batch["y"])

    state = TrainState.create(
        **variables._asdict(), apply_fn=model.apply_fn, tx=optax.sgd(0.1), rng=jax.random.key(1)
    )
    for _ in range(2):
        state, _ = train_step(loss_fn)(state, data)
    ctx = Context(state, train=False)
    outputs = ctx.apply(state.params, data["x"], **kind.call(data["x"], False))
    held = {"batch_stats": state.batch_stats or {}, **(state.collections or {})}
    return state.params, held, kind.outputs(outputs)


def trained_by_hand(kind: Kind, variables: Any, data: Any) -> Any:
    collections = variables.by_collection()
    params = collections.pop("params")
    for _ in range(2):

        def objective(params: Any, rest: Any = collections) -> Any:
            outputs, rest = kind.by_hand(params, rest, data["x"], True)
            return loss(kind.outputs(outputs), data["y"]).mean(), rest

        grads, collections = jax.grad(objective, has_aux=True)(params)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    outputs = kind.by_hand(params, collections, data["x"], False)[0]
    return params, {"batch_stats": {}, **collections}, kind.outputs(outputs)


def initial(source: Any, data: Any) -> tuple[Any, Any]:
    model, key = as_model(source), jax.random.key(0)
    ready = model.ready(key)
    if ready is None:
        ready = on_host(model.init, jax.jit(model.init), key, data["x"])
    return model, normalized(ready)


@functools.cache
def results(family: str, quick: bool) -> dict[str, Any]:
    """Returns (by Distaff, by hand) for the kinds of a family; one program for all of them."""
    data, errors = batch(), {}
    made = {}
    for name, kind in KINDS.items():
        if name.split()[0] == family and (name in QUICK) is quick:
            made[name] = initial(kind.source(), data)

    def program(variables: Any, data: Any) -> Any:
        found = {}
        for name, (model, _) in made.items():
            try:
                found[name] = (
                    trained(KINDS[name], model, variables[name], data),
                    trained_by_hand(KINDS[name], variables[name], data),
                )
            except Exception as error:  # Told by the test of this kind.
                errors[name] = error
        return found

    found = jax.jit(program)({name: variables for name, (_, variables) in made.items()}, data)
    return {**found, **errors}


@pytest.mark.slow_but(*QUICK)
@pytest.mark.parametrize("name", KINDS)
def test_model_trains_and_evaluates_as_it_does_by_hand(name: str) -> None:
    found = results(name.split()[0], name in QUICK)[name]
    if isinstance(found, Exception):
        raise found
    ours, by_hand = found
    assert jax.tree.structure(ours) == jax.tree.structure(by_hand)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        *map(without_keys, found),
    )
    assert np.isfinite(ours[2]).all()


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["*", "dots_saveable"])
@pytest.mark.parametrize("name", KINDS)
def test_what_is_computed_again_has_the_same_results(name: str, remat: str) -> None:
    if remat == "*" and (name in WITHOUT_MODULES or name.startswith("functions")):
        pytest.skip("it calls no modules")
    kind, data = KINDS[name], batch()
    model, variables = initial(kind.source(), data)

    def program(variables: Any, data: Any) -> Any:
        models = (model, rematerialized(model, remat))
        return [without_keys(trained(kind, each, variables, data)) for each in models]

    plain, again = jax.jit(program)(variables, data)
    assert jax.tree.structure(plain) == jax.tree.structure(again)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), plain, again)
