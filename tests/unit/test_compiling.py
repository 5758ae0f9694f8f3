"""Compiles after the first: told with the leaf that changed, the step, the time, the cache."""

from __future__ import annotations

import secrets
import threading
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import distaff
from distaff import data, tasks, zoo
from distaff.errors import ConfigError, RecompileError, RecompileWarning
from distaff.execution.compile import recompiles
from distaff.execution.compile.recompiles import Watch


def watched(recompile: Any = "error", **options: Any) -> tuple[Watch, Any]:
    def step(state: Any, batch: Any) -> Any:
        return state + batch.sum()

    watch = Watch(recompile, step=lambda: 7, **options)
    return watch, watch.over(jax.jit(step), "the step", ("state", "batch"))


def test_first_compile_and_calls_without_one_are_no_surprise():
    _, program = watched()
    for _ in range(3):
        assert program(np.float32(1), np.ones(3, np.float32)) == 4


def test_error_names_the_leaf_the_step_and_the_remedy():
    _, program = watched()
    program(np.float32(1), np.ones(3, np.float32))
    with pytest.raises(RecompileError) as caught:
        program(np.float32(1), np.ones(3, np.int32))
    text = str(caught.value)
    assert "the step compiled again after step 7, in " in text
    assert "batch was float32[3], is int32[3]. Cast it in the loader" in text
    assert "state" not in text


def test_warning_comes_once_for_a_signature_and_not_without_end():
    _, program = watched("warn")
    program(np.float32(1), np.ones((2, 3), np.float32))
    with pytest.warns(RecompileWarning, match=r"batch was float32\[2,3\], is int32\[2,3\]"):
        program(np.float32(1), np.ones((2, 3), np.int32))
    program(np.float32(1), np.ones((2, 3), np.int32))
    batches = [np.ones((2, length), np.float32) for length in range(4, 12)]
    with pytest.warns(RecompileWarning) as caught:
        list(map(program, range(8), batches))
    assert len(caught) == 4
    assert "Further recompiles are only logged" in str(caught[-1].message)


def test_ignore_says_nothing():
    said: list[str] = []
    _, program = watched("ignore", say=said.append)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for size in range(1, 5):
            program(np.float32(1), np.ones(size, np.float32))
    assert (said, caught) == ([], [])


def test_second_size_of_batches_is_said_and_a_third_is_a_warning():
    said: list[str] = []
    _, program = watched("warn", say=said.append)
    for size in (8, 5, 8, 5):
        program(np.float32(1), np.ones(size, np.float32))
    assert len(said) == 1
    assert "batch was float32[8], is float32[5]" in said[0]
    with pytest.warns(RecompileWarning, match="remainder='drop'"):
        program(np.float32(1), np.ones(3, np.float32))


def test_expected_compile_is_no_surprise_and_the_one_after_it_is():
    watch, program = watched()
    program(np.float32(1), np.ones(3, np.float32))
    watch.expect()
    program(np.float32(1), np.ones(4, np.float32))
    with pytest.raises(RecompileError, match=r"batch was float32\[4\], is float32\[5\]"):
        program(np.float32(1), np.ones(5, np.float32))


def test_declared_shapes_are_no_surprise_and_everything_else_is():
    watch, program = watched()
    watch.expect(num_shapes=3)
    for length in (4, 8, 16, 8):
        program(np.float32(1), np.ones((2, length), np.float32))
    with pytest.raises(RecompileError, match=r"batch was float32\[2,16\], is float32\[2,5\]"):
        program(np.float32(1), np.ones((2, 5), np.float32))
    watch.expect(num_shapes=3)
    program(np.float32(1), np.ones((2, 6), np.float32))
    for state, batch, remedy in (
        (np.float32(1), np.ones((2, 6), np.int32), "Cast it"),
        (np.ones(2, np.float32), np.ones((2, 6), np.float32), "Return arrays with the same shapes"),
        (np.float32(1), np.ones((3, 6), np.float32), "Drop a short last batch"),
    ):
        with pytest.raises(RecompileError, match=remedy):
            program(state, batch)
    watch.expect(object(), num_shapes=2)
    watch.expect(object(), num_shapes=2)
    for length in range(20, 24):
        program(np.float32(1), np.ones((2, length), np.float32))


@pytest.mark.slow
def test_compile_without_a_change_is_told_as_that():
    _, program = watched()
    program(np.float32(1), np.ones(3, np.float32))
    jax.clear_caches()
    with pytest.raises(RecompileError, match=r"all arguments are the same as.*clear_caches"):
        program(np.float32(1), np.ones(3, np.float32))


def test_cache_that_served_is_told():
    number = secrets.randbits(100) / 7  # so that no test run before this one has compiled it
    told = []
    for _ in range(2):
        jax.clear_caches()
        watch = Watch("error")
        program = watch.over(jax.jit(lambda batch: batch * number), "the step", ["batch"])
        program(np.ones(3, np.float32))
        with pytest.raises(RecompileError) as caught:
            program(np.ones(18, np.float32))
        told.append(str(caught.value))
    assert "s (not cached)" in told[0]
    assert "s (cached)" in told[1]


