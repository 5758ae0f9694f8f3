"""Optimizers run over all eleven landscapes; the table and the picture say where they end."""

from __future__ import annotations

import re
from pathlib import Path

import optax
import pytest

from distaff.tune.landscapes import LANDSCAPES


@pytest.mark.slow
def test_landscapes_tells_how_near_each_optimizer_comes(example, tmp_path, capsys) -> None:
    module = example("landscapes")
    module.OPTIMIZERS = {"sgd": optax.sgd, "adam": optax.adam}
    paths = module.main(module.Options(num_steps=60, root=str(tmp_path)))
    assert list(paths) == [landscape.name for landscape in LANDSCAPES]
    for landscape in LANDSCAPES:
        ways = paths[landscape.name]
        assert {name: way.shape for name, way in ways.items()} == {"sgd": (61, 2), "adam": (61, 2)}
        assert (ways["sgd"][0] == ways["adam"][0]).all()
        if landscape.name in ("Booth", "Matyas"):  # bowls, where the way down leads to the minimum
            assert landscape.distance(ways["sgd"][-1]) < 0.3
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["sgd", "adam"]
    for line, landscape in zip(lines[1:12], LANDSCAPES, strict=True):
        assert re.fullmatch(rf"{landscape.name} +([\d.e-]+ +\d+% *){{2}}", line), line
    assert Path(lines[12], "paths.png").read_bytes().startswith(b"\x89PNG")
