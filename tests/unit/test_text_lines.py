"""Lines of text files, against Python's own reading."""

from __future__ import annotations

import bz2
import gzip
import os
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distaff import data
from distaff.errors import BatchError, ConfigError, DataFileError

PIECES = st.sampled_from(
    [
        "a",
        "bc",
        "\u00e9",
        "\u20ac",
        "\U0001f600",
        "\n",
        "\n",
        "\r\n",
        "\r",
        "\u2028",
        "\x0b",
        "\x85",
    ]
)
CONTENTS = st.lists(st.lists(PIECES, max_size=40).map("".join), min_size=1, max_size=3)


def lines_of(contents: bytes) -> list[bytes]:
    """Tells lines in another way: a line feed ends one, with a carriage return before it or not."""
    return [line[0] for line in re.findall(rb"(.*?)(\r?\n|\Z)", contents, re.DOTALL)][:-1]


def all_of(examples) -> list:
    return [examples[index] for index in range(len(examples))]


@settings(deadline=None)
@given(contents=CONTENTS, block_bytes=st.integers(1, 50), blocks_in_memory=st.integers(1, 3))
@example(contents=["\n"], block_bytes=1, blocks_in_memory=1)
@example(contents=["a\r"], block_bytes=1, blocks_in_memory=1)
@example(contents=["a\r\nb", "", "\r\n"], block_bytes=1, blocks_in_memory=1)
def test_lines_are_those_of_the_files(tmp_path_factory, contents, block_bytes, blocks_in_memory):
    folder = tmp_path_factory.getbasetemp() / "lines"
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{number}.txt" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content.encode())
    expected = [line for path in paths for line in lines_of(path.read_bytes())]
    options = {"block_bytes": block_bytes, "blocks_in_memory": blocks_in_memory}
    if not expected:
        with pytest.raises(BatchError, match="at least one example"):
            data.TextLines(paths, **options)
        return
    lines = data.TextLines(paths, encoding=None, **options)
    assert all_of(lines) == expected
    assert all_of(data.TextLines(paths, **options)) == [line.decode() for line in expected]
    for start, stop in pairwise(lines.starts):
        assert sum(map(len, expected[start : stop - 1])) <= block_bytes


