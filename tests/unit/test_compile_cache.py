"""Where compiled programs are kept. That trials share them: tests/faults/test_tune_faults.py."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from distaff.execution import compile_cache

DIRECTORY, SECONDS = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"


def chosen() -> tuple[str | None, float]:
    return getattr(jax.config, DIRECTORY), getattr(jax.config, SECONDS)


@pytest.fixture(autouse=True)
def nothing_chosen(tmp_path, monkeypatch) -> Iterator[None]:
    """Has no directory chosen, as a user's program starts."""
    before = chosen()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    jax.config.update(DIRECTORY, None)
    jax.config.update(SECONDS, 1.0)
    yield
    jax.config.update(DIRECTORY, before[0])
    jax.config.update(SECONDS, before[1])


def test_cache_is_below_home_and_for_its_owner_alone_from_the_first(tmp_path, monkeypatch):
    expected = tmp_path / "home" / ".cache" / "distaff" / "jax"
    modes, chmod = [], Path.chmod

    def watched(path: Path, mode: int) -> None:
        modes.append(path.stat().st_mode & 0o777)
        chmod(path, mode)

    monkeypatch.setattr(Path, "chmod", watched)
    assert compile_cache.enable() == expected
    assert [*modes, expected.stat().st_mode & 0o777] == [0o700, 0o700]
    assert chosen() == (str(expected), 0.0)
    assert compile_cache.enable() == expected


def test_cache_follows_xdg_cache_home_where_that_is_absolute(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert compile_cache.enable() == tmp_path / "home" / ".cache" / "distaff" / "jax"
    jax.config.update(DIRECTORY, None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert compile_cache.enable() == tmp_path / "xdg" / "distaff" / "jax"


@pytest.mark.parametrize("mask", [0o000, 0o022])
def test_cache_that_others_could_use_is_closed_to_them(tmp_path, mask):
    directory = tmp_path / "home" / ".cache" / "distaff" / "jax"
    before = os.umask(mask)
    try:
        directory.mkdir(parents=True)
        assert compile_cache.enable() == directory
    finally:
        os.umask(before)
    assert directory.stat().st_mode & 0o777 == 0o700


def test_choice_of_the_user_is_kept(tmp_path):
    jax.config.update(DIRECTORY, str(tmp_path / "own"))
    assert compile_cache.enable() == tmp_path / "own"
    assert chosen() == (str(tmp_path / "own"), 1.0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("way", ["file", "directory of another", "read-only"])
def test_cache_that_cannot_be_written_is_none(tmp_path, monkeypatch, way):
    home = tmp_path / "home"
    if way == "file":
        home.write_text("in the way")
    else:

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError

        monkeypatch.setattr(Path, "chmod" if way == "directory of another" else "mkdir", refuse)
    assert compile_cache.enable() is None
    assert chosen() == (None, 1.0)


def test_user_without_a_home_has_no_cache(monkeypatch):
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert compile_cache.enable() is None
    assert chosen() == (None, 1.0)
