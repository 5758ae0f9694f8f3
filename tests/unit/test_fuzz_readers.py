"""What is read back of a run may be anything: only Distaff's errors come out, and nothing is lost.

`DISTAFF_FUZZ_EXAMPLES=10000` makes the long form of each test.
"""

from __future__ import annotations

import contextlib
import json
import os

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from distaff.checkpoint.record import example_from, read_record
from distaff.errors import DistaffError
from distaff.loggers import CsvLogger, JsonlLogger
from distaff.run.directory.run_directory import RunDirectory

fuzz = settings(
    deadline=None,
    max_examples=int(os.environ.get("DISTAFF_FUZZ_EXAMPLES", "200")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

RECORD = {
    "distaff": "0.1.0",
    "model": {"$class": "models:CNN", "width": 8},
    "options": {"seed": 0, "learning_rate": 1e-3, "clip": {"$float": "inf"}},
    "example_batch": {"x": {"$array": {"shape": [4, 3], "dtype": "float32"}}},
}
STATUS = {"status": "running", "started": "2026-01-01T00:00:00+00:00", "ended": None, "starts": 2}
LINES = [{"step": step, "epoch": 1, "time": 0.5, "train/loss": 1 / step} for step in (1, 3, 2, 4)]
TABLE = b'step,epoch,time,loss,"a,b"\n1,1,0.5,0.25,\n3,1,0.5,,"[1.0, ""nan""]"\n2,1,0.5,nan,\n'

numbers = st.integers() | st.floats() | st.sampled_from([10**400, -(2**63), 1e308, 5e-324])
words = st.text(max_size=6) | st.sampled_from(
    [
        "$array",
        "$float",
        "$class",
        "shape",
        "dtype",
        "model",
        "status",
        "step",
        "nan",
        "\0",
        "\ud800",
    ]
)
values = st.recursive(
    st.none() | st.booleans() | numbers | words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
    max_leaves=8,
)
scraps = st.binary(max_size=8) | st.sampled_from(
    [
        *(b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"[" * 100_000, b'{"a":' * 100_000),
        *(
            b'"step": 1, ',
            b"\n",
            b"\r",
            b"\0",
            b"\xff\xfe",
            b"\xef\xbb\xbf",
            b'"\\ud800"',
            b"{}",
            b'"',
        ),
    ]
)


@st.composite
def mutated(draw, valid: bytes) -> bytes:
    """Cuts, and inserts scraps into, a file as Distaff writes it."""
    data = valid
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 12)))
        data = data[:start] + draw(scraps) + data[end:]
    return data


def dumped(value: object) -> bytes:
    return json.dumps(value).encode()


def members_changed(value: dict) -> st.SearchStrategy[bytes]:
    """Gives a file whose form is right, and whose members have other types."""
    changed = {name: st.just(member) | values for name, member in value.items()}
    return st.fixed_dictionaries({}, optional=changed).map(dumped)


def repeated(value: dict) -> bytes:
    """Writes each name twice, with other content first."""
    members = [f"{json.dumps(name)}: {json.dumps(member)}" for name, member in value.items()]
    return ("{" + ", ".join([f"{json.dumps(name)}: []" for name in value] + members) + "}").encode()


def file_like(value: dict) -> st.SearchStrategy[bytes]:
    valid = dumped(value)
    return (
        st.binary(max_size=64)
        | mutated(valid)
        | members_changed(value)
        | values.map(dumped)
        | scraps
        | st.just(repeated(value))
    )


def contents(directory) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in os.listdir(directory)}


@fuzz
@given(content=file_like(RECORD))
@example(
    content=dumped({**RECORD, "example_batch": {"$array": {"shape": [1, 10**30], "dtype": "int8"}}})
)
def test_read_record_raises_only_our_errors(tmp_path_factory, content):
    directory = tmp_path_factory.getbasetemp() / "record"
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_bytes(content)
    with contextlib.suppress(DistaffError):
        example_from(read_record(directory / "config.json")["example_batch"])
    assert contents(directory) == {"config.json": content}


@fuzz
@given(content=file_like(STATUS))
def test_status_of_any_content_is_read_and_replaced(tmp_path_factory, content):
    root = tmp_path_factory.getbasetemp() / "status"
    directory = root / "run" / "0001"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "status.json").write_bytes(content)
    run = RunDirectory(root)
    found = run.unfinished()
    opened = RunDirectory.open(directory)
    try:
        status = opened.read_json("status.json")
    except DistaffError:
        status = None
    is_known = isinstance(status, dict)
    unfinished = is_known and status.get("status") in ("running", "interrupted", "failed")
    assert found == ([directory] if unfinished else [])
    assert contents(directory) == {"status.json": content}
    opened.set_status("running")
    assert opened.read_json("status.json")["starts"] >= 1
    assert run.unfinished() == [directory]


def kept_of(content: bytes, step: int) -> bytes:
    """Returns what a resume by step keeps, told in another way: whole lines that json reads."""
    lines = content.split(b"\n")[:-1]
    return b"".join(line + b"\n" for line in lines if json.loads(line)["step"] <= step)


lines = b"".join(dumped(line) + b"\n" for line in LINES)
positions = st.none() | st.integers(-1, len(lines) + 9) | values


@fuzz
@given(
    content=mutated(lines)
    | st.binary(max_size=64)
    | st.lists(members_changed(LINES[0]), max_size=4).map(b"\n".join)
    | st.just(repeated(LINES[0]) + b"\n"),
    step=st.integers(-1, 5),
    position=positions,
)
def test_jsonl_logger_resumes_a_file_of_any_content(tmp_path_factory, content, step, position):
    directory = tmp_path_factory.getbasetemp() / "jsonl"
    directory.mkdir(exist_ok=True)
    path = directory / "metrics.jsonl"
    path.write_bytes(content)
    logger = JsonlLogger(path)
    before = logger.position()
    assert before == content.rfind(b"\n") + 1
    assert contents(directory) == {"metrics.jsonl": content}
    try:
        logger.resume(step, position)
    except DistaffError:
        assert contents(directory) == {"metrics.jsonl": content}
        return
    after = path.read_bytes()
    assert os.listdir(directory) == ["metrics.jsonl"]
    is_place = type(position) is int and 0 <= position <= len(content)
    if is_place and (position == 0 or content[:position].endswith(b"\n")):
        assert after == content[:position]
    else:
        assert after == kept_of(content, step)


@fuzz
@given(
    content=mutated(TABLE) | st.binary(max_size=64),
    step=st.integers(-1, 5),
    position=positions,
)
def test_csv_logger_resumes_a_file_of_any_content(tmp_path_factory, content, step, position):
    directory = tmp_path_factory.getbasetemp() / "csv"
    directory.mkdir(exist_ok=True)
    path = directory / "metrics.csv"
    path.write_bytes(content)
    logger = CsvLogger(path)
    try:
        logger.position()
        logger.resume(step, position)
    except DistaffError:
        assert contents(directory) == {"metrics.csv": content}
        return
    assert os.listdir(directory) == ["metrics.csv"]
    resumed = path.read_bytes()
    rows = logger.position()
    logger.resume(step, rows)
    assert path.read_bytes() == resumed
    logger.log_metrics({"loss": 0.5}, step=9, epoch=1)
    assert logger.position() == rows + 1
