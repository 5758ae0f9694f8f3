"""What a notebook shows: one output per run, updated in place; short descriptions of objects."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import logging
import pickle
import re
import sys
from html.parser import HTMLParser
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import distaff
from distaff import OptimizerConfig, TrainerConfig, TrainState, data, tasks, zoo
from distaff.core import optional
from distaff.run.display import NotebookDisplay, PlainDisplay, make_display, model_table
from distaff.run.display.lines import EpochLine
from line import Line, loader, trained

CELLS = """
from distaff import data, tasks, zoo
train, val, test = data.digits(batch_size=256)
trainer = tasks.Classifier(zoo.MLP((8, 10)), root=None)
# %%
result = trainer.train_model(train, val, test, num_epochs=4)
# %%
trainer.predict(test).shape
# %%
result
# %%
trainer.state
# %%
import contextlib, io
with contextlib.redirect_stdout(io.StringIO()) as text:
    trainer.train_model(train, val, num_epochs=1)
assert "epoch" in text.getvalue()
"""


class FakeClock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


class Cell:
    """The outputs of a cell: what each has shown, in order."""

    def __init__(self) -> None:
        self.outputs: list[list[tuple[str, str]]] = []

    def __call__(self) -> Any:
        shown: list[tuple[str, str]] = []
        self.outputs.append(shown)
        return type("Output", (), {"show": lambda _, page, text: shown.append((page, text))})()


class _Balance(HTMLParser):
    """Checks that every element is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def assert_whole(page: str) -> None:
    balance = _Balance()
    balance.feed(page)
    balance.close()
    assert balance.open == []


