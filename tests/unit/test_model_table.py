"""The model table: rows, sums down to a depth, totals, width, and the trainer's option."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distaff import TrainerModule
from distaff.errors import ConfigError
from distaff.models import LayerRow, as_model
from distaff.run.display import as_text, model_table
from distaff.zoo import CNN, ResNet

F32, BF16 = np.dtype("float32"), jnp.dtype("bfloat16")
BLOCK = LayerRow("block", "Block", "float32[1,2]", (("params", "scale", (2,), F32),), 500.0)
NORM = LayerRow(
    "block/norm",
    "BatchNorm",
    "bfloat16[1,3]",
    (("batch_stats", "mean", (3,), F32), ("params", "bias", (1024, 3), BF16)),
    1_500.0,
)
ROWS = [
    LayerRow("", "Net", "float32[1]", (), 4.0),
    BLOCK,
    NORM,
    LayerRow("block/norm/inner/deep", "Deep", "float32[9]", (("cache", "c", (), F32),), None),
    LayerRow("blocks", "Dense", "float32[7]", (("params", "kernel", (0, 7), F32),), 0.0),
]
TOTAL = [
    "total  3,074  6.0 KiB  2.0 k",
    "3 values  (batch_stats)  12 B",
    "1 values  (cache)  4 B",
]


def lines_of(rows: list[LayerRow], depth: Any) -> list[str]:
    """Returns the table's lines, header included, with cells two spaces apart."""
    text = as_text(model_table(rows, "Net", depth))
    return [re.sub(r" {2,}", "  ", line.strip()) for line in text.splitlines()]


def test_table_lists_each_array_and_each_modules_work():
    title, *lines = lines_of(ROWS, None)
    assert title == "Net (FLOPs: evaluation of the example batch)"
    assert lines == [
        "path  shape  dtype  parameters  bytes  FLOPs  output",
        "Net  4  float32[1]",
        "block/scale  [2]  float32  2  8 B  500  float32[1,2]",
        "block/norm/mean  [3]  float32  (batch_stats)  12 B  1.5 k  bfloat16[1,3]",
        "block/norm/bias  [1024, 3]  bfloat16  3,072  6.0 KiB",
        "block/norm/inner/deep/c  []  float32  (cache)  4 B  float32[9]",
        "blocks/kernel  [0, 7]  float32  0  0 B  0  float32[7]",
        *TOTAL,
    ]


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (
            0,
            [
                "Net  3,074  6.0 KiB  2.0 k  float32[1]",
                "Net  (batch_stats)  12 B",
                "Net  (cache)  4 B",
            ],
        ),
        (
            1,
            [
                "Net  4  float32[1]",
                "block  3,074  6.0 KiB  2.0 k  float32[1,2]",
                "block  (batch_stats)  12 B",
                "block  (cache)  4 B",
                "blocks  0  0 B  0  float32[7]",
            ],
        ),
        (
            3,
            [
                "Net  4  float32[1]",
                "block  2  8 B  500  float32[1,2]",
                "block/norm  3,072  6.0 KiB  1.5 k  bfloat16[1,3]",
                "block/norm  (batch_stats)  12 B",
                "block/norm  (cache)  4 B",
                "blocks  0  0 B  0  float32[7]",
            ],
        ),
    ],
)
def test_table_with_a_depth_adds_what_is_below_to_the_module_above(depth, expected):
    header = "path  parameters  bytes  FLOPs  output"
    assert lines_of(ROWS, depth)[1:] == [header, *expected, *TOTAL]


def test_table_without_flops_has_no_column_for_them():
    rows = [row._replace(flops=None) for row in (ROWS[0], BLOCK)]
    assert lines_of(rows, 0) == [
        "Net",
        "path  parameters  bytes  output",
        "Net  2  8 B  float32[1]",
        "total  2  8 B",
    ]


def test_table_of_the_cnn_fits_in_a_hundred_columns():
    rows = as_model(CNN()).layers(jax.random.key(0), jnp.zeros((32, 8, 8, 1)))
    lines = as_text(model_table(rows, "CNN"), width=100).splitlines()
    assert not any("…" in line for line in lines)
    assert len(lines) == 2 + 19 + 2
    assert lines[-2].split() == ["total", "30,762", "121.2", "KiB", "46.7", "M"]
    assert lines[-1].split() == ["256", "values", "(batch_stats)", "1.0", "KiB"]


