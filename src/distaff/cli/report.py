"""The command `distaff report`: one HTML file about one or several runs, to open from disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tyro

from distaff.core.files import explained, write_whole
from distaff.core.paths import shown
from distaff.core.views.amounts import byte_text
from distaff.errors import ConfigError
from distaff.report import IMAGE_BYTES
from distaff.report.summary import find_runs


def report(
    runs: tyro.conf.Positional[tuple[Path, ...]],
    out: Path = Path("report.html"),
    image_bytes: int = IMAGE_BYTES,
) -> int:
    """Writes a report of runs: what differs, learning curves, tables, figures, environments.

    Args:
        runs: paths of runs, such as runs/digits/0001, or of folders with runs, such as runs/digits.
        out: the HTML file to write. It needs no network and no other file.
        image_bytes: the most bytes of figures and images to include.
    """
    from distaff.report.facts import gather  # needs JAX, which the help does not load
    from distaff.report.page import page

    paths: list[Path] = []
    for path in runs:
        is_run = (path / "config.json").is_file() or not path.is_dir()
        paths += [path] if is_run else [run.path for run in find_runs(path) if not run.archived]
    paths = list(dict.fromkeys(path.absolute() for path in paths))
    if not paths:
        raise ConfigError("Name at least one run, such as runs/digits/0001, or a folder with runs.")
    text = page(gather(paths, image_bytes))
    with explained(out, rule="A report must be a file that can be {}", other="--out"):
        write_whole(out.absolute(), text)
    count = f"{len(paths)} {'run' if len(paths) == 1 else 'runs'}"
    print(f"{shown(out.absolute())}: {count}, {byte_text(len(text.encode()))}")
    return 0


def main(words: Sequence[str]) -> int:
    """Runs `distaff report` with these arguments; returns the exit status.

    Raises:
        DistaffError: there is no such run, or the file cannot be written.
    """
    return tyro.cli(report, prog="distaff report", args=list(words))
