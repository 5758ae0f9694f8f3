"""The model card beside an exported model: what the run recorded, escaped, and nothing else."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import numpy as np
import pytest

from distaff import cli, data, export_model, tasks, zoo
from distaff.core.config.encoding import to_json
from distaff.core.config.strict_json import load
from distaff.errors import ConfigError, RunDirectoryError

RNG = np.random.default_rng(0)
BATCH = {
    "image": RNG.normal(size=(12, 8, 8, 1)).astype(np.float32),
    "label": np.arange(12, dtype=np.int32) % 10,
}
HOSTILE = "</code><script>alert(1)</script> | [x](javascript:y) ``` <b>\n# head"


class OfColumns(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        return nn.Dense(2)(x["numbers"]) + nn.Embed(2, 2)(x["city"])


class Case(NamedTuple):
    trainer: tasks.Classifier
    path: Path
    metrics: dict[str, float]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp("card")
    options = {"name": "net", "batch_size": 4, "enable_progress_bar": False, "ema": 0.5}
    trainer = tasks.Classifier(zoo.MLP((8, 10)), root=root, **options)
    result = trainer.train_model(BATCH, BATCH, BATCH, num_epochs=1)
    return Case(trainer, result.path, result.metrics)


def card(folder: Path) -> str:
    return (folder / "README.md").read_text("utf-8")


def rows(text: str, heading: str) -> dict[str, list[str]]:
    """Returns the rows of the first table below a heading by their first cell."""
    table = re.search(rf"^## {heading}\n(?:.*\n)*?((?:\|.*\n)+)", text, re.M).group(1)
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
    return {name: rest for name, *rest in cells[2:]}


def test_card_has_what_the_run_recorded(case, tmp_path):
    folder = export_model(case.trainer, tmp_path / "model", BATCH, license="apache-2.0")
    text = card(folder)
    assert text.startswith("---\nlibrary_name: jax\n")
    assert 'license: "apache-2.0"\n---' in text
    assert "0001" in text
    assert f"{64 * 8 + 8 + 8 * 10 + 10:,} parameters" in text
    recorded = load(case.path / "config.json")
    train = rows(text, "Data")["train"]
    assert train[:3] == ["ArrayLoader", "12", "3"]
    assert train[-1].endswith(recorded["identity"]["data"]["train"]["facts"][0]["values"])
    shown = json.loads(re.search(r"```json\n(.*?)\n```", text, re.S).group(1))
    assert shown["options"]["ema"]["decay"] == 0.5
    assert "root" not in shown["options"]
    assert shown["model"] == recorded["model"]
    assert "Dense_0/kernel" in text
    assert str(case.path.parents[1]) not in text


@pytest.mark.parametrize(("weights", "suffix"), [("raw", ""), ("ema", "_ema")])
def test_metrics_are_of_the_exported_weights(case, tmp_path, weights, suffix):
    folder = export_model(case.trainer, tmp_path / "model", BATCH, weights=weights)
    found = {
        name.replace("\\", ""): float(x) for name, (x,) in rows(card(folder), "Metrics").items()
    }
    names = [f"{split}{suffix}/{m}" for split in ("val", "test") for m in ("loss", "accuracy")]
    assert found == pytest.approx({name: case.metrics[name] for name in names}, rel=1e-5)


def test_other_steps_have_no_metrics(case, tmp_path):
    other = tasks.Classifier(zoo.MLP((8, 10)), root=None, enable_progress_bar=False)
    other.init_model(BATCH)
    folder = export_model(other, tmp_path / "model", BATCH, run=case.path)
    assert "The run recorded no metrics of this model." in card(folder)


def test_card_without_a_run_claims_nothing(case, tmp_path):
    loaded = tasks.Classifier.load_from_checkpoint(case.path)
    text = card(export_model(loaded, tmp_path / "model", BATCH))
    assert text.count("Not recorded") == 3
    assert "license:" not in text
    assert text.endswith("## License\n\nNot stated.\n")
    with pytest.raises(RunDirectoryError, match="no run directory"):
        export_model(loaded, tmp_path / "other", BATCH, run=tmp_path / "gone")


def test_command_describes_the_run(case, tmp_path):
    words = ("export", str(case.path), str(tmp_path / "model"), "--license", "mit")
    assert cli.main(words) == 0
    text = card(tmp_path / "model")
    assert "val/loss" in text
    assert 'license: "mit"' in text


def test_texts_of_the_run_are_escaped(case, tmp_path):
    copy = tmp_path / "net" / "0001"
    shutil.copytree(case.path, copy)
    record = load(copy / "config.json")
    record["identity"]["data"] = {HOSTILE: {"kind": HOSTILE, "batch": {HOSTILE: HOSTILE}}}
    record["model"] = {"$class": HOSTILE}
    record["options"]["name"] = HOSTILE
    (copy / "config.json").write_text(json.dumps(record))
    (copy / "model.txt").write_text(HOSTILE)
    (copy / "status.json").write_text(json.dumps({"best": 3, "metrics": [HOSTILE]}))
    text = card(export_model(case.trainer, tmp_path / "model", BATCH, run=copy))
    outside = re.sub(r"^(`{3,})[^`\n]*\n.*?^\1$", "", text, flags=re.M | re.S)
    for each in ("<script>", "<b>", "\n# head"):
        assert each not in outside
    assert len(rows(outside, "Data")) == 1
    assert not re.search(r"(?<!\\)\]\(", outside)


@pytest.mark.parametrize("name", ["", "apache 2.0", 'mit"\nx: y', "<b>"])
def test_license_is_an_identifier(case, tmp_path, name):
    with pytest.raises(ConfigError, match="license must be an identifier"):
        export_model(case.trainer, tmp_path / "model", BATCH, license=name)
    assert list(tmp_path.iterdir()) == []


def test_card_and_description_name_the_columns_of_a_data_frame(tmp_path):
    coding = data.FrameCoding(("age", HOSTILE), {"city": ("Bonn", "Rome")}, "left", ("no", "yes"))
    batch = {
        "x": {"numbers": np.zeros((4, 2), np.float32), "city": np.zeros(4, np.int32)},
        "y": np.zeros(4, np.int32),
    }
    trainer = tasks.Classifier(OfColumns(), coding=coding, root=None)
    trainer.init_model(batch)
    folder = export_model(trainer, tmp_path / "model", batch)
    assert json.loads((folder / "model.json").read_text())["coding"] == to_json(coding)
    assert "outputs = predict(x_city=..., x_numbers=...)\n" in (folder / "load.py").read_text()
    text = card(folder)
    assert "| numbers | age |" in text
    assert "| category | city | Bonn, Rome |" in text
    assert "| label | left | no, yes |" in text
    assert "<script>" not in text
