"""Compares the record of a new run with that of an earlier one."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING
from typing import Any, NamedTuple

from distaff.core.config import encoding
from distaff.core.config.options import Options
from distaff.core.digest import REST
from distaff.optim import OptimizerConfig
from distaff.run.identity.identity import Subject
from distaff.run.identity.sketch import is_near

_ALWAYS_IGNORED = ("distaff", "constructor.given")
"""Entries of the record that may change without a note."""

_NOT_COMPARED = ("identity", "fit")
"""Entries that are compared in another way: `fit` chose options, which are."""

_LABELS = {REST: "the training step"}
_DIGESTS = ("values", "batches")
_UNKNOWN = "were not recorded and could not be compared"


class RecordComparison(NamedTuple):
    """How a run differs from another one.

    Attributes:
        changes: differences that make it another run.
        doubts: loaders whose first batch differs: they have other data, or no seed.
        notes: other differences, and what could not be compared.
    """

    changes: list[str]
    doubts: list[str]
    notes: list[str]

    def lines(self) -> list[str]:
        """Returns the lines to log when the run is resumed."""
        return [*(f"changed: {each}" for each in self.changes), *self.notes]


def compare_records(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    subject: Subject | None,
    *,
    inexact: bool,
    options: type[Options],
) -> RecordComparison:
    """Compares the record of an earlier run with that of a new one.

    Args:
        old: content of `config.json`; without an identity if written by an old version.
        new: the record of the new run, with its identity.
        subject: the source of the new run's identity.
        inexact: whether first batches may differ, as without a seed.
        options: class of the new run's options, which declares how each affects resuming.
    """
    if not old:
        return RecordComparison(["its record cannot be read"], [], [])
    found = _options(old, new, options)
    same = {"num_epochs", *(f"options.{name}" for name in options.names("same run"))}
    was, now = old.get("identity"), new.get("identity")
    changes = [text for name, text in found.items() if not _is_of(name, same)]
    notes = [f"changed: {text}" for name, text in found.items() if _is_of(name, same)]
    if not isinstance(was, Mapping) or not isinstance(now, Mapping):
        return RecordComparison(
            changes, [], [*notes, f"program, data and start weights {_UNKNOWN}"]
        )
    program, remarks = _program(was, now, subject)
    is_named = any(name.startswith("optimizer") for name in found)
    changes += [text for text in program if not (is_named and text.startswith("optimizer"))]
    data, doubts = _data(was, now, inexact=inexact)
    one, other = was.get("weights"), now.get("weights")
    if one and other:
        is_same = one["form"] == other["form"] and is_near(one["sketch"], other["sketch"])
        data += [] if is_same else ["start weights differ"]
    return RecordComparison([*changes, *data], doubts, [*notes, *remarks])


def _options(
    old: Mapping[str, Any], new: Mapping[str, Any], options: type[Options]
) -> dict[str, str]:
    """Returns the changes of the configuration, except for those that only affect resuming."""
    defaults = {"options": options(), "optimizer": OptimizerConfig()}
    for part, default in defaults.items():
        was, now = old.get(part), new.get(part)
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            # A field that the old version did not have counts as its default.
            known = encoding.to_json(default)
            old = {**old, part: {**{n: known[n] for n in now if n in known}, **was}}
    pair = [{n: x for n, x in each.items() if n not in _NOT_COMPARED} for each in (old, new)]
    ignored = {*_ALWAYS_IGNORED, *(f"options.{name}" for name in options.names("ignored"))}
    found = encoding.diff(pair[0], encoding.to_json(pair[1]))
    return {
        name: f"{name}: {_as_text(before)} -> {_as_text(after)}"
        for name, (before, after) in found.items()
        if not _is_of(name, ignored)
        and not (before is MISSING and not after)  # an unused field of a newer version
    }


def _is_of(name: str, options: Collection[str]) -> bool:
    """Returns whether a name is of one of the options, or of a field of its value."""
    return any(name == option or name.startswith(f"{option}.") for option in options)


def _as_text(value: Any) -> str:
    return "nothing" if value is MISSING else repr(value)


def _program(
    old: Mapping[str, Any], new: Mapping[str, Any], subject: Subject | None
) -> tuple[list[str], list[str]]:
    """Returns the changes of the programs, and notes on what could not be compared."""
    was, now = old.get("step"), new.get("step")
    if not was or not now:
        return [], ["the training step could not be traced and was not compared"]
    total = old.get("total_steps")
    if subject is not None and total != new.get("total_steps") and was["whole"] != now["whole"]:
        now = subject.step_for(total) or now  # a longer run has a longer schedule
    changes = list(_parts(was, now))
    one, other = old.get("evaluation"), new.get("evaluation")
    if not changes and one and other and one != other:
        changes = ["evaluation differs"]
    before, after = old.get("versions") or {}, new.get("versions") or {}
    if changes and before != after:
        names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
        found = ", ".join(f"{name} {before.get(name)} -> {after.get(name)}" for name in names)
        return [], [f"the program could not be compared: {found}"]
    return changes, []


def _parts(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Yields a line for each part of the training step that differs."""
    if old["whole"] == new["whole"]:
        return
    names = sorted({*old["parts"], *new["parts"]})
    pairs = [(name, old["parts"].get(name), new["parts"].get(name)) for name in names]
    changed = [pair for pair in pairs if pair[1] != pair[2]]
    if not changed:
        yield f"{_LABELS[REST]} differs"
    for name, was, now in changed:
        label = _LABELS.get(name, name)
        numbers = ""
        if was and now and was["form"] == now["form"]:
            gone = [each for each in was["numbers"] if each not in now["numbers"]]
            come = [each for each in now["numbers"] if each not in was["numbers"]]
            is_rate = name == "optimizer" and len(gone) == len(come) == 1
            what = "learning rate or another constant" if is_rate else "constants"
            numbers = f", {what}: {', '.join(gone)} -> {', '.join(come)}" if gone or come else ""
        yield f"{label} differs{numbers}"


def _data(
    old: Mapping[str, Any], new: Mapping[str, Any], *, inexact: bool
) -> tuple[list[str], list[str]]:
    """Returns the changes of the data, and those that may only be due to a missing seed."""
    was, now = old.get("data") or {}, new.get("data") or {}
    changes, doubts = [], []
    for name in {**was, **now}:
        if name not in was or name not in now:
            changes.append(f"{name} data differs: {'added' if name in now else 'removed'}")
            continue
        one, other = was[name], now[name]
        found = [f"{name} data differs: {text}" for text in _facts(one, other)]
        changes += found
        is_known = one["first"] == other["first"] or one["position"] != other["position"]
        if not (found or inexact or is_known):
            is_verified = any("source" in each for each in other["facts"])
            (doubts if is_verified else changes).append(f"{name} data differs")
    return changes, doubts


def _facts(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for name in ("kind", "length", "batch"):
        if old[name] != new[name]:
            yield f"{name} {old[name]} -> {new[name]}"
    for was, now in zip(old["facts"], new["facts"], strict=False):
        for name in {**was, **now}:
            if was.get(name) != now.get(name) and name in _DIGESTS:
                yield "other values"
            elif was.get(name) != now.get(name):
                yield f"{name} {was.get(name)} -> {now.get(name)}"
