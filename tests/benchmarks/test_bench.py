"""The benchmarks measure what they say: no speed is asserted here."""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from distaff.data import as_loader

ROOT = Path(__file__).parents[2]
SYSTEMS = ("distaff K=1", "distaff", "hand loop", "hand scan", "hand unrolled")


@pytest.fixture(scope="module")
def benchmarks() -> Any:
    """Returns the package, which lies beside the sources and is not installed."""
    sys.path.insert(0, str(ROOT))
    import benchmarks.chart
    import benchmarks.run
    import benchmarks.table

    yield benchmarks
    sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def results(benchmarks: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("bench") / "results.json"
    args = ["--only", "W1", "--rounds", "1", "--scale", "0.01", "--systems", ";".join(SYSTEMS)]
    assert benchmarks.run.main([*args, "--output", str(file)]) == file
    return json.loads(file.read_text())


@pytest.mark.slow
def test_results_file_is_complete(results: dict[str, Any]) -> None:
    assert results["machine"]["device"].startswith("cpu")
    assert {"cpu", "cores", "memory_gb", "load_before", "load_after"} <= set(results["machine"])
    assert {"distaff", "jax", "python"} <= set(results["versions"]["core"])
    assert results["settings"]["rounds"] == 1
    assert "output" not in results["settings"]  # a path of this machine; the file is shared
    measured = results["workloads"]["W1"]
    assert measured["skipped"] == {}
    assert tuple(measured["systems"]) == SYSTEMS
    for entry in measured["systems"].values():
        assert len(entry["seconds"]) == 1
        assert len(entry["losses"]) == len(entry["warmup_seconds"]) + 1
        assert entry["peak_mb"] > 0


@pytest.mark.slow
def test_ratios_are_those_of_rounds_side_by_side(results: dict[str, Any], benchmarks: Any) -> None:
    measured = results["workloads"]["W1"]
    reference = measured["systems"]["hand loop"]["seconds"]
    best = measured["systems"][measured["best_by_hand"]]["seconds"]
    assert measured["best_by_hand"].startswith("hand")
    for entry in measured["systems"].values():
        assert entry["ratio"] == pytest.approx(entry["seconds"][0] / reference[0])
        assert entry["ratio_to_best"] == pytest.approx(entry["seconds"][0] / best[0])
        assert entry["ms_per_step"] == pytest.approx(
            1e3 * statistics.median(entry["seconds"]) / measured["steps"]
        )
    # The median of the ratios, which is not the ratio of the medians.
    assert benchmarks.report.ratio([1.0, 6.0, 9.0], [1.0, 2.0, 9.0]) == 1.0


@pytest.mark.slow
def test_hand_written_forms_and_distaff_reach_the_same_loss(results: dict[str, Any]) -> None:
    measured = results["workloads"]["W1"]
    losses = {name: entry["losses"][:3] for name, entry in measured["systems"].items()}
    for name in SYSTEMS:
        assert losses[name] == pytest.approx(losses["hand loop"], rel=1e-4), name
    assert losses["hand loop"][2] < losses["hand loop"][0]
    assert max(measured["loss_differences"].values()) < 1e-4


@pytest.mark.slow
def test_tables_and_chart_are_made_from_the_results(
    results: dict[str, Any], benchmarks: Any, tmp_path: Path
) -> None:
    page = (ROOT / "docs" / "speed.md").read_text()
    placed = benchmarks.table.place(page, benchmarks.report.markdown(results))
    assert benchmarks.table.place(placed, "") == benchmarks.table.place(page, "")
    for name in SYSTEMS:
        assert f"| {name} |" in placed
    benchmarks.chart.draw(results, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes()[1:4] == b"PNG"


def test_coordinator_skips_a_system_without_its_environment(
    benchmarks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmarks.rounds, "PEERS", tmp_path / "none")
    workload = benchmarks.workloads.WORKLOADS["W1"].scaled(0.01)
    measured = benchmarks.rounds.measure(workload, ["PyTorch"], 1, tmp_path)
    assert measured["systems"] == {}
    assert "make bench-peers" in measured["skipped"]["PyTorch"]


@pytest.mark.slow
def test_loaders_are_measured_beside_rows_by_hand(
    benchmarks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = benchmarks.systems.SECTIONS["loaders"]
    kinds = ("NumPy rows by hand", "distaff, rows of an ArrayLoader", "distaff, generator function")
    workload = dataclasses.replace(benchmarks.workloads.ALL["loaders"], steps=20)
    measured = benchmarks.rounds.measure(workload, kinds, 2, tmp_path)
    assert measured["skipped"] == {}
    hand, rows, stream = (measured["systems"][kind] for kind in kinds)
    assert hand["losses"] == rows["losses"]  # the same rows in the same order
    assert set(stream["losses"]) == {hand["losses"][0]}  # the order of the first epoch
    benchmarks.report.summarise(measured, workload.steps, section.reference)
    results = {"workloads": {}, "others": {}, "sections": {"loaders": measured}}
    ((title, columns, table),) = benchmarks.report.tables(results)
    assert (title, columns[1]) == (section.title, "examples/s")
    assert [row[0] for row in table] == list(kinds)
    speed = 64 * 1e3 / hand["ms_per_step"]
    assert float(table[0][1].replace(",", "")) == pytest.approx(speed, rel=0.01)
    assert table[0][3] == "1.00"


def test_loaders_all_read_the_same_rows(benchmarks: Any, tmp_path: Path) -> None:
    from benchmarks.systems import loaders

    def rows(batch: Any) -> list[tuple[float, int]]:
        return list(zip(batch["x"].sum(axis=1).tolist(), batch["label"].tolist(), strict=True))

    workload = dataclasses.replace(benchmarks.workloads.ALL["loaders"], steps=10)
    held, systems = loaders.arrays(workload), benchmarks.systems.SECTIONS["loaders"].systems
    kinds = {system.options["kind"] for system in systems.values() if system.options}
    for kind in kinds - {"torch", "hugging_face"}:
        batches = list(as_loader(getattr(loaders, kind)(held, workload, tmp_path)))
        assert [len(batch["label"]) for batch in batches] == [64] * 10, kind
        assert sorted(chain.from_iterable(map(rows, batches))) == sorted(rows(held)), kind


@pytest.mark.slow
def test_options_take_turns_and_train_the_same() -> None:
    command = [sys.executable, "-m", "benchmarks.options", "--blocks", "2", "--steps", "64"]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    rows = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 6
    assert len({row.count("|") for row in rows}) == 1
    losses = [float(each) for each in re.findall(r" (\d+\.\d{6})", printed.rpartition("losses")[2])]
    assert len(losses) == 6
    assert max(losses) == pytest.approx(min(losses), rel=1e-3)


@pytest.mark.slow
def test_systems_of_many_seeds_train_the_same(benchmarks: Any) -> None:
    import benchmarks.many

    found = benchmarks.many.measure(["population", "distaff", "by_hand_once"], 2, 3, 1, "seeds")
    together, alone, by_hand = (found[name]["accuracies"] for name in found)
    assert together == pytest.approx(alone)
    assert statistics.mean(by_hand) == pytest.approx(statistics.mean(alone), abs=0.08)
    assert benchmarks.many.table(found).splitlines()[2].startswith("| population |")
