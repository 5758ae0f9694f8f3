"""The real PyTorch, torchdata, Hugging Face `datasets` and TensorFlow, for `make test-peers`."""

from __future__ import annotations

import importlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import jax
import numpy as np
import pytest

from distaff import Callback, data, tasks, zoo
from distaff.data.loader import in_order
from distaff.errors import BatchError, ChangedBatchesError
from distaff.testing.loaders import LoaderContract, assert_batches_equal

X = np.arange(44.0, dtype=np.float32).reshape(22, 2)
Y = np.arange(22) % 3
CONTRACT = [name for name in dir(LoaderContract) if name.startswith("test_")]

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def assert_keeps_contract(make: Callable[[], data.Loader]) -> None:
    """Runs every assertion of the contract."""

    class Made(LoaderContract):
        def make_loader(self) -> data.Loader:
            return make()

    assert "test_state_resumes_exactly_at_every_position" in CONTRACT
    for name in CONTRACT:
        getattr(Made(), name)()


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("module", "name"),
    [
        pytest.param("torch.utils.data", "DataLoader", marks=pytest.mark.peer("torch")),
        pytest.param(
            "torchdata.stateful_dataloader",
            "StatefulDataLoader",
            marks=pytest.mark.peer("torch", "torchdata"),
        ),
    ],
)
def test_torch_loader_keeps_the_contract(module: str, name: str) -> None:
    torch: Any = importlib.import_module("torch")
    make = getattr(importlib.import_module(module), name)
    rows = torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))

    def loader() -> data.Loader:
        generator = torch.Generator().manual_seed(0)
        return data.as_loader(make(rows, 4, shuffle=True, generator=generator))

    assert_keeps_contract(loader)


@pytest.mark.peer("datasets")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
def test_dataset_keeps_the_contract(shuffle: bool, streaming: bool) -> None:
    datasets: Any = importlib.import_module("datasets")
    held = importlib.import_module("pyarrow").table({"x": X.tolist(), "label": Y.tolist()})
    table = datasets.Dataset(datasets.table.InMemoryTable(held), fingerprint="given")

    def loader() -> data.Loader:
        rows = table.to_iterable_dataset() if streaming else table
        return data.from_datasets(rows, 4, shuffle=shuffle)

    assert_keeps_contract(loader)


def tensorflow() -> Any:
    return importlib.import_module("tensorflow")


def rows() -> Any:
    return tensorflow().data.Dataset.from_tensor_slices({"x": X, "label": Y})


def nested() -> Any:
    tensors = ({"x": X, "more": {"square": X**2}}, Y)
    return tensorflow().data.Dataset.from_tensor_slices(tensors).batch(4)


def parallel() -> Any:
    mapped = rows().shuffle(9, seed=1).map(lambda row: row, num_parallel_calls=2)
    return mapped.shuffle(5, seed=2).batch(4).prefetch(2)


def generated() -> Any:
    tf = tensorflow()
    signature = {"x": tf.TensorSpec((2,)), "label": tf.TensorSpec((), tf.int64)}

    def examples() -> Iterator[Any]:
        return ({"x": x, "label": label} for x, label in zip(X, Y, strict=True))

    made = tf.data.Dataset.from_generator(examples, output_signature=signature)
    return made.shuffle(22, seed=1).batch(4)


PIPELINES: dict[str, Callable[[], Any]] = {
    "batched": lambda: rows().batch(4),
    "nested": nested,
    "without remainder": lambda: rows().batch(4, drop_remainder=True),
    "shuffled": lambda: rows().shuffle(22, seed=1).batch(4),
    "shuffled once": lambda: rows().shuffle(22, seed=1, reshuffle_each_iteration=False).batch(4),
    "in parallel": parallel,
    "repeated": lambda: rows().shuffle(22, seed=1).repeat(2).batch(4),
    "cached": lambda: rows().cache().shuffle(22, seed=1).batch(4),
    "filtered": lambda: rows().filter(lambda row: row["label"] > 0).batch(4),
    "generated": generated,
}


@pytest.mark.peer("tensorflow")
@pytest.mark.parametrize("name", PIPELINES)
def test_tensorflow_dataset_keeps_the_contract(name: str) -> None:
    assert_keeps_contract(lambda: data.as_loader(PIPELINES[name]()))


