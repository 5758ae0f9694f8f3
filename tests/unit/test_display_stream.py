"""A display on streams that fail, stall, or are replaced: the run goes its way."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import sys
import threading

import pytest

from distaff import data, tasks, zoo
from distaff.run.display import NullDisplay, PlainDisplay, make_display
from distaff.run.display import stream as display_stream
from distaff.run.display.stream import SteadyStream


class Plain:
    """A stream as some programs make their own: it can write, and no more."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text


class Failing(Plain):
    """A stream that fails from its n-th write on."""

    def __init__(self, error, after=0):
        super().__init__()
        self.error, self.calls, self.after = error, 0, after

    def write(self, text):
        self.calls += 1
        if self.calls > self.after:
            raise self.error
        super().write(text)


def encoded(encoding):
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding)


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """A trainer that is made while there is another standard output than in its runs."""
    root = tmp_path_factory.mktemp("runs")
    trainer = tasks.Classifier(zoo.MLP((2, 10)), name="é━", root=root, resume="never")
    trained(trainer)
    return trainer


def trained(trainer):
    train, val, _ = data.digits(batch_size=512)
    return trainer.train_model(train, val, num_epochs=1, steps_per_epoch=1)


BAD = {
    "none": lambda: None,
    "no isatty": Plain,
    "ascii": lambda: encoded("ascii"),
    "closed": closed,
    "terminal is gone": lambda: Failing(OSError(errno.EIO, "Input/output error"), 3),
    "pipe is gone": lambda: Failing(BrokenPipeError(errno.EPIPE, "Broken pipe"), 2),
    "full disk": lambda: Failing(OSError(errno.ENOSPC, "No space left on device"), 1),
    "its own error": lambda: Failing(RuntimeError("what?")),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.slow
def test_run_ends_as_ever_whatever_standard_output_is(kind, trainer, monkeypatch):
    monkeypatch.setattr(sys, "stdout", BAD[kind]())
    assert trained(trainer).status == "finished"
    trainer.predict(data.digits(batch_size=512)[1])
    trainer.print_tabulate(trainer.example_batch)


def test_run_is_shown_where_standard_output_is_when_it_begins(trainer):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        trained(trainer)
    assert out.getvalue().count("epoch") >= 1
    before = out.getvalue()
    trained(trainer)
    assert out.getvalue() == before


def test_display_of_no_stream_draws_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    display = make_display(True)
    display.start(1, 1)
    display.print("a")
    display.close()
    assert type(make_display(True, Plain())) is PlainDisplay
    assert type(make_display(False)) is NullDisplay


@pytest.mark.parametrize(
    ("encoding", "expected"), [("ascii", b"\\xe9 \\u2501\n"), ("latin-1", b"\xe9 \\u2501\n")]
)
def test_text_that_the_encoding_lacks_is_escaped(encoding, expected):
    stream = encoded(encoding)
    make_display(True, stream).print("é ━")
    assert stream.buffer.getvalue() == expected


def test_stream_that_fails_is_given_up_and_the_log_says_so_once(caplog):
    stream = Failing(OSError(errno.EIO, "Input/output error"), 2)
    display = make_display(True, stream)
    with caplog.at_level(logging.INFO):
        for line in "abcdef":
            display.print(line)
    assert (stream.text, stream.calls) == ("a\n", 3)
    assert caplog.text.count("the run continues without it") == 1


def test_full_disk_costs_only_what_it_does_not_take():
    stream = Failing(OSError(errno.ENOSPC, "No space left on device"))
    steady = SteadyStream(stream)
    steady.write("lost")
    stream.after = 10
    steady.write("kept")
    assert stream.text == "kept"


@pytest.fixture
def pipe():
    reader, writer = os.pipe()
    stream = open(writer, "w", encoding="utf-8")  # noqa: SIM115
    yield reader, stream
    with contextlib.suppress(OSError):
        stream.close()
    with contextlib.suppress(OSError):
        os.close(reader)


def read_all(reader, into):
    while block := os.read(reader, 2**16):
        into.append(block)


def test_pipe_that_nobody_reads_holds_no_run_up_and_loses_nothing_once_it_is_read(pipe):
    reader, stream = pipe
    display = make_display(True, stream)
    lines = [f"{number} {'é' * 500}" for number in range(500)]
    for line in lines:
        display.print(line)  # a plain print would wait for ever after some 64 KiB
    found: list[bytes] = []
    thread = threading.Thread(target=read_all, args=(reader, found))
    thread.start()
    display.close()
    stream.close()
    thread.join()
    assert b"".join(found).decode().splitlines() == lines


def test_pipe_that_stays_unread_loses_what_is_beyond_a_bound_and_says_so(pipe, monkeypatch):
    monkeypatch.setattr(display_stream, "_MOST_HELD", 1000)
    monkeypatch.setattr(display_stream, "_LAST_WAIT", 0.05)
    reader, stream = pipe
    display = make_display(True, stream)
    for number in range(100):
        display.print(f"{number} {'x' * 1500}")
    os.read(reader, 2**16)
    display.print("and on")
    text = os.read(reader, 2**20).decode()
    assert text.endswith("and on\n") or "lines dropped: the output was not read" in text
    display.close()


def test_pipe_without_a_reader_is_not_even_tried(pipe):
    reader, stream = pipe
    os.close(reader)
    display = make_display(True, stream)
    display.print("a")
    display.close()
    stream.close()  # raises nothing: nothing is left in its buffer
    assert stream.closed
