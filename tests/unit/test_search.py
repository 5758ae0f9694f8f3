"""The search behind a study: Optuna's samplers, pruners, storages, and several processes."""

from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna import pruners, samplers, storages

from distaff.core import optional
from distaff.errors import ConfigError
from distaff.integrations import optuna as integration
from distaff.run.directory.process import this_process
from distaff.tune import Choice, Float, Int
from distaff.tune.heart import Heart
from distaff.tune.objectives import as_objectives


def play(num_trials: int = 8, space: Any = None, first: Any = None, **options: Any) -> Any:
    """Runs a search whose score is the sum of the values plus 1 / epoch."""
    space = space or {"n": Int(1, 3), "c": Choice(0, 0.5)}
    options.setdefault("storage", storages.InMemoryStorage())
    seed = options.pop("seed", 0)
    made = integration.OptunaSearch(
        space, {"mode": "min"}, first=first, seed=seed, root="runs", options=options
    )
    while (suggestion := made.ask(num_trials)) is not None:
        status, score = "finished", sum(suggestion.values.values())
        for epoch in (1, 2, 3, 4):
            suggestion.report(score + 1 / epoch, epoch)
            if suggestion.should_prune():
                status = "pruned"
                break
        made.tell(suggestion, status, score)
    return made


def values(search: Any) -> list[tuple[Any, ...]]:
    return [tuple(trial.values.values()) for trial in search.trials()]


def experimental(make: Any) -> Any:
    with pytest.warns(optuna.exceptions.ExperimentalWarning):
        return make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: samplers.RandomSampler(seed=0),
        lambda: samplers.TPESampler(seed=0, multivariate=True),
        lambda: samplers.NSGAIISampler(seed=0),
        lambda: experimental(lambda: samplers.QMCSampler(seed=0)),
    ],
    ids=["random", "tpe", "nsga2", "qmc"],
)
def test_sampler_passes_through(make):
    sampler = make()
    played = play(sampler=sampler, first={"n": 2, "c": 0.5})
    assert played.study.sampler is sampler
    assert values(played)[0] == (2, 0.5)
    assert len(played.trials()) == 8


@pytest.mark.parametrize(
    "make",
    [
        pruners.NopPruner,
        lambda: pruners.PercentilePruner(25.0, n_startup_trials=1),
        pruners.SuccessiveHalvingPruner,
        lambda: pruners.HyperbandPruner(max_resource=4),
        lambda: pruners.ThresholdPruner(upper=3.0),
        lambda: experimental(lambda: pruners.PatientPruner(pruners.MedianPruner(1), 1)),
        lambda: experimental(lambda: pruners.WilcoxonPruner()),
    ],
    ids=["none", "percentile", "halving", "hyperband", "threshold", "patient", "wilcoxon"],
)
def test_pruner_passes_through(make):
    pruner = make()
    played = play(20, pruner=pruner, sampler=samplers.RandomSampler(seed=0))
    assert played.study.pruner is pruner
    statuses = {trial.status for trial in played.trials()}
    assert statuses == {"finished"} | (
        set() if isinstance(pruner, pruners.NopPruner | pruners.PatientPruner) else {"pruned"}
    )


GRID = {"n": [1, 2, 3], "c": [0, 0.5]}


@pytest.mark.parametrize(
    "make",
    [
        lambda: samplers.GridSampler(GRID),
        lambda: experimental(lambda: samplers.BruteForceSampler(seed=0)),
    ],
    ids=["grid", "brute force"],
)
def test_sampler_that_tries_everything_ends_the_study(make):
    sampler, storage = make(), storages.InMemoryStorage()
    everything = sorted((n, c) for n in GRID["n"] for c in GRID["c"])
    first = {"n": 2, "c": 0.5}
    play(2, sampler=sampler, storage=storage, first=first)
    for _ in range(2):  # the second time, nothing is left
        played = play(20, sampler=sampler, storage=storage)
        assert sorted(values(played)) == everything
    if isinstance(sampler, samplers.BruteForceSampler):
        assert values(played)[0] == (2, 0.5)


def test_interrupted_point_of_a_grid_is_tried_again():
    storage = storages.InMemoryStorage()
    sampler = samplers.GridSampler(GRID)
    played = play(5, sampler=sampler, storage=storage)
    for _ in range(2):
        played.abandon(played.ask(20))
    assert len(values(play(20, sampler=sampler, storage=storage))) == 6
    assert sorted(values(played)) == sorted((n, c) for n in GRID["n"] for c in GRID["c"])


