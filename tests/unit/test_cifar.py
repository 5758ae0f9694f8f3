from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distaff import data
from distaff.errors import DataFileError

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
TRAIN = [f"data_batch_{part}.bin" for part in range(1, 6)]


def cifar(images: np.ndarray, *labels: np.ndarray) -> bytes:
    """Returns the records of a binary file: labels, then all red, all green, all blue values."""
    rows = zip(images, *labels, strict=True)
    return b"".join(bytes(map(int, row[1:])) + row[0].transpose(2, 0, 1).tobytes() for row in rows)


def pictures(count: int, first: int = 0) -> np.ndarray:
    """Returns pictures that all differ: pixel (0, 0) has its number in red, 1 and 2 beside it."""
    images = np.zeros((count, 32, 32, 3), np.uint8)
    images[:, 0, 0] = np.stack([first + np.arange(count), np.full(count, 1), np.full(count, 2)], -1)
    images[:, 31, 0] = 255
    return images


def write_cifar10(folder: Path, each: int = 20) -> Path:
    folder.mkdir(parents=True)
    for part, name in enumerate([*TRAIN, "test_batch.bin"]):
        labels = np.arange(each) % 10
        (folder / name).write_bytes(cifar(pictures(each, part * each), labels))
    (folder / "batches.meta.txt").write_text("\n".join(NAMES) + "\n\n")
    return folder


def write_cifar100(folder: Path, train: int = 200, test: int = 10) -> Path:
    folder.mkdir(parents=True)
    for name, count in (("train.bin", train), ("test.bin", test)):
        fine = np.arange(count) % 100
        (folder / name).write_bytes(cifar(pictures(count), fine // 5, fine))
    names = [f"class {number}" for number in range(100)]
    (folder / "fine_label_names.txt").write_text("\n".join(names) + "\n")
    return folder


def numbers(loader: data.MappedLoader) -> list[int]:
    return np.round(255 * loader.arrays["image"][:, 0, 0, 0]).astype(int).tolist()


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 4), st.integers(0, 2**32))
def test_cifar_round_trip(tmp_path_factory, count, seed):
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (count, 32, 32, 3), np.uint8)
    label, coarse, fine = (random.integers(0, top, count) for top in (10, 20, 100))
    path = tmp_path_factory.getbasetemp() / "round_trip.bin"
    path.write_bytes(cifar(images, label))
    for read, expected in zip(data.read_cifar10(path), (images, label), strict=True):
        np.testing.assert_array_equal(read, expected)
    path.write_bytes(cifar(images, coarse, fine))
    for read, expected in zip(data.read_cifar100(path), (images, fine, coarse), strict=True):
        np.testing.assert_array_equal(read, expected)
    assert [read.dtype for read in data.read_cifar100(path)] == [np.uint8, np.int32, np.int32]


def test_cifar10_batches_have_the_stated_form(tmp_path):
    folder = write_cifar10(tmp_path / "cifar-10-batches-bin")
    for place in (folder, tmp_path, str(tmp_path)):
        train, val, test = data.cifar10(place, batch_size=8)
        assert [len(loader) for loader in (train, val, test)] == [11, 2, 3]
        assert data.cifar10_names(place) == tuple(NAMES)
    batch = data.first_batch(test)
    assert (batch["image"].shape, batch["image"].dtype) == ((8, 32, 32, 3), np.float32)
    assert (batch["label"].tolist(), batch["label"].dtype) == (list(range(8)), np.int32)
    np.testing.assert_array_equal(batch["image"][3, 0, 0], np.float32([103, 1, 2]) / 255)
    assert batch["image"][3, 31, 0].tolist() == [1, 1, 1]
    assert test.loader.arrays["image"].dtype == np.uint8


def test_cifar10_split_is_fixed_stratified_and_whole(tmp_path):
    write_cifar10(tmp_path / "cifar")
    parts = data.cifar10(tmp_path, batch_size=8, seed=0)
    assert sorted(itertools.chain(*map(numbers, parts))) == list(range(120))
    assert numbers(parts[2]) == list(range(100, 120))
    assert np.bincount(parts[1].arrays["label"]).tolist() == [1] * 10
    expected = "2 7 26 30 54 55 71 78 93 99"
    assert numbers(parts[1]) == [int(number) for number in expected.split()]
    other = data.cifar10(tmp_path, batch_size=8, seed=1)
    assert list(map(numbers, other)) == list(map(numbers, parts))
    assert not np.array_equal(
        data.first_batch(parts[0])["image"], data.first_batch(other[0])["image"]
    )


