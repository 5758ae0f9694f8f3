"""The pages as a reader meets them: links that lead somewhere, in plain English."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from distaff import errors
from test_words import TURNS

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.relative_to(ROOT) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])

IDIOMATIC = re.compile(r"tells a model whether|tells the loader to|tells them apart|no, is refused")
"""Plain turns that the rule for the package's sources would find."""


def prose(page: Path) -> str:
    """Returns the text of a page outside of fenced blocks."""
    return re.sub(r"^```.*?^```$", "", (ROOT / page).read_text("utf-8"), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, by GitHub's rule."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in kept}


def broken(page: Path) -> Iterator[str]:
    """Yields the links of a page that lead to no file, or to no heading of it."""
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        path = (ROOT / page).parent / target if target else ROOT / page
        if not path.exists():
            yield f"{link}: no such file"
        elif anchor and anchor not in anchors(path.resolve().relative_to(ROOT)):
            yield f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_of_page_lead_somewhere(page: Path) -> None:
    assert list(broken(page)) == []


def test_broken_links_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    text = "# One, two\n[a](#one-two) [b](#three) [c](gone.md) [d](https://example.org)\n"
    (tmp_path / "page.md").write_text(text)
    assert list(broken(Path("page.md"))) == ["#three: no such heading", "gone.md: no such file"]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_page_is_in_plain_words(page: Path) -> None:
    text = IDIOMATIC.sub("", prose(page))
    assert [line for line in text.splitlines() if TURNS.search(line)] == []


PUBLIC = (
    *("distaff", "distaff.augment", "distaff.callbacks", "distaff.checkpoint", "distaff.data"),
    *(
        "distaff.distributed",
        "distaff.loggers",
        "distaff.metrics",
        "distaff.models",
        "distaff.optim",
    ),
    *("distaff.optim.learned", "distaff.serve", "distaff.tasks", "distaff.tune", "distaff.zoo"),
)


@pytest.mark.parametrize("package", PUBLIC)
def test_reference_has_every_public_name(package: str) -> None:
    module = importlib.import_module(package)
    pages = "\n".join(page.read_text("utf-8") for page in ROOT.glob("docs/reference/*.md"))
    # A module of integrations imports a package that may be missing.
    listed = re.findall(r"^::: (?!distaff\.integrations\.)(\S+)\.(\w+)$", pages, re.M)
    found = {id(getattr(importlib.import_module(place), name)) for place, name in listed}
    named = {name: getattr(module, name) for name in module.__all__}
    assert [n for n, it in named.items() if not (inspect.ismodule(it) or id(it) in found)] == []


def test_errors_page_has_every_error() -> None:
    text = (ROOT / "docs" / "errors.md").read_text("utf-8")
    kinds = (
        name
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and issubclass(kind, (errors.DistaffError, Warning))
    )
    assert [name for name in kinds if name not in text] == []


def test_site_has_every_page() -> None:
    listed = re.findall(r"([\w/.-]+\.md)$", (ROOT / "site" / "mkdocs.yml").read_text(), re.M)
    # `site/build.py` lists the records of decisions.
    names = [page.relative_to("docs").as_posix() for page in PAGES if page.parts[0] == "docs"]
    assert sorted(listed) == sorted(name for name in names if not name.startswith("decisions/"))


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/howto/*.md")), ids=lambda page: page.stem)
def test_everyday_page_has_one_short_program(page: Path) -> None:
    text = page.read_text("utf-8")
    program, *_ = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    assert sum(bool(line.strip()) for line in program.splitlines()) <= 30
    assert "\n## See also\n" in text
    assert len(text.splitlines()) <= 120


SEARCHED = {
    "log-to-tensorboard": "tensorboard",
    "ema": "ema",
    "resume": "resume",
    "class-weights": "class weights",
    "gradient-accumulation": "gradient accumulation",
}
"""The search of the site ranks words of a page's title first."""


@pytest.mark.parametrize("page", SEARCHED)
def test_title_has_the_words_that_people_search(page: str) -> None:
    title, *_ = (ROOT / "docs" / "howto" / f"{page}.md").read_text("utf-8").splitlines()
    assert SEARCHED[page] in title.lower()
