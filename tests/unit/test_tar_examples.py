"""Tar archives, against the standard library's `tarfile`, and archives that may hold anything.

`DISTAFF_FUZZ_EXAMPLES=10000` makes the long form of the fuzz test.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from distaff import data
from distaff.data.formats.tar import read_members
from distaff.errors import BatchError, ConfigError, DataFileError, DistaffError

fuzz = settings(
    deadline=None,
    max_examples=int(os.environ.get("DISTAFF_FUZZ_EXAMPLES", "200")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def npy(array: np.ndarray, **options) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def sized(array: np.ndarray, shape: bytes, stated: bytes) -> bytes:
    """Returns an .npy file that states another shape, in a header of the same length."""
    longer = len(stated) - len(shape)
    content = npy(array).replace(shape + b", }" + b" " * longer, stated + b", }")
    assert len(content) == len(npy(array))
    return content


def tar_of(members: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT, **options) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for option, value in options.items():
                setattr(member, option, value)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def all_of(examples) -> list:
    return [examples[index] for index in range(len(examples))]


def examples_of(tmp_path: Path, *contents: bytes, **options) -> data.TarExamples:
    paths = [tmp_path / f"{number}.tar" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return data.TarExamples(paths, **options)


folders = st.sampled_from(
    ["", "a/", "./", "/abs/", "../", "a.b/", "\u00e9" * 60 + "/" + "b" * 90 + "/"]
)
stems = st.sampled_from(["1", "2", "x" * 120, "\u00fc", "", "__m"])
extensions = st.sampled_from(["cls", "JPG", "seg.png", "", "txt", "y__"])
names = st.builds("{}{}.{}".format, folders, stems, extensions)


@fuzz
@given(
    members=st.lists(
        st.tuples(names, st.binary(max_size=9) | st.just(bytes(1024))),
        max_size=12,
        unique_by=lambda member: member[0].lower(),
    ),
    form=st.sampled_from(["gnu", "pax"]),
    examples_per_block=st.integers(1, 4),
)
def test_examples_are_those_of_tarfile(tmp_path_factory, members, form, examples_per_block):
    path = tmp_path_factory.getbasetemp() / "examples.tar"
    path.write_bytes(tar_of(members, FORMATS[form]))
    expected = []
    with tarfile.open(path) as archive:
        named = [
            (*os.path.split(member.name), archive.extractfile(member).read())
            for member in archive
            if not (member.name.startswith("__") and member.name.endswith("__"))
        ]
    named = [each for each in named if all(each[1].partition(".")[::2])]
    for (folder, stem), group in groupby(named, lambda each: (each[0], each[1].partition(".")[0])):
        values = {name.partition(".")[2].lower(): content for _, name, content in group}
        expected.append({"__key__": os.path.join(folder, stem), **values})
    options = {"decode": False, "examples_per_block": examples_per_block, "blocks_in_memory": 2}
    if not expected:
        with pytest.raises(BatchError, match="at least one example"):
            data.TarExamples(path, **options)
        return
    assert all_of(data.TarExamples(path, **options)) == expected


@pytest.mark.parametrize("form", FORMATS)
def test_values_are_decoded_by_their_names(tmp_path, form):
    pixels = np.arange(6, dtype=np.int16).reshape(2, 3)
    content = tar_of(
        [
            ("1.jpg", b"\xff\xd8"),
            ("1.cls", b" 7\n"),
            ("1.seg.npy", npy(pixels)),
            ("2.npy", npy(np.asfortranarray(pixels))),
            ("2.txt", "\u00e9".encode()),
            ("2.json", json.dumps({"a": [1]}).encode()),
            ("3.npy", npy(np.zeros((0, 3)))),
            ("4.npy", npy(np.float32(2))),
        ],
        FORMATS[form],
    )
    first, second, third, fourth = all_of(examples_of(tmp_path, content, examples_per_block=3))
    assert (first["__key__"], first["jpg"], first["cls"]) == ("1", b"\xff\xd8", 7)
    np.testing.assert_array_equal(first["seg.npy"], pixels)
    np.testing.assert_array_equal(second["npy"], pixels)
    assert (second["txt"], second["json"]) == ("\u00e9", {"a": [1]})
    assert third["npy"].shape == (0, 3)
    assert fourth["npy"].shape == ()
    assert fourth["npy"] == 2
    (raw, *_) = all_of(examples_of(tmp_path, content, decode=False))
    assert raw["cls"] == b" 7\n"


def test_an_example_that_is_changed_stays_as_it_is_in_the_file(tmp_path):
    examples = examples_of(tmp_path, tar_of([("1.npy", npy(np.zeros(2)))]))
    changed = examples[0]
    changed.pop("npy")[:] = 1
    np.testing.assert_array_equal(examples[0]["npy"], np.zeros(2))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("1.cls", b"seven"),
        ("1.cls", b"9" * 5000),
        ("1.txt", b"\xff"),
        ("1.json", b"[" * 100_000),
        ("1.npy", npy(np.array([{}], object), allow_pickle=True)),
        ("1.npy", npy(np.zeros(3))[:-1]),
        ("1.npy", sized(np.zeros(0), b"(0,)", b"(999999999999,)").replace(b"'<f8'", b"'|S0'")),
        ("1.npy", npy(np.zeros(3)).replace(b"{", b"(")),
        ("1.npy", npy(np.zeros(3)).replace(b"(3,)", b"(-3)")),
        ("1.npy", sized(np.zeros(3), b"(3,)", b"(2000000000000000000,)")),
        ("1.npy", b"\x93NUMPY\x09\x00"),
        ("1.npy", b""),
    ],
)
def test_value_that_is_not_what_its_name_says(tmp_path, name, content):
    examples = examples_of(tmp_path, tar_of([("0.cls", b"1"), (name, content)]))
    assert examples[0]["cls"] == 1
    with pytest.raises(DataFileError, match=rf"'{name}' in .*0\.tar is not"):
        assert examples[1]


def header(**fields: bytes) -> bytes:
    """Returns a header of a file `1.cls` with other fields, and a checksum that is right."""
    places = {"size": slice(124, 136), "kind": slice(156, 157), "name": slice(0, 100)}
    found = bytearray(tar_of([("1.cls", b"1")], tarfile.USTAR_FORMAT)[:512])
    for field, value in fields.items():
        found[places[field]] = value.ljust(places[field].stop - places[field].start, b"\0")
    found[148:156] = b" " * 8
    found[148:156] = b"%06o\0 " % sum(found)
    return bytes(found)


def record(key: bytes, value: bytes) -> bytes:
    """Returns a pax header of one record."""
    body = b" " + key + b"=" + value + b"\n"
    length = len(body) + 2
    content = b"%d" % length + body
    return header(kind=b"x", size=b"%011o" % length) + content.ljust(512, b"\0")


GOOD = tar_of([("0.cls", b"1")])[:1024]
END = bytes(1024)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "without the zeros"),
        (b"text\n" * 200, "not an octal number|wrong checksum"),
        (GOOD, "ends at 1,024 bytes, without the zeros"),
        (GOOD[:800], "the member at 0|without the zeros"),
        (GOOD + header()[:400], "without the zeros"),
        (GOOD + header() + b"1", "ends at"),
        (GOOD + header()[:-1] + b"x" + bytes(512) + END, "wrong checksum"),
        (GOOD + header(size=b"\x80" + b"\xff" * 11) + END, "ends at"),
        (GOOD + header(size=b"\xff" * 12) + END, "not an octal number"),
        (GOOD + header(size=b"-0000000001") + END, "not an octal number"),
        (GOOD + header(size=b"77777777777") + END, "ends at 8,589,936,127"),
        (GOOD + record(b"size", b"-512") + header() + bytes(512) + END, "not a decimal number"),
        (GOOD + record(b"size", b"9" * 60) + header() + bytes(512) + END, "ends at"),
        (GOOD + header(kind=b"x", size=b"5") + b"9" * 512 + END, "not a decimal|damaged"),
        (GOOD + header(kind=b"x", size=b"10000000") + bytes(2**22), "a header has 2,097,152"),
        (GOOD + header(kind=b"S") + bytes(512) + END, "sparse"),
        (GOOD + record(b"GNU.sparse.major", b"1") + header() + bytes(512) + END, "sparse"),
        (GOOD + GOOD + END, "'0' has two files 'cls'"),
        (GOOD + END + GOOD + END, "ends at 1,024, but more data follow.*several files"),
        (GOOD + END[:512] + GOOD + END, "ends at 1,024, but more data follow"),
        (GOOD + bytes(5 * 2**19) + b"\n", "ends at 1,024, but more data follow"),
    ],
)
def test_hostile_archive_is_refused(tmp_path, content, said):
    with pytest.raises(DataFileError, match=said):
        examples_of(tmp_path, content)


def test_links_devices_and_folders_are_left_out(tmp_path):
    others = [header(kind=kind, name=b"2.cls", size=b"7777777") for kind in b"1 2 3 4 5 6".split()]
    content = header() + bytes(512) + b"".join(others) + header(name=b"3.cls/") + bytes(512)
    assert [
        each["__key__"] for each in all_of(examples_of(tmp_path, content + END, decode=False))
    ] == ["1"]


def test_any_number_of_zeros_may_end_an_archive(tmp_path):
    contents = [GOOD + bytes(size) for size in (512, 1000, 5 * 2**19)]
    assert [each["cls"] for each in all_of(examples_of(tmp_path, *contents))] == [1, 1, 1]


def test_many_extended_headers_are_no_recursion(tmp_path):
    content = record(b"path", b"9.cls") * 5000 + header(size=b"1") + b"7".ljust(512) + END
    assert all_of(examples_of(tmp_path, content)) == [{"__key__": "9", "cls": 7}]


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda path: data.TarExamples(path / "a.tar.gz"), DataFileError, "gunzip"),
        (lambda path: data.TarExamples(path / "a", examples_per_block=0), ConfigError, "per_block"),
        (lambda path: data.TarExamples(path / "a", examples_per_block=2.5), ConfigError, "got 2.5"),
    ],
)
def test_what_is_refused(tmp_path, make, error, said):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz"):
        pass
    with pytest.raises(error, match=said):
        make(tmp_path)


def test_changed_archive_is_noticed(tmp_path):
    first = [(f"{number}.cls", b"1") for number in range(9)]
    examples = examples_of(tmp_path, tar_of(first), examples_per_block=2)
    assert examples[0]["cls"] == 1
    (tmp_path / "0.tar").write_bytes(tar_of([(f"{number}.cls", b"") for number in range(18)]))
    with pytest.raises(DataFileError, match="has changed"):
        assert examples[5]


VALID = tar_of(
    [("a/1.cls", b"1"), ("a/1.npy", npy(np.zeros(3))), ("a/" + "2" * 120 + ".txt", b"x")]
)
scraps = st.binary(max_size=16) | st.sampled_from(
    [
        *(
            b"\0" * 512,
            b"\xff" * 12,
            b"\x80" + b"\xff" * 11,
            b"-1",
            b"99999999999\0",
            b"x",
            b"L",
            b"S",
        ),
        *(
            record(b"size", b"9" * 40),
            record(b"size", b"-1"),
            record(b"path", b"."),
            header(kind=b"g"),
        ),
        *(header(kind=b"5"), header(size=b"17777777777"), header(), GOOD, GOOD[:512]),
    ]
)


@st.composite
def archives(draw) -> bytes:
    """Cuts, and puts scraps into, an archive; half of them have wrong checksums again."""
    content = VALID
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)) | st.integers(0, 12).map(lambda k: 512 * k))
        end = min(len(content), start + draw(st.sampled_from([0, 1, 12, 512])))
        content = content[:start] + draw(scraps) + content[end:]
    if draw(st.booleans()):
        blocks = [content[start : start + 512] for start in range(0, len(content), 512)]
        content = b"".join(map(checked, blocks))
    return content


def checked(block: bytes) -> bytes:
    """Returns a block with a checksum, where it may be a header."""
    if b"ustar" not in block or len(block) < 512:
        return block
    total = sum(block[:148]) + 8 * 32 + sum(block[156:])
    return block[:148] + b"%06o\0 " % total + block[156:]


@fuzz
@given(content=archives() | st.binary(max_size=1024))
@example(content=VALID)
def test_fuzz_archives_raise_only_our_errors(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz.tar"
    path.write_bytes(content)
    try:
        examples = data.TarExamples(path, examples_per_block=1)
    except DistaffError:
        return
    for member in read_members(io.BytesIO(content), len(content)):
        assert 0 <= member.header < member.start <= member.stop <= member.end
        assert member.stop <= len(content)
    for index in range(len(examples)):
        try:
            example_ = examples[index]
        except DataFileError:
            continue
        for value in example_.values():
            assert not isinstance(value, bytes) or value in content
