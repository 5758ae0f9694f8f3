"""Evaluations see every example once, in the data's own order, and leave the loader where it is."""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

from distaff import data, tasks
from distaff.data.loader import in_order
from distaff.errors import BatchError

X = np.arange(22, dtype=np.float32)[:, None]
ARRAYS = {"x": X, "y": 2 * X + 1}
ROWS = [{"x": x, "y": 2 * x + 1} for x in X]


def shuffled() -> data.ArrayLoader:
    return data.ArrayLoader(ARRAYS, 4, shuffle=True, seed=1)


class Reversed(data.ArrayLoader):
    """A loader of one's own kind, which has its own way to make a batch."""

    def gathered(self, rows: np.ndarray) -> Any:
        return jax.tree.map(np.negative, super().gathered(rows))


class Foreign:
    """A loader that has no more than it must: shuffled, and with a short last batch dropped."""

    def __init__(self) -> None:
        self._inner = shuffled()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._inner)

    def get_state(self) -> dict[str, Any]:
        return self._inner.get_state()

    def set_state(self, state: Any) -> None:
        self._inner.set_state(state)


def torch_loader() -> Any:
    torch: Any = importlib.import_module("torch")
    generator = torch.Generator().manual_seed(0)
    return data.as_loader(
        torch.utils.data.DataLoader(ROWS, 4, shuffle=True, drop_last=True, generator=generator)
    )


def torch_part() -> Any:
    torch: Any = importlib.import_module("torch")
    sampler = torch.utils.data.SubsetRandomSampler(range(22))
    return data.as_loader(torch.utils.data.DataLoader([*ROWS, *ROWS], 4, sampler=sampler))


def dataset(iterable: bool) -> Any:
    datasets: Any = importlib.import_module("datasets")
    table = datasets.Dataset.from_dict(ARRAYS)
    return data.from_datasets(table.to_iterable_dataset() if iterable else table, 4, shuffle=True)


LOADERS: dict[str, Callable[[], Any]] = {
    "arrays": shuffled,
    "mapped": lambda: data.MappedLoader(shuffled(), lambda batch: batch),
    "examples": lambda: data.from_examples(ROWS, 4, shuffle=True),
    "function": lambda: data.Stream(lambda: iter(data.ArrayLoader(ARRAYS, 4))),
    "list": lambda: data.as_loader(list(data.ArrayLoader(ARRAYS, 4))),
    "torch": torch_loader,
    "part of a dataset, torch": torch_part,
    "datasets": lambda: dataset(iterable=False),
    "iterable datasets": lambda: dataset(iterable=True),
}


PEERS = {
    **dict.fromkeys(("torch", "part of a dataset, torch"), "torch"),
    **dict.fromkeys(("datasets", "iterable datasets"), "datasets"),
}
KINDS = [
    pytest.param(kind, marks=pytest.mark.peer(PEERS[kind]) if kind in PEERS else ())
    for kind in LOADERS
]


def rows_of(loader: Any) -> list[float]:
    return np.concatenate([np.ravel(batch["x"]) for batch in loader]).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_in_order_has_every_example_once_and_moves_nothing(kind):
    loader, other = LOADERS[kind](), LOADERS[kind]()
    running, plain = iter(loader), iter(other)
    first, expected = next(running), next(plain)
    view = in_order(loader)
    for _ in range(2):
        assert rows_of(view) == X[:, 0].tolist()
    if kind != "part of a dataset, torch":  # its sampler draws from the global generator
        assert np.array_equal(first["x"], expected["x"])
        assert rows_of(running) == rows_of(plain)
        assert rows_of(loader) == rows_of(other)


def test_in_order_of_limited_packed_bucketed_and_mixed_loaders():
    assert rows_of(in_order(data.Limited(shuffled(), 2))) == X[:8, 0].tolist()
    tokens = [np.arange(length) for length in (3, 5, 2, 4, 1)]
    for make in (
        lambda: data.packed(tokens, 5, 2, shuffle=True),
        lambda: data.bucketed(tokens, (2, 5), 2, shuffle=True),
    ):
        view = in_order(make())
        seen = [batch["tokens"].sum() for batch in view]
        assert sum(seen) == sum(each.sum() for each in tokens)
        assert seen == [batch["tokens"].sum() for batch in view]
    mixture = data.Mixture({"a": shuffled(), "b": shuffled()}, {"a": 1, "b": 1})
    place = mixture.get_state()
    assert rows_of(in_order(mixture)) == rows_of(in_order(mixture))
    assert mixture.get_state() == place
    assert rows_of(in_order(mixture))[:4] == [0, 0, 1, 1]


