"""Data of PyTorch, Hugging Face and TensorFlow: stand-ins that have their names and behaviour.

`test_real_loaders.py` has the real ones.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from distaff import data, tasks, zoo
from distaff.data.adapters import torch as torch_adapter
from distaff.data.adapters.adapters import KINDS
from distaff.data.loader import in_order
from distaff.errors import BatchError, ChangedBatchesError, ConfigError
from distaff.testing.loaders import LoaderContract, assert_batches_equal

X = np.arange(44.0, dtype=np.float32).reshape(22, 2)
Y = np.arange(22) % 3


def named(module: str, name: str) -> Callable[[type], type]:
    """Gives a stand-in the module and the name that the real class has."""

    def rename(cls: type) -> type:
        cls.__module__, cls.__name__, cls.__qualname__ = module, name, name
        return cls

    return rename


@named("torch", "Tensor")
class Tensor:
    def __init__(self, values: Any, dtype: str = "") -> None:
        self.values, self.dtype, self.detached = np.asarray(values), dtype, False

    def detach(self) -> Tensor:
        found = Tensor(self.values, self.dtype)
        found.detached = True
        return found

    def cpu(self) -> Tensor:
        return self

    def float(self) -> Tensor:
        return Tensor(self.values.astype(np.float32))

    def numpy(self) -> np.ndarray:
        if self.dtype == "bfloat16":
            raise TypeError("Got unsupported ScalarType BFloat16")
        return self.values


@named("torch.nn.parameter", "Parameter")
class Parameter(Tensor):
    """Of which the base class is the tensor."""


class Generator:
    """A random generator as the one that a torch sampler has: its state is a tensor of bytes."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def get_state(self) -> Tensor:
        text = json.dumps(self.rng.bit_generator.state)
        return Tensor(np.frombuffer(text.encode(), np.uint8))

    def set_state(self, tensor: Tensor) -> None:
        self.rng.bit_generator.state = json.loads(tensor.numpy().tobytes())


@named("torch.utils.data.sampler", "RandomSampler")
class RandomSampler:
    """Says that the order is random."""