def test_cifar100_batches_have_both_labels(tmp_path):
    folder = write_cifar100(tmp_path / "cifar-100-binary")
    for place in (folder, tmp_path):
        train, val, test = data.cifar100(place, batch_size=4)
        assert [len(loader) for loader in (train, val, test)] == [45, 5, 3]
        assert data.cifar100_names(place)[99] == "class 99"
    batch = data.first_batch(train)
    assert batch["image"].shape == (4, 32, 32, 3)
    assert batch["label"].dtype == batch["coarse_label"].dtype == np.int32
    np.testing.assert_array_equal(batch["coarse_label"], batch["label"] // 5)
    assert len(set(train.arrays["label"]) | set(val.arrays["label"])) == 100


def test_cifar_says_where_to_get_the_files(tmp_path):
    for read, archive, size in (
        (data.cifar10, "cifar-10-binary.tar.gz", "162 MB"),
        (data.cifar100, "cifar-100-binary.tar.gz", "161 MB"),
    ):
        with pytest.raises(DataFileError) as refused:
            read(tmp_path / "absent")
        for word in ("no such folder", "www.cs.toronto.edu/~kriz/cifar.html", archive, size):
            assert word in str(refused.value)
    folder = write_cifar10(tmp_path / "cifar-10-batches-bin")
    (folder / "data_batch_3.bin").unlink()
    with pytest.raises(DataFileError, match=r"cifar-10-batches-bin has no data_batch_3\.bin\."):
        data.cifar10(tmp_path)
    with pytest.raises(DataFileError, match="tar -xzf"):
        data.cifar10_names(tmp_path)


@pytest.mark.parametrize(
    ("read", "folder", "files", "archive"),
    [
        (data.cifar10, "cifar-10-batches-py", ["data_batch_1", "batches.meta"], "cifar-10-binary"),
        (data.cifar100, "cifar-100-python", ["train", "test", "meta"], "cifar-100-binary"),
    ],
)
def test_cifar_refuses_pickles(tmp_path, read, folder, files, archive):
    (tmp_path / folder).mkdir()
    for name in files:
        (tmp_path / folder / name).write_bytes(b"\x80\x02}q\x01.")
    for place in (tmp_path, tmp_path / folder):
        with pytest.raises(DataFileError, match=rf"not read.*pickles.*{archive}\.tar\.gz"):
            read(place)


RECORD = cifar(pictures(1), np.array([9]))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "0 bytes, 0 records"),
        (RECORD[:-1], "3,072 bytes, 0 records and 3,072 bytes"),
        (RECORD * 2 + b"\0", "6,147 bytes, 2 records and 1 bytes"),
        (RECORD + b"\x0a" + RECORD[1:], r"0\.\.9; record 1 has 10"),
    ],
)
def test_cifar10_refuses(tmp_path, content, complaint):
    path = write_cifar10(tmp_path / "cifar") / "data_batch_4.bin"
    path.write_bytes(content)
    with pytest.raises(DataFileError, match=complaint) as refused:
        data.cifar10(tmp_path)
    assert str(path) in str(refused.value)


def test_cifar100_refuses_labels_out_of_range(tmp_path):
    for label, complaint in ((b"\x14\x00", "coarse label.*20"), (b"\x00\x64", "fine label.*100")):
        path = tmp_path / "train.bin"
        path.write_bytes(label + bytes(3072))
        with pytest.raises(DataFileError, match=complaint):
            data.read_cifar100(path)


def test_cifar_refuses_a_file_of_absurd_size_unread(tmp_path):
    with (tmp_path / "sparse.bin").open("wb") as file:
        file.truncate(3073 * 50_001)
    with pytest.raises(DataFileError, match="50,001 records"):
        data.read_cifar10(tmp_path / "sparse.bin")


@pytest.mark.parametrize(
    "text",
    ["", "\n".join(NAMES[:9]), "\n".join([*NAMES, "more"]), "\n".join([*NAMES[:9], "\x1b[1m"])],
)
def test_cifar10_names_refuses_other_lines(tmp_path, text):
    (write_cifar10(tmp_path / "cifar") / "batches.meta.txt").write_text(text)
    with pytest.raises(DataFileError, match="names of 10 classes"):
        data.cifar10_names(tmp_path)
