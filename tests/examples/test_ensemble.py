"""Networks of an ensemble see other bootstrap samples, and disagree away from the points."""

from __future__ import annotations

from pathlib import Path

import jax
import matplotlib as mpl
import numpy as np
import pytest


@pytest.mark.slow
def test_ensemble_weights_each_point_by_a_bootstrap_sample_of_its_own(
    example, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = example("ensemble")
    samples: dict[int, dict[int, int]] = {}

    def record(seed, numbers, counts) -> None:
        own = samples.setdefault(int(seed), {})
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            assert own.setdefault(number, count) == count  # the same in each epoch

    classify = module.tasks.Classifier.loss_fn

    def recording(self, params, batch, ctx):
        if "weight" in batch:
            seed = jax.random.key_data(ctx.state.rng)[-1]
            jax.debug.callback(record, seed, batch["number"], batch["weight"])
        return classify(self, params, batch, ctx)

    monkeypatch.setattr(module.tasks.Classifier, "loss_fn", recording)
    options = module.Options(num_networks=3, num_epochs=30, root=str(tmp_path))
    with mpl.rc_context({"backend": "agg"}):
        found = module.main(options)
    jax.effects_barrier()

    assert len(samples) == 3
    first, *others = ([own[n] for n in range(200)] for own in samples.values())
    assert all(other != first for other in others)
    for counts in (first, *others):
        assert 0.8 < np.mean(counts) < 1.2
        assert 0.3 < np.mean(np.equal(counts, 0)) < 0.45  # 1/e of the points are left out
    assert found.summary()["val/accuracy"].mean > 0.85
    assert (tmp_path / "ensemble" / "ensemble.png").stat().st_size > 5_000
    assert "val/accuracy 0." in capsys.readouterr().out
