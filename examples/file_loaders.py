"""What `loaders.py` does, with files: text, tar, Parquet and ArrayRecord, shuffled by blocks.

.venv/bin/python examples/file_loaders.py
"""

import contextlib
import importlib.util
import io
import tarfile
import tempfile

import loaders
import numpy as np
import tyro

from distaff import data

FLAT, ROWS = loaders.FLAT, loaders.ROWS
BYTES = np.column_stack([FLAT["label"], 16 * FLAT["x"]]).astype(np.uint8)  # a label, 64 pixels


def read(examples, decode=None):
    examples = data.MappedExamples(examples, decode) if decode else examples
    return data.from_examples(examples, 64, shuffle=True)


def from_bytes(record):
    label, *pixels = record
    return {"x": np.float32(pixels) / 16, "label": label}


def from_text(line):
    return from_bytes(map(int, line.split()))


def from_files(files):
    return {"image": files["npy"], "label": files["cls"]}


def write_files():
    np.savetxt("digits.txt", BYTES, "%d")
    with tarfile.open("digits.tar", "w") as archive:
        for i, row in enumerate(ROWS):
            np.save(image := io.BytesIO(), row["image"])
            for end, content in {"npy": image.getvalue(), "cls": b"%d" % row["label"]}.items():
                member = tarfile.TarInfo(f"{i:04}.{end}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    if importlib.util.find_spec("pyarrow"):
        from pyarrow import parquet, table

        parquet.write_table(table({**FLAT, "x": [*FLAT["x"]]}), "digits.pq", row_group_size=100)
    if importlib.util.find_spec("array_record"):
        from array_record.python.array_record_module import ArrayRecordWriter

        with contextlib.closing(ArrayRecordWriter("digits.rec", "group_size:64")) as writer:
            for row in BYTES:
                writer.write(row.tobytes())


LOADERS = {  # by name: a package, and what makes a loader with it
    "data.TextLines": ("jax", lambda x: read(data.TextLines("digits.txt"), from_text)),
    "data.TarExamples": ("jax", lambda x: read(data.TarExamples("digits.tar"), from_files)),
    "data.ParquetExamples": ("pyarrow", lambda x: read(data.ParquetExamples("digits.pq"))),
    "data.ArrayRecordExamples": (
        "array_record",
        lambda x: read(data.ArrayRecordExamples("digits.rec"), from_bytes),
    ),
}


def main(num_epochs: int = 10) -> dict[str, bool]:
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        write_files()
        loaders.LOADERS = LOADERS
        return loaders.main(num_epochs)


if __name__ == "__main__":
    tyro.cli(main)
