from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distaff import data
from distaff.errors import DataFileError

CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def idx(array: np.ndarray) -> bytes:
    """Returns an array in the IDX format."""
    kind = array.dtype.str[1:]
    header = struct.pack(f">2x2B{array.ndim}I", CODES[kind], array.ndim, *array.shape)
    return header + array.astype(f">{kind}").tobytes()


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def write_mnist(folder: Path, train: int = 40, test: int = 7, suffix: str = "") -> None:
    """Writes the four files, with labels 0, 1, .. 9, 0, .. and pictures that all differ."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count, first in (("train", train, 0), ("t10k", test, train)):
        images = np.zeros((count, 28, 28), np.uint8)
        images[:, 0, 0] = first + np.arange(count)
        images[:, 3, 5] = 255
        for kind, array in (("images-idx3", images), ("labels-idx1", np.arange(count) % 10)):
            content = idx(array.astype(np.uint8))
            path = folder / f"{split}-{kind}-ubyte{suffix}"
            path.write_bytes(gzip.compress(content) if suffix == ".gz" else content)


ARRAYS = st.tuples(
    st.sampled_from(sorted(CODES)),
    st.lists(st.integers(1, 5), min_size=1, max_size=5),
    st.integers(0, 2**32),
)


@settings(deadline=None, max_examples=100)
@given(ARRAYS, st.booleans())
def test_idx_round_trip(tmp_path_factory, described, compress):
    kind, shape, seed = described
    values = np.random.default_rng(seed).bytes(math.prod(shape) * np.dtype(kind).itemsize)
    array = np.frombuffer(values, kind).reshape(shape)
    content = idx(array)
    path = tmp_path_factory.getbasetemp() / "round_trip"
    read = data.read_idx(written(path, gzip.compress(content) if compress else content))
    assert read.dtype == np.dtype(kind)
    assert read.shape == tuple(shape)
    assert read.tobytes() == array.tobytes()
    assert read.flags.writeable


def test_idx_reads_the_bytes_of_the_published_page(tmp_path):
    # The head of train-labels-idx1-ubyte as its page prints it, cut to three labels.
    labels = bytes.fromhex("00000801 00000003 05 00 04")
    np.testing.assert_array_equal(data.read_idx(written(tmp_path / "a", labels)), [5, 0, 4])
    numbers = bytes.fromhex("00000b02 00000001 00000002 0102 fffe")
    np.testing.assert_array_equal(data.read_idx(written(tmp_path / "b", numbers)), [[258, -2]])


HEADERS = st.builds(
    lambda code, sizes: struct.pack(f">2x2B{len(sizes)}I", code, len(sizes), *sizes),
    st.sampled_from([*CODES.values(), 0x0A]),
    st.lists(st.integers(0, 9) | st.integers(0, 2**32 - 1), max_size=4),
)


@settings(deadline=None, max_examples=200)
@given(st.just(b"") | HEADERS, st.binary(max_size=40), st.booleans())
def test_idx_reads_what_was_written_or_refuses(tmp_path_factory, header, rest, compress):
    content = header + rest
    path = tmp_path_factory.getbasetemp() / "any_bytes"
    written(path, gzip.compress(content) if compress else content)
    try:
        array = data.read_idx(path)
    except DataFileError:
        return
    assert idx(array) == content


GOOD = idx(np.arange(6, dtype=np.uint8).reshape(2, 3))
HUGE = struct.pack(">2x2B3I", 0x08, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1)
BAD = {
    "empty": (b"", "an empty file"),
    "short magic": (GOOD[:3], "got 00 00 08"),
    "first bytes": (b"\1" + GOOD[1:], "the bytes 00 00.*got 01 00 08 02"),
    "dtype": (b"\0\0\x0a" + GOOD[3:], "08, 09, 0b, 0c, 0d, 0e.*got 00 00 0a 02"),
    "no axes": (b"\0\0\x08\0" + GOOD[4:], "1 to 64 axes; got 0"),
    "many axes": (b"\0\0\x08\x41" + b"\0\0\0\1" * 65 + b"\7", "1 to 64 axes; got 65"),
    "short sizes": (GOOD[:7], "8 bytes for the sizes of 2 axes; got 3"),
    "no example": (struct.pack(">2x2B2I", 8, 2, 0, 3), r"at least 1; got \[0, 3\]"),
    "short values": (GOOD[:-1], r"6 bytes for uint8 \[2, 3\]; got 5 "),
    "long values": (GOOD + b"\0", r"6 bytes for uint8 \[2, 3\]; got 7 "),
    "gzip short values": (gzip.compress(GOOD[:-1]), r"6 bytes for uint8 \[2, 3\]; got 5"),
    "gzip long values": (gzip.compress(GOOD + b"\0"), r"6 bytes for uint8 \[2, 3\]; got more"),
    "gzip cut": (gzip.compress(GOOD)[:-9], "a whole gzip file; got"),
    "gzip checksum": (gzip.compress(GOOD)[:-8] + b"\0" * 8, "a whole gzip file; got"),
    "gzip damaged": (gzip.compress(GOOD)[:10] + b"\7" * 20, "a whole gzip file; got"),
    "states too much": (HUGE, r"more than max_bytes=1,073,741,824.*raise max_bytes"),
    "gzip states too much": (
        gzip.compress(struct.pack(">2x2BI", 0x08, 1, 2**29)),
        r"536,870,912 bytes for uint8 \[536870912\]; got at most",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_idx_refuses(tmp_path, case):
    content, complaint = BAD[case]
    path = written(tmp_path / "train-labels-idx1-ubyte", content)
    with pytest.raises(DataFileError, match=complaint) as refused:
        data.read_idx(path)
    assert str(path) in str(refused.value)


def test_idx_does_not_unpack_more_than_it_may(tmp_path):
    # 64 MB of zeros in 62 KB: the header is honest, so only the limit stands in the way.
    content = idx(np.zeros(2**26, np.uint8))
    packer = zlib.compressobj(9, wbits=31)
    path = written(tmp_path / "bomb", packer.compress(content) + packer.flush())
    with pytest.raises(DataFileError, match=r"67,108,864 bytes.*max_bytes=1,000,000"):
        data.read_idx(path, max_bytes=1_000_000)


def test_idx_names_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(DataFileError, match=r"absent is not: .*No such file"):
        data.read_idx(tmp_path / "absent")
    with pytest.raises(DataFileError, match="must be readable"):
        data.read_idx(tmp_path)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_batches_have_the_stated_form(tmp_path, suffix):
    write_mnist(tmp_path / "mnist", suffix=suffix)
    for folder in (tmp_path / "mnist", tmp_path, str(tmp_path)):
        train, val, test = data.mnist(folder, batch_size=3)
        assert [len(loader) for loader in (train, val, test)] == [12, 2, 3]
    batch = data.first_batch(test)
    assert (batch["image"].shape, batch["image"].dtype) == ((3, 28, 28, 1), np.float32)
    assert (batch["label"].tolist(), batch["label"].dtype) == ([0, 1, 2], np.int32)
    assert batch["image"][2, 3, 5, 0] == 1
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], np.float32([40, 41, 42]) / 255)
    assert test.loader.arrays["image"].dtype == np.uint8


def test_mnist_reads_names_with_a_dot(tmp_path):
    write_mnist(tmp_path)
    for path in list(tmp_path.iterdir()):
        path.rename(path.with_name(path.name.replace("-idx", ".idx")))
    assert len(data.mnist(tmp_path, batch_size=7)[2]) == 1


def test_mnist_split_is_fixed_stratified_and_whole(tmp_path):
    write_mnist(tmp_path, train=200, test=20)
    parts = data.mnist(tmp_path, batch_size=4, seed=0)
    marks = [np.round(255 * part.arrays["image"][:, 0, 0, 0]).astype(int) for part in parts]
    assert sorted(np.concatenate(marks)) == list(range(220))
    assert [len(mark) for mark in marks] == [180, 20, 20]
    assert marks[2].tolist() == list(range(200, 220))
    assert np.bincount(parts[1].arrays["label"]).tolist() == [2] * 10
    expected = "5 10 14 18 33 57 61 69 73 78 85 102 107 146 154 159 161 170 182 196"
    assert marks[1].tolist() == [int(number) for number in expected.split()]
    other = data.mnist(tmp_path, batch_size=4, seed=1)
    for part, same in zip(parts, other, strict=True):
        np.testing.assert_array_equal(part.arrays["label"], same.arrays["label"])
    assert not np.array_equal(
        data.first_batch(parts[0])["image"], data.first_batch(other[0])["image"]
    )


def test_mnist_says_where_to_get_the_files(tmp_path):
    with pytest.raises(DataFileError) as refused:
        data.mnist(tmp_path / "absent")
    for word in ("no such folder", "absent", "yann.lecun.com/exdb/mnist", "11.6 MB", "Fashion"):
        assert word in str(refused.value)
    write_mnist(tmp_path / "here", suffix=".gz")
    (tmp_path / "here" / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataFileError, match=r"here has no t10k-labels-idx1-ubyte\. Download"):
        data.mnist(tmp_path)


def test_mnist_refuses_to_choose_between_folders(tmp_path):
    write_mnist(tmp_path / "fashion")
    write_mnist(tmp_path / "mnist")
    with pytest.raises(DataFileError, match=r"\['fashion', 'mnist'\].*Pass one"):
        data.mnist(tmp_path)
    write_mnist(tmp_path)
    assert len(data.mnist(tmp_path, batch_size=7)[2]) == 1


@pytest.mark.parametrize(
    ("name", "array", "complaint"),
    [
        ("train-images-idx3-ubyte", np.zeros((40, 28, 27), "u1"), r"28 x 28.*uint8 \[40, 28, 27\]"),
        ("train-images-idx3-ubyte", np.zeros((40, 28, 28), "i4"), r"28 x 28.*int32 \[40, 28, 28\]"),
        ("train-images-idx3-ubyte", np.zeros(40, "u1"), r"28 x 28.*uint8 \[40\]"),
        ("train-labels-idx1-ubyte", np.zeros(39, "u1"), r"each of the 40 pictures.*uint8 \[39\]"),
        ("train-labels-idx1-ubyte", np.zeros((40, 1), "u1"), r"uint8 \[40\].*uint8 \[40, 1\]"),
        ("t10k-labels-idx1-ubyte", np.zeros(7, "i1"), r"each of the 7 pictures.*int8 \[7\]"),
        ("t10k-labels-idx1-ubyte", np.arange(5, 12, dtype="u1"), r"0\.\.9; label 5 is 10"),
    ],
)
def test_mnist_refuses_files_that_do_not_fit(tmp_path, name, array, complaint):
    write_mnist(tmp_path)
    written(tmp_path / name, idx(array))
    with pytest.raises(DataFileError, match=complaint) as refused:
        data.mnist(tmp_path)
    assert name in str(refused.value)
