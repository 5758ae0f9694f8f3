"""A soak: one run that trains for long, is asked to end again and again, and must not grow.

    python tests/faults/soak.py --minutes 30

Each start, a leg, is a process of its own, which SIGTERM ends. All parts work at once: batches are
read ahead by a thread, four steps are a program, validation, checkpoints, loggers, early stopping.
At the end it prints what memory, threads, open files and the logs came to, and exits with 1 if one
of them is over its limit.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

STEPS_PER_EPOCH, LOG_EVERY, VALIDATE_EVERY, KEEP_LAST = 1234, 50, 4, 2
RUN = Path("soak", "0001")
LEG_MINUTES, WARM_UP_SECONDS = 5.0, 60.0

MAX_KB_PER_1000_STEPS, MAX_GROWTH = 200.0, 0.05
"""Of the resident memory after the warm-up: what each step may keep, and all steps of a leg.

Each save keeps some 20 to 90 KB, which the JSON of TensorStore 0.1.86 loses: 4 to 18 KB here.
"""

MAX_GROWTH_OF_LEGS = 0.1
"""From the second leg to the last: a start reads the CSV table whole, and keeps some of that."""

MAX_BLOCKS_PER_STEP = 0.2
"""Objects of Python that stay: one in each program would be 0.25. Those saves make it 0.08."""

MAX_MORE = 1.0
"""Files and threads: by how much the median of a leg's second half may be over the first's."""

MIN_AHEAD = 0.9


class Sample(NamedTuple):
    """What a process held at the end of an epoch.

    Attributes:
        step: completed updates.
        seconds: since its training began.
        resident: bytes of memory.
        blocks: of Python's allocator.
        files: open descriptors.
        threads: of the process.
        folders: in `checkpoints`, those that are being written and removed included.
        ahead: the share of batches that a thread got.
    """

    step: int
    seconds: float
    resident: int
    blocks: int
    files: int
    threads: int
    folders: int
    ahead: float


class Check(NamedTuple):
    """A row of the table at the end."""

    what: str
    found: str
    limit: str
    is_good: bool


def train(root: Path) -> None:
    """Trains until it is asked to end, and appends a sample after each epoch."""
    from distaff import Callback, EarlyStopping, Monitor, loggers, tasks, zoo

    class Drawn:
        """A slow loader with a position: batch `i` of epoch `e` is drawn from the seed `(e, i)`."""

        def __init__(self) -> None:
            self.position, self.is_resumed, self.num_read, self.num_ahead = (0, 0), False, 0, 0

        def __len__(self) -> int:
            return STEPS_PER_EPOCH

        def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
            epoch, batch = self.position
            if not self.is_resumed and batch:
                epoch, batch = epoch + 1, 0
            self.is_resumed = False
            while batch < STEPS_PER_EPOCH:
                time.sleep(1e-3)
                batch += 1
                self.position = epoch, batch
                self.num_read += 1
                self.num_ahead += threading.current_thread().name == "read ahead"
                yield examples(32, [epoch, batch])
            self.position = epoch + 1, 0

        def get_state(self) -> dict[str, int]:
            return {"epoch": self.position[0], "batch": self.position[1]}

        def set_state(self, state: Mapping[str, int]) -> None:
            self.position, self.is_resumed = (state["epoch"], state["batch"]), True

    class Sampling(Callback):
        def on_training_start(self, info: Any) -> None:
            self.start = time.monotonic()

        def on_epoch_end(self, info: Any) -> None:
            sample = Sample(
                info.step,
                time.monotonic() - self.start,
                int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
                sys.getallocatedblocks(),
                len(os.listdir("/proc/self/fd")),
                len(os.listdir("/proc/self/task")),
                len([*(root / RUN / "checkpoints").glob("*")]),
                loader.num_ahead / loader.num_read,
            )
            with (root / "samples.jsonl").open("a") as file:
                file.write(json.dumps([os.getpid(), *sample]) + "\n")

    loader = Drawn()
    trainer = tasks.Regressor(
        zoo.MLP((32, 1), dropout=0.1),
        loggers=[loggers.CsvLogger(root / "metrics.csv")],
        callbacks=[EarlyStopping(Monitor("val/loss"), patience=10**9), Sampling()],
        name="soak",
        root=str(root),
        steps_per_call=4,
        log_every_n_steps=LOG_EVERY,
        check_val_every_n_epoch=VALIDATE_EVERY,
        keep_last=KEEP_LAST,
        enable_progress_bar=False,
    )
    validation = [examples(32, [number]) for number in range(10)]  # a Stream, verified each time
    trainer.train_model(loader, validation, num_epochs=10**6)


def examples(size: int, seed: Sequence[int]) -> dict[str, np.ndarray]:
    """Returns noisy points of a plane, `x` `[size, 16]`."""
    x = np.random.default_rng(seed).normal(size=(size, 16)).astype(np.float32)
    return {"x": x, "y": x.sum(axis=1, keepdims=True)}


def main() -> int:
    """Runs the legs, prints two tables, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    minutes = float(os.environ.get("DISTAFF_SOAK_MINUTES", "30"))
    parser.add_argument("--minutes", type=float, default=minutes, help="at least 1")
    minutes = max(1.0, parser.parse_args().minutes)
    num_legs = max(2, round(minutes / LEG_MINUTES))
    seconds = 60 * minutes / num_legs
    print(f"{num_legs} legs of {seconds:.0f} s", flush=True)
    with tempfile.TemporaryDirectory(prefix="distaff-soak-") as folder:
        root = Path(folder)
        codes = [one_leg(root, seconds) for _ in range(num_legs)]
        legs = samples(root, warm_up=min(WARM_UP_SECONDS, seconds / 3))
        checks = [*of_endings(codes, root), *of_memory(legs), *of_handles(legs), *of_files(root)]
    print(
        "\nafter the warm-up  steps            resident MB       blocks             files  threads"
    )
    for number, (first, *_, last) in enumerate(legs, 1):
        print(
            f"leg {number:<13} {first.step:>8}-{last.step:<8} "
            f"{first.resident / 2**20:7.1f}-{last.resident / 2**20:<7.1f}  "
            f"{first.blocks:>8}-{last.blocks:<8}  {first.files:>2}-{last.files:<2}  "
            f"{first.threads:>2}-{last.threads:<2}"
        )
    print()
    for check in checks:
        verdict = "ok" if check.is_good else "FAILED"
        print(f"{check.what:<46} {check.found:>22}   {check.limit:<22} {verdict}")
    return 0 if all(check.is_good for check in checks) else 1


