"""Files of all kinds under the contract of loaders, and in a run that goes on."""

from __future__ import annotations

import io
import pickle
import tarfile
import weakref
import zlib
from abc import abstractmethod
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from distaff import OptimizerConfig, data, tasks, zoo
from distaff.errors import BatchError, ConfigError, DataFileError
from distaff.testing.loaders import LoaderContract, assert_batches_equal
from scripted import Break, InterruptError

X = np.random.default_rng(0).normal(size=(23, 3)).astype(np.float32)


class FileContract(LoaderContract):
    """Two files of 23 examples `{"x": [3]}`, which stand in random order in batches of 8."""

    @pytest.fixture(autouse=True)
    def _files(self, tmp_path: Path) -> None:
        self.paths = [tmp_path / "0", tmp_path / "1"]
        for path in self.paths:
            self.write(path)

    @abstractmethod
    def write(self, path: Path) -> None:
        """Writes `X`."""

    @abstractmethod
    def examples(self) -> data.Examples:
        """Returns the examples of `self.paths`."""

    def make_loader(self) -> data.Loader:
        return data.from_examples(self.examples(), 8, shuffle=True, seed=3, remainder="keep")

    def test_an_epoch_holds_each_example_once(self) -> None:
        rows = np.concatenate([batch["x"] for batch in self.make_loader()])
        expected = np.concatenate([X, X])
        np.testing.assert_array_equal(rows[np.lexsort(rows.T)], expected[np.lexsort(expected.T)])
        assert not np.array_equal(rows, expected)

    def test_position_depends_on_the_sizes_of_the_files(self) -> None:
        sizes = np.array([path.stat().st_size for path in self.paths], "<i8")
        state = self.make_loader().get_state()
        assert state["fingerprint"] == zlib.crc32(sizes.tobytes())
        with pytest.raises(BatchError, match="loader with the same options and data"):
            self.make_loader().set_state({**state, "fingerprint": 0})

    def test_another_process_gets_the_examples_without_their_blocks(self) -> None:
        examples = self.examples()
        examples = getattr(examples, "_examples", examples)  # without the function, a lambda
        size = len(pickle.dumps(examples))
        rows = [examples[index] for index in range(len(examples))]
        content = pickle.dumps(examples)
        assert len(content) == size
        copy = pickle.loads(content)
        found = [copy[index] for index in range(len(copy))]
        jax.tree.map(np.testing.assert_array_equal, found, rows)

    def test_file_that_grows_is_noticed(self) -> None:
        loader = self.make_loader()
        for path in self.paths:
            with path.open("ab") as file:
                file.write(b"0 0 0\n")
        with pytest.raises(DataFileError, match="has changed"):
            list(loader)


class TestText(FileContract):
    def write(self, path: Path) -> None:
        path.write_text("".join(" ".join(map(str, row)) + "\n" for row in X.tolist()))

    def examples(self) -> data.Examples:
        lines = data.TextLines(self.paths, block_bytes=150, blocks_in_memory=3)
        return data.MappedExamples(lines, lambda line: {"x": np.float32(line.split())})


class TestTar(FileContract):
    def write(self, path: Path) -> None:
        with tarfile.open(path, "w") as archive:
            for number, row in enumerate(X):
                stream = io.BytesIO()
                np.save(stream, row)
                member = tarfile.TarInfo(f"{number}.npy")
                member.size = stream.tell()
                stream.seek(0)
                archive.addfile(member, stream)

    def examples(self) -> data.Examples:
        examples = data.TarExamples(self.paths, examples_per_block=4, blocks_in_memory=3)
        return data.MappedExamples(examples, lambda example: {"x": example["npy"]})


class TestParquet(FileContract):
    def write(self, path: Path) -> None:
        pa = pytest.importorskip("pyarrow")
        pq = pytest.importorskip("pyarrow.parquet")
        column = pa.array(X.tolist(), pa.list_(pa.float32()))
        pq.write_table(pa.table({"x": column, "text": ["a"] * len(X)}), path, row_group_size=5)

    def examples(self) -> data.Examples:
        return data.ParquetExamples(self.paths, ["x"])


