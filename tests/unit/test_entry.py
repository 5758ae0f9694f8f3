from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import pytest

from distaff.data import entry
from distaff.errors import BatchError


@dataclasses.dataclass
class Pair:
    x: Any
    label: Any


class Named(NamedTuple):
    label: Any
    x: Any


def find(batch: Any) -> Any:
    return entry(batch, ("image", "x"), 0, what="The input", override="model_inputs(self, batch)")


@pytest.mark.parametrize(
    "batch", [{"label": 1, "x": 7}, (7, 1), [7], Pair(7, 1), Named(label=1, x=7)]
)
def test_entry_is_found_by_name_or_position(batch):
    assert find(batch) == 7


def test_entry_prefers_the_first_name():
    assert find({"x": 1, "image": 7}) == 7


@pytest.mark.parametrize(
    ("batch", "held"),
    [({"y": 1}, r"\['y'\]"), ((), "0 items"), (object(), "object")],
)
def test_entry_that_is_not_there_names_what_is(batch, held):
    with pytest.raises(BatchError, match=rf"holds {held}\. Override model_inputs"):
        find(batch)


def test_entry_of_a_single_array_says_what_to_pass():
    with pytest.raises(BatchError, match=r"one array of shape \(3,\)\. Pass \(inputs, labels\)"):
        find(np.zeros(3))
