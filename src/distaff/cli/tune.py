"""The command `distaff tune`: searches for the best options of a recipe.

Functions import what needs JAX, so that the help starts without it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import tyro

import distaff
from distaff.cli.fit import only_options
from distaff.cli.recipes import RECIPES, find, load_code
from distaff.core import optional
from distaff.core.config.checks import whole
from distaff.core.paths import shown
from distaff.errors import ConfigError, DistaffError, NonFiniteError, StateError, nearest

if TYPE_CHECKING:
    from distaff.tune import StudyResult

_USAGE = """usage: distaff tune RECIPE --space FILE:NAME [OPTIONS] [RECIPE OPTIONS]

Searches for the best options of a recipe with Optuna. Trials are runs, compared by the monitored
metric; the best one is tested at the end. Start the same command again to resume the study, or with
more --trials to continue it.

RECIPE is a name or a function of your own, as for `distaff fit`. Its own options may follow; after
`--` also those that have the name of an option of this command.

recipes:
{recipes}

distaff tune RECIPE --help lists the options of this command.
"""
_WORKER = "--as-worker"
"""First argument of the processes that `--workers` starts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """Searches for the best options of a recipe.

    Args:
        space: what to search, such as space.py:space: a dict of tune.Float, tune.Int and
            tune.Choice by the dotted path of a recipe's option, or a function of the trial.
        trials: number of trials of the whole study, with those it has already.
        name: name of the study; by default that of the recipe.
        workers: number of processes that train trials at the same time.
        batch: number of trials to ask for at once. Those that differ in values such as the learning
            rate only are trained as one population.
        objective: validation metrics to optimize at once, such as val/loss val/accuracy; by default
            the monitored metric of the recipe's trainer. val/cost:min gives a direction.
        sampler: how Optuna chooses values.
        pruner: how Optuna ends bad trials early; by default the median rule, or none with several
            objectives.
        storage: journal file or URL of a database, such as sqlite:///runs/study.db; by default
            <root>/<name>.journal.
        figures: draw importances, parallel coordinates and the trials' curves at the end, if
            matplotlib is installed.
    """

    space: str
    trials: int = 32
    name: str | None = None
    workers: int = 1
    batch: int = 1
    objective: tuple[str, ...] = ()
    sampler: Literal["tpe", "random", "nsgaii"] = "tpe"
    pruner: Literal["median", "halving", "hyperband", "none"] | None = None
    storage: str | None = None
    figures: bool = True

    def __post_init__(self) -> None:
        whole("trials", self.trials)
        whole("workers", self.workers)
        whole("batch", self.batch)


class _Recipe(NamedTuple):
    """A recipe as a function of a config, and its config from the command line."""

    train: Callable[[Any], Any]
    config: Any


def main(words: Sequence[str]) -> int:
    """Runs `distaff tune` with these arguments; returns the exit status.

    Raises:
        DistaffError: the recipe, the space or an option is wrong, or no trial finished.
    """
    is_worker = list(words[:1]) == [_WORKER]
    words = list(words[1:] if is_worker else words)
    if not words or words[0] in ("-h", "--help"):
        listed = (f"  {name:<20} {recipe.summary}" for name, recipe in RECIPES.items())
        print(_USAGE.format(recipes="\n".join(listed)), end="")
        return 0
    if words[0].startswith("-"):
        raise ConfigError(
            f"The recipe comes first; got {words[0]!r}. Write distaff tune RECIPE {words[0]} ..."
        )
    name, *rest = words
    mark = rest.index("--") if "--" in rest else len(rest)
    options, others = tyro.cli(
        TuneOptions, prog=f"distaff tune {name}", args=rest[:mark], return_unknown_args=True
    )
    _ = distaff.TrainerModule  # loads the library before the recipe imports JAX, which is faster
    recipe = _recipe(name, [*others, *rest[mark + 1 :]])
    try:
        _study(name, recipe, options, words, is_worker=is_worker)
    except KeyboardInterrupt:
        if not is_worker:
            command = shlex.join(["distaff", "tune", *words])
            print(f"Interrupted. To resume the study, run: {command}", file=sys.stderr)
        return 130
    return 0


def _recipe(name: str, words: Sequence[str]) -> _Recipe:
    found: Any = find(name)
    prog = f"distaff tune {name}"
    if inspect.isclass(found):
        return _Recipe(lambda config: config.run(), tyro.cli(found, prog=prog, args=words))
    if (kind := only_options(found)) is not None:
        return _Recipe(found, tyro.cli(kind, prog=prog, args=words))

    @functools.wraps(found)
    def arguments(**given: Any) -> dict[str, Any]:
        return given

    return _Recipe(lambda config: found(**config), tyro.cli(arguments, prog=prog, args=words))


