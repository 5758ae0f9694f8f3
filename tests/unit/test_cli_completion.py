"""Completion: what Tab offers, in Python and in a real bash."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from distaff import cli

RECIPE = """
raise SystemExit("read, not run")

def main(num_epochs: int, *, width: int = 3) -> None:
    ...

class Recipe:
    depth: int = 2

def _hidden() -> None:
    ...
"""


def offered(line: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert cli.main(("--complete", line)) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out.splitlines()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("distaff re", ["report"]),
        ("distaff --v", ["--version"]),
        ("distaff --completion z", ["zsh"]),
        ("distaff runs t", ["tag"]),
        ("distaff runs list --sta", ["--status"]),
        ("distaff  runs list --sort val/loss --no-a", ["--no-archived", "--no-as-json"]),
        ("distaff runs rm 'my runs/a' --y", ["--yes"]),
        ("distaff predict runs/a data.npz --arg", ["--argmax"]),
        ("distaff fit d", ["digits", "diabetes-folds", "digits-resnet"]),
        ("distaff fit --r", ["--resume"]),
        ("distaff fit digits --optimizer.learning", ["--optimizer.learning-rate"]),
        ("distaff fit train.py:", ["train.py:main", "train.py:Recipe"]),
        ("distaff fit train.py:main --", ["--num-epochs", "--width", "--help"]),
        ("distaff fit train.py:Recipe --d", ["--depth"]),
        ("distaff fit gone.py:main --", []),
        ("distaff fit gone.py:", []),
        ("distaff runs show ru", []),
        ("distaff 'ope", []),
        ("distaff gone --", []),
        ("distaff env -", ["--help"]),
    ],
)
def test_last_word_is_completed(line, expected, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    Path("train.py").write_text(RECIPE)
    assert offered(line, capsys) == expected


def test_first_word_is_any_command(capsys):
    assert offered("distaff ", capsys) == [*cli.COMMANDS]


def test_unknown_shell_is_an_error(capsys):
    assert cli.main(("--completion", "bsh")) == 2
    assert "Did you mean 'bash'?" in capsys.readouterr().err
    assert cli.main(("--completion",)) == 2


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_commands_options_and_words_with_colons():
    Path("train.py").write_text(RECIPE)
    program = Path(sys.executable).with_name("distaff")
    code = f"""
eval "$({program} --completion bash)"
complete -p distaff
ask() {{ COMP_LINE="$1"; COMP_POINT=${{#1}}; _distaff {program}; echo "${{COMPREPLY[*]}}"; }}
ask "distaff exp"
ask "distaff runs list --sor"
ask "distaff fit train.py:m"
ask "distaff fit tra"
"""
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "complete -o default -F _distaff distaff",
        "export",
        "--sort",
        "main",
        "",
    ]