def test_sampler_that_does_not_fit_the_space_fails_without_leaving_a_trial():
    storage = storages.InMemoryStorage()
    with pytest.raises(ValueError, match="c, is not found in the given grid"):
        play(sampler=samplers.GridSampler({"n": [1, 2]}), storage=storage)
    played = play(2, storage=storage)
    assert [trial.state.name for trial in played.study.trials] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert all("attempt" not in trial.user_attrs for trial in played.study.trials)


@pytest.mark.parametrize("number", [None, 7])
def test_study_that_goes_on_draws_other_values(number):
    storage, wide = storages.InMemoryStorage(), {"x": Float(0, 1)}

    def go_on(num_trials: int) -> Any:
        sampler = None if number is None else samplers.RandomSampler(seed=number)
        return play(num_trials, wide, storage=storage, sampler=sampler)

    assert len(set(values(go_on(2)) + values(go_on(4)))) == 4


def test_default_sampler_draws_by_the_seed():
    wide = {"x": Float(0, 1)}
    one, same, other = (values(play(12, wide, seed=seed)) for seed in (1, 1, 2))
    assert one == same
    assert one != other


@pytest.mark.parametrize("sampler", ["tpe", "random"])
@pytest.mark.parametrize("ends", ["interrupted", "killed", "between"])
def test_resumed_search_draws_the_values_of_one_that_was_not_interrupted(sampler, ends):
    wide = {"x": Float(0, 1), "n": Int(1, 100), "c": Choice("a", "b", "c")}

    def made(storage: Any, seed: int = 3) -> Any:
        options = {"storage": storage, "sampler": sampler}
        return integration.OptunaSearch(
            wide, {"mode": "min"}, first=None, seed=seed, root="runs", options=options
        )

    def go_on(storage: Any, num_trials: int, seed: int = 3) -> list[dict[str, Any]]:
        search = made(storage, seed)
        while (suggestion := search.ask(num_trials)) is not None:
            value = abs(suggestion.values["x"] - 0.3)
            suggestion.report(value, 1)
            search.tell(suggestion, "finished", value)
        return [trial.values for trial in search.trials()]

    whole = go_on(storages.InMemoryStorage(), 16)  # after ten trials, TPE looks at their results
    storage = storages.InMemoryStorage()
    for num_trials in (3, 12):
        go_on(storage, num_trials)
        if ends != "between":
            search = made(storage)
            suggestion = search.ask(16)
            search.abandon(suggestion) if ends == "interrupted" else lost(suggestion)
    assert go_on(storage, 16) == whole
    assert go_on(storages.InMemoryStorage(), 16, seed=4) != whole


def test_unknown_sampler_is_an_error():
    with pytest.raises(ConfigError, match=r"got 'tpee'\. Did you mean 'tpe'"):
        play(sampler="tpee")


def of_sqlite() -> storages.RDBStorage:
    return storages.RDBStorage("sqlite:///own.db")


@pytest.mark.parametrize(
    ("make", "file"),
    [
        (lambda: None, "runs/mine.journal"),
        (lambda: "deep/er/own.journal", "deep/er/own.journal"),
        (lambda: Path("deep/er/own.journal"), "deep/er/own.journal"),
        (lambda: "sqlite:///deep/er/own.db", "deep/er/own.db"),
        (of_sqlite, "own.db"),
        (storages.InMemoryStorage, "."),
    ],
    ids=["default", "journal", "path", "sqlite", "object", "memory"],
)
def test_storage_passes_through(make, file, tmp_path):
    storage = make()
    first = play(2, storage=storage, study_name="mine")
    again = play(3, storage=storage, study_name="mine")
    assert again.trials()[:2] == first.trials()[:2]
    assert len(again.study.trials) == 3
    assert again.study.study_name == "mine"
    assert Path(file).exists()
    assert len(list(tmp_path.iterdir())) == (file != ".")


def test_storage_may_hold_several_studies():
    storage = storages.InMemoryStorage()
    one, other = (play(2, storage=storage, study_name=name) for name in ("one", "other"))
    assert len(one.trials()) == len(other.trials()) == 2


