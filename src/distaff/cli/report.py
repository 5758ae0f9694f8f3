"""The command `distaff report`: one HTML page about one or several runs."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import tyro

from distaff.core.files import explained, write_whole
from distaff.core.paths import shown
from distaff.core.views.amounts import byte_text
from distaff.errors import ConfigError, DistaffError, RunDirectoryError
from distaff.report import IMAGE_BYTES
from distaff.report.summary import find_runs, is_run


def report(
    runs: tyro.conf.Positional[tuple[Path, ...]],
    out: Path | None = None,
    image_bytes: int = IMAGE_BYTES,
    serve: bool = False,
    port: int | None = None,
) -> int:
    """Writes a report of runs: what differs, learning curves, tables, figures, environments.

    Args:
        runs: paths of runs, such as runs/digits/0001, or of folders with runs, such as runs/digits.
        out: the HTML file to write; by default report.html. It needs no network and no other file.
        image_bytes: the most bytes of figures and images to include.
        serve: show the report in the browser of this machine instead, and follow runs that train.
        port: the port for --serve; by default a free one.
    """
    if not runs or not (serve or _paths(runs)):
        raise ConfigError("Name at least one run, such as runs/digits/0001, or a folder with runs.")
    if serve:
        if out is not None:
            raise ConfigError(f"--serve writes no file; got --out {out}. Leave out one of them.")
        return _serve(runs, image_bytes, port or 0)
    if port is not None:
        raise ConfigError(f"--port {port} is the port of --serve. Add --serve.")
    return _write(_paths(runs), out or Path("report.html"), image_bytes)


def _paths(given: Sequence[Path]) -> list[Path]:
    """Returns the directories of the runs at these paths, and below folders."""
    paths: list[Path] = []
    for path in given:
        is_one = is_run(path) or not path.is_dir()
        paths += [path] if is_one else [run.path for run in find_runs(path) if not run.archived]
    return list(dict.fromkeys(path.absolute() for path in paths))


def _write(paths: Sequence[Path], out: Path, image_bytes: int) -> int:
    from distaff.report.facts import gather  # needs JAX, which the help does not load
    from distaff.report.page import page

    text = page(gather(paths, image_bytes))
    with explained(out, rule="A report must be a file that can be {}", other="--out"):
        write_whole(out.absolute(), text)
    print(f"{shown(out.absolute())}: {_count(paths)}, {byte_text(len(text.encode()))}")
    return 0


def _serve(given: Sequence[Path], image_bytes: int, port: int) -> int:
    from distaff.report.server import HOST, LivePage, make_server

    for path in given:
        if not path.is_dir():
            raise RunDirectoryError(f"There is no run directory at {str(path)!r}. Check the path.")
    paths = [path.absolute() for path in given]
    with make_server(LivePage(lambda: _present(paths), image_bytes), port) as server:
        print(f"http://{HOST}:{server.server_port}/: {_count(_paths(paths))}", flush=True)
        print("It follows runs that train. Press Ctrl-C to stop serving.", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    return 0


def _present(paths: Sequence[Path]) -> list[Path]:
    """Returns the runs at these paths, of which some may be removed at this moment."""
    found: list[Path] = []
    for path in paths:
        try:
            found += _paths([path])
        except (DistaffError, OSError):
            found.append(path)
    return found


def _count(paths: Sequence[Path]) -> str:
    return f"{len(paths)} {'run' if len(paths) == 1 else 'runs'}"


def main(words: Sequence[str]) -> int:
    """Runs `distaff report` with these arguments; returns the exit status.

    Raises:
        DistaffError: there is no such run, or the file cannot be written.
    """
    return tyro.cli(report, prog="distaff report", args=list(words))
