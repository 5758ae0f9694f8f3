"""The loaders that tests compare: the same twenty-two examples, in batches of four."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distaff import data

BATCH = 4


class Rows:
    """Twenty-two examples that note which of them are asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        x = np.arange(44, dtype=np.float32).reshape(22, 2)
        self.arrays = {"x": x, "label": np.arange(22) % 3}

    def __len__(self) -> int:
        return 22

    def __repr__(self) -> str:
        return "Rows()"  # Grain tells sources apart by it

    def __getitem__(self, row: int) -> dict[str, Any]:
        self.asked.append(row)
        return {name: array[row] for name, array in self.arrays.items()}

    def batches(self, order: Any = range(22)) -> Iterator[Any]:
        for start in range(0, 22, BATCH):
            examples = [self[row] for row in order[start : start + BATCH]]
            yield {name: np.stack([each[name] for each in examples]) for name in self.arrays}


def array_loader(rows: Rows, part: slice = slice(None)) -> Any:
    arrays = {name: array[part] for name, array in rows.arrays.items()}
    loader = data.ArrayLoader(arrays, BATCH)
    gathered = loader.gathered

    def noting(chosen: np.ndarray) -> Any:
        rows.asked.extend(np.arange(22)[part][chosen].tolist())
        return gathered(chosen)

    loader.gathered = noting
    return loader


def mapped_loader(rows: Rows) -> Any:
    return data.MappedLoader(array_loader(rows), lambda batch: batch)


def mixture(rows: Rows) -> Any:
    loaders = {name: array_loader(rows, slice(name, None, 2)) for name in (0, 1)}
    return data.Mixture(
        {"even": loaders[0], "odd": loaders[1]}, {"even": 1, "odd": 1}, num_batches=6
    )


def from_list(rows: Rows) -> Any:
    return data.from_examples(rows, BATCH)


