"""Rules for operations of a function: programs of every kind are entered, no other bit changes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import PartitionSpec

from distaff.core.rewriter import Rewriter, bound
from distaff.models.precision.autocast import autocast

X = jax.random.normal(jax.random.key(0), (4, 4))
W = jax.random.normal(jax.random.key(1), (4, 4)) / 2


def plain(x, w):
    return jnp.tanh(x @ w) @ w


def jitted(x, w):
    inner = jax.jit(lambda x, w: jnp.tanh(x @ w))
    return inner(inner(x, w), w)


def scanned(x, w):
    def body(carry, row):
        return jnp.tanh(carry @ w), (carry * row[None]).sum(0) @ w

    carry, rows = jax.lax.scan(body, x, x, reverse=True)
    return carry + rows


def stacked(x, w):
    kernels = jnp.stack([w, 2 * w, 3 * w])
    return jax.lax.scan(lambda carry, w: (jnp.tanh(carry @ w), None), x, kernels)[0]


def looped(x, w):
    return jax.lax.while_loop(
        lambda carry: ((carry[1] @ w).sum() < 1e6) & (carry[0] < 3),
        lambda carry: (carry[0] + 1, jnp.tanh(carry[1] @ w)),
        (0, x),
    )[1]


def chosen(x, w):
    x = jax.lax.cond(x.sum() > 0, lambda x: x @ w, lambda x: x, x)
    return jax.lax.switch(2, [lambda x: x, lambda x: x, lambda x: x @ w], x)


def recomputed(x, w):
    policy = jax.checkpoint_policies.dots_saveable
    return jax.checkpoint(plain, policy=policy)(jax.checkpoint(plain)(x, w), w)


@jax.custom_jvp
def _own_jvp(x, w, power):
    return (x @ w) ** power


@_own_jvp.defjvp
def _(primals, tangents):
    # Three times the derivative, as no other would have it.
    (x, w, power), (dx, dw, _) = primals, tangents
    return _own_jvp(x, w, power), 3 * power * (x @ w) ** (power - 1) * (dx @ w + x @ dw)


def own_jvp(x, w):
    return _own_jvp(x, w, 2)


@jax.custom_vjp
def _own_vjp(x, w, power):
    return (x @ w) ** power


def _forward(x, w, power):
    return _own_vjp(x, w, power), (x, w, power)


def _backward(residuals, cotangent):
    x, w, power = residuals
    inner = 5 * power * (x @ w) ** (power - 1) * cotangent
    return inner @ w.T, x.T @ inner, None


_own_vjp.defvjp(_forward, _backward)


def own_vjp(x, w):
    return _own_vjp(x, w, jnp.int32(2))


def mapped(x, w):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = PartitionSpec("data"), PartitionSpec()

    def part(x, w):
        return jax.lax.psum((x @ w).sum(0), "data"), plain(x, w)

    out_specs = PartitionSpec(), PartitionSpec("data")
    total, rows = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=out_specs)(x, w)
    return rows + total[None]


def placed(x, w):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.NamedSharding(mesh, PartitionSpec("data"))
    return jax.jit(plain, in_shardings=(rows, None), out_shardings=rows)(x, w)


def nested(x, w):
    return jax.checkpoint(jax.jit(lambda x: scanned(own_vjp(own_jvp(x, w), w), w)))(x)


FUNCTIONS = (plain, jitted, scanned, stacked, looped, chosen, recomputed, own_jvp, own_vjp)
FUNCTIONS += (mapped, placed, nested)
ITSELF = dict.fromkeys(["dot_general"], lambda equation, operands, _: bound(equation, operands))


def rewritten(function, rules):
    return lambda *args: Rewriter(rules)(function, *args)


def with_gradient(function):
    """Returns the results of a function with derivatives; forward ones of a `while` loop."""

    def run(x, w):
        if function is looped or getattr(function, "is_loop", False):
            return jax.jvp(function, (x, w), (x, w))
        return function(x, w), jax.grad(lambda *args: (function(*args) ** 2).sum(), (0, 1))(x, w)

    return run


def dtypes(jaxpr):
    """Returns the dtypes of the operands of all products in a program, however deep."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found += [each.aval.dtype.name for each in equation.invars]
        for inner in jaxprs_in_params(equation.params):
            found += dtypes(inner)
    return found


