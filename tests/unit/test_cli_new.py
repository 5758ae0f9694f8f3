"""`distaff new`: a project that works at once, or no trace of it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from distaff import cli
from distaff.cli.new import FILES

BIN = Path(sys.executable).parent


def run(*words: str | Path) -> str:
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(words, cwd="spirals", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_project_has_all_files_in_good_form(capsys):
    assert cli.main(("new", "spirals")) == 0
    assert "cd spirals && make train" in capsys.readouterr().out
    assert {path.name for path in Path("spirals").iterdir()} == set(FILES)
    project = tomllib.loads(Path("spirals/pyproject.toml").read_text())["project"]
    assert project["name"] == "spirals"
    assert 'name="spirals"' in Path("spirals/recipe.py").read_text()
    assert "NAME" not in Path("spirals/README.md").read_text()
    run(BIN / "ruff", "check", "--no-cache")
    run(BIN / "ruff", "format", "--check", "--no-cache")


@pytest.mark.slow
def test_project_trains_and_its_tests_pass():
    cli.main(("new", "spirals"))
    assert "2 passed" in run("make", "test", f"PYTHON={sys.executable}")
    run("make", "train", "ARGS=--num-epochs 1 --width 8")
    listed = run("distaff", "runs", "list")
    assert "runs/spirals/0001  finished" in listed


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("my project", ("'my project'", "Try 'my-project'")),
        ("../élan!", ("'élan!'", "Try 'lan'")),
        ("-", ("got '-'", "Try 'my-project'")),
        ("", ("got ''",)),
        ("/", ("got ''",)),
        ("a" * 101, ("at most 100",)),
        ("gone/spirals", ("no folder 'gone'",)),
        ("taken", ("'taken' exists",)),
        ("JAX", ("package that it needs", "Try 'my-jax'")),
        ("link", ("'link' exists",)),
    ],
)
def test_wrong_names_are_errors_and_change_nothing(name, parts, capsys):
    Path("taken").mkdir()
    Path("link").symlink_to("nowhere")
    assert cli.main(("new", "--", name)) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in parts)
    assert sorted(os.listdir()) == ["link", "taken"]


def test_second_project_of_a_name_leaves_the_first_alone():
    cli.main(("new", "spirals"))
    Path("spirals/recipe.py").write_text("mine")
    assert cli.main(("new", "spirals")) == 2
    assert Path("spirals/recipe.py").read_text() == "mine"


@pytest.mark.parametrize(
    ("error", "status"), [(OSError(errno.ENOSPC, "No space left"), 1), (KeyboardInterrupt(), 130)]
)
def test_failure_leaves_no_half_of_a_project(error, status, monkeypatch, capsys):
    write_text = Path.write_text

    def fail(path, *args, **options):
        if path.name == "README.md":
            raise error
        return write_text(path, *args, **options)

    monkeypatch.setattr(Path, "write_text", fail)
    assert cli.main(("new", "spirals")) == status
    assert capsys.readouterr().err.startswith("distaff: ")
    assert os.listdir() == []
