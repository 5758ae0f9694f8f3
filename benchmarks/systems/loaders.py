"""Loaders alone: batches of shuffled rows, in memory or in files; nobody trains on them.

Every loader is what `distaff.data.as_loader` makes of it, and is read for an epoch.
"""

from __future__ import annotations

import io
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rounds import ROOT
from benchmarks.worker import Rounds
from benchmarks.workloads import Workload, digits


def arrays(workload: Workload) -> dict[str, np.ndarray]:
    """Returns the digits of an epoch: `x` float32 `[examples, 64]`, `label` int32 `[examples]`."""
    inputs, labels = digits(workload.steps * workload.batch_size)
    return {"x": inputs, "label": labels}


def by_hand(workload: Workload, rounds: Rounds, folder: Path) -> None:
    """Rows of a permutation, taken from NumPy's arrays."""
    held = arrays(workload)
    _drain(rounds, lambda epoch: _batches(held, workload, epoch))


def loader(workload: Workload, rounds: Rounds, folder: Path, *, kind: str) -> None:
    """A loader of Distaff.

    Args:
        workload: says how many rows, and of how many a batch.
        rounds: says when.
        folder: for the files of those that read files.
        kind: a function of this file that makes the loader.
    """
    sys.path.insert(0, str(ROOT / "src"))  # for environments in which Distaff is not installed
    from distaff import data

    folder.mkdir(parents=True, exist_ok=True)
    made = data.as_loader(globals()[kind](arrays(workload), workload, folder))
    _drain(rounds, lambda epoch: made)


def array_loader(held: dict[str, np.ndarray], workload: Workload, folder: Path) -> Any:
    """Returns an `ArrayLoader`."""
    from distaff import data

    return data.ArrayLoader(held, workload.batch_size, shuffle=True)


def mixture(held: dict[str, np.ndarray], workload: Workload, folder: Path) -> Any:
    """Returns a `Mixture` of two `ArrayLoader`s that hold half of the rows each."""
    from distaff import data

    halves = [{name: array[i::2] for name, array in held.items()} for i in (0, 1)]
    even, odd = (data.ArrayLoader(half, workload.batch_size, shuffle=True) for half in halves)
    weights = {"even": 1, "odd": 1}
    return data.Mixture({"even": even, "odd": odd}, weights, num_batches=workload.steps)


def examples(held: dict[str, np.ndarray], workload: Workload, folder: Path) -> Any:
    """Returns a loader of examples in memory, one by one."""
    return _from_examples(_Rows(held), workload)


def text(held: dict[str, np.ndarray], workload: Workload, folder: Path) -> Any:
    """Returns a loader of lines, each of a label and 64 whole numbers."""
    from distaff import data

    np.savetxt(folder / "rows.txt", _bytes(held), "%d")
    return _from_examples(
        data.TextLines(folder / "rows.txt"),
        workload,
        lambda line: _example(np.fromstring(line, np.float32, sep=" ")),
    )


def tar(held: dict[str, np.ndarray], workload: Workload, folder: Path) -> Any:
    """Returns a loader of an archive, of an `.npy` file and a `.cls` file for each example."""
    from distaff import data

    with tarfile.open(folder / "rows.tar", "w") as archive:
        for row, (x, label) in enumerate(zip(held["x"], held["label"], strict=True)):
            np.save(array := io.BytesIO(), x)
            for end, content in {"npy": array.getvalue(), "cls": b"%d" % label}.items():
                member = tarfile.TarInfo(f"{row}.{end}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return _from_examples(
        data.TarExamples(folder / "rows.tar"),
        workload,
        lambda files: {"x": files["npy"], "label": files["cls"]},
    )


def parquet(held: dict[str, np.ndarray], workload: Workload, folder: Path) -> Any:
    """Returns a loader of columns, whose rows are gathered by batch."""
    import pyarrow
    import pyarrow.parquet

    from distaff import data

    table = pyarrow.table({**held, "x": list(held["x"])})
    pyarrow.parquet.write_table(table, folder / "rows.parquet", row_group_size=8192)
    return _from_examples(data.ParquetExamples(folder / "rows.parquet"), workload)


