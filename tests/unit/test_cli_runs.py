"""`distaff runs`: what it prints of runs, and what it removes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from distaff import cli
from distaff.run.directory.run_lock import locked


def make(version: str, loss: float | None, *, name: str = "digits", **facts: Any) -> Path:
    """Writes the files of a run that the command reads."""
    path = Path("runs") / name / version
    (path / "checkpoints" / "step_00000010").mkdir(parents=True)
    (path / "checkpoints" / "step_00000010" / "arrays").write_bytes(bytes(5000))
    metrics = {} if loss is None else {"val/loss": loss, "train/loss": 2 * loss}
    status = {
        "status": "finished",
        "reason": "",
        "epoch": 3,
        "step": 1200,
        "started": f"2026-01-0{int(version)}T10:00:00+00:00",
        "ended": f"2026-01-0{int(version)}T11:02:03+00:00",
        "metrics": metrics,
        "best": {"step": 10, "metrics": {"val/loss": loss}} if metrics else None,
    }
    config = {
        "model": {"$class": "a:Net", "features": [4]},
        "options": {"name": name, "seed": int(version)},
        "identity": {"step": f"changes {version}"},
    }
    start = {"argv": ["/bin/distaff", "fit", "digits", "--seed", version]}
    for file, value in {
        "status.json": {**status, **facts},
        "config.json": config,
        "env.json": {"starts": [start]},
    }.items():
        (path / file).write_text(json.dumps(value))
    return path


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> list[list[str]]:
    assert cli.main(("runs", *words)) == 0
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def failed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(("runs", *words)) in (1, 2)
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_list_has_a_row_per_run_in_the_order_of_their_start(capsys):
    make("0002", 0.25)
    make("0001", 0.5)
    make("0003", None, name="other/deep", status="failed")
    head, *rows, count = printed(capsys, "list")
    assert head == ["run", "status", "epoch", "step", "started", "time", "val/loss"]
    assert [row[0] for row in rows] == [
        "runs/digits/0001",
        "runs/digits/0002",
        "runs/other/deep/0003",
    ]
    assert rows[0][1:4] == ["finished", "3", "1,200"]
    assert rows[0][-2:] == ["1:02:03", "0.5"]
    assert rows[2][1] == "failed"
    assert rows[2][-1] == "-"
    assert count == ["3", "runs", "in", "runs"]


def test_list_sorts_and_filters(capsys):
    for version, loss in (("0001", 0.5), ("0002", 0.25), ("0003", None), ("0004", 0.75)):
        make(version, loss)
    make("0005", 0.1, name="other", status="failed")
    _, *rows, _ = printed(capsys, "list", "--name", "dig*", "--sort", "val/loss")
    assert [row[0][-4:] for row in rows] == ["0002", "0001", "0004", "0003"]
    _, *rows, _ = printed(capsys, "list", "--name", "dig*", "--sort", "val/loss", "--reverse")
    assert [row[0][-4:] for row in rows] == ["0004", "0001", "0002", "0003"]
    head, *rows, _ = printed(capsys, "list", "--status", "failed", "--metrics", "train/loss")
    assert [row[0] for row in rows] == ["runs/other/0005"]
    assert head[-1] == "train/loss"
    assert rows[0][-1] == "0.2"


def test_list_as_json_has_an_object_per_run(capsys):
    path = make("0001", 0.5)
    assert cli.main(("runs", "list", "--as-json")) == 0
    (line,) = capsys.readouterr().out.splitlines()
    facts = json.loads(line)
    assert Path(facts["path"]) == path.absolute()
    assert facts["metrics"]["val/loss"] == 0.5


def test_list_shows_runs_with_damaged_files(capsys):
    path = make("0001", 0.5)
    (path / "status.json").write_text("{")
    (path / "env.json").unlink()
    _, row, _ = printed(capsys, "list")
    assert row[:2] == ["runs/digits/0001", "unknown"]


@pytest.mark.parametrize("text", ["3", "[1]", "{", '{"starts": [3], "options": 3, "best": 4}'])
def test_no_damaged_file_stops_a_command(text, capsys):
    whole, damaged = make("0001", 0.5), make("0002", 0.5)
    for name in ("status.json", "config.json", "env.json"):
        (damaged / name).write_text(text)
    assert [row[0] for row in printed(capsys, "list")[1:3]] == [str(damaged), str(whole)]
    for words in (("show", str(damaged)), ("diff", str(whole), str(damaged)), ("du",)):
        assert printed(capsys, *words)
    assert cli.main(("report", "runs")) == 0


def test_values_of_other_types_are_left_out(capsys):
    path = make("0001", 0.5, epoch="x", step=[1], started=5)
    status = (path / "status.json").read_text().replace("0.5", "1e999")
    (path / "status.json").write_text(status)
    _, row, _ = printed(capsys, "list")
    assert row[:4] == ["runs/digits/0001", "finished", "0", "0"]
    assert cli.main(("report", "runs")) == 0


def test_show_has_status_command_metrics_and_options(capsys):
    make("0001", 0.5, status="failed", reason="the disk is full")
    lines = [" ".join(line) for line in printed(capsys, "show", "runs/digits/0001")]
    assert "status failed (the disk is full)" in lines
    assert "command /bin/distaff fit digits --seed 0001" in lines
    assert {"val/loss 0.5 0.5", "train/loss 1 -", "model.features [4]", "seed 1"} <= set(lines)
    assert not any("identity" in line for line in lines)


def test_diff_shows_options_and_metrics_that_differ(capsys):
    make("0001", 0.5)
    make("0002", 0.25)
    lines = printed(capsys, "diff", "runs/digits/0001", "runs/digits/0002")
    assert lines == [
        ["option", "runs/digits/0001", "runs/digits/0002"],
        ["seed", "1", "2"],
        [],
        ["metric", "runs/digits/0001", "runs/digits/0002"],
        ["val/loss", "0.5", "0.25"],
        ["train/loss", "1", "0.5"],
    ]


def test_du_adds_up_the_sizes(capsys):
    make("0001", 0.5)
    whole = sum(file.stat().st_size for file in Path("runs").rglob("*") if file.is_file())
    _, row, every = printed(capsys, "du")
    assert row == ["runs/digits/0001", f"{whole / 1024:.3g}", "KiB", "4.88", "KiB"]
    assert every == ["all", f"{whole / 1024:.3g}", "KiB", "4.88", "KiB"]


def test_rm_removes_after_yes_only(capsys, monkeypatch):
    path, other = make("0001", 0.5), make("0002", 0.5)
    answers = iter(["n", "", "y"])
    monkeypatch.setattr("builtins.input", lambda _: next(answers))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    for _ in range(2):
        assert printed(capsys, "rm", str(path))[-1] == ["Nothing", "was", "removed."]
    assert path.is_dir()
    assert printed(capsys, "rm", str(path))[-1] == ["removed", "runs/digits/0001"]
    assert not path.exists()
    assert other.is_dir()
    printed(capsys, "rm", str(other), "--yes")
    assert not other.exists()


def test_rm_keeps_a_run_that_is_in_use_and_asks_at_a_terminal_only(capsys):
    path = make("0001", 0.5)
    assert cli.main(("runs", "rm", str(path))) == 2
    assert "--yes" in capsys.readouterr().err
    with locked(path):
        assert cli.main(("runs", "rm", str(path), "--yes")) == 1
    assert "in use" in capsys.readouterr().err
    assert path.is_dir()


def test_rm_removes_nothing_if_one_path_is_no_run(capsys):
    path = make("0001", 0.5)
    Path("other").mkdir()
    assert "no config.json" in failed(capsys, "rm", str(path), "other", "--yes")
    assert path.is_dir()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("lst",), ("no command 'runs lst'", "Did you mean 'list'?")),
        (("list", "--root", "gone"), ("no folder 'gone'", "--root")),
        (("list", "--sort", "val/los"), ("no run has the metric 'val/los'", "'val/loss'")),
        (("show", "runs/digits/0009"), ("no run directory", "0009")),
        (("show", "runs"), ("no run at 'runs'", "config.json")),
        (("rm",), ("at least one run",)),
    ],
)
def test_wrong_words_are_errors(words, parts, capsys):
    make("0001", 0.5)
    message = failed(capsys, *words)
    assert all(part.lower() in message.lower() for part in parts)


def test_config_repeats_the_command_of_a_run(capsys, monkeypatch):
    path = make("0001", 0.5)
    seen = []

    def recipe(seed: str) -> None:
        seen.append(seed)

    monkeypatch.setattr("distaff.cli.fit.find", {"digits": recipe}.get)
    assert cli.main(("fit", "--config", str(path))) == 0
    assert cli.main(("fit", f"--config={path}", "--seed", "7")) == 0
    assert seen == ["0001", "7"]


def test_config_of_a_run_of_another_program_names_that_program(capsys):
    path = make("0001", 0.5)
    (path / "env.json").write_text(json.dumps({"starts": [{"argv": ["train.py", "--seed", "1"]}]}))
    assert cli.main(("fit", "--config", str(path))) == 2
    assert '["train.py", "--seed", "1"]' in capsys.readouterr().err
    shutil.rmtree(path)
    assert cli.main(("fit", "--config", str(path))) == 1
    assert cli.main(("fit", "--config")) == 2


def test_tags_are_listed_found_and_removed(capsys):
    path, other = make("0001", 0.5), make("0002", 0.25)
    assert printed(capsys, "tag", str(path), "best", "paper") == [[f"{path}:", "best", "paper"]]
    printed(capsys, "tag", str(path), "paper", "best")
    printed(capsys, "tag", str(other), "paper")
    head, *rows, _ = printed(capsys, "list", "--tag", "best", "paper")
    assert head[6] == "tags"
    assert [row[0] for row in rows] == [str(path)]
    assert ["tags", "best", "paper"] in printed(capsys, "show", str(path))
    assert "no tag 'bets'. Did you mean 'best'?" in failed(
        capsys, "tag", str(path), "paper", "bets", "--remove"
    )
    assert printed(capsys, "tag", str(path), "best", "--remove") == [[f"{path}:", "paper"]]
    assert "'best'" in failed(capsys, "list", "--tag", "best")
    assert cli.main(("runs", "list", "--as-json")) == 0
    assert [json.loads(line)["tags"] for line in capsys.readouterr().out.splitlines()] == [
        ["paper"],
        ["paper"],
    ]


def test_archived_runs_are_left_out_and_stay_where_they_are(capsys):
    path, other = make("0001", 0.5), make("0002", 0.25)
    killed = make("0003", 0.5, status="running")
    printed(capsys, "tag", str(path), "old")
    for each in (path, killed):
        assert printed(capsys, "archive", str(each)) == [[f"{each}:", "archived"]]
    _, row, count = printed(capsys, "list")
    assert (row[0], " ".join(count)) == (str(other), "1 run in runs; 2 archived (--archived)")
    _, *rows, _ = printed(capsys, "list", "--archived", "--tag", "old")
    assert [row[0] for row in rows] == [str(path)]
    assert ["archived", "yes"] in printed(capsys, "show", str(path))
    assert cli.main(("report", "runs")) == 0
    assert "1 run," in capsys.readouterr().out
    assert len(printed(capsys, "du")) == 5
    assert printed(capsys, "archive", str(path), "--restore") == [[f"{path}:", "restored"]]
    assert len(printed(capsys, "list")) == 4


def test_archived_run_that_trains_again_is_listed(capsys):
    path = make("0001", 0.5, status="running")
    printed(capsys, "archive", str(path))
    with locked(path):
        assert len(printed(capsys, "list")) == 3
    assert len(printed(capsys, "list")) == 2


def test_run_in_use_is_neither_tagged_nor_archived(capsys):
    path = make("0001", 0.5)
    with locked(path):
        for words in (("tag", str(path), "best"), ("archive", str(path))):
            assert "in use" in failed(capsys, *words)
    assert not (path / "tags.json").exists()


@pytest.mark.parametrize("tag", ["two words", "a,b", "", "x" * 51, "a\tb", "a\nb", "a\x00b"])
def test_tag_is_one_word(tag, capsys):
    path = make("0001", 0.5)
    assert repr(tag) in failed(capsys, "tag", str(path), "good", tag)
    assert not (path / "tags.json").exists()


def test_damaged_tags_are_not_overwritten(capsys):
    path = make("0001", 0.5)
    for text in ("{", "[1]"):
        (path / "tags.json").write_text(text)
        assert len(printed(capsys, "list")) == 3
        assert "tags.json" in failed(capsys, "tag", str(path), "best")
        assert (path / "tags.json").read_text() == text


def test_list_that_is_too_wide_has_a_paragraph_per_run(capsys, monkeypatch):
    path = make("0001", 0.5)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    for columns, lines in (("40", 5), ("200", 3)):
        monkeypatch.setenv("COLUMNS", columns)
        shown = printed(capsys, "list")
        assert len(shown) == lines
    monkeypatch.setenv("COLUMNS", "40")
    assert cli.main(("runs", "list")) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{path}\n  status finished  epoch 3")
    assert max(map(len, out.splitlines())) <= 40


def test_output_that_cannot_be_written_is_an_error_and_closed_output_none(capsys, monkeypatch):
    make("0001", 0.5)
    monkeypatch.setattr("sys.stdout", None)
    assert cli.main(("runs", "list")) == 0

    def full(_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("distaff.cli.runs.Listing.run", full)
    assert cli.main(("runs", "list")) == 1
    assert "No space left on device" in capsys.readouterr().err