def _study(
    name: str, recipe: _Recipe, options: TuneOptions, words: Sequence[str], *, is_worker: bool
) -> None:
    from distaff.tune.recipe import RecipeTask
    from distaff.tune.study import run_study

    methods = optional.load("studies.methods", extra="tune")
    study_name = options.name or name.replace(".py:", "-").replace(":", "-").replace("/", "-")
    trainers: list[Any] = []

    def search(begun: Callable[[Any], None]) -> StudyResult:
        return run_study(
            RecipeTask(recipe.train, name),
            _space(options.space),
            recipe.config,
            num_trials=options.trials,
            batch=options.batch,
            options={
                "study_name": study_name,
                "storage": options.storage,
                "objectives": _objectives(options.objective),
                "sampler": options.sampler,
                "pruner": None if options.pruner is None else methods.pruner(options.pruner),
            },
            begun=begun,
            busy=lambda: any(worker.poll() is None for worker in workers),
        )

    workers: list[subprocess.Popen[bytes]] = []

    def begin(trainer: Any) -> None:
        trainers.append(trainer)
        if not is_worker:
            workers.extend(_start(words) for _ in range(options.workers - 1))

    with methods.quiet(), _ending(workers):
        result = _first(search, begin, workers)
        for worker in workers:
            worker.wait()
        if workers:  # takes over what a killed one left, and tests
            result = search(lambda trainer: None)
    if not is_worker:
        _print(result, trainers[0].monitor.name, _with_trials(words, 2 * options.trials))
        if options.figures:
            _draw(result, Path(trainers[0].config.root) / f"{study_name}.study")


def _first(
    search: Callable[[Callable[[Any], None]], StudyResult],
    begin: Callable[[Any], None],
    workers: Sequence[subprocess.Popen[bytes]],
) -> StudyResult | None:
    """Searches in this process, until no trial is left to begin."""
    try:
        return search(begin)
    except (StateError, NonFiniteError):  # none of its trials has finished, but others may
        if not workers:
            raise
        return None


def _space(place: str) -> Any:
    file, colon, name = place.rpartition(":")
    if not colon:
        raise ConfigError(
            f"--space must name a file or module and what is in it; got {place!r}. Write "
            f"--space {place}:space."
        )
    module = load_code(file)
    found = getattr(module, name, None)
    if not isinstance(found, Mapping) and not callable(found):
        known = [key for key, value in vars(module).items() if isinstance(value, Mapping)]
        raise ConfigError(
            f"{file!r} has no space {name!r}, a dict or a function of the trial. "
            f"{nearest(name, [key for key in known if key[0] != '_'])}"
        )
    return found


def _objectives(words: Sequence[str]) -> list[Any] | None:
    """Returns the objectives of the command line as monitors; None without one."""
    from distaff.metrics.monitor import Monitor

    pairs = [word.rpartition(":") if ":" in word else (word, "", None) for word in words]
    return [Monitor(name, mode, insist=True) for name, _, mode in pairs] or None  # ty: ignore[invalid-argument-type]  # which it checks


def _start(words: Sequence[str]) -> subprocess.Popen[bytes]:
    """Starts a worker, in a session of its own: Ctrl-C reaches it once, through this process."""
    from distaff.run.display import terminal

    code = "import sys; from distaff.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "tune", _WORKER, *words]
    # Its lines would break the table of this process, which shows all trials.
    out = None if terminal(sys.stdout) is None else subprocess.DEVNULL
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, start_new_session=True)


@contextlib.contextmanager
def _ending(workers: Sequence[subprocess.Popen[bytes]]) -> Generator[None]:
    """Ends the workers with this process, after they have saved their trials."""

    def end(number: int, frame: object) -> None:
        sys.exit(128 + number)

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except BaseException:
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                worker.send_signal(signal.SIGINT)
        for worker in workers:
            worker.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)


def _print(result: Any, metric: str, command: str) -> None:
    statuses = [trial.status for trial in result.trials]
    counts = ", ".join(f"{statuses.count(each)} {each}" for each in dict.fromkeys(statuses))
    best = result.best
    place = "" if best.path is None else f", {shown(best.path)}"
    print(f"{len(statuses)} trials: {counts}")
    print(f"best: trial {best.number}, {metric} {best.value:.6g}{place}")
    width = max(map(len, best.values), default=0)
    for path, value in best.values.items():
        print(f"  {path:<{width}}  {_text(value)}")
    tested = (f"{n}={x:.4f}" for n, x in result.metrics.items() if isinstance(x, int | float))
    if line := " ".join(tested):
        print(line)
    if best.objectives is not None:
        print("Pareto front:")
        for trial in result.front:
            found = {**trial.objectives, **trial.values}
            print(f"  trial {trial.number}  {'  '.join(f'{n}={_text(found[n])}' for n in found)}")
    print(f"To continue the study, run: {command}")


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _with_trials(words: Sequence[str], trials: int) -> str:
    """Returns the command with another number of trials."""
    mark = words.index("--") if "--" in words else len(words)
    own = list(words[:mark])
    for place, word in enumerate(own):
        if word == "--trials":
            own[place + 1] = str(trials)
            break
        if word.startswith("--trials="):
            own[place] = f"--trials={trials}"
            break
    else:
        own += ["--trials", str(trials)]
    return shlex.join(["distaff", "tune", *own, *words[mark:]])


def _draw(result: Any, folder: Path) -> None:
    try:
        plots = optional.load("matplotlib", extra="plots")
    except DistaffError:
        return
    figures = optional.load("studies.figures", extra="tune").figures(
        result.study, list(result.best.objectives or ())
    )
    for name, figure in figures.items():
        plots.save(figure, folder / f"{name}.png")
    if figures:
        print(f"figures: {', '.join(f'{name}.png' for name in figures)} in {shown(folder)}")
