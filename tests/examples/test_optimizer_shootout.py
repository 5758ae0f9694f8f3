"""The shoot-out chooses rates, trains over seeds, prints its table and draws its curves."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.mark.slow
def test_optimizer_shootout_compares_what_it_is_asked_to(example, tmp_path: Path, capsys) -> None:
    module = example("optimizer_shootout")
    options = module.Options(
        only=("sgd", "schedule_free_adamw"),
        rates=(1e-4, 0.1),
        seeds=(0, 1),
        num_epochs=2,
        target=2.2,
        root=str(tmp_path),
    )
    found = module.main(options)
    rates = {name: result.learning_rate for name, result in found.results.items()}
    assert rates == {"sgd": 0.1, "schedule_free_adamw": 0.1}
    for row in found.rows().values():
        assert row["test/accuracy"].count == 2
        assert row["steps"].count == 2
        assert row["test/accuracy"].mean > 0.3
    first, second = found.results["sgd"].runs
    assert (first.losses != second.losses).all()
    folder = tmp_path / "optimizer_shootout" / "0001"
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "table.txt").read_text() == found.table() + "\n"
    assert found.table() in capsys.readouterr().out


def test_optimizer_shootout_has_the_ten_optimizers_and_gives_velo_its_weights(example) -> None:
    module = example("optimizer_shootout")
    assert len(module.OPTIMIZERS) == 10
    assert module.maker("lbfgs", module.Options())(1.0).learning_rate == 1.0
    config = module.maker("velo", module.Options(velo="weights"))(None)
    assert (config.name, config.options) == ("velo", {"weights": "weights"})
