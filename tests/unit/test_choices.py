"""The file of choices: whole or absent, for its owner, bounded, forgotten, and never an error."""

from __future__ import annotations

import json
import os
import threading
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from distaff import MeshConfig
from distaff.execution.compile import measured_choices
from distaff.execution.compile.measured_choices import Entry, program_key
from distaff.mesh.placement import OnMesh

DAY = 24 * 3600.0


def jaxpr(factor: float = 2.0, size: int = 3, dtype: Any = jnp.float32) -> Any:
    return jax.make_jaxpr(lambda x: factor * x)(jnp.ones(size, dtype))


def test_entry_is_read_by_its_key_and_for_thirty_days(tmp_path):
    file, now = tmp_path / "new" / "forms.json", [0.0]
    now[0] = 100 * DAY
    one, other = (Entry(file, key, clock=lambda: now[0]) for key in ("one", "other"))
    assert one.read() is None
    one.write({"a": 1})
    now[0] += 20 * DAY
    other.write([2])
    assert (one.read(), other.read()) == ({"a": 1}, [2])
    now[0] += 10.1 * DAY
    assert (one.read(), other.read()) == (None, [2])
    now[0] -= 90 * DAY  # what comes from the future is of a clock that was wrong
    assert other.read() is None


def test_entry_without_a_file_keeps_nothing(tmp_path):
    Entry(None, "key").write(1)
    assert Entry(None, "key").read() is None
    assert list(tmp_path.iterdir()) == []


def test_file_is_for_its_owner_and_keeps_the_newest(tmp_path, monkeypatch):
    monkeypatch.setattr(measured_choices, "_MAX_ENTRIES", 3)
    file = tmp_path / "forms.json"
    before = os.umask(0)
    try:
        for number in range(5):
            Entry(file, str(number), clock=lambda number=number: 1e9 + number).write(number)
    finally:
        os.umask(before)
    assert file.stat().st_mode & 0o777 == 0o600
    assert list(json.loads(file.read_text())) == ["2", "3", "4"]
    assert [path.name for path in tmp_path.iterdir()] == ["forms.json"]


HOSTILE = {
    "empty": b"",
    "cut off": b'{"key": {"saved": 1, "val',
    "not UTF-8": b"\xff\xfe\x00",
    "a list": b"[1, 2]",
    "deep": b"[" * 100_000,
    "large numbers": b'{"key": {"saved": 1' + b"0" * 5000 + b', "value": 1}}',
    "no entry": b'{"key": 7}',
    "no time": b'{"key": {"value": 1}}',
    "a text for a time": b'{"key": {"saved": "now", "value": 1}}',
    "not a number": b'{"key": {"saved": NaN, "value": 1}}',
    "endless": b'{"key": {"saved": 1, "value": "' + b"x" * 2**20 + b'"}}',
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=list(HOSTILE))
def test_file_that_nobody_wrote_here_is_ignored_and_replaced(tmp_path, content):
    file = tmp_path / "forms.json"
    file.write_bytes(content)
    entry = Entry(file, "key", clock=lambda: 2.0)
    assert entry.read() is None
    entry.write(3)
    assert entry.read() == 3


@pytest.mark.parametrize("kind", ["directory", "link", "pipe", "file in the way"])
def test_what_is_no_file_is_ignored(tmp_path, kind):
    file = tmp_path / "distaff" / "forms.json"
    if kind == "file in the way":
        file.parent.write_text("")
    else:
        file.parent.mkdir()
    if kind == "directory":
        file.mkdir()
    elif kind == "link":
        elsewhere = tmp_path / "elsewhere"
        Entry(elsewhere, "key").write(1)
        assert Entry(elsewhere, "key").read() == 1
        file.symlink_to(elsewhere)
    elif kind == "pipe":
        os.mkfifo(file)
    entry = Entry(file, "key")
    assert entry.read() is None
    entry.write(2)
    assert entry.read() == (2 if kind in ("link", "pipe") else None)


def test_file_of_another_user_is_ignored(tmp_path, monkeypatch):
    entry = Entry(tmp_path / "forms.json", "key")
    entry.write(1)
    assert entry.read() == 1
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert entry.read() is None


def test_writers_at_once_leave_a_whole_file(tmp_path):
    file = tmp_path / "forms.json"
    wrong = []

    def write(writer: int) -> None:
        for number in range(20):
            Entry(file, f"{writer}-{number}").write("x" * 1000)
            try:
                json.loads(file.read_bytes())
            except ValueError as error:
                wrong.append(error)

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(json.loads(file.read_bytes())) >= 20
    assert [path.name for path in tmp_path.iterdir()] == ["forms.json"]


def test_program_key_is_that_of_the_program_the_machine_and_the_software(monkeypatch):
    key = program_key(jaxpr(), 4)
    assert key == program_key(jaxpr(), 4)
    others = [jaxpr(3.0), jaxpr(size=4), jaxpr(dtype=jnp.bfloat16)]
    keys = [key, program_key(jaxpr(), 5), *(program_key(other, 4) for other in others)]
    for name in ("distaff", "jax", "jaxlib"):
        with monkeypatch.context() as patched:
            patched.setattr(
                measured_choices.importlib.metadata,
                "version",
                lambda asked, n=name: f"{asked == n}",
            )
            keys.append(program_key(jaxpr(), 4))
    with monkeypatch.context() as patched:
        patched.setattr(os, "cpu_count", lambda: 1000)
        keys.append(program_key(jaxpr(), 4))
        patched.setenv("XLA_FLAGS", "--one")
        keys.append(program_key(jaxpr(), 4))
        patched.setattr(jax, "process_count", lambda: 2)
        keys.append(program_key(jaxpr(), 4))
    assert len(set(keys)) == len(keys)


def test_program_key_is_that_of_the_mesh():
    meshes = MeshConfig(1, fsdp=4), MeshConfig(1, fsdp=2), MeshConfig(4)
    steps = [OnMesh(mesh).keeping(lambda x: 2 * x) for mesh in meshes]
    assert len({program_key(jax.make_jaxpr(step)(jnp.zeros(8))) for step in steps}) == 3


def test_program_key_does_not_hold_addresses():
    one, other = "pjit[f=<function f at 0x7f00aa>]", "pjit[f=<function f at 0x7f11bb>]"
    assert program_key(one) == program_key(other)
    assert program_key(one) != program_key(one.replace("pjit", "scan"))
