"""The model card of an exported model, in the form that the Hugging Face Hub reads."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distaff.core.views.amounts import byte_text
from distaff.errors import ConfigError, MetricError, RunDirectoryError
from distaff.export.program import ExportedProgram
from distaff.loggers.history import History
from distaff.run.directory.run_directory import RunDirectory

_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|~:@])")
_MOST_TEXT = 300
_MOST_BLOCK = 8_000
_NOT_OF_A_MODEL = ("identity", "example_batch", "callback_names", "distaff", "trainer")
_HEAD = "---\nlibrary_name: jax\ntags:\n- jax\n- stablehlo\n- distaff\n{}---\n"
_NO_METRICS = "The run recorded no metrics of this model."
_NO_RUN = "Not recorded: the model was exported without the files of its run."
_OF_THE_MODEL = "As the run recorded them for these weights, after {:,} updates."


def check_license(name: str | None) -> None:
    """Checks the identifier of a licence.

    Raises:
        ConfigError: it is not one word, such as "apache-2.0".
    """
    if name is not None and not _LICENSE.fullmatch(name):
        raise ConfigError(
            f"license must be an identifier, such as 'apache-2.0' or 'mit'; got {name!r}. "
            "Put other terms into the file README.md of the exported folder."
        )


class RunFacts(NamedTuple):
    """What the files of a run say about a model.

    Attributes:
        name: name and version of the run, such as "digits/0001"; None if its files are unknown.
        config: its record.
        metrics: metrics of the exported model by name.
        table: the table of its layers.
    """

    name: str | None = None
    config: Mapping[str, Any] = {}
    metrics: Mapping[str, float] = {}
    table: str = ""

    @classmethod
    def read(cls, path: Path, step: int, is_of_model: Callable[[str], bool]) -> RunFacts:
        """Reads the facts about the model that a run had after `step` updates.

        Files that are missing or damaged count as empty.

        Args:
            path: the directory of the run.
            step: completed updates of the exported model.
            is_of_model: returns whether a metric is of the exported weights, by its name.

        Raises:
            RunDirectoryError: there is no directory at this path.
        """
        run = RunDirectory.open(path)
        table = run.path / "model.txt"
        found = {**_validated(run.path, step), **_tested(_read(run, "status.json"), step)}
        return cls(
            f"{run.path.parent.name}/{run.path.name}",
            _read(run, "config.json"),
            {name: value for name, value in found.items() if is_of_model(name)},
            table.read_text("utf-8", errors="replace") if table.is_file() else "",
        )


def model_card(
    facts: Mapping[str, Any], program: ExportedProgram, run: RunFacts, license: str | None
) -> str:
    """Returns the model card as Markdown. Texts of the run are escaped.

    Args:
        facts: the description of the exported model, `model.json`.
        program: what is exported.
        run: what is known about the run.
        license: identifier of the licence, such as "apache-2.0".
    """
    head = _HEAD.format(f"license: {json.dumps(license)}\n" if license else "")
    size = byte_text(sum(array.nbytes for array in program.weights.values()))
    kind = str(_of(run.config, "model").get("$class", "")).rpartition(":")[2]
    parts = [
        f"# {_text(run.name or facts['trainer'])}",
        f"The model of {_code(facts['trainer'])}{f' with {_code(kind)}' if kind else ''}: "
        f"{facts['num_parameters']:,} parameters ({size} of weights), after {facts['step']:,} "
        f"optimizer updates, with the weights {_code(facts['weights'])}.",
        "## How to use it",
        "It needs the packages jax, numpy and flatbuffers.",
        _fenced(
            "from load import load  # in this folder\n\npredict = load()\n"
            f"outputs = {call(program)}",
            "python",
        ),
        _forms("input", program.inputs),
        _forms("output", program.outputs),
        *_columns(facts["coding"]),
        "JAX reads an exported program for at least six months after the version that wrote it, "
        f"{facts['versions']['jax']}. After that, export the run again: "
        "`distaff export RUN FOLDER`.",
        "## Metrics",
        *_metrics(run, facts["step"]),
        "## Data",
        *_data(run),
        "## Configuration",
        _configuration(run),
        "## Model",
        _fenced(run.table or _weights(program)),
        "## Versions",
        _table(("package", "version"), [(n, v) for n, v in facts["versions"].items()]),
        "## License",
        _text(license) if license else "Not stated.",
    ]
    return head + "\n" + "\n\n".join(parts) + "\n"


def call(program: ExportedProgram) -> str:
    """Returns a call of the exported model as code, with the form of a single input."""
    forms = list(program.inputs.values())
    shown = f"predict({', '.join(f'{name}=...' for name in program.inputs)})"
    return f"{shown}  # {forms[0]['dtype']} {_shape(forms[0])}" if len(forms) == 1 else shown


def _columns(coding: Mapping[str, Any] | None) -> Iterator[str]:
    """Yields how columns of the data frame become inputs, and what the outputs stand for."""
    if coding is None:
        return
    yield (
        "The inputs are columns of a data frame. Each category is an integer, its place in the "
        "list; `model.json` has the lists as `coding`."
    )
    rows = [("numbers", name, "") for name in coding["numbers"]]
    rows += [("category", n, ", ".join(map(str, x))) for n, x in coding["categories"].items()]
    if coding["labels"] is not None:
        rows.append(("label", coding["target"], ", ".join(map(str, coding["labels"]))))
    yield _table(("kind", "column", "values, from 0"), rows)


def _metrics(run: RunFacts, step: int) -> Iterator[str]:
    if run.name is None:
        yield _NO_RUN
    elif not run.metrics:
        yield _NO_METRICS
    else:
        yield _OF_THE_MODEL.format(step)
        yield _table(("metric", "value"), [(n, f"{x:.6g}") for n, x in run.metrics.items()])


def _data(run: RunFacts) -> Iterator[str]:
    splits = {
        str(name): _mapping(of)
        for name, of in _of(run.config, "identity", "data").items()
        if isinstance(of, Mapping)
    }
    if not splits:
        yield _NO_RUN
        return
    rows = []
    for name, split in splits.items():
        known = split.get("facts")
        found = [each for each in (known if isinstance(known, list) else []) if _mapping(each)]
        sizes = [each["num_examples"] for each in found if "num_examples" in each]
        digests = [each["values"] for each in found if "values" in each]
        batch = _mapping(split.get("batch"))
        rows.append(
            (
                name,
                split.get("kind", ""),
                sizes[0] if sizes else "unknown",
                split.get("length") or "unknown",
                ", ".join(f"{key} {form}" for key, form in batch.items()),
                f"values {digests[0]}" if digests else f"first batch {split.get('first', '')}",
            )
        )
    yield _table(("split", "loader", "examples", "batches", "batch", "fingerprint"), rows)
    yield (
        "A fingerprint is a digest of all values, or of the first batch. The run records no name, "
        "source or licence of the data."
    )


def _configuration(run: RunFacts) -> str:
    shown = {key: x for key, x in run.config.items() if key not in _NOT_OF_A_MODEL}
    options = _mapping(shown.get("options"))
    if options:
        shown["options"] = {key: x for key, x in options.items() if key != "root"}
    return _fenced(json.dumps(shown, indent=2), "json") if shown else _NO_RUN


def _weights(program: ExportedProgram) -> str:
    lines = [f"{n}  {x.dtype}{list(x.shape)}" for n, x in program.weights.items()]
    return "\n".join(lines)


def _validated(path: Path, step: int) -> dict[str, float]:
    """Returns the validation metrics of a run after a step."""
    try:
        history = History.read(path)
    except (MetricError, RunDirectoryError):
        return {}
    found = {}
    for name, values in history.items():
        if not name.startswith("val") or values.ndim != 1 or values.dtype == object:
            continue
        at = [float(x) for x, s in zip(values, history.steps[name], strict=True) if s == step]
        found |= {name: at[-1]} if at and math.isfinite(at[-1]) else {}
    return found


def _tested(status: Mapping[str, Any], step: int) -> dict[str, float]:
    """Returns the test metrics of a run, if its best model, which is tested, is of this step."""
    best = status.get("best")
    tested = best.get("step") if isinstance(best, Mapping) else status.get("step")
    return {
        str(name): float(x)
        for name, x in _of(status, "metrics").items()
        if str(name).startswith("test") and isinstance(x, float | int) and tested == step
    }


def _forms(what: str, forms: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [(name, form["dtype"], _shape(form)) for name, form in forms.items()]
    return _table((what, "dtype", "shape"), rows)


def _shape(form: Mapping[str, Any]) -> str:
    return f"[{', '.join(map(str, form['shape']))}]"


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *([_text(x) for x in row] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _fenced(text: str, language: str = "") -> str:
    """Returns a code block, with a longer fence than any in the text."""
    text = text if len(text) <= _MOST_BLOCK else f"{text[:_MOST_BLOCK]}\n..."
    fence = "`" * (2 + max([1, *(len(run) + 1 for run in re.findall("`+", text))]))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _code(text: Any) -> str:
    return f"<code>{_text(text)}</code>"


def _text(value: Any) -> str:
    """Returns text that Markdown and HTML show as it is, on one line."""
    text = " ".join(str(value).split())
    text = text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]}..."
    return _MARKDOWN.sub(r"\\\1", html.escape(text, quote=False))


def _read(run: RunDirectory, name: str) -> Mapping[str, Any]:
    try:
        return _mapping(run.read_json(name))
    except RunDirectoryError:
        return {}


def _of(value: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    for key in keys:
        value = _mapping(value.get(key))
    return value


def _mapping(value: Any) -> Mapping[str, Any]:
    """Returns the value if it is a mapping, or an empty one: a file may be damaged."""
    return value if isinstance(value, Mapping) else {}