def one_leg(root: Path, seconds: float) -> int:
    """Starts the run, asks it to end after a time, and returns its exit code."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(root / "cache")}
    command = [sys.executable, __file__, "--leg", str(root)]
    with subprocess.Popen(command, env=environment) as process:
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
        return process.wait(timeout=120)


def samples(root: Path, warm_up: float) -> list[list[Sample]]:
    """Returns the samples of each leg that were taken after its warm-up."""
    legs: dict[int, list[Sample]] = {}
    for line in (root / "samples.jsonl").read_text().splitlines():
        process, *values = json.loads(line)
        legs.setdefault(process, []).append(Sample(*values))
    return [[each for each in leg if each.seconds >= warm_up] for leg in legs.values()]


def of_endings(codes: Sequence[int], root: Path) -> Iterator[Check]:
    """Checks that each leg was ended by SIGTERM, and the next one went on with its run."""
    found = json.loads((root / RUN / "status.json").read_text())
    ends = found["status"], found["starts"]
    yield Check("exit codes", str(sorted(set(codes))), "[-15]", set(codes) == {-signal.SIGTERM})
    yield Check("status and starts", str(ends), "", ends == ("interrupted", len(codes)))


def of_memory(legs: Sequence[Sequence[Sample]]) -> Iterator[Check]:
    """Checks that memory stays flat, by straight lines of one slope through the legs."""
    kilobytes = 1000 / 1024 * slope(legs, "resident")
    is_good = kilobytes <= MAX_KB_PER_1000_STEPS
    limit = f"<= {MAX_KB_PER_1000_STEPS:g} KB"
    yield Check("resident memory, per 1,000 steps", f"{kilobytes:.1f} KB", limit, is_good)
    growth = max(
        slope([leg], "resident") * (leg[-1].step - leg[0].step) / leg[0].resident for leg in legs
    )
    limit, is_good = f"<= {MAX_GROWTH:.0%}", growth <= MAX_GROWTH
    yield Check("resident memory, in the leg that grew most", f"{growth:.2%}", limit, is_good)
    if len(legs) > 2:  # the first one compiles what the others find on disk
        second, last = (np.median([each.resident for each in leg]) for leg in (legs[1], legs[-1]))
        growth = float(last / second - 1)
        limit, is_good = f"<= {MAX_GROWTH_OF_LEGS:.0%}", growth <= MAX_GROWTH_OF_LEGS
        yield Check("resident memory, second leg to last", f"{growth:.2%}", limit, is_good)
    blocks = slope(legs, "blocks")
    is_good = blocks <= MAX_BLOCKS_PER_STEP
    limit = f"<= {MAX_BLOCKS_PER_STEP:g}"
    yield Check("blocks of Python's allocator, per step", f"{blocks:.4f}", limit, is_good)


def of_handles(legs: Sequence[Sequence[Sample]]) -> Iterator[Check]:
    """Checks that files and threads stay as many as they are, and folders few."""
    for name in ("files", "threads"):
        more = max(increase([getattr(each, name) for each in leg]) for leg in legs)
        yield Check(
            f"{name}, second half of a leg", f"{more:+g}", f"<= {MAX_MORE:+g}", more <= MAX_MORE
        )
    # With the best, that of the last interruption, one that is written, and one that is removed.
    most, limit = max(each.folders for leg in legs for each in leg), KEEP_LAST + 4
    is_good = most <= limit
    yield Check("folders in checkpoints, while it trains", str(most), f"<= {limit}", is_good)
    least = min(leg[-1].ahead for leg in legs)
    limit, is_good = f">= {MIN_AHEAD:.0%}", least >= MIN_AHEAD
    yield Check("batches got ahead by the thread", f"{least:.1%}", limit, is_good)


def of_files(root: Path) -> Iterator[Check]:
    """Checks that the logs have each line once, and that no checkpoint was left behind."""
    step = json.loads((root / RUN / "status.json").read_text())["step"]
    text = (root / RUN / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    windows = [line["step"] for line in lines if "step/loss" in line]
    is_good = windows == windows_until(step)
    yield Check("lines of steps, to step", f"{len(windows)}, {step}", "each once", is_good)
    epochs = [line["step"] for line in lines if "train/loss" in line]
    # A run that ends in a validation has trained an epoch that it has not logged.
    whole = [epochs == [*range(STEPS_PER_EPOCH, step + ended, STEPS_PER_EPOCH)] for ended in (0, 1)]
    yield Check("lines of epochs", str(len(epochs)), "each once", any(whole))
    table = (root / "metrics.csv").read_text().splitlines()[1:]
    is_good = [int(row.split(",")[0]) for row in table] == [line["step"] for line in lines]
    yield Check("rows of the CSV table", str(len(table)), "as the lines", is_good)
    names = sorted(path.name for path in (root / RUN / "checkpoints").iterdir())
    # With the best, and that of the last interruption.
    is_good = len(names) <= KEEP_LAST + 2 and all(name[5:].isdigit() for name in names)
    yield Check("checkpoints in the end", str(len(names)), f"<= {KEEP_LAST + 2}", is_good)


def windows_until(step: int) -> list[int]:
    """Returns the steps at which a window ends: every `LOG_EVERY`, and with each epoch."""
    every = {*range(LOG_EVERY, step + 1, LOG_EVERY)}
    return sorted(every | {*range(STEPS_PER_EPOCH, step + 1, STEPS_PER_EPOCH)})


def slope(legs: Sequence[Sequence[Sample]], name: str) -> float:
    """Returns the slope by step of parallel lines, one through each leg, by least squares."""
    centred = [np.array([(each.step, getattr(each, name)) for each in leg], float) for leg in legs]
    steps, values = np.concatenate([points - points.mean(axis=0) for points in centred]).T
    return float((steps * values).sum() / np.square(steps).sum())


def increase(values: Sequence[float]) -> float:
    """Returns the difference of the medians of the second and the first half."""
    middle = len(values) // 2
    return float(np.median(values[middle:]) - np.median(values[:middle]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--leg"]:
        train(Path(sys.argv[2]))
    else:
        sys.exit(main())
