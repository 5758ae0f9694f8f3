"""The command line: what is typed, what is printed, what is left behind."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

import distaff.cli
from distaff.cli.recipes import RECIPES, find

ROOT = Path(__file__).parents[2]
QUICK = (
    *("fit", "digits", "--num-epochs", "2", "--optimizer.learning-rate", "1e-3"),
    *("--features", "4", "4"),
)
RESULT = re.compile(r"test/accuracy=(0\.\d{4}) test/loss=(\d+\.\d{4}) run=(\S+)")


class Printed(NamedTuple):
    status: int | str | None
    out: str
    err: str


def typed(capsys: pytest.CaptureFixture[str], *words: str) -> Printed:
    try:
        status = distaff.cli.main(words)
    except SystemExit as end:
        status = end.code
    return Printed(status, *capsys.readouterr())


@pytest.mark.parametrize("words", [(), ("-h",), ("--help",)])
def test_usage_lists_the_commands(words, capsys):
    printed = typed(capsys, *words)
    assert (printed.status, printed.err) == (0, "")
    assert printed.out.startswith("usage: distaff COMMAND [OPTIONS]\n")
    for command in distaff.cli.COMMANDS:
        assert re.search(rf"^  {command}\b", printed.out, re.MULTILINE)


def test_help_and_lists_of_runs_start_without_jax():
    typed = [
        *("--help", "--version", "fit", "runs", "runs list --help", "runs list --root ."),
        *(
            "new --help",
            "watch --help",
            "report --help",
            "eval --help",
            "predict --help",
            "export --help",
        ),
        *("serve --help", "watch --help", "launch --help", "tune", "tune digits --help"),
    ]
    code = f"""
import contextlib, sys
from distaff.cli import main
for words in {typed}:
    with contextlib.suppress(SystemExit):
        assert main(words.split()) == 0, words
print({{"jax", "numpy", "flax", "optax", "distaff.cli.runs"}} & set(sys.modules))
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout.splitlines()[-1] == "{'distaff.cli.runs'}"


def test_recipes_are_listed_with_what_they_need(capsys):
    assert find("digits").__doc__.splitlines()[0] == RECIPES["digits"].summary
    printed = typed(capsys, "fit", "--list")
    assert printed.status == 0
    assert len(printed.out.splitlines()) == len(RECIPES)
    assert re.search(r'^  gan +pip install "distaff"$', printed.out, re.MULTILINE)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name, recipe in list(RECIPES.items())[1:]:
        assert set(recipe.extras) <= set(extras["optional-dependencies"]), name
        assert recipe.place == f"{name.replace('-', '_')}.py"
        assert "\ndef main(" in (ROOT / "examples" / recipe.place).read_text(), name


def test_examples_are_in_the_wheel_where_recipes_are_looked_for():
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert wheel["targets"]["wheel"]["sources"]["examples"] == "distaff/cli/examples"
    assert "examples" in wheel["targets"]["wheel"]["only-include"]


def test_recipe_by_name_is_the_example_and_names_a_missing_extra(capsys, monkeypatch):
    recipe = find("text-classification")
    assert Path(inspect.getfile(recipe)) == ROOT / "examples" / "text_classification.py"
    for name in {each for each in sys.modules if each.startswith("matplotlib.")} | {"matplotlib"}:
        monkeypatch.setitem(sys.modules, name, None)
    printed = typed(capsys, "fit", "sine-regression")
    assert printed.status == 2
    assert 'pip install "distaff[plots]"' in printed.err


@pytest.mark.parametrize("words", [("fit",), ("fit", "-h"), ("fit", "--help")])
def test_usage_of_fit_lists_the_recipes(words, capsys):
    printed = typed(capsys, *words)
    assert (printed.status, printed.err) == (0, "")
    assert printed.out.startswith("usage: distaff fit RECIPE [OPTIONS]\n")
    assert re.search(r"^  digits +Trains a small CNN on ", printed.out, re.MULTILINE)


def test_help_of_a_recipe_lists_its_options(capsys):
    printed = typed(capsys, "fit", "digits", "--help")
    assert (printed.status, printed.err) == (0, "")
    for option in ("--num-epochs", "--optimizer.learning-rate", "--features", "--root"):
        assert option in printed.out


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("fti", "digits"), ("no command 'fti'", "Did you mean 'fit'?")),
        (("fit", "digit"), ("no recipe 'digit'", "Did you mean 'digits'?")),
        (("fit", "digits", "--num-epochs", "many"), ("num-epochs", "many")),
        (("fit", "digits", "--num-epoch", "3"), ("--num-epoch", "--num-epochs")),
        (("fit", "digits", "--optimizer.name", "adamv"), ("'adamv'", "Did you mean 'adam")),
        (("fit", "digits", "--optimizer.schedule", "cosin"), ("cosin", "cosine")),
        (("fit", "digits", "--num-epochs", "0"), ("num_epochs", "at least 1", "0")),
        (("fit", "digits", "--batch-size", "0"), ("batch_size", "at least 1", "0")),
        (("fit", "digits", "--batch-size", "5000"), ("batch_size is 5000", "lower batch_size")),
        (("fit", "digits", "--features"), ("features",)),
        (("fit", "digits", "--optimizer.warmup-steps", "9999"), ("warmup_steps is 9999",)),
    ],
)
def test_wrong_words_end_with_status_2_and_no_traceback(words, parts, capsys, tmp_path):
    printed = typed(capsys, *words)
    assert printed.status == 2
    for part in parts:
        assert part in printed.err
    assert "Traceback" not in printed.err + printed.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_fit_digits_leaves_a_whole_run_and_ends_with_its_result(capsys):
    printed = typed(capsys, *QUICK)
    assert (printed.status, printed.err) == (0, "")
    assert re.fullmatch(r"[\x20-\x7e\n\u2500-\u257f\u00d7\u2605]*", printed.out)
    *lines, last = printed.out.splitlines()
    accuracy, loss, path = RESULT.fullmatch(last).groups()
    assert path == "runs/digits/0001"
    written = json.loads((Path(path) / "metrics" / "test.json").read_text())
    assert float(accuracy) == round(written["test/accuracy"], 4) > 0.2
    assert float(loss) == round(written["test/loss"], 4)
    assert len([line for line in lines if re.match(r"epoch +\d+/2\b", line)]) == 2
    config = json.loads((Path(path) / "config.json").read_text())
    assert config["optimizer"]["learning_rate"] == 1e-3
    assert config["model"]["features"] == [4, 4]
    figures = {figure.name for figure in Path(path, "figures").iterdir()}
    assert figures == {"learning_curves.png", "confusion_matrix.png", "worst_mistakes.png"}
    for figure in figures:
        assert Path(path, "figures", figure).read_bytes().startswith(b"\x89PNG")
        assert f"  {path}/figures/{figure}" in lines


@pytest.mark.slow
def test_console_script_makes_runs_side_by_side(capsys):
    words = [*QUICK, "--no-figures", "--no-progress-bar"]
    first = typed(capsys, *words)
    assert RESULT.fullmatch(first.out.rstrip("\n"))[3] == "runs/digits/0001"
    before = Path("runs/digits/0001/status.json").read_bytes()
    finished = subprocess.run(
        [Path(sys.executable).with_name("distaff"), *words],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert (finished.returncode, finished.stderr) == (0, "")
    assert RESULT.fullmatch(finished.stdout.rstrip("\n"))[3] == "runs/digits/0002"
    assert not Path("runs/digits/0002/figures").exists()
    assert Path("runs/digits/0001/status.json").read_bytes() == before