@pytest.mark.parametrize(
    ("width", "absent"),
    [(100, set()), (80, {"dtype", "bytes"}), (64, {"dtype", "bytes", "output"})],
)
def test_table_drops_columns_rather_than_breaking_cells(width, absent):
    rows = as_model(CNN()).layers(jax.random.key(0), jnp.zeros((32, 8, 8, 1)))
    _, header, *lines = as_text(model_table(rows, "CNN"), width=width).splitlines()
    columns = {"path", "shape", "dtype", "parameters", "bytes", "FLOPs", "output"}
    assert set(header.split()) == columns - absent
    assert len(lines) == 19 + 2
    assert not any("…" in line for line in lines)


def test_table_without_dtypes_says_which_array_is_no_float32():
    shapes = as_text(model_table(ROWS, "Net"), width=85).splitlines()
    assert "dtype" not in shapes[1]
    assert any("bfloat16[1024, 3]" in line for line in shapes)
    assert not any("float32[2]" in line for line in shapes)


def blocks(count: int, width: int = 4) -> list[LayerRow]:
    kernels = [("params", f"kernel_{n}", (width, width), F32) for n in range(3)]
    return [
        LayerRow("", "GPT", "float32[1]", (), 1.0),
        *(LayerRow(f"block_{n}", "Block", "float32[4]", tuple(kernels), 8.0) for n in range(count)),
        LayerRow("head", "Dense", "float32[9]", (kernels[0],), 2.0),
    ]


def test_table_folds_a_deep_model_by_itself_and_adds_up():
    _, header, *lines, note = lines_of(blocks(12), "auto")
    assert note == "folded; table_depth=None shows every array"
    assert header == "path  parameters  bytes  FLOPs  output"
    assert lines == [
        "GPT  1  float32[1]",
        "block_0 … block_11 (12)  576  2.2 KiB  96  float32[4]",
        "head  16  64 B  2  float32[9]",
        "total  592  2.3 KiB  99",
    ]


def test_table_folds_only_what_is_equal_and_next_to_each_other():
    rows = blocks(12)
    rows[6] = rows[6]._replace(kind="Other")
    names = [line.split("  ")[0] for line in lines_of(rows, "auto")[2:-1]]
    assert names == [
        "GPT",
        "block_0 … block_4 (5)",
        "block_5",
        "block_6 … block_11 (6)",
        "head",
        "total",
    ]


def test_table_of_a_small_model_shows_every_array():
    assert lines_of(ROWS, "auto") == lines_of(ROWS, None)
    assert lines_of(blocks(9), "auto") == lines_of(blocks(9), None)  # 29 lines


def test_table_of_a_long_model_without_equal_modules_is_not_cut():
    rows = [LayerRow(f"m_{n}", "M", "", (("params", "w", (n + 1,), F32),), None) for n in range(40)]
    assert len(lines_of(rows, "auto")) == 2 + 40 + 2


def test_trainer_folds_the_table_it_prints_and_keeps_all_of_it(capsys):
    trainer = TrainerModule(ResNet(blocks=(2, 2, 2)), root=None)
    trainer.print_tabulate({"image": jnp.zeros((2, 8, 8, 1))})
    assert len(capsys.readouterr().out.splitlines()) <= 30
    assert "ResidualBlock_3/Conv_0/kernel" in as_text(trainer._workspace.table)


def test_trainer_prints_and_keeps_the_table_to_its_depth(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    batch = {"image": jnp.zeros((2, 8, 8, 1))}
    trainer = TrainerModule(CNN(), root=None, table_depth=0)
    trainer.print_tabulate(batch)
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 6
    assert "float32[2,10]" in printed
    assert as_text(trainer._workspace.table).splitlines()[2].split()[:2] == ["CNN", "30,762"]


@pytest.mark.parametrize("depth", [-1, 1.5, "1"])
def test_trainer_refuses_a_depth_that_is_no_level(depth):
    with pytest.raises(ConfigError, match=re.escape(f"at least 0, or None; got {depth!r}")):
        TrainerModule(CNN(), table_depth=depth)