def again(function, rules):
    result = rewritten(function, rules)
    result.is_loop = function is looped
    return with_gradient(result)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_results_and_derivatives_are_bit_equal_without_a_change(function):
    expected = jax.jit(with_gradient(function))(X, W)
    found = jax.jit(again(function, ITSELF))(X, W)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_product_of_a_function_and_of_its_derivative_has_the_rule(function):
    before = dtypes(jax.make_jaxpr(with_gradient(function))(X, W))
    found = dtypes(jax.make_jaxpr(again(function, autocast(jnp.bfloat16)))(X, W))
    assert set(before) == {"float32"}
    assert set(found) == {"bfloat16"}
    # `jax.vjp` of a custom function, and a loop that is entered twice, may add products.
    assert len(found) >= len(before)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.slow
def test_functions_in_half_precision_are_close(function):
    expected = jax.jit(with_gradient(function))(X, W)
    found = jax.jit(again(function, autocast(jnp.bfloat16)))(X, W)

    def close(found, expected):
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(found, expected, atol=0.05 * np.abs(expected).max())

    jax.tree.map(close, found, expected)


def test_a_program_that_is_called_twice_is_one_program():
    jaxpr = jax.make_jaxpr(rewritten(jitted, autocast(jnp.bfloat16)))(X, W)
    first, second = (each.params["jaxpr"] for each in jaxpr.eqns if each.primitive.name == "jit")
    assert first is second


def test_programs_keep_their_shardings():
    def shardings(function):
        (equation,) = jax.make_jaxpr(function)(X, W).eqns
        return equation.params["in_shardings"], equation.params["out_shardings"]

    assert shardings(rewritten(placed, ITSELF)) == shardings(placed)


def test_programs_without_a_rule_are_not_entered():
    def function(x, w):
        return jax.jit(jnp.tanh)(x) @ w

    (before,) = (
        each.params["jaxpr"]
        for each in jax.make_jaxpr(function)(X, W).eqns
        if each.primitive.name == "jit"
    )
    (after,) = (
        each.params["jaxpr"]
        for each in jax.make_jaxpr(rewritten(function, ITSELF))(X, W).eqns
        if each.primitive.name == "jit"
    )
    assert before is after


def test_unknown_operations_run_as_they_are():
    def function(x, w):
        form = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.pure_callback(lambda x: np.asarray(x) * 2, form, x) @ w

    expected = jax.jit(function)(X, W)
    np.testing.assert_array_equal(jax.jit(rewritten(function, ITSELF))(X, W), expected)


def test_a_rule_knows_which_arguments_an_operand_comes_from():
    seen = []

    def rule(equation, operands, sources):
        seen.append(sources)
        return bound(equation, operands)

    def function(w, v, x):
        merged = (w + v).T.astype(jnp.float32)
        inner = jax.jit(lambda x, w: x @ w)
        body = jax.checkpoint(lambda x: x @ w)
        return inner(body(x), merged) @ jax.lax.scan(lambda c, w: (c @ w, None), x, v[None])[0]

    names = [frozenset({"w"}), frozenset({"v"}), None]
    Rewriter({"dot_general": rule})(function, W, W, X, sources=names)
    assert seen == [
        [None, frozenset({"w"})],
        [None, frozenset({"w", "v"})],
        [None, frozenset({"v"})],
        [None, None],
    ]


def test_operations_keep_their_line_and_scope():
    def function(x, w):
        with jax.named_scope("attention"):
            return jax.checkpoint(lambda x: x @ w)(x) @ w

    def places(jaxpr):
        found = []
        for equation in jaxpr.eqns:
            info = equation.source_info
            if equation.primitive.name == "dot_general":
                lines = [f.line_num for f in info.traceback.frames if f.file_name == __file__]
                found.append((lines[0], str(info.name_stack)))
            for inner in jaxprs_in_params(equation.params):
                found += places(inner)
        return found

    line = function.__code__.co_firstlineno + 2
    expected = [(line, "attention")]
    jaxpr = jax.make_jaxpr(rewritten(function, autocast(jnp.bfloat16)))(X, W)
    assert places(jaxpr)[-1:] == expected
    assert {each[0] for each in places(jaxpr)} == {line}


def test_arrays_of_other_kinds_stay_as_they_are():
    def function(x, w):
        whole = jnp.arange(16).reshape(4, 4) @ jnp.arange(4)
        complex_ = (x + 1j) @ (w + 1j)
        return whole, complex_

    expected = function(X, W)
    found = rewritten(function, autocast(jnp.bfloat16))(X, W)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
