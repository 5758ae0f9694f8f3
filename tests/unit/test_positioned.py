"""Positioned: what is read of data of other libraries, also after an error in them."""

from __future__ import annotations

from typing import Any

import pytest

from distaff import data
from distaff.errors import BatchError


class Flaky:
    """Rows that cannot be read once."""

    def __init__(self, bad: int, error: type[BaseException]) -> None:
        self.bad, self.error = {bad}, error

    def __call__(self, row: int) -> dict[str, int]:
        if row in self.bad:
            self.bad.remove(row)
            raise self.error("the disk is on fire")
        return {"x": row}


def rows(batches: Any) -> list[int]:
    return [row for batch in batches for row in batch["x"].tolist()]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("bad", [0, 2, 22, 39])
@pytest.mark.parametrize("shuffle", [False, True])
def test_reading_goes_on_after_an_error(error, bad, shuffle):
    whole = rows(data.from_examples([{"x": row} for row in range(40)], 4, shuffle=shuffle))
    examples = data.MappedExamples(list(range(40)), Flaky(bad, error))
    loader = data.from_examples(examples, 4, shuffle=shuffle)
    seen: list[int] = []
    with pytest.raises(error):
        seen.extend(row for batch in loader for row in rows([batch]))
    state = loader.get_state()
    assert state["batch"] == len(seen) // 4
    loader.set_state(state)
    assert seen + rows(loader) == whole


def test_first_batch_that_cannot_be_read_is_an_error_each_time():
    loader = data.packed([[1, 2, 3, 4]], 3, 1)
    for _ in range(3):
        with pytest.raises(BatchError, match="example 0 has 4"):
            list(loader)
