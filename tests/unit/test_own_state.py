"""A state that the user creates or sets before training is the state that is trained."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from distaff import data, tasks, zoo
from distaff.errors import StateError

ROWS = {"image": np.ones((8, 3), np.float32), "label": np.zeros(8, np.int32)}
LOADER = data.ArrayLoader(ROWS, 4)


def classifier(**options):
    return tasks.Classifier(zoo.MLP((2,)), enable_progress_bar=False, root=None, **options)


def assert_equal(a, b):
    for x, y in zip(*map(jax.tree.leaves, (a.state.params, b.state.params)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_state_of_init_model_is_trained():
    first, second = classifier(), classifier()
    second.init_model(ROWS)
    for each in (first, second):
        each.train_model(LOADER, num_epochs=1)
    assert_equal(first, second)


def test_state_that_was_set_is_trained():
    first, second = classifier(seed=1), classifier(seed=2)
    first.init_model(ROWS)
    second.state = first.state
    for each in (first, second):
        each.train_model(LOADER, num_epochs=1)
    assert_equal(first, second)


def test_evaluation_of_a_state_without_a_step_is_an_error():
    trainer = classifier()
    trainer.init_model(ROWS)
    with pytest.raises(StateError, match="Pass an example_batch to the trainer"):
        trainer.eval_model(LOADER)