def test_paths_are_files_lists_and_patterns(tmp_path, monkeypatch):
    for name in ("b", "a", "c[1]"):
        (tmp_path / f"{name}.txt").write_text(f"{name}\n")
    (tmp_path / "d.txt").mkdir()
    assert all_of(data.TextLines(str(tmp_path / "*.txt"))) == ["a", "b", "c[1]"]
    assert all_of(data.TextLines([tmp_path / "b.txt", tmp_path / "a*"])) == ["b", "a"]
    assert all_of(data.TextLines(tmp_path / "c[1].txt")) == ["c[1]"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert all_of(data.TextLines("~/a.txt")) == ["a"]


def test_other_encodings(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\u00e9t\u00e9\n\u00fc".encode("latin-1"))
    assert all_of(data.TextLines(path, encoding="latin-1")) == ["\u00e9t\u00e9", "\u00fc"]


def test_wrong_encoding_names_the_line(tmp_path):
    whole, broken = tmp_path / "a.txt", tmp_path / "b.txt"
    whole.write_text("fine\n" * 9)
    broken.write_bytes(b"one\n" * 20 + b"tw\xffo\n" + b"three\n" * 20)
    lines = data.TextLines([whole, broken], block_bytes=16)
    assert lines[0] == "fine"
    with pytest.raises(DataFileError, match=r"b\.txt, line 21, is not: invalid start byte"):
        all_of(lines)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: path.write_text("one\n" * 99), "now has 396 bytes"),
        (lambda path: path.write_text("one1one\n" * 25), "were"),
        (lambda path: path.unlink(), "must be readable"),
    ],
)
def test_changed_file_is_noticed(tmp_path, change, said):
    path = tmp_path / "a.txt"
    path.write_text("one\n" * 50)
    lines = data.TextLines(path, block_bytes=20)
    assert lines[3] == "one"
    change(path)
    with pytest.raises(DataFileError, match=said):
        assert lines[49]


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda path: data.TextLines(path / "none.txt"), DataFileError, "is not a file"),
        (lambda path: data.TextLines(path), DataFileError, "is not a file"),
        (lambda path: data.TextLines(f"{path}/*.csv"), DataFileError, "matches no file"),
        (lambda path: data.TextLines([]), DataFileError, "At least one file"),
        (lambda path: data.TextLines(path / "a.gz"), DataFileError, "gunzip .*a.gz"),
        (lambda path: data.TextLines(path / "a.zst"), DataFileError, "unzstd .*a.zst"),
        (lambda path: data.TextLines(path / "a.bz2"), DataFileError, "bunzip2 .*a.bz2"),
        (lambda path: data.TextLines(path / "b.bz2"), DataFileError, "bunzip2 .*b.bz2"),
        (lambda path: data.TextLines(path / "pipe"), DataFileError, "is not a file"),
        (lambda path: data.TextLines(path / "a.txt", block_bytes=0), ConfigError, "block_bytes"),
        (lambda path: data.TextLines(path / "a.txt", block_bytes=1e6), ConfigError, "block_bytes"),
        (lambda path: data.TextLines(path / "a.txt", encoding="utf-16"), ConfigError, "utf-16"),
        (lambda path: data.TextLines(path / "a.txt", encoding="rot13"), ConfigError, "rot13"),
        (lambda path: data.TextLines(path / "a.txt", encoding="none"), ConfigError, "none"),
    ],
)
def test_what_is_refused(tmp_path, make, error, said):
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"one\n"))
    (tmp_path / "a.bz2").write_bytes(bz2.compress(b"one\n"))
    (tmp_path / "b.bz2").write_bytes(bz2.compress(b""))
    (tmp_path / "a.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(20))
    (tmp_path / "a.txt").write_text("one\n")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(error, match=said):
        make(tmp_path)


def test_a_text_may_begin_as_a_compressed_file_might(tmp_path):
    (tmp_path / "a.csv").write_text("BZhang,1\nBZh9,2\n")
    assert all_of(data.TextLines(tmp_path / "a.csv")) == ["BZhang,1", "BZh9,2"]


def test_endless_line_is_refused_before_it_fills_memory(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("one\n" + "x" * 1000)
    monkeypatch.setattr("distaff.data.formats.text._MAX_LINE_BYTES", 100)
    with pytest.raises(DataFileError, match="at most 100 bytes"):
        data.TextLines(path, block_bytes=10)


def test_shuffled_epoch_keeps_few_blocks_and_reads_each_once(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"{number}\n" for number in range(1000)))
    reads = []

    class Counted(data.TextLines):
        def read(self, place):
            reads.append(place.start)
            return super().read(place)

    lines = Counted(path, block_bytes=256, blocks_in_memory=3)
    encoded = data.MappedExamples(lines, lambda line: np.int32(line))
    loader = data.from_examples(encoded, 7, shuffle=True, remainder="keep")
    assert sorted(np.concatenate(list(loader)).tolist()) == list(range(1000))
    assert len(reads) == len(set(reads)) == len(lines.starts) - 1


def test_position_is_refused_where_a_file_has_another_size(tmp_path):
    def make(content: str, **options) -> data.Loader:
        Path(tmp_path / "a.txt").write_text(content)
        lines = data.TextLines(tmp_path / "a.txt", **options)
        return data.from_examples(data.MappedExamples(lines, len), 2)

    state = make("one\n" * 8).get_state()
    with pytest.raises(BatchError, match="loader with the same options and data"):
        make("four\n" * 8).set_state(state)
    make("one\n" * 8, block_bytes=3).set_state(state)
