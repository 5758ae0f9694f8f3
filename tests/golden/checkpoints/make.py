"""Makes a fixture of today's checkpoint format: `python make.py format_1`.

A fixture is never made anew: it stands for the runs that users have on their disks.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import numpy as np

from distaff import data, tasks, zoo

INPUTS = np.linspace(-1, 1, 24, dtype=np.float32).reshape(8, 3)


def main(name: str) -> None:
    """Trains a tiny classifier for one epoch, and keeps what loading it again needs."""
    arrays = {"x": INPUTS, "label": np.arange(8) % 2}
    loader = data.ArrayLoader(arrays, 4)
    trainer = tasks.Classifier(zoo.MLP((4, 2)), root=".", enable_progress_bar=False)
    run = Path(trainer.train_model(loader, loader, num_epochs=1).path)
    fixture = Path(__file__).parent / name
    fixture.mkdir()
    (run / "config.json").rename(fixture / "config.json")
    (run / "checkpoints").rename(fixture / "checkpoints")
    outputs = np.asarray(jax.device_get(trainer.predict([INPUTS])))
    (fixture / "outputs.json").write_text(json.dumps(outputs.tolist()) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