@named("torch.utils.data.dataloader", "DataLoader")
class DataLoader:
    """Yields lists `[x, y]` of tensors, as the default collation does."""

    num_workers, collate_fn, worker_init_fn, multiprocessing_context, timeout = (
        0,
        None,
        None,
        None,
        0,
    )
    batch_sampler, dataset = None, ()

    def __init__(
        self,
        source: Any = None,
        batch_size: int | None = None,
        *,
        generator: Generator | None = None,
        rows: int = 11,
        step: int = 3,
        **options: Any,
    ) -> None:
        # One that is made for an evaluation gets a dataset first.
        self.generator = source if isinstance(source, Generator) else generator
        self.rows, self.step = rows, batch_size or step
        self.batch_size, self.sampler = self.step, RandomSampler()

    def __len__(self) -> int:
        return -(-self.rows // self.step)

    def order(self) -> np.ndarray:
        return self.generator.rng.permutation(self.rows) if self.generator else np.arange(self.rows)

    def batches(self, order: np.ndarray) -> Iterator[Any]:
        for start in range(0, self.rows, self.step):
            part = order[start : start + self.step]
            yield [Tensor(X[part]), {"label": Tensor(Y[part])}]

    def __iter__(self) -> Iterator[Any]:
        return self.batches(self.order())


@named("torchdata.stateful_dataloader.stateful_dataloader", "StatefulDataLoader")
class StatefulDataLoader(DataLoader):
    """Behaves as torchdata's: a loaded state is where the next iteration goes on.

    Where that was at its end, the next iteration begins the epoch after it.
    """

    started = 0
    running: dict[str, Any] | None = None
    loaded: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        self.started += 1
        assert self.generator is not None
        loaded, self.loaded = self.loaded, None
        done = 0
        if loaded is not None:
            self.generator.set_state(loaded["sampler"]["generator"])
            done = 0 if loaded["finished"] else loaded["sampler"]["yielded"]
        begun_with = self.generator.get_state()
        running = {"sampler": {"generator": begun_with, "yielded": done}, "finished": False}
        self.running = {**running, "extra": (1, b"two", [None, 0.5]), 0: "worker"}
        return self.rest(self.order(), self.running)

    def rest(self, order: np.ndarray, running: dict[Any, Any]) -> Iterator[Any]:
        for batch in islice(self.batches(order), running["sampler"]["yielded"], None):
            running["sampler"]["yielded"] += 1
            yield batch
        running["finished"] = True
        running["sampler"]["generator"] = self.generator.get_state()

    def state_dict(self) -> dict[str, Any]:
        assert self.running is not None
        return {**self.running, "sampler": dict(self.running["sampler"])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["extra"] == (1, b"two", [None, 0.5])
        assert state[0] == "worker"
        self.loaded = state


@pytest.fixture(autouse=True)
def fake_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has what makes a tensor of a position."""
    utils = SimpleNamespace(DataLoader=DataLoader, IterableDataset=tuple)
    torch = SimpleNamespace(
        from_numpy=Tensor, Generator=lambda: None, utils=SimpleNamespace(data=utils)
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    train, errors = SimpleNamespace(Checkpoint=Checkpoint), SimpleNamespace(OpError=OpError)
    monkeypatch.setitem(sys.modules, "tensorflow", SimpleNamespace(train=train, errors=errors))


class TestTorchLoader(LoaderContract):
    def make_loader(self) -> data.Loader:
        return data.as_loader(DataLoader(Generator(3)))


class TestStatefulTorchLoader(LoaderContract):
    def make_loader(self) -> data.Loader:
        return data.as_loader(StatefulDataLoader(Generator(3)))


def test_torch_batches_keep_their_structure_and_become_arrays_that_are_copied_once():
    (image, rest) = next(iter(data.as_loader(DataLoader())))
    assert (type(image), image.dtype, rest["label"].dtype) == (np.ndarray, np.float32, np.int64)
    np.testing.assert_array_equal(image, X[:3])
    held = Tensor(X)
    assert np.shares_memory(torch_adapter.as_arrays([held])[0], X)  # the Stream makes the one copy
    assert next(iter(data.as_loader(DataLoader()))) is not None
    assert data.num_batches(data.as_loader(DataLoader())) == 4


def test_torch_tensors_of_any_kind_become_arrays():
    half = Tensor(np.array([1.5, -2.0], jnp.bfloat16), "bfloat16")
    found = torch_adapter.as_arrays({"half": half, "weight": Parameter(X), "name": "as it is"})
    assert found["half"].dtype == jnp.bfloat16
    assert found["half"].tolist() == [1.5, -2.0]
    assert found["weight"] is X
    assert found["name"] == "as it is"


def test_torch_loader_that_shuffles_without_a_seed_is_not_gone_on_with():
    loader = data.as_loader(DataLoader(Generator(1)))
    list(islice(loader, 2))
    with pytest.raises(ChangedBatchesError, match="Seed its shuffling"):
        data.as_loader(DataLoader(Generator(2))).set_state(loader.get_state())


def test_torch_loader_without_a_length_is_taken():
    class Endless(DataLoader):
        def __len__(self) -> int:
            raise TypeError("an IterableDataset has no length")

    assert data.num_batches(data.as_loader(Endless())) is None


def test_torch_loader_that_is_a_loader_already_is_taken_as_it_is():
    class Own(DataLoader):
        def get_state(self) -> dict[str, int]:
            return {}

        def set_state(self, state: Any) -> None: ...

    loader = Own()
    assert data.as_loader(loader) is loader


def test_stateful_torch_loader_goes_to_a_position_without_reading_up_to_it():
    loader = data.as_loader(StatefulDataLoader(Generator(3)))
    whole = [list(loader) for _ in range(3)]
    again = data.as_loader(StatefulDataLoader(Generator(3)))
    list(again), list(again)
    running = iter(again)
    next(running)
    state = json.loads(json.dumps(again.get_state()))
    inner = StatefulDataLoader(Generator(99))
    resumed = data.as_loader(inner)
    resumed.set_state(state)
    assert inner.started == 1
    assert_batches_equal(list(resumed), whole[2][1:])


def test_state_that_json_does_not_have_is_refused():
    class Odd(StatefulDataLoader):
        def state_dict(self) -> dict[str, Any]:
            return {"odd": object()}

    loader = data.as_loader(Odd(Generator(0)))
    next(iter(loader))
    with pytest.raises(TypeError, match="numbers, strings, arrays, lists and dicts; got <object"):
        loader.get_state()


@pytest.mark.parametrize(
    "held",
    [
        {"$array": ["|O", [1], "AAAAAAAAAAA=", False]},
        {"$array": ["<f4", [10**12], "AAAA", False]},
        {"$array": ["<f4", [1], "not base64!", True]},
        {"$array": 3},
        {"$other": []},
        {"$bytes": 5},
        {},
        3,
    ],
)
def test_hostile_position_is_refused(held):
    loader = data.as_loader(StatefulDataLoader(Generator(0)))
    next(iter(loader))
    with pytest.raises(BatchError, match="could not be started at epoch 5, batch 1"):
        loader.set_state({**loader.get_state(), "epoch": 5, "source": held})


class Table:
    """Rows in columns, of which one or many are asked for."""

    def __init__(self, rows: int = 11, asked: list[Any] | None = None) -> None:
        self.rows, self.asked = rows, [] if asked is None else asked

    def with_format(self, kind: str) -> Table:
        assert kind == "numpy"
        return type(self)(self.rows, self.asked)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, rows: Any) -> Any:
        self.asked.append(rows)
        assert isinstance(rows, slice) or all(type(row) is int for row in rows)
        return {"x": X[: self.rows][rows].copy(), "label": Y[: self.rows][rows].copy()}


@named("datasets.arrow_dataset", "Dataset")
class Dataset(Table):
    pass


@named("datasets.iterable_dataset", "IterableDataset")
class IterableDataset:
    def __init__(self, rows: int = 11, shuffling: Any = None) -> None:
        self.rows, self._shuffling, self.epoch, self.place = rows, shuffling, 0, 0
        self.loaded: dict[str, Any] | None = None

    def with_format(self, kind: str) -> IterableDataset:
        return IterableDataset(self.rows, self._shuffling)

    def shuffle(self, *, seed: int, buffer_size: int) -> IterableDataset:
        return IterableDataset(self.rows, (seed, buffer_size))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        return {"examples_iterable": {"shard_idx": 0, "place": self.place}, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state

    def iter(self, batch_size: int, drop_last_batch: bool) -> Iterator[Any]:
        if self.loaded is not None and self.loaded["epoch"] == self.epoch:
            self.place = self.loaded["examples_iterable"]["place"]
        order = np.arange(self.rows)
        if self._shuffling:
            order = np.random.default_rng([self._shuffling[0], self.epoch]).permutation(order)
        while self.place < self.rows:
            part = order[self.place : self.place + batch_size]
            if drop_last_batch and len(part) < batch_size:
                return
            self.place += len(part)
            yield {"x": X[part], "label": Y[part]}


class TestDataset(LoaderContract):
    def make_loader(self) -> data.Loader:
        return data.from_datasets(Dataset(), 3)


class TestShuffledDataset(LoaderContract):
    def make_loader(self) -> data.Loader:
        return data.from_datasets(Dataset(), 3, shuffle=True, seed=2)


class TestIterableDataset(LoaderContract):
    def make_loader(self) -> data.Loader:
        return data.from_datasets(IterableDataset(), 3)


class TestShuffledIterableDataset(LoaderContract):
    def make_loader(self) -> data.Loader:
        return data.from_datasets(IterableDataset(), 3, shuffle=True)


def test_dataset_is_read_in_slices_and_goes_far_at_once():
    dataset = Dataset()
    loader = data.from_datasets(dataset, 4)
    assert [len(batch["x"]) for batch in loader] == [4, 4, 3]
    assert dataset.asked == [slice(0, 4), slice(4, 8), slice(8, 11)]
    loader.set_state({**loader.get_state(), "epoch": 10**9, "batch": 2})
    assert len(dataset.asked) == 3


def test_remainder_is_dropped_or_kept():
    def sizes(loader: Any) -> list[int]:
        return [len(batch["x"]) for batch in loader]

    for kind in (Dataset, IterableDataset):
        assert sizes(data.from_datasets(kind(), 4)) == [4, 4, 3]
        assert sizes(data.from_datasets(kind(), 4, remainder="drop")) == [4, 4]
        assert sizes(data.from_datasets(kind(), 4, shuffle=True)) == [4, 4]
        assert sizes(data.from_datasets(kind(), 4, shuffle=True, remainder="keep")) == [4, 4, 3]


def test_shuffled_stream_of_rows_is_read_again_since_its_buffer_is_in_no_position():
    shuffled = IterableDataset(shuffling=(5, 100))
    assert isinstance(data.from_datasets(shuffled, 3), data.Stream)
    assert isinstance(data.from_datasets(IterableDataset(), 3), data.Positioned)
    epochs = [
        [batch["x"][:, 0].tolist() for batch in data.from_datasets(shuffled, 3)] for _ in range(2)
    ]
    assert epochs[0] == epochs[1]


@pytest.mark.parametrize("kind", [Dataset, IterableDataset])
def test_bad_options_are_refused(kind):
    for options in ({"batch_size": 0}, {"batch_size": 2.5}, {"batch_size": 2, "seed": -1}):
        with pytest.raises(ConfigError, match="must be an integer, at least"):
            data.from_datasets(kind(), **options)
    with pytest.raises(ConfigError, match="Unknown remainder 'dropp'"):
        data.from_datasets(kind(), 2, remainder="dropp")
    with pytest.raises(BatchError, match=r"a dict of splits, pass one: dataset\['train'\]"):
        data.from_datasets({"train": kind()}, 2)


@pytest.mark.parametrize("kind", [Dataset, IterableDataset])
def test_dataset_of_rows_is_told_how_to_become_a_loader(kind):
    with pytest.raises(BatchError, match=r"holds rows. Write data.from_datasets\(dataset, batch"):
        data.as_loader(kind())


@named("tensorflow.python.data.ops.dataset_ops", "DatasetV2")
class DatasetV2:
    pass


@named("tensorflow.python.data.ops.batch_op", "_BatchDataset")
class BatchDataset(DatasetV2):
    """Draws the seed of each pass from one generator, if it shuffles."""

    def __init__(self, cardinality: int = 4, *, shuffled: bool = False) -> None:
        self.known, self.shuffled, self.num_passes = cardinality, shuffled, 0

    def cardinality(self) -> Any:
        return np.int64(self.known)

    def as_numpy_iterator(self) -> Pass:
        self.num_passes += 1
        return Pass(self)


class Pass:
    def __init__(self, dataset: BatchDataset) -> None:
        self.dataset, order = dataset, np.arange(11)
        if dataset.shuffled:
            order = np.random.default_rng(dataset.num_passes).permutation(11)
        self.batches = ({"x": X[part], "label": Y[part]} for part in np.split(order, (3, 6, 9)))

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self.batches)


class Checkpoint:
    def __init__(self, iterator: Pass) -> None:
        self.dataset = iterator.dataset

    def write(self, path: str) -> str:
        if self.dataset.known == -2:
            raise OpError
        Path(path).write_text(str(self.dataset.num_passes))
        return path

    def read(self, path: str) -> None:
        self.dataset.num_passes = int(Path(path).read_text())


class OpError(Exception):
    message = "RandomUniform is stateful"


class TestTensorFlow(LoaderContract):
    def make_loader(self) -> data.Loader:
        return data.as_loader(BatchDataset())


def test_tensorflow_dataset_has_a_length_where_it_knows_one():
    lengths = [data.num_batches(data.as_loader(BatchDataset(n))) for n in (4, -1, -2)]
    assert lengths == [4, None, None]


@pytest.mark.parametrize("position", [0, 2, 4])
@pytest.mark.parametrize("cardinality", [4, -1])
def test_evaluation_of_a_shuffled_tensorflow_dataset_changes_no_order(position, cardinality):
    def epochs(*, evaluated: bool) -> tuple[list[Any], list[Any]]:
        dataset = BatchDataset(cardinality, shuffled=True)
        loader, found, views = data.as_loader(dataset), [], []
        data.first_batch(loader)  # as a run does
        for _ in range(3):
            running = iter(loader)
            found += islice(running, position)
            for view in [in_order(loader), in_order(data.as_loader(dataset))] * evaluated:
                views.append(list(view))
                next(iter(view))
            found += running
        return found, views

    (found, views), (expected, _) = epochs(evaluated=True), epochs(evaluated=False)
    assert_batches_equal(found, expected)
    assert_batches_equal(views, [views[0]] * 6)


def test_evaluation_of_a_tensorflow_dataset_without_a_position_is_a_warning():
    loader = data.as_loader(BatchDataset(-2))
    next(iter(loader))
    with pytest.warns(
        UserWarning, match="may change the order .* RandomUniform is stateful. Evaluate with"
    ):
        assert len(list(in_order(loader))) == 4


@pytest.mark.slow_but("<lambda>0")
@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(Generator(0), rows=22),
        lambda: StatefulDataLoader(Generator(0), rows=22),
        lambda: data.from_datasets(Dataset(22), 4, shuffle=True),
        BatchDataset,
    ],
)
def test_run_takes_the_object_itself(make):
    class Own(tasks.Classifier):
        def labels(self, batch: Any) -> Any:
            found = batch[1] if isinstance(batch, list) else batch
            return found["label"]

    trainer = Own(zoo.MLP((4, 3)), root=None, enable_progress_bar=False, tune_process=False)
    result = trainer.train_model(make(), make(), make(), num_epochs=2)
    assert np.isfinite(result.metrics["test/loss"])


def test_class_of_the_same_name_elsewhere_is_no_kind():
    class DataLoader:
        def __iter__(self) -> Iterator[Any]:
            yield X

    assert isinstance(data.as_loader(DataLoader()), data.Stream)
    named("torch.utils.database", "DataLoader")(DataLoader)
    assert not isinstance(next(iter(data.as_loader(DataLoader()))), list)
    assert len({(kind.package, kind.name) for kind in KINDS}) == len(KINDS)


def test_nothing_foreign_is_imported():
    code = "import sys; from distaff import data; data.as_loader([1]); print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "tensorflow", "datasets", "grain"} & set(found.stdout.split())
