"""Training uses one device of one process, and says so where there are more."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from distaff import data, tasks, zoo
from distaff.errors import ConfigError
from distaff.execution.placement import idle_devices
from distaff.execution.processes import check_one_process

BATCH = {"image": np.ones((8, 3), np.float32), "label": np.zeros(8, np.int32)}


def on(number: int) -> dict[str, jax.Array]:
    """Returns a batch that lies on so many devices."""
    mesh = jax.sharding.Mesh(jax.devices()[:number], "data")
    return jax.device_put(BATCH, jax.NamedSharding(mesh, jax.P("data")))


def test_idle_devices_are_counted_where_the_batch_is():
    line = idle_devices(BATCH)
    assert line.startswith("One of 8 local cpu devices computes. To hide the others, leave ")
    assert idle_devices(on(1)) == line
    assert idle_devices(on(4)).startswith("4 of 8 local cpu devices compute.")
    assert idle_devices(on(8)) == ""


def test_one_device_has_nothing_to_say(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    assert idle_devices(BATCH) == ""


def test_run_says_once_that_devices_are_idle(capsys):
    loader = data.ArrayLoader(BATCH, 4)
    result = tasks.Classifier(zoo.MLP((2,))).train_model(loader, num_epochs=2)
    assert capsys.readouterr().out.count("One of 8 local cpu devices computes") == 1
    assert (result.path / "log.txt").read_text().count("One of 8 local cpu devices computes") == 1


def test_several_processes_are_an_error_with_their_number(monkeypatch):
    check_one_process()
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    with pytest.raises(ConfigError, match=r"jax\.process_count\(\) is 3 .*Start one process"):
        check_one_process()
