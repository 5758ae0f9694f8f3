"""Programs that are called once compile with less effort, and give the same bits."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distaff import zoo
from distaff.execution.execution import Compiled, Eager
from distaff.tasks import Classifier

MODELS = {
    "mlp": (zoo.MLP((128, 10)), (4, 64)),
    "cnn": (zoo.CNN(), (4, 8, 8, 1)),
    "layer_norm": (nn.Sequential([nn.Dense(7), nn.LayerNorm(), nn.Dense(3)]), (4, 5)),
}


@pytest.mark.slow_but("mlp")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("optimized")
def test_initialisation_with_little_effort_gives_the_bits_of_one_with_all(name: str) -> None:
    module, shape = MODELS[name]
    key, x = jax.random.key(3), jnp.ones(shape)

    def init(key: Any) -> Any:
        variables = module.init(key, x)
        return variables, optax.adam(1e-3).init(variables["params"])

    jax.tree.map(np.testing.assert_array_equal, Compiled().once(init)(key), jax.jit(init)(key))


def test_program_called_once_is_compiled_with_little_effort(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    jit = jax.jit
    monkeypatch.setattr(jax, "jit", lambda f, **options: asked.append(options) or jit(f, **options))
    assert Compiled().once(jnp.sin)(0.0) == 0.0
    assert asked == [{"compiler_options": {"xla_backend_optimization_level": 1}}]


def test_program_called_once_can_be_part_of_another() -> None:
    once = Compiled().once(lambda x: x + 1)
    assert jax.jit(lambda x: 2 * once(x))(3) == 8
    assert jax.eval_shape(once, 1.0).shape == ()


def test_debugged_program_called_once_is_the_function() -> None:
    assert Eager().once(np.sin) is np.sin


@pytest.mark.parametrize("seed", [0, 42, -1, 2**31 + 5, 2**40 + 7])
@pytest.mark.usefixtures("optimized")
def test_root_key_is_the_second_half_of_the_seed(seed: int) -> None:
    trainer = Classifier(zoo.MLP((4, 2)), seed=seed, root=None, enable_progress_bar=False)
    trainer.init_model({"x": np.ones((2, 3), np.float32)})
    first, second = jax.random.split(jax.random.key(seed))
    state = trainer.state
    assert (jax.random.key_data(state.rng) == jax.random.key_data(second)).all()
    params = zoo.MLP((4, 2)).init(jax.random.fold_in(first, 0), jnp.ones((2, 3)))["params"]
    jax.tree.map(np.testing.assert_array_equal, state.params, params)