def array_record(held: dict[str, np.ndarray], workload: Workload, folder: Path) -> Any:
    """Returns a loader of records of 65 bytes."""
    from array_record.python.array_record_module import ArrayRecordWriter

    from distaff import data

    path = folder / "rows.array_record"
    with closing(ArrayRecordWriter(str(path), "group_size:64")) as writer:
        for row in _bytes(held):
            writer.write(row.tobytes())
    return _from_examples(
        data.ArrayRecordExamples(path),
        workload,
        lambda record: _example(np.frombuffer(record, np.uint8)),
    )


def stream(held: dict[str, np.ndarray], workload: Workload, folder: Path) -> Any:
    """Returns a generator function that does what the loop by hand does."""
    return lambda: _batches(held, workload, 0)


def grain_map(held: dict[str, np.ndarray], workload: Workload, folder: Path) -> Any:
    """Returns a `grain.MapDataset`, which Distaff reads with Grain's 16 threads."""
    import grain

    return grain.MapDataset.source(_Rows(held)).seed(0).shuffle().batch(workload.batch_size)


def grain_iter(held: dict[str, np.ndarray], workload: Workload, folder: Path) -> Any:
    """Returns a `grain.IterDataset`, with the 16 threads of Grain's default."""
    import grain

    rows = grain.MapDataset.source(_Rows(held)).seed(0).shuffle()
    return rows.to_iter_dataset().batch(workload.batch_size)


def grain_no_threads(held: dict[str, np.ndarray], workload: Workload, folder: Path) -> Any:
    """Returns a `grain.IterDataset` that reads in the thread that asks."""
    import grain

    rows = grain.MapDataset.source(_Rows(held)).seed(0).shuffle()
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return rows.to_iter_dataset(options).batch(workload.batch_size)


def torch(held: dict[str, np.ndarray], workload: Workload, folder: Path) -> Any:
    """Returns a torch `DataLoader` in this process."""
    import torch.utils.data

    generator = torch.Generator().manual_seed(0)
    return torch.utils.data.DataLoader(
        _Rows(held), workload.batch_size, shuffle=True, generator=generator
    )


def hugging_face(held: dict[str, np.ndarray], workload: Workload, folder: Path) -> Any:
    """Returns rows of a `datasets.Dataset`."""
    import datasets

    from distaff import data

    table = datasets.Dataset.from_dict(held)
    return data.from_datasets(table, workload.batch_size, shuffle=True)


class _Rows:
    """Examples one by one."""

    def __init__(self, held: dict[str, np.ndarray]) -> None:
        self._held = held

    def __len__(self) -> int:
        return len(self._held["label"])

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {name: array[row] for name, array in self._held.items()}


def _from_examples(
    read: Any, workload: Workload, decode: Callable[[Any], Any] | None = None
) -> Any:
    from distaff import data

    read = data.MappedExamples(read, decode) if decode else read
    return data.from_examples(read, workload.batch_size, shuffle=True)


def _bytes(held: dict[str, np.ndarray]) -> np.ndarray:
    """Returns a label and 64 pixels of each row, uint8 `[rows, 65]`."""
    return np.column_stack([held["label"], 16 * held["x"]]).astype(np.uint8)


def _example(values: np.ndarray) -> dict[str, Any]:
    return {"x": np.float32(values[1:]) / 16, "label": np.int32(values[0])}


def _batches(held: dict[str, np.ndarray], workload: Workload, epoch: int) -> Iterator[Any]:
    order = np.random.default_rng([0, epoch]).permutation(len(held["label"]))
    for rows in order.reshape(-1, workload.batch_size):
        yield {name: array[rows] for name, array in held.items()}


def _drain(rounds: Rounds, epoch_of: Callable[[int], Iterable[Any]]) -> None:
    for epoch in rounds:
        total = 0.0
        for batch in epoch_of(epoch):
            total += float(batch["label"][0]) + float(batch["x"][-1, -1])
        rounds.done(total)
