"""The ledger of a run: every second once, by a clock that a test moves."""

from __future__ import annotations

import json
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distaff import data, tasks, zoo
from distaff.throughput import PARTS, Ledger, Throughput


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def seconds(ledger: Ledger) -> dict[str, float]:
    return {part: spent for part, spent in ledger.read().seconds.items() if spent}


def test_each_second_counts_once_in_the_innermost_part():
    clock = Clock()
    ledger = Ledger(clock)
    clock.now += 1
    with ledger.spent("evaluation"):
        clock.now += 2
        with ledger.spent("data"):
            clock.now += 4
        clock.now += 8
    clock.now += 16
    assert seconds(ledger) == {"other": 17, "evaluation": 10, "data": 4}
    assert seconds(ledger) == {"other": 17, "evaluation": 10, "data": 4}


def test_timed_counts_the_time_to_get_each_item_and_not_what_is_done_with_it():
    clock = Clock()
    ledger = Ledger(clock)

    def items() -> Iterator[int]:
        for item in range(3):
            clock.now += 1
            yield item
        clock.now += 5

    for _ in ledger.timed(items(), "data"):
        clock.now += 10
    assert seconds(ledger) == {"data": 8, "other": 30}


@pytest.mark.parametrize("where", ["spent", "timed"])
def test_part_ends_with_an_error(where):
    clock = Clock()
    ledger = Ledger(clock)

    def broken() -> Iterator[int]:
        raise ValueError("broken")
        yield

    def spend() -> None:
        with ledger.spent("data"):
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        spend() if where == "spent" else list(ledger.timed(broken(), "data"))
    clock.now += 1
    assert seconds(ledger) == {"other": 1}


def test_compiling_is_counted_apart():
    ledger = Ledger()
    with ledger.spent("steps"):
        jax.jit(lambda x: jnp.sin(x) + 1234.5)(np.ones(3, np.float32))
    read = ledger.read()
    assert read.programs == 1
    assert read.seconds["compile"] > 0
    assert read.seconds["steps"] >= 0
    assert Ledger().read().programs == 0


def test_line_says_how_fast_and_where_the_time_went():
    spent = {**dict.fromkeys(PARTS, 0.0), "steps": 6.0, "data": 2.0, "compile": 2.0}
    line = Throughput(steps=4000, examples=64000, seconds=spent, programs=7, cached=3).line()
    assert line == (
        "500 steps/s, 8,000 examples/s, 2 ms per step; 10.0s: steps 60%, data 20%, compile 20%; "
        "7 programs compiled, 3 of them cached"
    )


def test_line_of_a_run_without_steps_divides_by_nothing():
    assert Throughput(0, 0, dict.fromkeys(PARTS, 0.0), 0, 0).line().startswith("0 steps/s")


def test_run_reports_its_throughput(capsys):
    train, val, test = data.digits(batch_size=128)
    trainer = tasks.Classifier(zoo.MLP((8, 10)), steps_per_call=4)
    result = trainer.train_model(train, val, test, num_epochs=2)
    read = json.loads((result.path / "status.json").read_text())["throughput"]
    assert (read["steps"], read["examples"]) == (18, 18 * 128)
    spent = read["seconds"]
    assert all(spent[part] > 0 for part in ("steps", "data", "logging", "evaluation", "checkpoint"))
    assert all(second >= 0 for second in spent.values())
    assert "steps/s" in capsys.readouterr().out