def test_journal_with_half_a_line_is_read():
    journal = Path("study.journal")
    before = play(2, storage=journal).trials()
    with journal.open("a") as file:
        file.write('{"op_code": 4, "wor')
    assert play(2, storage=journal).trials() == before
    assert len(play(3, storage=journal).trials()) == 3


def test_journal_stays_where_it_is_when_the_program_goes_elsewhere(tmp_path, monkeypatch):
    played = play(1, storage="study.journal")
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    played.remember("fact", 1)
    assert play(1, storage="../study.journal").recall("fact") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["below", "study.journal"]


def test_two_processes_do_not_begin_more_than_is_asked_for(monkeypatch):
    storage = storages.InMemoryStorage()
    one, other = (play(0, storage=storage) for _ in range(2))
    first, seconds, ask = one.ask(2), [], one.study.ask

    def ask_after_the_other() -> Any:
        seconds.append(other.ask(2))
        return ask()

    monkeypatch.setattr(one.study, "ask", ask_after_the_other)
    assert one.ask(2) is None
    assert other.ask(2) is None
    (second,) = seconds
    assert [text.split(" (")[0] for text in one.underway()] == ["trial 0", "trial 1"]
    for search, suggestion in ((one, first), (other, second)):
        search.tell(suggestion, "finished", 1.0)
    assert [trial.number for trial in one.trials()] == [0, 1]
    assert len(one.study.trials) == 3  # the one that was withdrawn counts nowhere
    assert other.ask(2) is None
    assert other.ask(3) is not None


def test_config_s_own_values_are_tried_once_by_two_processes():
    storage = storages.InMemoryStorage()
    wide = {"x": Float(0, 1)}
    two = [play(0, wide, storage=storage, first={"x": 0.25}) for _ in range(2)]
    found = [search.ask(4).values["x"] for search in (*two, *two)]
    assert len(set(found)) == 4
    assert found[0] == 0.25


def test_trial_of_a_process_that_is_gone_is_tried_again():
    storage = storages.InMemoryStorage()
    one, other = (play(0, storage=storage) for _ in range(2))
    left, kept = one.ask(3), one.ask(3)
    left.note(owner={**this_process(), "started": 1})
    taken = other.ask(3)
    assert (taken.number, taken.values) == (2, left.values)
    assert [text.split(" (")[0] for text in one.underway()] == ["trial 1", "trial 2"]
    # Had the process lived on where it cannot be seen: it is not heard any more, and not harmed.
    left.report(1.0, 1)
    assert left.should_prune() is False
    assert one.tell(left, "finished", 1.0).status == "abandoned"
    one.abandon(left)
    assert len(one.study.trials) == 3
    assert one.tell(kept, "finished", 1.0).status == "finished"
    assert other.tell(taken, "pruned", None).number == 2
    assert [trial.number for trial in one.trials()] == [1, 2]


def test_trial_that_was_killed_while_it_began_is_ended_after_a_minute(monkeypatch):
    played = play(0)
    played.study.ask()
    assert played.ask(1) is None
    assert played.underway() == ["trial 0 (process unknown on unknown)"]
    monkeypatch.setattr(integration, "_PATIENCE", timedelta(0))
    assert played.ask(1).number == 1


def test_values_of_conditions_and_tuples_come_back_from_a_storage():
    space = {
        "n": Int(1, "m"),
        "m": Int(2, 4),
        "c": Choice((1,), (2, 3), None),
        "x": Float(0, 1, when={"c": [(1,), None]}),
    }

    def ran(num_trials: int) -> Any:
        made = integration.OptunaSearch(
            space,
            {"mode": "min"},
            first={"n": 1, "m": 2, "c": (2, 3)},
            seed=0,
            root="runs",
            options={},
        )
        while (suggestion := made.ask(num_trials)) is not None:
            made.tell(suggestion, "finished", float(suggestion.values["n"]))
        return made.trials()

    found = [trial.values for trial in ran(12)]
    assert found == [trial.values for trial in ran(12)]
    assert found[0] == {"m": 2, "n": 1, "c": (2, 3)}
    assert {values["c"] for values in found} == {(1,), (2, 3), None}
    assert all(values["n"] <= values["m"] for values in found)
    assert all(("x" in values) == (values["c"] != (2, 3)) for values in found)


