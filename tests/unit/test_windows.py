from __future__ import annotations

import numpy as np
import pytest

from distaff import data
from distaff.errors import BatchError, ConfigError

TEXT = bytes(range(1, 24))


def _predicted(loader) -> list[int]:
    """The bytes that count, in the loader's order."""
    batches = list(loader)
    return [int(byte) for b in batches for byte in b["tokens"][:, 1:][b["mask"]]]


@pytest.mark.parametrize("size", range(4, 24))
@pytest.mark.parametrize("stride", [1, 2, 3, 4, None])
def test_held_out_windows_predict_every_byte_once_from_those_before_it(size, stride):
    text = TEXT[:size]
    loader = data.held_out_windows(text, 4, batch_size=3, stride=stride)
    assert bytes(_predicted(loader)) == text
    assert len(list(loader)) == len(loader)
    stream = b"\0" + text
    for batch in loader:
        assert batch["tokens"].dtype == np.int32
        assert batch["mask"].dtype == bool
        assert batch["tokens"].shape[1] == 5 == batch["mask"].shape[1] + 1
        for row in batch["tokens"]:
            assert bytes(row.astype(np.uint8)) in stream


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_held_out_windows_give_each_byte_the_promised_context(stride):
    context: dict[int, int] = {}
    for batch in data.held_out_windows(TEXT, 8, batch_size=4, stride=stride):
        for tokens, mask in zip(batch["tokens"], batch["mask"], strict=True):
            context.update({int(tokens[at + 1]): at for at in np.flatnonzero(mask)})
    assert [context[byte] for byte in TEXT[:8]] == list(range(8))
    assert min(context[byte] for byte in TEXT[8:]) >= 8 - stride
    assert max(context.values()) <= 7


def test_held_out_windows_do_not_overlap_by_default():
    (batch,) = data.held_out_windows(TEXT, 8, batch_size=4)
    assert batch["tokens"][:, 0].tolist() == [0, 8, 15]
    assert batch["mask"].sum(axis=1).tolist() == [8, 8, 7]


def test_shuffled_windows_hold_every_byte_once_an_epoch():
    loader = data.shuffled_windows(bytes(range(1, 26)), 4, batch_size=2, seed=1)
    epochs = [np.concatenate([batch["tokens"] for batch in loader]) for _ in range(3)]
    for rows in epochs:
        assert rows.dtype == np.int32
        assert (np.diff(rows, axis=1) == 1).all()
        assert sorted(rows[:, 1:].ravel().tolist()) == list(range(2, 26))
    assert epochs[0].tolist() != epochs[1].tolist()
    again = data.shuffled_windows(bytes(range(1, 26)), 4, batch_size=2, seed=1)
    np.testing.assert_array_equal(np.concatenate([b["tokens"] for b in again]), epochs[0])
    other = data.shuffled_windows(bytes(range(1, 26)), 4, batch_size=2, seed=2)
    assert np.concatenate([b["tokens"] for b in other]).tolist() != epochs[0].tolist()


def test_shuffled_windows_begin_at_every_stride():
    loader = data.shuffled_windows(TEXT, 4, batch_size=1, stride=3)
    starts = sorted(int(batch["tokens"][0, 0]) for batch in loader)
    assert starts == list(range(1, 20, 3))


@pytest.mark.parametrize("windows", [data.shuffled_windows, data.held_out_windows])
@pytest.mark.parametrize(
    ("text", "length", "options", "error", "match"),
    [
        ("text", 2, {}, BatchError, r"str.*\.encode"),
        (TEXT, 24, {}, BatchError, "length=24; it has 23 bytes"),
        (b"", 1, {}, BatchError, "it has 0 bytes"),
        (TEXT, 0, {}, ConfigError, "length=0, stride=0"),
        (TEXT, 4, {"stride": 5}, ConfigError, "length=4, stride=5"),
        (TEXT, 4, {"stride": 0}, ConfigError, "stride=0"),
        (TEXT, 4, {"batch_size": 0}, ConfigError, "batch_size must be .* got 0"),
    ],
)
def test_windows_refuse(windows, text, length, options, error, match):
    with pytest.raises(error, match=match):
        windows(text, length, **{"batch_size": 2, **options})


def test_shuffled_windows_need_one_whole_batch():
    with pytest.raises(BatchError, match=r"23 bytes make 5 windows.*batch_size is 6"):
        data.shuffled_windows(TEXT, 4, batch_size=6)
    with pytest.raises(BatchError, match="make 0 windows"):
        data.shuffled_windows(TEXT, 23, batch_size=1)
