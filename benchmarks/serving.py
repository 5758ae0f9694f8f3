"""Requests per second and p99 of `distaff serve` on loopback: one by one, and in batches.

    .venv/bin/python -m benchmarks.serving [--seconds 10] [--clients 32]

A server process for each setting serves the same model, an MLP with two layers of 2048 units whose
weights take 38 MB. Clients in this process send one example each as .npz, and the next request
after the answer to the last. Rounds of the settings take turns, so that a slow second affects all;
the table has the median of the rounds. Client and server share the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from distaff import tasks, zoo

FEATURES, CLASSES = 256, 10


class Setting(NamedTuple):
    """One row of the table."""

    name: str
    max_batch_size: int
    is_alone: bool


SETTINGS = (
    Setting("one client", 32, True),
    Setting("many clients, batches of 1", 1, False),
    Setting("many clients, dynamic batches", 32, False),
)


class Figures(NamedTuple):
    """What one round measured."""

    per_second: float
    p50: float
    p99: float


def trained(root: Path) -> Path:
    """Returns the path of a run with an MLP that was trained for one epoch."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, FEATURES)).astype(np.float32)
    y = rng.integers(0, CLASSES, 64).astype(np.int32)
    model = zoo.MLP((2048, 2048, 2048, CLASSES))
    trainer = tasks.Classifier(model, root=root, batch_size=32, enable_progress_bar=False)
    return trainer.train_model({"x": x, "label": y}, num_epochs=1).path


@contextlib.contextmanager
def serving(run: Path, setting: Setting) -> Iterator[int]:
    """Starts a server, and yields its port."""
    code = "import sys; from distaff.cli import main; sys.exit(main())"
    words = ["serve", str(run), "--port", "0", "--max-batch-size", str(setting.max_batch_size)]
    with subprocess.Popen(
        [sys.executable, "-c", code, *words], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:(\d+)", process.stdout.readline())
        assert found is not None, "the server did not start"
        try:
            yield int(found[1])
        finally:
            process.terminate()


def request() -> bytes:
    """Returns a request for the outputs of one example."""
    file = io.BytesIO()
    np.savez(file, x=np.ones((1, FEATURES), np.float32))
    body = file.getvalue()
    head = (
        "POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/x-npz\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def _client(port: int, message: bytes, end: float, seconds: list[float]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while time.perf_counter() < end:
        start = time.perf_counter()
        writer.write(message)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        length = re.search(rb"content-length: (\d+)", head)
        assert length is not None
        await reader.readexactly(int(length[1]))
        seconds.append(time.perf_counter() - start)
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def _load(port: int, clients: int, seconds: float) -> Figures:
    message, times = request(), []
    start = time.perf_counter()
    await asyncio.gather(*(_client(port, message, start + seconds, times) for _ in range(clients)))
    elapsed = time.perf_counter() - start
    p50, p99 = np.percentile(times, [50, 99])
    return Figures(len(times) / elapsed, float(p50), float(p99))


def main() -> None:
    """Measures all settings, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, default=32)
    options = parser.parse_args()
    found: dict[str, list[Figures]] = {setting.name: [] for setting in SETTINGS}
    with tempfile.TemporaryDirectory() as root, contextlib.ExitStack() as stack:
        run = trained(Path(root))
        ports = {each.name: stack.enter_context(serving(run, each)) for each in SETTINGS}
        for number in range(options.rounds + 1):
            for setting in SETTINGS:
                clients = 1 if setting.is_alone else options.clients
                figures = asyncio.run(_load(ports[setting.name], clients, options.seconds))
                if number:  # the first round warms up
                    found[setting.name].append(figures)
    print(f"{options.clients} clients, {options.rounds} rounds of {options.seconds:g} s\n")
    print("| setting | requests/s | p50 | p99 |\n|---|---:|---:|---:|")
    for name, rounds in found.items():
        rate, p50, p99 = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(f"| {name} | {rate:,.0f} | {p50 * 1e3:.1f} ms | {p99 * 1e3:.1f} ms |")


if __name__ == "__main__":
    main()