def test_space_may_be_a_function_of_the_trial():
    def space(trial: Any) -> dict[str, Any]:
        depth = trial.suggest_int("depth", 1, 2)
        return {"widths": tuple(trial.suggest_int(f"w{n}", 4, 8) for n in range(depth))}

    played = integration.OptunaSearch(
        space, {"mode": "min"}, first=None, seed=0, root="runs", options={}
    )
    asked = []
    while (suggestion := played.ask(6)) is not None:
        asked.append(suggestion.values)
        played.tell(suggestion, "finished", 0.0)
    assert [trial.values for trial in played.trials()] == asked
    assert {len(values["widths"]) for values in asked} == {1, 2}
    draws = optional.load("studies.methods", extra="tune").probe(space)
    assert {len(draw.values["widths"]) for draw in draws} == {1, 2}
    accepts = draws[0].parameters["depth"]
    assert [accepts(value) for value in (1, 3, "a")] == [True, False, False]


TRADE = {"mode": "min", "objectives": {"val/b": "max", "val/a": "min"}}


def trading(storage: Any, form: Any = None, **options: Any) -> Any:
    return integration.OptunaSearch(
        {"x": Float(0, 1), "y": Float(0, 1)},
        form or TRADE,
        first=None,
        seed=0,
        root="runs",
        options={"storage": storage, **options},
    )


@pytest.mark.parametrize("sampler", ["tpe", "nsgaii"])
def test_several_objectives_have_a_front_and_one_order(sampler):
    storage = storages.InMemoryStorage()
    for num_trials in (5, 70):  # more than a generation of NSGA-II
        # The order of directions is that of the first call.
        swapped = {"mode": "min", "objectives": {"val/a": "min", "val/b": "max"}}
        search = trading(storage, TRADE if num_trials == 5 else swapped, sampler=sampler)
        while (suggestion := search.ask(num_trials)) is not None:
            assert suggestion.objectives == ("val/b", "val/a")
            x, y = suggestion.values["x"], suggestion.values["y"]
            suggestion.note(objectives={"val/a": x + y, "val/b": x - y})
            suggestion.report(x, 1)
            assert not suggestion.should_prune()
            told = search.tell(suggestion, "finished", x)
            assert (told.value, told.objectives) == (x, {"val/a": x + y, "val/b": x - y})
    scores = {t.number: t.objectives for t in search.trials()}
    front = [
        number
        for number, own in scores.items()
        if not any(
            other != own and other["val/a"] <= own["val/a"] and other["val/b"] >= own["val/b"]
            for other in scores.values()
        )
    ]
    assert [trial.number for trial in search.front()] == front
    assert 1 <= len(front) < 70
    assert [each.name for each in search.study.directions] == ["MAXIMIZE", "MINIMIZE"]


def test_table_has_the_running_trials_and_changes_are_told():
    search, changes = play(2), []
    search.on_change = lambda: changes.append(search.table()[-1])
    suggestion = search.ask(3)
    suggestion.report(2.0, 1)
    suggestion.report(1.0, 2)
    suggestion.report(3.0, 3)
    shown = [(x.number, x.status, x.value, x.epoch) for x in changes]
    assert shown == [
        (2, "running", value, epoch) for value, epoch in ((None, None), (2, 1), (1, 2), (1, 3))
    ]
    search.tell(suggestion, "finished", 1.0)
    assert search.table() == search.trials()


def test_several_objectives_are_not_pruned_and_not_changed():
    storage = storages.InMemoryStorage()
    with pytest.raises(ConfigError, match=r"val/b, val/a\) cannot be pruned.*MedianPruner"):
        trading(storage, pruner=pruners.MedianPruner())
    trading(storage, pruner=pruners.NopPruner())
    with pytest.raises(ConfigError, match=r"objectives\.val/b: 'max', now absent"):
        trading(storage, {"mode": "min", "objectives": {"val/a": "min", "val/c": "max"}})


