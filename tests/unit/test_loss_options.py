"""Options of losses belong to a run: it is resumed bit for bit, and other ones begin a new run."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distaff import Callback, data, tasks

RNG = np.random.default_rng(0)
X = RNG.normal(size=(24, 3)).astype(np.float32)
PRODUCT = (lambda key, *inputs: {"w": 0.5 * jnp.eye(3)}, lambda p, x: jnp.matmul(x, p["w"]))
TABLE = (lambda key, *inputs: {"w": 0.1 * jnp.eye(7)}, lambda p, tokens: p["w"][tokens])

CASES: dict[str, tuple[Any, Any, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "multi-label": (
        tasks.MultiLabelClassifier,
        PRODUCT,
        {"x": X, "y": (X > 0.5).astype(np.int32)},
        {"positive_weights": (5.0, 1.0, 3.0), "label_weights": (1.0, 2.0, 1.0), "focal": 1.0},
        {"focal": 2.0},
    ),
    "huber": (
        tasks.Regressor,
        PRODUCT,
        {"x": X, "y": X[:, ::-1].copy()},
        {"loss": "huber", "huber_delta": 0.5},
        {"huber_delta": 0.75},
    ),
    "quantile": (
        tasks.Regressor,
        PRODUCT,
        {"x": X, "y": X.sum(1)},
        {"loss": "quantile", "quantiles": (0.1, 0.5, 0.9)},
        {"quantiles": (0.2, 0.5, 0.9)},
    ),
    "tokens": (
        tasks.LanguageModel,
        TABLE,
        {"tokens": RNG.integers(0, 7, (24, 5)).astype(np.int32)},
        {"label_smoothing": 0.1},
        {"label_smoothing": 0.2},
    ),
}


class Interrupt(Callback):
    """Interrupts a run in its second epoch, or does nothing."""

    def __init__(self, *, cuts: bool) -> None:
        self.cuts = cuts

    def on_step_end(self, info: Any) -> None:
        if self.cuts and info.step == 5:
            raise KeyboardInterrupt


@pytest.mark.slow_but("quantile")
@pytest.mark.parametrize("case", CASES)
def test_run_is_resumed_bit_for_bit_and_only_with_its_options(case: str):
    kind, model, arrays, options, change = CASES[case]

    def trained(name: str, *, cuts: bool = False, **more: Any) -> tuple[Any, Any]:
        fixed: dict[str, Any] = {"enable_progress_bar": False, "callbacks": [Interrupt(cuts=cuts)]}
        run = kind(model, name=name, optimizer=optax.sgd(0.1), **fixed, **{**options, **more})
        loader = data.ArrayLoader(arrays, 8, seed=1)
        result = run.train_model(loader, loader, num_epochs=2)
        return result, jax.device_get(run.state.params["w"])

    whole, params = trained("whole", steps_per_call=1)
    with pytest.raises(KeyboardInterrupt):
        trained("cut", cuts=True, steps_per_call=3)
    resumed, same = trained("cut", steps_per_call=3)
    assert resumed.first_step > 0
    assert resumed.metrics == whole.metrics
    np.testing.assert_array_equal(same, params)
    with pytest.raises(KeyboardInterrupt):
        trained("cut", cuts=True)
    other, _ = trained("cut", **change)
    assert other.first_step == 0
    assert other.metrics["train/loss"] != whole.metrics["train/loss"]
