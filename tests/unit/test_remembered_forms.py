"""The form that one trainer has measured is the one that the next starts with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

import distaff
from distaff import compile_cache, tasks, zoo


def batches(size: int = 8) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    return [
        {
            "image": random.normal(size=(size, 4, 4, 1)).astype(np.float32),
            "label": random.integers(10, size=size).astype(np.int32),
        }
        for _ in range(40)
    ]


def trained(*, features: int = 5, size: int = 8, **options: Any) -> tuple[Any, dict[str, Any], str]:
    """Trains, and returns the trainer, what the status says of the form, and the log."""
    trainer = tasks.Classifier(
        zoo.MLP((features, 10)),
        optimizer=distaff.OptimizerConfig("adam"),
        enable_progress_bar=False,
        **options,
    )
    result = trainer.train_model(batches(size), num_epochs=4)
    facts = json.loads((result.path / "status.json").read_text())["steps_per_call"]
    return trainer, facts, (result.path / "log.txt").read_text()


def kept() -> Path:
    directory = compile_cache.home()
    assert directory is not None
    return directory / "forms.json"


def test_second_trainer_starts_with_the_form_of_the_first():
    first, measured, _ = trained()
    second, remembered, log = trained()
    assert measured["why"] == "measured"
    assert measured["seconds_per_step"]["fused"] > 0
    assert remembered == {**measured, "why": "remembered"}
    steps = "the step" if measured["capacity"] == 1 else "the fused steps"
    compiled = [line for line in log.splitlines() if " compiled the " in line]
    assert [steps in line for line in compiled] == [True]
    assert f"{measured['num_steps']} per call, remembered (" in log
    np.testing.assert_array_equal(*map(np.concatenate, map(flat, (first, second))))
    assert kept().stat().st_mode & 0o777 == 0o600


def flat(trainer: Any) -> list[np.ndarray]:
    return [np.ravel(leaf) for leaf in jax.tree.leaves(trainer.state.params)]


def test_another_step_is_measured_anew():
    trained()
    for other in ({"features": 6}, {"size": 7}, {"tune_process": False}):
        assert trained(**other)[1]["why"] == "measured"
    assert trained(steps_per_call=2)[1]["why"] == "given"
    assert trained()[1]["why"] == "remembered"


def test_nothing_is_written_where_nothing_is_remembered():
    trained(tune_process=False)
    trained(steps_per_call=2)
    assert not kept().exists()


def test_corrupt_file_is_measured_over():
    trained()
    kept().write_text(kept().read_text()[:40])
    assert trained()[1]["why"] == "measured"
    assert trained()[1]["why"] == "remembered"


def test_display_shows_the_choice(capsys):
    for _ in range(2):
        tasks.Classifier(zoo.MLP((5, 10)), root=None).train_model(batches(), num_epochs=4)
    lines = [line for line in capsys.readouterr().out.splitlines() if "steps as programs" in line]
    assert ["remembered" in line for line in lines] == [False, True]