def test_killed_trial_of_several_objectives_that_advances_does_not_count_as_one_that_crashes():
    search = trading(storages.InMemoryStorage())
    suggestion = search.ask(1)
    for epoch in range(1, 5):
        suggestion.report(1.0, epoch)
        suggestion.note(path="runs/line/0001")
        lost(suggestion)
        suggestion = search.ask(1)
        assert suggestion.origin == 0
    for _ in range(3):
        lost(suggestion)
        suggestion = search.ask(1)
    assert suggestion is None
    assert [trial.status for trial in search.trials()] == ["failed"]


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ("val/loss", "must be metrics of a study; got 'val/loss'"),
        (["val/loss"], "two or more"),
        (["val/loss", "val/loss"], "two or more different"),
        ({"val/loss": "max", "val/a": "min"}, "insist=True"),
        (["val/loss", "train/loss"], "'train/loss' is one of training"),
        (["val/loss", 3], "monitor must be"),
    ],
)
def test_wrong_objectives_are_an_error(given, complaint):
    with pytest.raises(ConfigError, match=complaint):
        as_objectives(given)


def test_objectives_have_the_directions_of_monitors():
    modes = [each.mode for each in as_objectives(("val/loss", "val/accuracy"))]
    assert modes == ["min", "max"]
    assert [each.mode for each in as_objectives({"val/x": "max", "val/y": "min"})] == ["max", "min"]


def lost(suggestion: Any) -> None:
    """Makes a trial look as if its process was killed."""
    suggestion.note(owner={**this_process(), "started": 1})


def test_killed_trial_is_told_where_to_resume_and_what_was_reported():
    search = play(0)
    left = search.ask(3)
    left.report(1.0, 1)
    left.note(path="runs/line/0001", seed=42)
    lost(left)
    again = search.ask(3)
    assert (again.origin, again.key, again.left) == (0, left.key, Path("runs/line/0001").absolute())
    again.report(9.0, 1)  # that epoch was reported before
    again.report(2.0, 2)
    stored = search.study.trials[again.number]
    assert stored.intermediate_values == {1: 1.0, 2: 2.0}
    # Attempts that advance do not count as ones that crash.
    for number in range(2, 6):
        again.report(float(number), number + 1)
        lost(again)
        again = search.ask(3)
        assert (again.origin, str(again.left)) == (
            0,
            str(left.left or Path("runs/line/0001").absolute()),
        )
    for _ in range(3):
        lost(again)
        again = search.ask(3)
    assert [trial.status for trial in search.trials()] == ["failed"]
    assert again.origin != 0


def test_trial_ended_by_the_user_s_code_starts_again():
    search = play(0)
    failed = search.ask(3)
    failed.report(1.0, 1)
    failed.note(path="runs/line/0001")
    search.abandon(failed, resumes=False)
    again = search.ask(3)
    assert (again.values, again.origin, again.left) == (failed.values, 0, None)
    assert search.study.trials[again.number].intermediate_values == {}


def test_process_killed_between_the_end_of_a_lost_trial_and_its_retry_loses_nothing(monkeypatch):
    search = play(0)
    search.ask(3)
    lost(search.ask(3))
    lost_one = search.study.trials[1]
    with monkeypatch.context() as patched:
        patched.setattr(search.study, "add_trial", lambda trial: None)
        search._recover()
    assert search.study.trials[1].state.name == "FAIL"
    again = search.ask(3)
    assert (again.values, again.origin) == (lost_one.params, 1)


def test_values_queued_by_two_processes_are_tried_once():
    search = play(0)
    lost(search.ask(3))
    search._recover()
    search.study.add_trial(search._retry(search.study.trials[0]))
    first, second = search.ask(3), search.ask(3)
    assert (first.origin, second.origin) == (0, 1)
    for suggestion in (first, second):
        search.tell(suggestion, "finished", 1.0)
    assert [trial.number for trial in search.trials()] == [1, 3]


def test_trial_of_another_machine_is_taken_over_after_five_silent_minutes(monkeypatch):
    search = play(0)
    far = search.ask(1)
    far.note(owner={**this_process(), "host": "another"})
    assert search.ask(1) is None
    far.beat()
    monkeypatch.setattr(integration, "_SILENCE", timedelta(seconds=-1))
    assert search.ask(1).origin == 0


def test_heart_beats_until_it_is_stopped():
    beats, twice = [], threading.Event()

    def beat() -> None:
        beats.append(1)
        if len(beats) > 1:
            twice.set()
        raise OSError("the storage cannot be reached")

    with Heart(beat, every=0.001):
        assert twice.wait(30)
    count = len(beats)
    assert not [each for each in threading.enumerate() if each.name == "distaff-heart"]
    assert len(beats) == count
