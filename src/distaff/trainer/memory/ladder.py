"""The fit ladder: finds options with which the training step fits into the memory of each device.

It is climbed before a run is prepared, and changes only the options of the trainer. See
`docs/decisions/0063-fit-memory.md`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from distaff.checkpoint import recorded
from distaff.core.config.encoding import to_json
from distaff.core.typing import Batch
from distaff.core.views.amounts import byte_text
from distaff.data import counts_itself, first_to_train, num_examples
from distaff.errors import ConfigError, LossError
from distaff.execution.device_memory import bytes_for_a_step, device_name
from distaff.execution.feed.feed import resident_bytes
from distaff.execution.placement import bytes_on_a_device
from distaff.execution.processes import gathered, is_first, told
from distaff.run.directory.run_directory import RunDirectory
from distaff.run.identity.candidates import find_candidates
from distaff.run.identity.comparison import RecordComparison
from distaff.trainer.initial import trained_model
from distaff.trainer.memory.measured import MeasuredStep
from distaff.trainer.memory.rungs import AS_WRITTEN, Rung, micro_batches, remat_rungs
from distaff.trainer.preparation import Preparation

_WORTH = 0.9

_MOST_RUNS = 32
"""Earlier runs whose records are read."""


class Tried(NamedTuple):
    """A rung that was compiled.

    Attributes:
        rung: its options.
        needed: bytes on each device; None if the compiler itself ran out of memory.
    """

    rung: Rung
    needed: int | None


def asks_to_fit(options: Any) -> bool:
    """Returns whether the options of a trainer ask that its step is made to fit."""
    return options.fit_memory is not False or options.micro_batch == "auto"


def fit(trainer: Any, base: type, train_loader: Any) -> None:
    """Sets options of a trainer with which its step fits into memory, if it asks for that.

    A trainer that has fitted already keeps its options, and so does a run that is resumed.

    Args:
        trainer: the trainer; its workspace keeps the entry for the record.
        base: the class that it overrides.
        train_loader: the loader of the run; its first batch is peeked at.

    Raises:
        ConfigError: no rung fits, or the options do not allow to compile the step.
    """
    here, options = trainer._workspace, trainer.config
    if here.fit is not None or not asks_to_fit(options):
        return
    if options.debug:
        raise ConfigError(
            "fit_memory and micro_batch='auto' compile the step, and debug=True does not. Turn one "
            "of them off."
        )
    batch = first_to_train(train_loader)
    asked = {name: getattr(options, name) for name in Rung._fields}
    written = MeasuredStep(trainer, base, batch, AS_WRITTEN)
    task: dict[str, Any] = {
        "step": written.digest(),
        "asked": to_json({**asked, "memory": options.fit_memory}),
    }
    found: Any = told(_earlier(trainer, task) if is_first() else None)
    if found is None:
        held = bytes_on_a_device(here.state) - resident_bytes(
            train_loader, here.execution.placement
        )
        limit = min(gathered(bytes_for_a_step(options.fit_memory, held)))
        climbed = _climbed(trainer, base, batch, limit, written)
        found = dict(task, device=device_name(), **climbed)
    here.fit = dict(found)
    _apply(trainer, base, batch, here.fit)


def line_of(fit: Mapping[str, Any]) -> str:
    """Returns a line on the rung that a run uses, from its entry in the record."""
    rung, first, last = Rung(**fit["rung"]), fit["tried"][0], fit["bytes"]
    need = f"a step needs {byte_text(last)} of {byte_text(fit['limit'])}"
    if rung == AS_WRITTEN:
        return f"memory: {need}, so nothing was changed"
    before = "more memory than there is" if first["bytes"] is None else byte_text(first["bytes"])
    return f"memory: {rung}: {need}, instead of {before}{''.join(f'; {x}' for x in fit['notes'])}"


def _climbed(
    trainer: Any, base: type, batch: Batch, limit: int, written: MeasuredStep
) -> dict[str, Any]:
    """Returns the first rung that fits, with those that were tried, as strict JSON.

    Raises:
        ConfigError: none fits.
    """
    tried: list[Tried] = []
    for rung in _rungs(trainer, batch, written, tried):
        try:
            step = MeasuredStep(trainer, base, batch, rung) if rung.changes else written
        except (ConfigError, LossError):
            continue  # no part of this step can be computed again, or it cannot be split
        tried.append(Tried(rung, step.peak_bytes()))
        if _fits(tried[-1], limit):
            return {
                "rung": rung.changes,
                "bytes": tried[-1].needed,
                "limit": limit,
                "tried": [{**each.rung.changes, "bytes": each.needed} for each in tried],
                "notes": list(_notes(written)) if rung.micro_batch else [],
            }
    raise ConfigError(_nothing_fits(tried, limit))


def _rungs(trainer: Any, batch: Batch, written: MeasuredStep, tried: list[Tried]) -> Iterator[Rung]:
    """Yields the rungs, the cheapest first. What the user has set stays as it is."""
    options = trainer.config
    yield AS_WRITTEN
    if options.remat is None and options.micro_batch != "auto":
        yield from remat_rungs(written.state.params)
    if isinstance(options.micro_batch, int) or counts_itself(batch):
        return
    base = worth_keeping(tried)
    parts = trainer._workspace.execution.placement.num_parts
    for size in micro_batches(num_examples(batch), parts):
        yield base._replace(micro_batch=size)


def worth_keeping(tried: list[Tried]) -> Rung:
    """Returns the rung that needs the least memory; a later one only if it saves a tenth."""
    best = tried[0]
    for each in tried[1:]:
        if best.needed is None or (each.needed or best.needed) < _WORTH * best.needed:
            best = each
    return best.rung


def _fits(tried: Tried, limit: int) -> bool:
    return tried.needed is not None and tried.needed <= limit


def _notes(step: MeasuredStep) -> Iterator[str]:
    """Yields what micro-batches make of a step's numbers, beyond rounding."""
    if step.state.batch_stats is not None:
        yield "batch normalization sees one micro-batch at a time"
    if step.is_random:
        yield "random numbers, such as dropout masks, are others than without micro-batches"


