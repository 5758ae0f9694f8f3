"""The page from a CSV file to predictions without Distaff, done literally in new processes."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "csv-file.md"
COLUMNS = ("age", "income", "city", "plan", "calls", "autopay")
COMMAND = "import sys; from distaff.cli import main; sys.exit(main(sys.argv[1:]))"
NEW = [
    (38, "", "Bonn", "basic", 8, True),
    (23, 31149.0, "", "basic", 9, True),
    (72, 17297.29, "Bonn", "pro", 4, False),
]


def write(name: str, columns: tuple[str, ...], rows: list[tuple]) -> None:
    with Path(name).open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def customers(number: int = 500) -> list[tuple]:
    """Returns rows of which some lack an age, an income or a city; calls decide most labels."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(number):
        age, calls = int(rng.integers(18, 80)), int(rng.integers(0, 10))
        plan, autopay = str(rng.choice(["basic", "plus", "pro"])), bool(rng.random() < 0.5)
        left = calls + 2 * (plan == "basic") - 2 * (plan == "pro") - autopay + rng.normal() > 4.5
        income, city = round(float(rng.lognormal(10, 0.5)), 2), str(rng.choice(["Bonn", "Oslo"]))
        row = [age, income, city, plan, calls, autopay, "yes" if left else "no"]
        for place in range(3):
            if rng.random() < 0.05:
                row[place] = ""
        rows.append(tuple(row))
    return rows


def done(*command: str, folder: str = ".") -> str:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "COLUMNS": "100"}
    finished = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.mark.slow
@pytest.mark.peer("pandas")
def test_page_from_a_csv_file_to_predictions_without_distaff() -> None:
    text = PAGE.read_text("utf-8")
    program, predicts, exported = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    shell = re.findall(r"^distaff (.+)$", text, re.M)
    fit, report, predict, export = (each.split() for each in shell)
    write("customers.csv", (*COLUMNS, "left"), customers())
    write("new.csv", COLUMNS, NEW)
    complete = [tuple(x if x != "" else y for x, y in zip(row, NEW[2], strict=True)) for row in NEW]
    write("complete.csv", COLUMNS, complete)
    Path("train.py").write_text(program)

    for words in (fit, report, predict, export):
        done(sys.executable, "-c", COMMAND, *words)
    assert Path("report.html").stat().st_size > 10_000
    assert done(sys.executable, "-c", predicts) == "['yes' 'yes' 'no']\n"
    codes = Path("classes.csv").read_text().split()[1:]
    without = "import sys\n" + exported + "\nassert 'distaff' not in sys.modules\n"
    named = done(sys.executable, "-c", without, folder="exported")
    assert named == f"{np.array(['no', 'yes'])[[int(code) for code in codes]]}\n"
