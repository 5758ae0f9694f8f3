"""Builds the documentation into .site, with Zensical.

    .venv-docs/bin/python site/build.py

Files that pages link to are copied. Zensical keeps, and cleans, a folder `.cache` beside
`mkdocs.yml`, so it works in a temporary folder.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SITE = ROOT / ".site"
OUTSIDE = re.compile(r'href="((?:\.\./)+)((?:examples|benchmarks)/[\w./-]+\.(?:py|json))"')
"""A link of a page to a file beside `docs`. On the site, that file is at the top, as plain text."""


def render(folder: Path) -> str:
    """Renders the pages into `folder/.site`; returns what Zensical prints.

    Raises:
        SystemExit: a page or a name of the reference was not found.
    """
    records = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    nav = "".join(f"          - decisions/{record.name}\n" for record in records)
    config = (ROOT / "site" / "mkdocs.yml").read_text("utf-8")
    (folder / "mkdocs.yml").write_text(config + nav, "utf-8")
    shutil.copyfile(ROOT / "site" / "doctests.py", folder / "doctests.py")
    shutil.copytree(ROOT / "docs", folder / "docs")
    shutil.copyfile(ROOT / "site" / "site.css", folder / "docs" / "site.css")
    (folder / "src").symlink_to(ROOT / "src")
    zensical = Path(sys.executable).with_name("zensical")
    done = subprocess.run([zensical, "build"], cwd=folder, capture_output=True, text=True)
    printed = done.stdout + done.stderr
    if done.returncode or "Warning" in printed or "griffe:" in printed:
        raise SystemExit(printed)
    return printed


def copy_linked(site: Path) -> None:
    """Copies the files of the repository that pages link to, and corrects the links."""
    for page in site.rglob("*.html"):
        text = page.read_text("utf-8")
        for _, name in OUTSIDE.findall(text):
            copy = site / f"{name}.txt"
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy)
        up = "../" * (len(page.relative_to(site).parts) - 1)
        page.write_text(OUTSIDE.sub(rf'href="{up}\2.txt"', text), "utf-8")


def main() -> None:
    """Builds the site, and replaces the last one if that succeeds."""
    with tempfile.TemporaryDirectory() as folder:
        print(render(Path(folder)), end="")
        site = Path(folder) / ".site"
        copy_linked(site)
        shutil.rmtree(SITE, ignore_errors=True)
        shutil.move(site, SITE)


if __name__ == "__main__":
    main()
