"""Tags of a run, and whether it is archived, in `tags.json` of its directory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distaff.core.config import strict_json
from distaff.errors import ConfigError, RunDirectoryError, nearest
from distaff.run.directory.run_directory import RunDirectory
from distaff.run.directory.run_lock import locked

TAGS_FILE = "tags.json"
_MOST_LETTERS = 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tags:
    """What you have noted about a run.

    Attributes:
        tags: its tags, in the order in which they were added.
        archived: whether lists of runs leave it out.
    """

    tags: tuple[str, ...] = ()
    archived: bool = False

    @classmethod
    def of(cls, data: Any) -> Tags:
        """Returns the content of the file, without values of other types."""
        found = data if isinstance(data, Mapping) else {}
        tags = found.get("tags")
        texts = [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []
        return cls(tags=tuple(texts), archived=found.get("archived") is True)


def change_tags(path: Path, tags: Sequence[str], *, remove: bool) -> tuple[str, ...]:
    """Adds tags to a run, or removes them. Returns all tags of the run.

    Raises:
        ConfigError: a tag is not one word, or the run has no such tag to remove.
        RunDirectoryError: the run is in use, or its file cannot be read or written.
    """
    for tag in tags:
        if not tag.isprintable() or not 0 < len(tag) <= _MOST_LETTERS or set(tag) & set(" ,"):
            raise ConfigError(
                f"A tag must be a word of at most {_MOST_LETTERS} letters, without spaces and "
                f"commas; got {tag!r}."
            )
    with locked(path):
        before = _read(path)
        for tag in tags if remove else ():
            if tag not in before.tags:
                known = nearest(tag, before.tags)
                raise ConfigError(f"The run {str(path)!r} has no tag {tag!r}. {known}")
        kept = [tag for tag in before.tags if not (remove and tag in tags)]
        after = tuple(dict.fromkeys([*kept, *([] if remove else tags)]))
        _write(path, dataclasses.replace(before, tags=after))
        return after


def set_archived(path: Path, archived: bool) -> bool:
    """Notes whether a run is archived. Returns whether that is a change.

    Raises:
        RunDirectoryError: the run is in use, or its file cannot be read or written.
    """
    with locked(path):
        before = _read(path)
        _write(path, dataclasses.replace(before, archived=archived))
        return before.archived != archived


def _read(path: Path) -> Tags:
    if not (path / TAGS_FILE).exists():
        return Tags()
    data = RunDirectory.open(path).read_json(TAGS_FILE)
    if not isinstance(data, Mapping):
        raise RunDirectoryError(
            f"{str(path / TAGS_FILE)!r} must hold a JSON object; it holds {data!r}. Remove it."
        )
    return Tags.of(data)


def _write(path: Path, tags: Tags) -> None:
    RunDirectory.open(path).write_text(TAGS_FILE, strict_json.dumps(dataclasses.asdict(tags)))
