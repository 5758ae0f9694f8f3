from __future__ import annotations

import os

import pytest

from distaff import data
from distaff.errors import DataFileError


@pytest.fixture
def library(tmp_path):
    """A folder like that of a standard library; each file holds its own path."""

    def add(*names: str):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(f"# {name}\n".encode())
        return tmp_path

    return add


def _held(parts: tuple[bytes, bytes, bytes]) -> list[list[str]]:
    return [[line[2:] for line in part.decode().splitlines()] for part in parts]


def test_python_source_is_split_by_the_hash_of_the_path(library):
    names = ["argparse.py", "bisect.py", "abc.py", "json/decoder.py", "json/__init__.py"]
    folder = library(*names)
    # argparse.py and bisect.py are those of the test and the validation part in every version.
    expected = [["abc.py", "json/__init__.py", "json/decoder.py"], ["bisect.py"], ["argparse.py"]]
    assert _held(data.python_source(folder)) == expected
    library(*(f"module_{i}.py" for i in range(400)))
    train, val, test = _held(data.python_source(folder))
    assert 270 < len(train) < 370
    assert set(train) & set(val) == set(train) & set(test) == set(val) & set(test) == set()
    assert len(train) + len(val) + len(test) == 405
    assert (train, val, test) == (sorted(train), sorted(val), sorted(test))


def test_python_source_is_the_library_alone(library):
    folder = library(
        *("abc.py", "configparser.py", "unittest/case.py", "test_of_mine.py", "README.txt"),
        *("site-packages/jax/a.py", "dist-packages/b.py", "test/c.py", "lib2to3/tests/d.py"),
        *("idlelib/idle_test/e.py", "config-3.11-x86_64-linux-gnu/f.py", "unittest/test/g.py"),
        *("_sysconfigdata__linux_x86_64-linux-gnu.py", "__pycache__/h.py", "abc.pyc"),
    )
    held = sorted(name for part in _held(data.python_source(folder)) for name in part)
    assert held == ["abc.py", "configparser.py", "test_of_mine.py", "unittest/case.py"]


def test_python_source_leaves_out_what_cannot_be_read(library):
    folder = library("abc.py")
    (folder / "broken.py").symlink_to(folder / "nowhere.py")
    os.mkdir(folder / "folder.py")
    assert _held(data.python_source(folder))[0] == ["abc.py"]


def test_python_source_says_where_it_looked(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataFileError, match=rf"{folder}, in files \*\.py.*folder="):
            data.python_source(folder)


def test_python_source_of_this_interpreter():
    train, val, test = parts = data.python_source()
    assert len(train) > 4 * max(len(val), len(test))
    assert min(map(len, parts)) > 100_000
    assert b"class ArgumentParser" in test
    assert b"class ArgumentParser" not in train
