"""Digests of programs: equal in every process, and another one for every change that counts."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distaff.core.digest import Program, program_digest, sample_digest
from distaff.core.equations import named_scope
from distaff.run.identity.sketch import is_near, sketch

TABLE = np.linspace(0, 1, 12, dtype=np.float32)


def doubled(x: Any) -> Any:
    return np.asarray(x) * 2


def step_digest(
    *,
    scale: float = 2.0,
    rate: float = 0.01,
    table: Any = TABLE,
    host: Any = doubled,
    key: int = 1,
    terms: Any = ("a", "bb", "ccc"),
    prints: bool = False,
    tx: Any = None,
) -> Program:
    """Returns the digest of a step that has a bit of everything in it."""
    tx = tx or optax.chain(optax.clip(1.0), optax.adam(optax.cosine_decay_schedule(rate, 100)))

    def loss(params: jax.Array, x: jax.Array) -> jax.Array:
        with named_scope("loss"):
            y = jax.checkpoint(lambda p: jnp.sin(p) * x)(params)
            y = jax.lax.scan(lambda c, a: (c + a, a * c), jnp.zeros(()), y)[1] * table
            y += jax.pure_callback(host, jax.ShapeDtypeStruct((12,), jnp.float32), x)
            y += jax.random.normal(jax.random.key(key), (12,))
            if prints:
                jax.debug.print("{y}", y=y.sum())
            y = jax.lax.cond(y.sum() > 0, lambda y: y * 2, lambda y: y * 3, y)
            return jax.nn.silu(y).sum() * scale + sum(jnp.cos(y * len(t)).sum() for t in terms)

    def step(params: Any, opt_state: Any, x: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(params, x)
        with named_scope("optimizer"):
            updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    params = jnp.ones(12)
    return program_digest(step, params, tx.init(params), params)


def changed(one: Program, other: Program) -> set[str]:
    names = {*one.parts, *other.parts}
    return {name for name in names if one.parts.get(name) != other.parts.get(name)}


def test_program_is_the_same_whatever_does_not_count() -> None:
    plain = step_digest()
    assert step_digest() == plain
    assert step_digest(prints=True).whole == plain.whole
    assert step_digest(terms=("ccc", "a", "bb")).whole == plain.whole  # a sum has no order


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"scale": 3.0}, "loss"),
        ({"table": TABLE + np.float32(1e-6)}, "loss"),
        ({"host": lambda x: np.asarray(x) * 3}, "loss"),
        ({"key": 2}, "loss"),
        ({"terms": ("a", "bb")}, "loss"),
        ({"rate": 0.02}, "optimizer"),
        ({"tx": optax.sgd(0.01, momentum=0.9)}, "optimizer"),
    ],
)
def test_program_differs_in_the_part_that_was_changed(change: dict[str, Any], part: str) -> None:
    plain, other = step_digest(), step_digest(**change)
    assert other.whole != plain.whole
    assert changed(plain, other) == {part}


def test_numbers_are_apart_from_the_form() -> None:
    one, other = step_digest().parts["optimizer"], step_digest(rate=0.02).parts["optimizer"]
    assert one.form == other.form
    assert set(one.numbers) ^ set(other.numbers) == {"0.01", "0.02"}


@pytest.mark.slow
def test_digest_is_equal_in_another_process() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_digest; "
        "print(test_digest.step_digest(terms={'a', 'bb', 'ccc', 'dddd', 'eeeee'}))"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code, os.path.dirname(__file__)],
            env={**os.environ, "PYTHONHASHSEED": seed, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1


def test_sample_of_a_large_array_is_spread_over_it() -> None:
    large = np.zeros(2**22 + 5, np.float32)
    one = sample_digest(large)
    large[:: 2**18] = 1
    assert sample_digest(large) != one
    assert sample_digest(np.zeros(3)) != sample_digest(np.zeros(4))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sketch_bears_rounding_and_no_more(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    leaf = rng.normal(size=(40, 30)).astype(np.float32)
    eps = float(jnp.finfo(dtype).eps)
    rounded = leaf * (1 + eps * rng.choice([-1, 0, 1], leaf.shape)).astype(np.float32)
    one = sketch([jnp.asarray(leaf, dtype), jax.random.key(0)])
    assert is_near(one, sketch([jnp.asarray(rounded, dtype), jax.random.key(0)]))
    assert not is_near(one, sketch([jnp.asarray(leaf * 1.1, dtype), jax.random.key(0)]))
    assert not is_near(one, sketch([jnp.asarray(leaf[::-1], dtype), jax.random.key(0)]))
    assert not is_near(one, sketch([jnp.asarray(leaf, dtype), jax.random.key(1)]))


def test_where_compiled_calls_end_is_no_part_of_a_program():
    def inner(x, y):
        return jnp.sin(x) * 2.5 + y, y

    def plain(x, y):
        first, _ = inner(x, y)
        second, _ = inner(first, x)
        return first, second

    def called(x, y):
        first, _ = jax.jit(inner)(x, y)
        second, _ = jax.jit(inner)(first, x)
        return first, second

    x = jnp.ones(3)
    assert program_digest(plain, x, x) == program_digest(called, x, x)
    assert program_digest(plain, x, x) == program_digest(jax.jit(called, inline=True), x, x)
    other = program_digest(lambda x, y: called(y, x), x, x)
    assert other.whole != program_digest(called, x, x).whole
