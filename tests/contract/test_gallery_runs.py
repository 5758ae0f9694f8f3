"""The gallery in whole runs: trained, resumed, loaded in a new process, and evaluated there."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distaff import OptimizerConfig, TrainerModule, data
from gallery import KINDS, WIDTH, Kind, without_keys

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

LOADED = """
import sys
from pathlib import Path
import numpy as np
from test_gallery_runs import KINDS, Gallery, loader
root = Path(sys.argv[1])
for number, (name, kind) in enumerate(KINDS.items()):
    path = root / f"kind{number}/0001"
    if not path.exists():
        continue
    Gallery.kind = kind
    try:
        found = Gallery.load_from_checkpoint(path, model=kind.source()).predict(loader())
        np.save(root / f"{number}.npy", found)
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {error}")
"""


class Gallery(TrainerModule):
    kind: Kind

    def loss_fn(self, params, batch, ctx):
        outputs = self.outputs(params, batch, ctx)
        return jnp.square(outputs - batch["y"])[:, 0]

    def predict_fn(self, params, batch, ctx):
        return self.outputs(params, batch, ctx)

    def outputs(self, params, batch, ctx):
        given = self.kind.call(batch["x"], ctx.train)
        return self.kind.outputs(ctx.apply(params, batch["x"], **given))


def loader() -> Any:
    x = np.random.default_rng(0).normal(size=(16, WIDTH)).astype(np.float32)
    arrays = {"x": x, "y": x.sum(1, keepdims=True)}
    return data.ArrayLoader(arrays, batch_size=8, shuffle=False)


def train(kind: Kind, root: Path, name: str, **options: Any) -> Any:
    Gallery.kind = kind
    trainer = Gallery(
        kind.source(),
        root=str(root),
        name=name,
        enable_progress_bar=False,
        optimizer=OptimizerConfig("sgd", learning_rate=0.05),
        **options,
    )
    trainer.train_model(loader(), loader(), num_epochs=2)
    return trainer


def interrupted(path: Path) -> None:
    """Makes a run look as if it had not come to its end."""
    status = json.loads((path / "status.json").read_text())
    (path / "status.json").write_text(json.dumps({**status, "status": "interrupted"}))


@functools.cache
def runs(family: str, root: Path) -> dict[str, Any]:
    """Returns (number, trainer, resumed trainer) for each kind of a family, or its error."""
    found: dict[str, Any] = {}
    for number, (name, kind) in enumerate(KINDS.items()):
        if name.split()[0] != family:
            continue
        try:
            first = train(kind, root, f"kind{number}")
            interrupted(first.last_run.path)
            again = train(kind, root, f"kind{number}", resume=2)
            found[name] = number, first, again
        except Exception as error:  # Told by the test of this kind.
            found[name] = error
    here = Path(__file__).parent
    paths = ":".join(map(str, (here, here.parent, *sys.path)))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOADED, str(root)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    return {"root": root, "said": done.stdout + done.stderr, **found}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gallery")


@pytest.mark.parametrize("name", KINDS)
def test_run_of_a_model_is_resumed_and_loaded(name: str, root: Path) -> None:
    family = name.split()[0]
    found = runs(family, root / family)
    if isinstance(found[name], Exception):
        raise found[name]
    number, first, again = found[name]
    assert first.step == again.step  # of the best model
    for one, other in (
        (first.state.params, again.state.params),
        (first.state.batch_stats, again.state.batch_stats),
        (first.state.collections, again.state.collections),
    ):
        jax.tree.map(np.testing.assert_array_equal, *map(without_keys, (one, other)))
    Gallery.kind = KINDS[name]
    file = found["root"] / f"{number}.npy"
    assert file.exists(), found["said"]
    np.testing.assert_allclose(np.load(file), first.predict(loader()), rtol=1e-5, atol=1e-6)
