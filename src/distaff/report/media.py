"""The figures, images and texts of a run, for a report."""

from __future__ import annotations

import base64
import itertools
from pathlib import Path, PurePath

from distaff.run.directory.curves import CURVES

_MEDIA = {".svg": "image/svg+xml", ".png": "image/png"}
_CURVES = PurePath(CURVES).stem  # the report draws them itself


def pictures(path: Path, budget: int) -> tuple[list[dict[str, str]], list[str]]:
    """Returns figures and images as data URLs, and the names of those beyond the budget."""
    kept, left_out = {}, []
    for file in _newest_first(path, "figures", "images"):
        name, kind = file.relative_to(path).as_posix(), _MEDIA.get(file.suffix)
        if kind is None or file.stem == _CURVES:
            continue
        content = file.read_bytes()
        size = len(content) * 4 // 3
        if size > budget:
            left_out.append(name)
            continue
        budget -= size
        kept[name] = f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
    return [{"name": name, "url": kept[name]} for name in sorted(kept, key=_in_order)], left_out


def logged_texts(path: Path, budget: int) -> tuple[list[dict[str, str]], list[str]]:
    """Returns logged texts, and the names of those beyond the budget."""
    kept, left_out = {}, []
    for file in _newest_first(path, "texts"):
        name, text = file.relative_to(path).as_posix(), file.read_text("utf-8", errors="replace")
        if len(text) > budget:
            left_out.append(name)
            continue
        budget -= len(text)
        kept[name] = text
    return [{"name": name, "text": kept[name]} for name in sorted(kept, key=_in_order)], left_out


def _newest_first(path: Path, *folders: str) -> list[Path]:
    """Returns the files of folders: the last step of each name, then the one before, and so on."""
    files = [each for folder in folders for each in (path / folder).rglob("*") if each.is_file()]
    by_name: dict[str, list[Path]] = {}
    for file in sorted(files, key=lambda file: _in_order(file.as_posix()), reverse=True):
        by_name.setdefault(_in_order(file.as_posix())[0], []).append(file)
    rounds = itertools.zip_longest(*(by_name[name] for name in sorted(by_name)))
    return [file for files in rounds for file in files if file is not None]


def _in_order(name: str) -> tuple[str, int]:
    """Returns the name and the step of a file such as `images/val/sample_1200.png`."""
    stem, _, step = name.rpartition(".")[0].rpartition("_")
    return (stem, int(step)) if step.isdecimal() and len(step) < 20 else (name, 0)
