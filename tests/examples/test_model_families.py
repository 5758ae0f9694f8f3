"""Families that start from equal parameters end with equal losses, and the table says so."""

from __future__ import annotations

import importlib.util

import pytest


@pytest.mark.slow
@pytest.mark.peer
def test_model_families_end_with_equal_losses(example, capsys) -> None:
    module = example("model_families")
    losses = module.main(num_epochs=2)
    names = ["Flax Linen", "Flax NNX", "Equinox", "functions"]
    assert list(losses)[:4] == names
    assert ("Haiku" in losses) == bool(importlib.util.find_spec("haiku"))
    assert list(losses.values()) == pytest.approx([losses["Flax Linen"]] * len(losses), rel=1e-4)
    assert losses["Flax Linen"] < 1.5  # that of a guess is 2.3
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line[:12].strip() for line in lines] == list(losses)
    for line in lines:
        size, loss, accuracy, _ = line[12:].split()
        assert (int(size), float(loss)) == (9610, round(losses[line[:12].strip()], 6))
        assert float(accuracy) > 0.7


@pytest.mark.slow
def test_model_families_notice_a_model_that_differs(example) -> None:
    module = example("model_families")
    module.FAMILIES = {
        "Flax Linen": module.Linen(),
        "other": (module.init, lambda params, image: 2 * module.apply(params, image)),
    }
    with pytest.raises(AssertionError):
        module.main(num_epochs=1)
