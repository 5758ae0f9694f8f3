"""`distaff report`: one file with all facts of the runs, in which their texts are only data."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from distaff import cli
from distaff.report import facts

FACTS = re.compile(r'<script type="application/json" id="facts">(.*?)</script>', re.DOTALL)
HOSTILE = "</script><script>document.title='broken'</script><img src=x onerror=alert(1)>&amp;"


def make(
    version: str, *, seed: int = 0, text: str = "", num_steps: int = 4, **options: Any
) -> Path:
    """Writes the files of a run that a report reads."""
    path = Path("runs/digits") / version
    (path / "figures").mkdir(parents=True)
    (path / "figures" / "curves.svg").write_text(f"<svg>{text}</svg>")
    rows = [
        {"step": s, "epoch": s, "time": 0.0, "val/loss": 1 / s, "train/loss": float(s)}
        for s in range(1, num_steps + 1)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status = {"status": "finished", "reason": text, "epoch": num_steps, "step": num_steps}
    status["metrics"] = {"val/loss": 1 / num_steps}
    status["best"] = {"metrics": {"val/loss": 1 / num_steps}}
    status["throughput"] = {"steps_per_second": 12.5, "seconds": {"device": 1.5}}
    config = {"options": {"name": "digits", "seed": seed, **options}, "identity": {"x": version}}
    start = {"argv": ["/bin/distaff", "fit", "digits", text or "--seed=1"]}
    env = {"python": "3.11", "packages": {"jax": "0.10"}, "starts": [start]}
    files = {"status.json": status, "config.json": config, "env.json": env}
    for name, value in files.items():
        (path / name).write_text(json.dumps(value))
    (path / "model.txt").write_text(f"params {text}")
    (path / "log.txt").write_text(f"log {text}")
    return path


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def written(*words: str) -> tuple[str, dict[str, Any]]:
    """Returns the page that the command writes, and its data."""
    assert cli.main(("report", *words)) == 0
    text = Path("report.html").read_text("utf-8")
    (data,) = FACTS.findall(text)
    return text, json.loads(data)


def test_report_has_the_facts_of_each_run():
    make("0001")
    _, data = written("runs/digits/0001")
    (run,) = data["runs"]
    assert run["path"] == "runs/digits/0001"
    assert run["curves"]["val/loss"]["value"] == [1.0, 0.5, 0.333333, 0.25]
    axis = {"step": [1, 2, 3, 4], "epoch": [1, 2, 3, 4], "minutes": [0.0, 0.0, 0.0, 0.0]}
    assert run["axes"] == [axis]
    assert {curve["axis"] for curve in run["curves"].values()} == {0}
    assert run["metrics"] == run["best"] == {"val/loss": 0.25}
    assert run["throughput"] == {"steps per second": 12.5, "device (s)": 1.5}
    assert run["environment"] == {"python": "3.11", "jax": "0.10"}
    assert run["command"] == "/bin/distaff fit digits --seed=1"
    assert [image["name"] for image in run["images"]] == ["figures/curves.svg"]
    assert data["differs"] == []


def test_folder_stands_for_its_runs_and_what_differs_is_named(capsys):
    make("0001", seed=0)
    make("0002", seed=1)
    make("0003", seed=1, width=8)
    _, data = written("runs")
    assert [run["path"][-4:] for run in data["runs"]] == ["0001", "0002", "0003"]
    assert data["differs"] == ["seed", "width"]
    assert [run["group"] for run in data["runs"]] == [0, 0, 1]  # equal but for the seed
    assert re.fullmatch(r"report\.html: 3 runs, \S+ KiB\n", capsys.readouterr().out)


def test_page_needs_no_other_file_and_no_network():
    make("0001")
    text, _ = written("runs/digits/0001")
    assert "default-src 'none'" in text
    outside = FACTS.sub("", text)
    assert not re.search(r"<(link|iframe|object)\b|<script[^>]* src=|@import|url\(", outside)


def test_texts_of_a_run_are_never_markup():
    make("0001", text=HOSTILE)
    text, data = written("runs/digits/0001")
    assert data["runs"][0]["reason"] == HOSTILE
    assert data["runs"][0]["model"] == f"params {HOSTILE}"
    assert "onerror" not in FACTS.sub("", text)
    assert "<" not in FACTS.search(text)[1]
    assert "innerHTML" not in (Path(facts.__file__).parent / "report.js").read_text("utf-8")


def test_not_a_number_is_a_gap():
    path = make("0001")
    line = '{"step": 5, "epoch": 5, "time": 0.0, "val/loss": "nan", "train/loss": 2.0}\n'
    with (path / "metrics.jsonl").open("a") as file:
        file.write(line)
    _, data = written("runs/digits/0001")
    assert data["runs"][0]["curves"]["val/loss"]["value"][-1] is None


@pytest.mark.parametrize("row", ["garbage", "[1]", '{"step": 1}'])
def test_damaged_row_of_the_log_is_named(row, capsys):
    path = make("0001")
    log = (path / "metrics.jsonl").read_text().splitlines()
    log[2] = row
    (path / "metrics.jsonl").write_text("\n".join(log) + "\n")
    assert cli.main(("report", "runs")) == 1
    message = capsys.readouterr().err
    assert "line 3 of" in message
    assert "metrics.jsonl" in message


def test_images_beyond_the_budget_are_named():
    path = make("0001")
    (path / "figures" / "large.png").write_bytes(bytes(4000))
    _, data = written("runs/digits/0001", "--image-bytes", "2000")
    (run,) = data["runs"]
    assert [image["name"] for image in run["images"]] == ["figures/curves.svg"]
    assert run["left_out"] == ["figures/large.png"]


def test_ten_long_runs_take_less_than_a_megabyte():
    for number in range(1, 11):
        path = make(f"{number:04}", seed=number, num_steps=3000)
        (path / "log.txt").write_text("a line of the log\n" * 5000)
        (path / "model.txt").write_text("a line of the model\n" * 5000)
        (path / "texts").mkdir()
        for step in range(5):
            (path / "texts" / f"story_{step}.txt").write_text("a sample\n" * 400)
        (path / "figures" / "large.png").write_bytes(bytes(26_000))
    text, data = written("runs")
    assert 500_000 < len(text.encode()) < 1_000_000
    run = data["runs"][0]
    steps = run["axes"][run["curves"]["train/loss"]["axis"]]["step"]
    assert (steps[0], steps[-1]) == (1, 3000)
    assert 500 < len(steps) <= facts.MOST_NUMBERS // 10


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("runs/digits/0009",), "no run directory"),
        (("empty",), "at least one run"),
        ((), "at least one run"),
        (("runs", "--out", "gone/report.html"), "gone/report.html"),
    ],
)
def test_wrong_words_are_errors(words, part, capsys):
    make("0001")
    Path("empty").mkdir()
    assert cli.main(("report", *words)) in (1, 2)
    assert part in capsys.readouterr().err
    assert not Path("report.html").exists()


def test_newest_samples_are_kept_and_shown_in_order():
    path = make("0001")
    (path / "images").mkdir()
    for step in (5, 10, 100):
        (path / "images" / f"sample_{step}.png").write_bytes(bytes(900))
        (path / "images" / f"other_{step}.png").write_bytes(bytes(900))
    _, data = written("runs/digits/0001", "--image-bytes", "4900")
    (run,) = data["runs"]
    names = [image["name"].removeprefix("images/") for image in run["images"]]
    assert names == [
        "figures/curves.svg",
        "other_10.png",
        "other_100.png",
        "sample_10.png",
        "sample_100.png",
    ]
    assert run["left_out"] == ["images/other_5.png", "images/sample_5.png"]


def test_texts_of_samples_are_included():
    path = make("0001")
    (path / "texts").mkdir()
    for step in (9, 10):
        (path / "texts" / f"story_{step}.txt").write_text(f"{HOSTILE} {step}")
    _, data = written("runs/digits/0001")
    texts = [each["text"] for each in data["runs"][0]["texts"]]
    assert texts == [f"{HOSTILE} 9", f"{HOSTILE} 10"]


def test_minutes_leave_out_the_time_between_an_end_and_a_resume():
    path = make("0001")
    starts = ["2027-01-15T08:00:00+00:00", "2027-01-15T18:00:00+00:00"]
    (path / "env.json").write_text(json.dumps({"starts": [{"time": time} for time in starts]}))
    first = datetime.fromisoformat(starts[0]).timestamp()
    times = [first + 60, first + 120, first + 36_000 + 30]
    rows = [{"step": n, "epoch": 1, "time": time, "val/loss": 1.0} for n, time in enumerate(times)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, data = written("runs/digits/0001")
    assert data["runs"][0]["axes"][0]["minutes"] == [1.0, 2.0, 2.5]


def test_run_that_trains_stands_where_its_curves_end():
    path = make("0001")
    (path / "status.json").write_text('{"status": "running"}')
    _, data = written("runs/digits/0001")
    (run,) = data["runs"]
    assert (run["step"], run["epoch"]) == (4, 4)
    assert run["metrics"] == {"val/loss": 0.25, "train/loss": 4.0}


def test_commands_that_repeat_a_run():
    path = make("0001")
    env = {
        "python": "3.11.7",
        "packages": {"jax": "0.10.2", "gone": None},
        "git": {"commit": "abc", "dirty": True},
        "starts": [{"argv": ["train.py", "--name", "a b"]}],
    }
    (path / "env.json").write_text(json.dumps(env))
    _, data = written("runs/digits/0001")
    (run,) = data["runs"]
    assert run["environment"]["commit"] == "abc, with uncommitted changes"
    assert run["repeat"].splitlines() == [
        "git checkout abc",
        "# some files had uncommitted changes",
        "pip install jax==0.10.2  # Python 3.11.7",
        "python train.py --name 'a b'",
    ]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_browser_shows_tables_and_curves(tmp_path):
    make("0001", text=HOSTILE)
    make("0002", seed=1)
    written("runs")
    switches = (
        "--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run"
    )
    shown = subprocess.run(
        [
            *("chromium", *switches.split(), f"--user-data-dir={tmp_path / 'profile'}"),
            *("--virtual-time-budget=5000", "--dump-dom", Path("report.html").absolute().as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    body = shown[shown.index("<main") : shown.index("</main>")]
    assert "<title>Distaff report</title>" in shown
    assert body.count("<canvas") == 1  # one metric, "loss"
    assert body.count('type="checkbox"') == 2 + 2 + 2  # runs, log scale, bands, splits
    assert "0.25" in body
    assert html.escape(HOSTILE, quote=False) in body