def test_programs_of_others_do_not_count():
    """Neither those of another thread, nor those that run within the call."""
    _, program = watched()
    args = np.float32(1), np.ones(3, np.float32)
    program(*args)
    inner = jax.jit(lambda x: x * 3)

    def compiles(*sizes: int) -> None:
        for size in sizes:
            inner(np.ones(size, np.float32))

    original = program._program

    def busy(*args: Any) -> Any:
        thread = threading.Thread(target=compiles, args=(20, 21))
        thread.start()
        thread.join()
        compiles(22, 23)
        return original(*args)

    program._program = busy
    before = recompiles.count()
    program(*args)
    assert recompiles.count() == before + 2  # not those of the thread
    with pytest.raises(RecompileError, match=r"float32\[4\]"):
        program(np.float32(1), np.ones(4, np.float32))


def classifier(**options: Any) -> Any:
    return tasks.Classifier(zoo.MLP((4, 10)), enable_progress_bar=False, **options)


def digits(*sizes: int, dtype: Any = np.float32) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    return [
        {
            "image": random.normal(size=(size, 8, 8, 1)).astype(dtype),
            "label": random.integers(10, size=size).astype(np.int32),
        }
        for size in sizes
    ]


@pytest.mark.parametrize(
    ("kind", "steps_per_call"),
    [
        ("arrays", "auto"),
        ("arrays", 4),
        ("lists", 1),
        ("lists", 4),
        ("placed", 1),
        ("placed", "auto"),
        ("sharded", 1),
        ("sharded", 4),
    ],
)
@pytest.mark.slow
def test_runs_of_one_form_compile_nothing_twice(kind, steps_per_call):
    """Epochs, validation, the best model loaded again, its test, evaluation, a second run."""
    train, val, test = data.digits(batch_size=128)
    if kind != "arrays":
        train, val, test = list(train)[:6], list(val)[:1], list(test)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    places = {
        "placed": jax.devices()[0],
        "sharded": jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")),
    }
    if kind in places:
        train, val = (jax.device_put(batches, places[kind]) for batches in (train, val))
    trainer = classifier(steps_per_call=steps_per_call, recompile="error")
    for _ in range(2):
        result = trainer.train_model(train, val, test, num_epochs=3)
        log = (result.path / "log.txt").read_text()
        assert "compiled again" not in log
        trainer.eval_model(val, "val/")
        trainer.eval_model(digits(10, 10, 3), "val/")
        trainer.eval_model(digits(12, 12, 3), "val/")


@pytest.mark.parametrize(
    ("steps_per_call", "expected"),
    [(1, "batch/image was float32[8,8,8,1], is float32[5,8,8,1]"), (2, "is float32[2,5,8,8,1]")],
)
@pytest.mark.slow
def test_run_says_a_short_last_batch_once(steps_per_call, expected, recwarn):
    trainer = classifier(steps_per_call=steps_per_call)
    result = trainer.train_model(digits(8, 8, 5), num_epochs=3)
    log = (result.path / "log.txt").read_text()
    assert log.count("compiled again after step 2") == 1
    assert log.count("compiled again") == 1
    assert expected in log
    assert [str(each.message) for each in recwarn] == []
    with pytest.raises(RecompileError, match="compiled again after step 2"):
        classifier(steps_per_call=steps_per_call, recompile="error").train_model(
            digits(8, 8, 5), num_epochs=3
        )


@pytest.mark.slow
def test_run_warns_of_a_changed_dtype_and_can_be_told_not_to():
    batches = [*digits(8, 8), *digits(8, dtype=np.float16)]
    with pytest.warns(RecompileWarning, match=r"after step 2, .*is float16\[8,8,8,1\]. Cast"):
        classifier(steps_per_call=1).train_model(batches, num_epochs=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        classifier(steps_per_call=1, recompile="ignore").train_model(batches, num_epochs=2)
    assert [str(each.message) for each in caught] == []


@pytest.mark.slow
def test_debugged_run_warns_of_no_changed_dtype():
    batches = [*digits(8, 8), *digits(8, dtype=np.float16)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        classifier(steps_per_call=1, debug=True).train_model(batches, num_epochs=1)
    assert [str(each.message) for each in caught] == []


def test_evaluation_of_growing_batches_is_told():
    class Own(distaff.TrainerModule):
        def create_functions(self) -> Any:
            def eval_step(state: Any, batch: Any) -> Any:
                return {"loss": jnp.mean(batch["x"])}

            train_step, _ = super().create_functions()
            return train_step, eval_step

        def loss_fn(self, params: Any, batch: Any, ctx: Any) -> Any:
            return ctx.apply(params, batch["x"]).mean(axis=(1,))

    def batches(*sizes: int) -> list[Any]:
        return [{"x": np.ones((size, 3), np.float32)} for size in sizes]

    trainer = Own(zoo.MLP((2,)), enable_progress_bar=False, example_batch=batches(4)[0])
    trainer.eval_model(batches(4, 4, 3))
    with pytest.warns(RecompileWarning, match="the evaluation step compiled again") as caught:
        trainer.eval_model(batches(7, 6, 5))
    assert all("after step 0" in str(each.message) for each in caught)


def test_run_tells_what_it_compiled_and_how(capsys):
    train, val, _ = data.digits(batch_size=128)
    result = tasks.Classifier(zoo.MLP((8, 10)), steps_per_call=4).train_model(
        train, val, num_epochs=1
    )
    log, printed = (result.path / "log.txt").read_text(), capsys.readouterr().out
    for text in (log, printed):
        assert text.count("compiled in ") == 1
        assert " programs, " in text
    assert "compiled the fused steps in " in log
    assert "cached)" in log


def test_unknown_value_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"recompile has no value 'wran'\. Did you mean 'warn'"):
        classifier(recompile="wran")