class TestRowsOfParquet(TestParquet):
    def examples(self) -> data.Examples:
        examples = data.ParquetExamples(self.paths)
        return data.MappedExamples(examples, lambda row: {"x": row["x"]})


class TestArrayRecord(FileContract):
    def write(self, path: Path) -> None:
        module = pytest.importorskip("array_record.python.array_record_module")
        writer = module.ArrayRecordWriter(str(path), "group_size:3")
        for row in X:
            writer.write(row.tobytes())
        writer.close()

    def examples(self) -> data.Examples:
        records = data.ArrayRecordExamples(self.paths, examples_per_block=6, blocks_in_memory=3)
        return data.MappedExamples(records, lambda record: {"x": np.frombuffer(record, "<f4")})

    @pytest.mark.parametrize("length", [0, 100, -10])
    def test_cut_file_is_refused(self, length: int) -> None:
        self.paths[1].write_bytes(self.paths[1].read_bytes()[:length])
        with pytest.raises(DataFileError, match="not a whole ArrayRecord file"):
            self.examples()

    def test_damaged_records_are_not_a_change(self, tmp_path: Path) -> None:
        module = pytest.importorskip("array_record.python.array_record_module")
        path = tmp_path / "damaged"
        writer = module.ArrayRecordWriter(str(path), "group_size:4")
        rng = np.random.default_rng(0)
        for _ in range(200):
            writer.write(rng.bytes(1000))
        writer.close()
        content = bytearray(path.read_bytes())
        content[100_000:100_100] = bytes(100)
        path.write_bytes(content)
        records = data.ArrayRecordExamples(path, examples_per_block=16)
        with pytest.raises(DataFileError, match=r"damaged in records .* Get or write it again"):
            assert [records[index] for index in range(200)]

    def test_few_files_are_open_and_none_twice(self, tmp_path: Path, monkeypatch: Any) -> None:
        integration = pytest.importorskip("distaff.integrations.array_record")
        opened, most = [], 0

        class Records(integration.Records):
            def __init__(self, file: Any) -> None:
                nonlocal most
                super().__init__(file)
                opened.append(weakref.ref(self))
                most = max(most, sum(each() is not None for each in opened))

        monkeypatch.setattr(integration, "Records", Records)
        loader = self.make_loader()
        for _ in range(2):
            list(loader)
        assert len(opened) == len(self.paths)
        del loader
        self.paths = [tmp_path / f"many{number}" for number in range(20)]
        for path in self.paths:
            self.write(path)
        list(self.make_loader())
        assert most == 16

    def test_options_are_checked(self) -> None:
        with pytest.raises(ConfigError, match="examples_per_block"):
            data.ArrayRecordExamples(self.paths, examples_per_block=0)


def test_run_goes_on_bit_for_bit(tmp_path):
    def train(root: str, step: int | None) -> Any:
        lines = data.TextLines(tmp_path / "*.txt", block_bytes=100, blocks_in_memory=2)
        trainer = tasks.Regressor(
            zoo.MLP((4, 1)),
            root=tmp_path / root,
            optimizer=OptimizerConfig(schedule="constant"),
            save_every=1e-9,
            callbacks=[Break(step)],
            enable_progress_bar=False,
            tune_process=False,
        )
        trainer.train_model(
            data.from_examples(data.MappedExamples(lines, encode), 4, shuffle=True), num_epochs=3
        )
        return trainer

    def encode(line: str) -> dict[str, np.ndarray]:
        return {"x": np.float32(line.split()), "y": np.float32([len(line)])}

    TestText.write(None, tmp_path / "a.txt")
    whole = train("whole", None)
    with pytest.raises(InterruptError):
        train("cut", 7)
    resumed = train("cut", None)
    (log,) = (tmp_path / "cut").glob("*/0001/log.txt")
    assert log.read_text().count("from its checkpoint of step") == 1
    assert_batches_equal(resumed.state.params, whole.state.params)