def test_in_order_keeps_what_a_subclass_does():
    loader = Reversed(ARRAYS, 4, shuffle=True)
    assert rows_of(in_order(loader)) == (-X[:, 0]).tolist()


class Trained(tasks.Regressor):
    looks_at: Any = None
    before: Any = None

    def on_training_epoch_end(self, epoch, metrics):
        if self.looks_at is not None:
            self.before = self.eval_model(self.looks_at, "clean/"), self.predict(self.looks_at)


def train(loader: Any, looks_at: Any = None, val: Any = None) -> Trained:
    options = {"root": None, "enable_progress_bar": False, "steps_per_call": 1}
    trainer = Trained(nn.Dense(1), optimizer=optax.sgd(1e-3), **options)
    trainer.looks_at = looks_at
    trainer.train_model(loader, val, num_epochs=2)
    return trainer


@pytest.mark.parametrize(
    "make", [shuffled, Foreign, lambda: data.from_examples(ROWS, 4, shuffle=True)]
)
def test_evaluations_of_the_train_loader_leave_the_training_as_it_is(make):
    loader = make()
    plain, looking = train(make()), train(loader, looks_at=loader, val=loader)
    jax.tree.map(np.testing.assert_array_equal, plain.state.params, looking.state.params)
    metrics, outputs = looking.before
    if make is not Foreign:
        assert outputs.shape == (22, 1)
        assert np.all(np.diff(outputs[:, 0]) > 0) or np.all(np.diff(outputs[:, 0]) < 0)
        assert metrics["clean/loss"] == pytest.approx(np.square(outputs - ARRAYS["y"]).mean(), 1e-5)


def test_predict_and_eval_model_count_each_example_of_a_shuffled_loader():
    trainer = train(shuffled())
    for loader in (shuffled(), iter(data.ArrayLoader(ARRAYS, 4))):
        np.testing.assert_array_equal(
            trainer.predict(loader), trainer.predict(data.ArrayLoader(ARRAYS, 22))[: len(X)]
        )
    exact = trainer.eval_model(data.ArrayLoader(ARRAYS, 22))["loss"]
    assert trainer.eval_model(shuffled())["loss"] == pytest.approx(exact, rel=1e-6)


def test_a_foreign_loader_is_not_evaluated_while_it_is_trained_on():
    loader = Foreign()

    class Within(Trained):
        def loss_fn(self, params, batch, ctx):
            return super().loss_fn(params, batch, ctx)

    class Look:
        def __init__(self, trainer: Any) -> None:
            self.trainer = trainer

    from distaff.callbacks import Callback

    class InStep(Callback):
        def on_step_end(self, info):
            trainers[0].eval_model(loader)

    trainers: list[Any] = []
    trainer = Within(
        nn.Dense(1),
        optimizer=optax.sgd(1e-3),
        root=None,
        enable_progress_bar=False,
        callbacks=[InStep()],
    )
    trainers.append(trainer)
    with pytest.raises(BatchError, match=r"is being trained on.*in_order\(\)"):
        trainer.train_model(loader, num_epochs=1)


class OneReader:
    """Examples that must not be read by two threads at once."""

    def __init__(self) -> None:
        self.readers, self.threads = 0, set()

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        self.readers += 1
        assert self.readers == 1
        self.threads.add(threading.get_ident())
        time.sleep(2e-3)
        self.readers -= 1
        return {"x": np.float32([index]), "y": np.float32([index])}


def test_data_that_is_read_ahead_is_not_read_by_an_evaluation_at_the_same_time():
    from distaff.callbacks import Callback

    examples = OneReader()
    loader = data.from_examples(examples, 8, shuffle=True)
    trainers: list[Any] = []

    class InStep(Callback):
        def on_step_end(self, info):
            if info.step in (3, 4):
                assert len(trainers[0].predict(loader)) == 40

    options = {"root": None, "enable_progress_bar": False, "callbacks": [InStep()]}
    trainer = tasks.Regressor(nn.Dense(1), optimizer=optax.sgd(1e-5), **options)
    trainers.append(trainer)
    trainer.train_model(loader, num_epochs=2)
    assert trainer.step == 10
    assert len(examples.threads) > 1


def test_an_evaluation_that_moves_a_loader_for_good_says_so():
    class Forgetful(Foreign):
        def set_state(self, state):
            if state != self.get_state():
                raise BatchError("it knows no way back")

    trainer = train(shuffled())
    with pytest.warns(UserWarning, match="changed the position of the predict loader.*no way back"):
        assert len(trainer.predict(Forgetful())) == 20