def _earlier(trainer: Any, task: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns what an earlier run of the same step found, so that it is resumed with that.

    A run that has finished counts on the same devices only.
    """
    options = trainer.config
    if not options.writes or options.resume == "never":
        return None
    directory = RunDirectory(options.root, options.name or type(trainer).__name__.lower())
    for run in find_candidates(directory, _uncompared)[:_MOST_RUNS]:
        found = recorded(run.path).get("fit")
        if not isinstance(found, Mapping) or any(found.get(n) != x for n, x in task.items()):
            continue
        if run.may_resume or found.get("device") == device_name():
            return dict(found)
    return None


def _uncompared(record: Mapping[str, Any]) -> RecordComparison:
    return RecordComparison([], [], [])


def _apply(trainer: Any, base: type, batch: Batch, fit: Mapping[str, Any]) -> None:
    """Gives a trainer the options of its rung, and makes its programs again if it has some."""
    rung = Rung(**fit["rung"])
    options, here = trainer.config, trainer._workspace
    if options.micro_batch == "auto":
        options = dataclasses.replace(options, micro_batch=None)
    vars(trainer)["config"] = dataclasses.replace(options, **rung.changes)
    if rung.changes and here.state is not None:
        apply_fn = trained_model(trainer.model, trainer.config).apply_fn
        Preparation(trainer, base).set_up_alone(batch, here.state.replace(apply_fn=apply_fn))


def _nothing_fits(tried: list[Tried], limit: int) -> str:
    lines = []
    for rung, needed in tried:
        size = "more than the compiler can handle" if needed is None else byte_text(needed)
        lines.append(f"\n  {size}: {str(rung) or 'as written'}")
    return (
        f"A training step may need {byte_text(limit)} on each device, and no rung of fit_memory "
        f"fits:{''.join(lines)}\nUse more devices, mesh='fsdp', which splits the state; a smaller "
        "batch or model; or precision='bf16'."
    )