def decoded(rows: Rows, examples: data.Examples, decode: Callable[[Any], Any]) -> Any:
    def noting(example: Any) -> Any:
        arrays = decode(example)
        rows.asked.append(int(arrays["x"][0]) // 2)
        return arrays

    return data.from_examples(data.MappedExamples(examples, noting), BATCH)


def text(rows: Rows) -> Any:
    if not Path("rows.txt").exists():
        np.savetxt("rows.txt", np.column_stack([*rows.arrays.values()]), "%d")

    def decode(line: str) -> dict[str, Any]:
        *x, label = map(int, line.split())
        return {"x": np.float32(x), "label": label}

    return decoded(rows, data.TextLines("rows.txt", block_bytes=20), decode)


def tar(rows: Rows) -> Any:
    if not Path("rows.tar").exists():
        with tarfile.open("rows.tar", "w") as archive:
            for row, x in enumerate(rows.arrays["x"]):
                stream = io.BytesIO()
                np.save(stream, x)
                label = b"%d" % rows.arrays["label"][row]
                for extension, content in {"npy": stream.getvalue(), "cls": label}.items():
                    member = tarfile.TarInfo(f"{row:02}.{extension}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))

    def decode(example: dict[str, Any]) -> dict[str, Any]:
        return {"x": example["npy"], "label": example["cls"]}

    return decoded(rows, data.TarExamples("rows.tar", examples_per_block=5), decode)


def parquet(rows: Rows) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not Path("rows.parquet").exists():
        table = pa.table({"x": list(rows.arrays["x"]), "label": rows.arrays["label"]})
        pq.write_table(table, "rows.parquet", row_group_size=5)

    class Noting(data.ParquetExamples):
        def read_batch(self, indices: Any) -> Any:
            rows.asked.extend(indices)
            return super().read_batch(indices)

    return data.from_examples(Noting("rows.parquet"), BATCH)


def array_record(rows: Rows) -> Any:
    from array_record.python import array_record_module

    if not Path("rows.array_record").exists():
        writer = array_record_module.ArrayRecordWriter("rows.array_record", "group_size:5")
        for x, label in zip(*rows.arrays.values(), strict=True):
            writer.write(bytes([*x.astype(int), label]))
        writer.close()

    def decode(record: bytes) -> dict[str, Any]:
        *x, label = record
        return {"x": np.float32(x), "label": label}

    records = data.ArrayRecordExamples("rows.array_record", examples_per_block=5)
    return decoded(rows, records, decode)


def sequences(rows: Rows, length: Callable[[int], int]) -> data.Examples:
    """Returns the rows as sequences of one or two entries, by their number."""

    def cut(row: dict[str, Any]) -> dict[str, Any]:
        return {"x": row["x"][: length(int(row["x"][0]) // 2)]}

    return data.MappedExamples(rows, cut)


def packed(rows: Rows) -> Any:
    """Each row of a batch holds a short sequence and a long one."""
    return data.packed(
        sequences(rows, lambda row: 1 + row % 2), 3, BATCH // 2, open_rows=BATCH // 2
    )


def bucketed(rows: Rows) -> Any:
    """Four short sequences and four long ones take turns."""
    return data.bucketed(sequences(rows, lambda row: 1 + row // BATCH % 2), (1, 2), BATCH)


def unseeded(rows: Rows) -> Any:
    return lambda: rows.batches(np.random.default_rng().permutation(22))


def grain_map(rows: Rows) -> Any:
    import grain

    return grain.MapDataset.source(rows).batch(BATCH)


def grain_iter(rows: Rows) -> Any:
    import grain

    one_by_one = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return grain.MapDataset.source(rows).to_iter_dataset(one_by_one).batch(BATCH)


def grain_loader(rows: Rows) -> Any:
    import grain

    sampler = grain.samplers.SequentialSampler(22, shard_options=grain.sharding.NoSharding())
    one_by_one = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return grain.DataLoader(
        data_source=rows,
        sampler=sampler,
        operations=[grain.transforms.Batch(BATCH)],
        read_options=one_by_one,
    )


def torch_loader(rows: Rows) -> Any:
    from torch.utils.data import DataLoader

    return DataLoader(rows, BATCH)


def torchdata_loader(rows: Rows) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(rows, BATCH)


def dataset(rows: Rows) -> Any:
    import datasets

    class Noting:
        table = datasets.Dataset.from_dict(rows.arrays).with_format("numpy")

        def with_format(self, kind: str) -> Any:
            return self

        def __len__(self) -> int:
            return len(self.table)

        def __getitem__(self, chosen: Any) -> Any:
            rows.asked.extend(np.arange(22)[chosen].tolist())
            return self.table[chosen]

    return data.from_datasets(Noting(), BATCH)


def iterable_dataset(rows: Rows, **options: Any) -> Any:
    import datasets

    table = datasets.Dataset.from_dict({**rows.arrays, "row": range(22)})

    def note(example: Any) -> Any:
        rows.asked.append(int(example["row"]))
        return example

    return data.from_datasets(table.to_iterable_dataset().map(note), BATCH, **options)


def shuffled_dataset(rows: Rows) -> Any:
    return iterable_dataset(rows, shuffle=True)


def tf_dataset(rows: Rows, **options: Any) -> Any:
    import tensorflow as tf

    def noted(row: Any) -> Any:
        rows.asked.append(int(row))
        return row

    def note(row: Any) -> Any:
        row = tf.ensure_shape(tf.numpy_function(noted, [row], row.dtype), ())
        return {name: tf.gather(array, row) for name, array in rows.arrays.items()}

    noted_rows = tf.data.Dataset.range(22).map(note)
    if options:
        noted_rows = noted_rows.shuffle(22, **options)
    return noted_rows.batch(BATCH)


def shuffled_tf_dataset(rows: Rows) -> Any:
    return tf_dataset(rows, seed=1)


class Source(NamedTuple):
    make: Callable[[Rows], Any]
    package: str = "distaff"


LOADERS = {
    "`data.ArrayLoader`": Source(array_loader),
    "`data.MappedLoader` of it": Source(mapped_loader),
    "`data.Mixture` of two `data.ArrayLoader`": Source(mixture),
    "`data.from_examples` of a list": Source(from_list),
    "the same of `data.TextLines`": Source(text),
    "the same of `data.TarExamples`": Source(tar),
    "the same of `data.ParquetExamples`": Source(parquet, "pyarrow"),
    "the same of `data.ArrayRecordExamples`": Source(array_record, "array_record"),
    "`data.packed`": Source(packed),
    "`data.bucketed`": Source(bucketed),
    "generator function": Source(lambda rows: rows.batches),
    "generator function, shuffled without a seed": Source(unseeded),
    "`grain.MapDataset`": Source(grain_map, "grain"),
    "`grain.IterDataset`": Source(grain_iter, "grain"),
    "`grain.DataLoader`": Source(grain_loader, "grain"),
    "`torch.utils.data.DataLoader`": Source(torch_loader, "torch"),
    "torchdata's `StatefulDataLoader`": Source(torchdata_loader, "torchdata"),
    "`datasets.Dataset`": Source(dataset, "datasets"),
    "`datasets.IterableDataset`": Source(iterable_dataset, "datasets"),
    "`datasets.IterableDataset`, shuffled": Source(shuffled_dataset, "datasets"),
    "`tf.data.Dataset`": Source(tf_dataset, "tensorflow"),
    "`tf.data.Dataset`, shuffled with a seed": Source(shuffled_tf_dataset, "tensorflow"),
}
