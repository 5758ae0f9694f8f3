"""The work of a step, counted in its jaxpr."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from distaff.execution.dispatch.work import Work, seconds_of, work_of


def counted(function: Callable[..., Any], *shapes: tuple[int, ...]) -> Work:
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return work_of(jax.make_jaxpr(function)(*arrays).jaxpr)


def convolved(x: jax.Array, kernel: jax.Array, groups: int = 1) -> jax.Array:
    return jax.lax.conv_general_dilated(
        *(x, kernel, (1, 1), "SAME"),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def test_product_counts_two_for_each_entry_that_is_summed():
    assert counted(jnp.matmul, (3, 5), (5, 7)) == Work(2 * 3 * 5 * 7, 4 * 3 * 7, 1, False)
    batched = counted(lambda x, y: jnp.einsum("bij,bjk->bik", x, y), (4, 3, 5), (4, 5, 7))
    assert batched.flops == 4 * 2 * 3 * 5 * 7


@pytest.mark.parametrize("groups", [1, 2])
def test_convolution_counts_the_kernel_of_its_group(groups):
    work = counted(lambda x, k: convolved(x, k, groups), (2, 8, 8, 4), (3, 3, 4 // groups, 6))
    assert work.flops == 2 * (2 * 8 * 8 * 6) * (3 * 3 * 4 // groups)
    assert work.convolves


def test_body_of_a_scan_counts_as_often_as_it_runs_and_that_of_a_while_loop_once():
    def body(carry: jax.Array, _: Any) -> tuple[jax.Array, None]:
        return carry @ carry, None

    once = counted(jnp.matmul, (4, 4), (4, 4))
    scanned = counted(lambda x: jax.lax.scan(body, x, length=9)[0], (4, 4))
    assert scanned.flops == 9 * once.flops
    end = jax.ShapeDtypeStruct((), jnp.int32)
    looped = jax.make_jaxpr(lambda n, x: jax.lax.fori_loop(0, n, lambda _, y: y @ y, x))(
        end, jax.ShapeDtypeStruct((4, 4), jnp.float32)
    )
    assert work_of(looped.jaxpr).flops == once.flops


def test_most_expensive_branch_counts():
    def branched(x: jax.Array) -> jax.Array:
        return jax.lax.cond(x[0, 0] > 0, lambda y: y @ y, lambda y: y + 1, x)

    work = counted(branched, (4, 4))
    assert work.flops == 2 * 4**3


def test_convolution_is_found_in_inner_programs():
    shapes = (1, 4, 4, 1), (3, 3, 1, 1)
    for wrap in (jax.jit, jax.checkpoint, lambda f: jax.grad(lambda *each: f(*each).sum())):
        assert counted(wrap(convolved), *shapes).convolves
    loop = counted(lambda x, k: jax.lax.fori_loop(0, 2, lambda _, y: convolved(y, k), x), *shapes)
    assert loop.convolves
    assert not counted(jnp.matmul, (2, 2), (2, 2)).convolves


def test_seconds_grow_with_each_part_of_the_work_and_know_every_platform():
    least = seconds_of(Work(), "cpu")
    assert least == 0
    for part in ("flops", "num_bytes", "operations"):
        assert seconds_of(Work(**{part: 1e9}), "cpu") > seconds_of(Work(**{part: 1e8}), "cpu") > 0
    assert seconds_of(Work(1e9), "METAL") == seconds_of(Work(1e9), "gpu")
