"""Cadences: what people write, and what raises an error."""

from __future__ import annotations

import json
from datetime import timedelta

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distaff import TrainerConfig
from distaff.core.config.cadence import Cadence, Every
from distaff.core.config.encoding import from_json, to_json
from distaff.errors import ConfigError

ANY = Cadence(("steps", "epochs", "seconds"), number="steps")


@pytest.mark.parametrize(
    ("value", "every"),
    [
        ("500 steps", Every(500, "steps")),
        (" 1e3 Steps ", Every(1000, "steps")),
        ("10_000 steps", Every(10_000, "steps")),
        ("1 step", Every(1, "steps")),
        ("2epochs", Every(2, "epochs")),
        ("1 epoch", Every(1, "epochs")),
        ("10m", Every(600, "seconds")),
        ("1h30m", Every(5400, "seconds")),
        ("00:30:00", Every(1800, "seconds")),
        (timedelta(minutes=2), Every(120, "seconds")),
        (50, Every(50, "steps")),
        ("50", Every(50, "steps")),
        (np.int64(7), Every(7, "steps")),
        (Every(3, "epochs"), Every(3, "epochs")),
    ],
)
def test_cadence_reads(value, every):
    assert ANY.parse("option", value) == every


@pytest.mark.parametrize(
    "value",
    [
        *(0, -1, 0.5, True, None, "", "steps", "0 steps", "1.5 epochs", "-3 steps", "1e9 tokens"),
        *("1..2 steps", "1__0 steps", "0s", float("nan"), float("inf"), 10**400, [], "5 steps 3s"),
    ],
)
def test_cadence_raises_with_its_name_and_the_value(value):
    with pytest.raises(ConfigError, match="every_so must be a positive cadence such as '500") as e:
        ANY.parse("every_so", value)
    assert repr(value)[:20] in str(e.value)


def test_error_names_the_nearest_unit_and_why_others_do_not_apply():
    with pytest.raises(ConfigError, match="Did you mean 'epochs'"):
        ANY.parse("option", "3 epcohs")
    with pytest.raises(ConfigError, match="no unit 'tokens'"):
        ANY.parse("option", "1e9 tokens")
    only = Cadence(("steps",), why="Epochs have their own line.")
    with pytest.raises(ConfigError, match=r"'500 steps'; got '2 epochs'. Epochs have their own"):
        only.parse("option", "2 epochs")
    with pytest.raises(ConfigError, match=r"'500 steps'; got 500. Write the unit, too."):
        only.parse("option", 500)


whole = st.builds(Every, st.integers(1, 2**53), st.sampled_from(["steps", "epochs"]))
times = st.builds(Every, st.floats(0, exclude_min=True, allow_infinity=False), st.just("seconds"))


@given(whole | times)
def test_a_cadence_is_the_same_after_a_round_trip(every: Every):
    assert ANY.parse("option", str(every)) == every
    assert ANY.parse("option", ANY.check("option", every)) == every
    assert ANY.parse("option", json.loads(json.dumps(to_json(str(every))))) == every


@given(st.integers(1, 100), st.integers(0, 10_000))
def test_it_is_due_at_its_multiples(count: int, number: int):
    every = Every(count, "epochs")
    assert every.is_due("epochs", number) == (number in range(0, 10_001, count))
    assert not every.is_due("steps", number)


def test_options_keep_the_spelling_of_the_user():
    config = TrainerConfig(
        save_every="1_000 steps", log_every_n_steps="20 steps", keep_every="1e3 steps"
    )
    written = json.loads(json.dumps(to_json(config)))
    assert written["save_every"] == "1_000 steps"
    assert written["keep_every"] == "1e3 steps"
    assert written["log_every_n_steps"] == "20 steps"
    assert from_json(TrainerConfig, written) == config
    assert TrainerConfig(save_every=Every(2, "epochs")).save_every == "2 epochs"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"log_every_n_steps": "1 epoch"}, r"log_every_n_steps.*'500 steps'.*train/"),
        ({"keep_every": "2 epochs"}, r"keep_every.*'500 steps'"),
        ({"keep_every": "10m"}, r"keep_every.*'500 steps'"),
        (
            {"save_every": "5 minuts"},
            "save_every.*'10m', '500 steps', '2 epochs', .* or '1e9 tokens'",
        ),
    ],
)
def test_options_raise_for_units_that_make_no_sense(options, match):
    with pytest.raises(ConfigError, match=match):
        TrainerConfig(**options)