def words(page: str) -> str:
    return re.sub(r"<[^>]*>", " ", page)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def test_notebook_display_updates_one_output_of_a_run(clock):
    cell = Cell()
    display = NotebookDisplay(cell, clock=clock)
    display.start(5, 10)
    display.compiling("the model")
    display.print("a <line>")
    display.running()
    for step in range(1, 51):
        clock.seconds += 0.1
        display.advance(step, (step + 9) // 10, 64)
        display.update({"step/loss": 1 / step, "step/learning_rate": 1e-3})
        if step % 10 == 0:
            epoch, metrics = step // 10, {"train/loss": 1 / step, "val/loss": 2 / step}
            display.epoch_line(EpochLine(epoch, 5, step, metrics, 1.0, epoch == 3))
        if step == 35:
            during, _ = cell.outputs[0][-1]
    display.table({"test": {"test/loss": 0.25}})
    display.close()
    (shown,) = cell.outputs
    assert len(shown) <= 2 + 5 / 0.5 + 3
    for page, _ in shown:
        assert_whole(page)
    assert re.search(r'<progress value="0\.[67]\d*" max="1">', during)
    assert "left" in words(during)
    assert "lr 0.0010" in words(during)
    last, text = shown[-1]
    assert "<progress" not in last
    assert "a &lt;line&gt;" in last
    assert len(re.findall(r"<svg ", last)) == 1
    assert last.count("<tr>") == 1 + 5 + 2  # epochs, and the test
    assert words(last).split().count("*") == 1
    (best,) = (line for line in text.splitlines() if line.startswith("epoch 3/5"))
    assert best.endswith(" *")


def test_notebook_display_says_what_compiles_at_once(clock):
    cell = Cell()
    display = NotebookDisplay(cell, clock=clock)
    display.start(1, 1)
    display.compiling("the step")
    assert "compiling the step" in words(cell.outputs[0][-1][0])


@pytest.mark.slow
def test_notebook_display_keeps_the_last_epochs_of_a_long_run(clock):
    cell = Cell()
    display = NotebookDisplay(cell, clock=clock)
    display.start(5000, 1)
    for epoch in range(1, 5001):
        clock.seconds += 1
        display.epoch_line(
            EpochLine(epoch, 5000, epoch, {"train/loss": 1.0, "val/loss": 2.0}, 1.0, False)
        )
    page, text = cell.outputs[0][-1]
    assert len(page) < 40_000
    assert len(text) < 4_000
    assert "5000" in words(page)


def test_notebook_display_shows_no_output_for_a_short_evaluation(clock):
    cell = Cell()
    display = NotebookDisplay(cell, clock=clock)
    assert list(display.track("abc", "predict", 3)) == ["a", "b", "c"]
    assert cell.outputs == []
    for _ in display.track("abc", "predict", 3):
        clock.seconds += 1
    ((*_, (page, text)),) = cell.outputs
    assert (text, "<progress" in page) == ("predict: 3.0 s", False)


def test_notebook_display_gives_what_is_printed_outside_of_a_run_its_own_output(clock):
    cell = Cell()
    display = NotebookDisplay(cell, clock=clock)
    rows = [distaff.models.LayerRow("", "Net", "", (("params", "w", (3,), np.dtype("f4")),), None)]
    display.print(model_table(rows, "Net"))
    display.print("text")
    (((page, text),), ((other, _),)) = cell.outputs
    assert "total" in text
    assert "<details>" not in page
    assert "text" in other


def test_notebook_that_is_gone_ends_no_run(clock, caplog):
    class Gone:
        def show(self, html: str, text: str) -> None:
            raise ConnectionError("the front end is gone")

    display = NotebookDisplay(Gone, clock=clock)
    display.start(1, 1)
    with caplog.at_level(logging.WARNING):
        display.compiling("the model")
        display.print("text")
        display.close()
    assert caplog.text.count("the front end is gone") == 1


def test_make_display_needs_the_stream_of_a_cell(monkeypatch):
    class Stream:
        """The standard output of a kernel."""

        __module__ = "ipykernel.iostream"

    class Notebook:
        CellOutput = Cell()

        def is_in_cell(self, stream: Any) -> bool:
            return isinstance(stream, Stream)

    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    monkeypatch.setattr(optional, "load", lambda name, extra: Notebook())
    assert type(make_display(True, Stream())) is NotebookDisplay
    assert type(make_display(True, io.StringIO())) is PlainDisplay


@pytest.mark.slow
def test_a_notebook_shows_one_output_per_run_and_none_that_is_empty(monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", ":".join(path for path in sys.path if path))
    book = nbformat.v4.new_notebook()
    book.cells = [nbformat.v4.new_code_cell(cell.strip()) for cell in CELLS.split("# %%\n")]
    client.NotebookClient(book, timeout=200, kernel_name="python3").execute()
    outputs = [cell.outputs for cell in book.cells]
    assert [len(each) for each in outputs] == [0, 1, 1, 1, 1, 0], json.dumps(outputs)[:4000]
    for output in (each for cell in outputs for each in cell):
        assert output.output_type in ("display_data", "execute_result")
        assert output.data["text/plain"].strip()
    run = outputs[1][0].data
    assert_whole(run["text/html"])
    assert "<svg" in run["text/html"]
    assert "<progress" not in run["text/html"]
    assert run["text/plain"].count("epoch ") >= 4
    assert outputs[2][0].data["text/plain"] == "(360, 10)"
    assert outputs[3][0].data["text/plain"].startswith("TrainResult(finished, step 16, epoch 4, ")
    assert len(outputs[4][0].data["text/html"]) < 200_000


def test_trainers_and_states_are_described_in_a_line():
    assert repr(Line(root=None)) == "Line(Functions, no parameters yet)"
    run = trained(Line, root=None)
    assert repr(run.trainer) == "Line(Functions, 3 parameters, step 4, epoch 1)"
    assert repr(run.trainer.state) == "TrainState(step 4, 3 parameters)"
    assert repr(tasks.Classifier(zoo.MLP((2,)))) == "Classifier(MLP, no parameters yet)"
    for each in (run.trainer, run.result, run.result.history, loader()):
        assert_whole(each._repr_html_())
    assert "TrainState(step 4, 3 parameters)" in run.trainer.state._repr_html_()


def test_result_is_described_by_its_test_metrics():
    result = trained(Line).result
    loss = result.metrics["test/loss"]
    assert repr(result) == (
        f"TrainResult(finished, step 8, epoch 2, test/loss {loss:.4g}, path={str(result.path)!r})"
    )
    page = result._repr_html_()
    assert_whole(page)
    assert "<svg" in page
    assert str(result.path) in words(page)


class Extended(TrainState):
    extra: Any = None


def test_state_is_described_where_its_values_cannot_be_read():
    state = Extended.create(params={"w": jnp.ones(3)}, apply_fn=lambda: None)
    assert repr(state) == "Extended(step 0, 3 parameters)"
    said: list[str] = []
    jax.jit(lambda each: said.append(repr(each)) or each.step)(state)
    assert said == ["Extended(step int32[], 3 parameters)"]
    donated = jax.jit(lambda each: jax.tree.map(lambda x: x + 1, each), donate_argnums=0)
    donated(state)
    assert repr(state).startswith("Extended(step ")
    assert "w" in state._repr_html_()


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnConfig(TrainerConfig):
    width: int = 3


def test_configs_are_described_by_what_was_changed():
    assert repr(TrainerConfig()) == "TrainerConfig()"
    assert repr(OwnConfig(seed=7, width=4)) == "OwnConfig(seed=7, width=4)"
    assert repr(OptimizerConfig()) == "OptimizerConfig('adamw')"
    config = OptimizerConfig("sgd", learning_rate=0.5, options={"momentum": 0.9})
    assert eval(repr(config), {"OptimizerConfig": OptimizerConfig}) == config
    page = OwnConfig(seed=7)._repr_html_()
    assert_whole(page)
    assert words(page).index("seed") < words(page).index("defaults") < words(page).index("width")


def test_loaders_are_described_by_their_size_and_arrays():
    arrays = {"x": np.zeros((10, 3), np.float32), "y": np.zeros(10, np.int32)}
    loader = data.ArrayLoader(arrays, 4, shuffle=True)
    text = "ArrayLoader(10 examples, 2 batches of 4, shuffled, x float32[10, 3], y int32[10])"
    assert repr(loader) == text
    assert "float32" in words(loader._repr_html_())
    assert (
        repr(data.MappedLoader(loader, lambda batch: batch)) == f"MappedLoader({text}, 2 batches)"
    )
    assert repr(data.Stream([arrays] * 3)) == "Stream(list, 3 batches)"

    def batches():
        yield arrays

    assert repr(data.Stream(batches)) == "Stream(batches)"


def test_descriptions_change_nothing_else():
    result = trained(Line).result
    assert pickle.loads(pickle.dumps(result)) == result
    config = OwnConfig(seed=7)
    assert copy.deepcopy(config) == config == dataclasses.replace(OwnConfig(), seed=7)
    assert tasks.Classifier(zoo.MLP((2,)), seed=7).config.seed == 7
    assert isinstance(nn.Dense(1), nn.Module)