def seen(batches: Any) -> list[int]:
    return [int(x) // 2 for batch in batches for x in batch["x"][:, 0]]


@pytest.mark.peer("tensorflow")
def test_tensorflow_batches_are_arrays_of_their_dtypes_with_a_short_last_one() -> None:
    tf = tensorflow()
    loader = data.as_loader(rows().batch(4))
    batches = list(loader)
    assert [len(batch["x"]) for batch in batches] == [4, 4, 4, 4, 4, 2]
    assert {type(leaf) for leaf in jax.tree.leaves(batches)} == {np.ndarray}
    assert (batches[0]["x"].dtype, batches[0]["label"].dtype) == (np.float32, np.int64)
    assert batches[0]["x"].flags.writeable
    assert seen(batches) == list(range(22))
    half = data.as_loader(tf.data.Dataset.from_tensor_slices(tf.cast(X, tf.bfloat16)).batch(4))
    assert next(iter(half)).dtype == jax.numpy.bfloat16
    lengths = [
        data.num_batches(data.as_loader(PIPELINES[name]()))
        for name in ("batched", "without remainder", "repeated", "filtered")
    ]
    assert lengths == [6, 5, 11, None]
    assert data.num_batches(data.as_loader(rows().batch(4).repeat())) is None


@pytest.mark.peer("tensorflow")
@pytest.mark.parametrize("position", [0, 2, 6])
@pytest.mark.parametrize("name", ["shuffled", "in parallel", "repeated", "cached", "generated"])
def test_evaluation_of_a_shuffled_tensorflow_dataset_changes_no_order(
    name: str, position: int
) -> None:
    if name == "repeated":
        position += 5  # an evaluation before the last repetition begins would change the order

    def epochs(*, evaluated: bool) -> list[Any]:
        dataset = PIPELINES[name]()
        loader = data.as_loader(dataset)
        data.first_batch(loader)
        found = []
        for _ in range(3):
            running = iter(loader)
            found += islice(running, position)
            for view in [in_order(loader), in_order(data.as_loader(dataset))] * evaluated:
                assert sorted(set(seen(view))) == list(range(22))
                next(iter(view))
            found += running
        return found

    assert_batches_equal(epochs(evaluated=True), epochs(evaluated=False))


@pytest.mark.peer("tensorflow")
def test_evaluation_of_an_endless_tensorflow_dataset_changes_no_order() -> None:
    def batches(*, evaluated: bool) -> list[Any]:
        loader = data.as_loader(rows().shuffle(22, seed=1).repeat().batch(4))
        running = iter(loader)
        found = list(islice(running, 3))
        for view in [in_order(loader)] * evaluated:
            list(islice(view, 2))
        return [*found, *islice(running, 20)]

    assert_batches_equal(batches(evaluated=True), batches(evaluated=False))


@pytest.mark.peer("tensorflow")
def test_evaluation_of_a_tensorflow_dataset_without_a_position_is_a_warning() -> None:
    tf = tensorflow()
    noisy = rows().batch(4).map(lambda row: {"x": row["x"] + 0 * tf.random.uniform([], seed=1)})
    loader = data.as_loader(noisy)
    assert seen(in_order(loader)) == list(range(22))  # nothing is trained on it yet
    next(iter(loader))
    with pytest.warns(UserWarning, match="cannot save its position: .*stateful"):
        assert seen(in_order(loader)) == list(range(22))


@pytest.mark.peer("tensorflow")
def test_tensorflow_dataset_that_shuffles_without_a_seed_is_not_resumed() -> None:
    def loader() -> Any:
        return data.as_loader(rows().shuffle(22).batch(4))

    first = loader()
    list(islice(first, 3))
    with pytest.raises(ChangedBatchesError, match="Seed its shuffling"):
        loader().set_state(json.loads(json.dumps(first.get_state())))


class CtrlC(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, info: Any) -> None:
        if info.step == self.step:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.peer("tensorflow")
@pytest.mark.parametrize("name", ["shuffled", "endless"])
def test_run_on_a_tensorflow_dataset_that_it_evaluates_too_is_resumed(name: str) -> None:
    def dataset() -> Any:
        repeated = rows().shuffle(22, seed=1)
        return (repeated.repeat() if name == "endless" else repeated).batch(4)

    def run(root: str, *, stop: int = 0) -> Any:
        train = dataset()
        options: dict[str, Any] = {"callbacks": [CtrlC(stop)], "enable_progress_bar": False}
        val = train if name == "shuffled" else rows().batch(4)
        trainer = tasks.Classifier(zoo.MLP((4, 3)), root=root, **options)
        return trainer.train_model(train, val, num_epochs=3, steps_per_epoch=6)

    def rows_of(result: Any) -> list[dict[str, Any]]:
        lines = (result.path / "metrics.jsonl").read_text().splitlines()
        return [{**json.loads(line), "time": None} for line in lines]

    whole = run("whole")
    stopped = run("stopped", stop=9)
    resumed = run("stopped")
    assert (whole.status, stopped.status, resumed.status) == ("finished", "interrupted", "finished")
    assert stopped.path == resumed.path
    assert rows_of(resumed) == rows_of(whole)


@pytest.mark.peer("tensorflow")
def test_wrong_tensorflow_dataset_is_an_error_with_the_leaf() -> None:
    tf = tensorflow()
    trainer = tasks.Classifier(zoo.MLP((4, 3)), root=None, enable_progress_bar=False)
    ragged = tf.data.Dataset.from_tensor_slices(tf.ragged.constant([[1], [2, 3], [4]]))
    texts = tf.data.Dataset.from_tensor_slices({"x": ["a", "b"], "label": [0, 1]})
    for dataset, text in (
        (ragged.batch(2), "holds arrays of several shapes. Pad all examples"),
        (texts.batch(2), "'x' has dtype"),
        (rows(), "must have a leading axis .* 'label' is a scalar"),
    ):
        with pytest.raises(BatchError, match=text):
            trainer.train_model(dataset, num_epochs=1)
